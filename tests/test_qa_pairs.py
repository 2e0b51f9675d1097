"""Tests parsing of questions and answers from replies, and the filters."""

import json
import random
import time

import pytest

from qa_generation.filters import make_filter
from qa_generation.qa_json import Pair, ParsedReply, Reject, parse_pairs

PAIR = ("What is it?", 'A "dog".')

READ = [  # text of one object; None: must be rejected
    ('{"q": "What is it?", "a": "A \\"dog\\"."}', PAIR),
    ('3. {"Question": "What is it?", "Answer": "A \\"dog\\".", "n": 1},', PAIR),
    ('{"q": "What\nis it?", "a": "A \\"dog\\"."}', PAIR),
    ('{"a": "A \\"dog\\".", "q": "What is it?"}', PAIR),
    ('{"id": 3, "q": "What is it?", "a": "A \\"dog\\"."}', PAIR),
    ('{"q": "What is it?", "a": "A \\"dog\\".",}', PAIR),
    ('{"q": "What is it?" "a": "A \\"dog\\"."}', PAIR),
    ('{"q": "What is it?", "a": "A "dog"."}', PAIR),
    ('{“q”: “What is it?”, “a”: “A \\"dog\\".”}', PAIR),
    ("{'q': 'What is it?', 'a': 'A \"dog\".'}", PAIR),
    ('{"q": "What is it?", "a": "A \\"dog\\"."\n', PAIR),
    ('{"q": "What is it?", "a": "A \\"dog', None),
    ('{"q": "What is it?", "a": "A dog", "a": "A cat"}', None),
    ('{"q": "What is it?", "a": ["A dog"]}', None),
    ('{"q": "What is it?"}', None),
    ('{"q": "What is it?", "a": "A dog \\ud83d"}', None),
    ('{"q": ' + "[" * 100_000, None),
    ('{"q": "Is "a", "a": "b", "a": "c" right?", "a": "Yes."}', None),
    ('{"q": What is it?, "a": A dog}', None),
    ("Q: What is it? A: A dog.", None),
    ("", None),
]


@pytest.mark.parametrize("text, expected", READ)
def test_malformed_json(text, expected):
    parsed = parse_pairs(text)
    if expected is None:
        assert not parsed.pairs and len(parsed.rejects) == 1
    else:
        assert parsed.pairs == [Pair(*expected)] and not parsed.rejects
    # The pairs before and after it are parsed.
    whole = '{"q": "one", "a": "two"}'
    parsed = parse_pairs(f"{whole}\n{text}\n{whole}")
    assert parsed.pairs.count(Pair("one", "two")) == 2


def test_random_damage_never_makes_up_a_pair():
    """The pairs of a reply with lost characters consist of the texts sent, in their order."""
    rng = random.Random(1)
    sent = [
        {"q": f"Why {i} is it?", "a": f"Since {i} it \"barks\", 'runs' {{and}} jumps"}
        for i in range(5)
    ]
    for _ in range(500):
        text = "\n".join(json.dumps(pair) for pair in sent)
        for _ in range(rng.randrange(1, 4)):
            cut = rng.randrange(len(text))
            text = text[:cut] + text[cut + 1 :]
        parsed = parse_pairs(text)
        assert len(parsed.pairs) == 5 or parsed.rejects  # Nothing is lost silently.
        for pair in parsed.pairs:
            whole = iter(" ".join(part for item in sent for part in (item["q"], item["a"])))
            assert all(
                letter in whole for letter in f"{pair.question}{pair.answer}" if letter.isalnum()
            )


def test_an_endless_reply_is_parsed_in_time():
    endless = '{"q": ' * 10**6
    start = time.process_time()
    for text in ("{" * 100_000, endless[:30_000]):
        parsed = parse_pairs(text)
        assert not parsed.pairs and parsed.rejects
    assert time.process_time() - start < 20  # less than 1 on a usual machine
    assert parse_pairs(endless) == ParsedReply(rejects=[Reject("too long", endless)])


def test_filters():
    reason = make_filter("we shall meet again on some sunny day", 4)
    cases = [
        ("What barks here?", "A dog barks near the road.", None),
        ("what barks here", "Another answer that is long enough.", "duplicate"),
        ("Who barks here?", "A dog barks, near the road!", "duplicate"),
        ("What is loud?", "The horn is loud enough to be noticed far away.", None),
        ("Is it rare?", "One cannot miss it, and it is possible to sleep.", None),
        ("Who owns the dog?", "It cannot be determined who owns it.", "unanswerable"),
        ("Who is the driver?", "There is no information on who drives.", "unanswerable"),
        ("What is the mood?", "According to the description it is calm.", "metadata"),
        ("What is first?", "The dog, at [0.0s-1.0s] in the clip.", "metadata"),
        ("How high is it?", "It is medium (120-135 Hz) for a man.", "metadata"),
        ("Why 'meet again on some sunny day'?", "Since they part now for long.", "metadata"),
        ("What now?", "A dog.", "short"),
    ]
    for question, answer, expected in cases:
        assert reason(Pair(question, answer)) == expected, (question, answer)
    assert make_filter("", 4, ("short",))(Pair("Who owns it?", "It cannot be determined.")) is None
