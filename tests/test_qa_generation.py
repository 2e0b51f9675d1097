"""Tests the client against a server that fails, stored replies after kill -9, and parsing."""

import json
import os
import random
import re
import signal
import subprocess
from pathlib import Path

import pytest
from llm_server import FAULTS, FakeLlm, completion

import qa_generation.llm
from qa_generation.filters import make_filter
from qa_generation.generate import main
from qa_generation.llm import GenerationStopped, Llm, LlmSettings, ReplyStore, RequestFailed
from qa_generation.metadata_prompts import SOURCES, message, pitch_rank
from qa_generation.qa_json import Pair, parse_pairs
from tests.machine import start_python, wait_until

ROOT = Path(__file__).parent.parent
SPOKEN = {
    "gender": "male",
    "pitch_detail": 130.0,
    "pitch": "low",
    "energy": "high",
    "speed": "slow",
}
META = {
    "temporal": "Sound of Dog (Sharp): [0.0s-1.0s]",
    "text": "the rain has begun again",
    "emotion": "sad",
    "sentiment": -2,
    "age": 31.4,
    "genre": ["Folk", "Pop"],
    "labels": "Singing; Rain",
    **SPOKEN,
}
LONG = "because its pitch rises quickly and then falls again, as it does near a road"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setattr(qa_generation.llm, "LONGEST_WAIT", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def pairs_of(body: dict) -> str:
    """Return three pairs that depend on the request alone."""
    mark = hash_of(body)
    return "\n".join(
        json.dumps({"q": f"What is noted, {mark} {i}?", "a": f"{i} {mark} {LONG}"})
        for i in range(3)
    )


def hash_of(body: dict) -> int:
    return random.Random(json.dumps(body, sort_keys=True)).randrange(10**9)


def good(body: dict) -> dict:
    return completion(pairs_of(body))


def odd(body: dict) -> dict:
    """Return a reply that is paid for, and of which not everything can be used."""
    lines = pairs_of(body).split("\n")
    texts = {
        0: ("", "stop"),
        1: ("I would rather talk about the weather.", "stop"),
        2: ("\n".join(lines)[:-30], "length"),
        3: ('{"q": "no answer"}\n' + lines[0], "stop"),
        4: ("```json\n[" + ",\n".join(lines) + "]\n```", "stop"),
        5: ("\n".join(line.replace('", "a"', '" "a"') for line in lines), "stop"),
    }
    return completion(*texts.get(hash_of(body) % 10, ("\n".join(lines), "stop")))


def write_meta(folder: Path, count: int) -> Path:
    rows = [{"audio_id": f"clip{i}.wav", "caption": f"caption {i}"} | META for i in range(count)]
    path = folder / "meta.json"
    path.write_text(json.dumps(rows))
    return path


def arguments(
    folder: Path, url: str, *more: str, source: str = "audioset_strong", count: int = 40
) -> list[str]:
    given = [
        "--source",
        source,
        "--input",
        str(write_meta(folder, count)),
        "--output",
        str(folder / "rows.json"),
    ]
    given += ["--model", "m", "--base_url", url, "--timeout", "60", "--concurrency", "8"]
    return given + list(more)


def results(folder: Path) -> list[str]:
    """Return examples, rejects and provenance; the last without folder and port."""
    texts = [
        (folder / f"rows.json{end}").read_text()
        for end in ("", ".rejects.jsonl", ".provenance.json")
    ]
    return texts[:2] + re.sub(r"/\S*/meta.json|127.0.0.1:\d+", "", texts[2]).splitlines()


@pytest.mark.parametrize("seed", range(2))
def test_faults_of_every_kind(tmp_path, seed, capsys):
    """The bytes are those of a server without faults.

    Every request is paid once, and a second run sends nothing.
    """
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    calm.mkdir(), rough.mkdir()
    with FakeLlm(odd) as server:
        assert main(arguments(calm, server.url)) == 0
    with FakeLlm(odd, fault_share=0.5, seed=seed) as server:
        server.script = list(FAULTS) if seed == 0 else []
        assert main(arguments(rough, server.url)) == 0
        assert seed or set(server.faults) == set(FAULTS)
        assert server.most_at_once <= 8
        # 2: the second `sample` of a useless reply
        assert max(server.paid.values()) <= 2 and len(server.paid) == 40
        paid = server.paid.total()
        assert main(arguments(rough, server.url)) == 0
        assert server.paid.total() == paid
    assert results(calm) == results(rough)
    counts = json.loads((rough / "rows.json.provenance.json").read_text())["counts"]
    assert (
        counts["clips"] == 40
        and counts["rows"] == len(json.loads((rough / "rows.json").read_text())) > 60
    )
    rejects = [
        json.loads(line) for line in (rough / "rows.json.rejects.jsonl").read_text().splitlines()
    ]
    assert {"empty reply", "no question and answer", "cut off"} <= {
        reject["reason"] for reject in rejects
    }
    assert sum(n for name, n in counts.items() if name.startswith("dropped")) == len(rejects)


def test_a_time_out_is_tried_again(tmp_path):
    """The bytes are those of a server that always answers in time."""
    calm, late = tmp_path / "calm", tmp_path / "late"
    calm.mkdir(), late.mkdir()
    with FakeLlm(odd) as server:
        assert main(arguments(calm, server.url, count=3)) == 0
    with FakeLlm(odd) as server:
        server.script = ["time-out"] * 2
        assert main(arguments(late, server.url, "--timeout", "0.5", count=3)) == 0
        assert server.faults == {"time-out": 2}
    assert results(calm) == results(late)


def test_kill_9_and_resume(tmp_path):
    """Replies that are on the disk are not requested again.

    The examples are those of a run that was not killed.
    """
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    rng = random.Random(5)
    with FakeLlm(good, delay=0.05) as server:
        given, store = arguments(one, server.url, count=90), one / "rows.json.replies.jsonl"
        for _ in range(2):
            goal = server.paid.total() + rng.randrange(10, 25)
            command = ["-m", "qa_generation.generate", *given]
            process = start_python(command, tmp_path, stderr=subprocess.DEVNULL)
            wait_until(lambda goal=goal: server.paid.total() >= goal, process)
            process.kill()
            process.wait()
            wait_until(lambda: not server.at_once)
            stored = {
                json.loads(line)["key"]
                for line in store.read_bytes().split(b"\n")[:-1]
                if b'"reply"' in line
            }
            # Only requests in flight may be lost.
            assert server.paid.total() - len(stored) <= 2 * 8
        before = server.paid.total()
        assert main(given) == 0
        assert server.paid.total() - before == 90 - len(stored)
        assert len(server.paid) == 90 and server.paid.total() <= 90 + 2 * 8
    with FakeLlm(good) as server:
        assert main(arguments(other, server.url, count=90)) == 0
    assert (one / "rows.json").read_bytes() == (other / "rows.json").read_bytes()


def test_budget_stops_and_resumes(tmp_path, capsys):
    with FakeLlm(good) as server:
        assert main(arguments(tmp_path, server.url, "--token_budget", "5000")) == 1
        assert 0 < server.paid.total() * 150 <= 5000
        assert "token budget" in capsys.readouterr().err
        some = json.loads((tmp_path / "rows.json").read_text())
        assert len(some) == 3 * server.paid.total()
        assert main(arguments(tmp_path, server.url, "--token_budget", "50000")) == 0
        assert (
            server.paid.total() == 40
            and len(json.loads((tmp_path / "rows.json").read_text())) == 120
        )


def test_ctrl_c_completes_requests_in_flight(tmp_path, capsys):
    def answer(body: dict) -> dict:
        if server.paid.total() == 12:  # By now the run handles the signal.
            os.kill(os.getpid(), signal.SIGINT)
        return good(body)

    with FakeLlm(answer, delay=0.1) as server:
        assert main(arguments(tmp_path, server.url)) == 1
        assert "stopped: SIGINT" in capsys.readouterr().err
        stored = (tmp_path / "rows.json.replies.jsonl").read_bytes().count(b'"reply"')
        assert 0 < server.paid.total() == stored < 40


@pytest.mark.parametrize("fault", ["401", "quota"])
def test_refused_key_stops_and_is_written_nowhere(tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    with FakeLlm(good) as server:
        server.script = ["400", *[fault] * 40]
        assert (
            main(arguments(tmp_path, server.url, "--key_from", "MY_KEY", "--concurrency", "1")) == 1
        )
        # 400 concerns only its clip.
        assert len(server.headers) == 2 and "Bearer sk-secret-123" in server.headers[0]
    printed = capsys.readouterr()
    assert "[key]" in printed.err and "sk-secret" not in printed.err + printed.out
    assert not [path for path in tmp_path.iterdir() if b"sk-secret" in path.read_bytes()]


def test_no_key_for_openai(tmp_path):
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        main(arguments(tmp_path, "https://api.openai.com/v1"))
    with (
        pytest.raises(StopIteration),
        ReplyStore(tmp_path / "s") as store,
    ):  # Other endpoints need none.
        Llm(LlmSettings("m", base_url="http://127.0.0.1:9/v1"), store)
        raise StopIteration


def test_retry_after_delays_all_requests(tmp_path):
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        server.script = ["429 0.3"]
        llm = Llm(LlmSettings("m", base_url=server.url, concurrency=1), store)
        assert len(llm.complete_all([[{"role": "user", "content": str(i)}] for i in range(3)])) == 3
        assert server.times[1] - server.times[0] >= 0.3
        server.script = ["429 9999"]  # Longer than max_wait: only this request fails.
        replies = llm.complete_all([[{"role": "user", "content": f"again {i}"}] for i in range(3)])
        assert [isinstance(reply, RequestFailed) for reply in replies] == [True, False, False]


def test_an_endpoint_that_is_gone_stops_the_run(tmp_path):
    settings = LlmSettings("m", base_url="http://127.0.0.1:9/v1", tries=2)
    with (
        ReplyStore(tmp_path / "s") as store,
        pytest.raises(GenerationStopped, match="one after the other"),
    ):
        Llm(settings, store).complete_all(
            [[{"role": "user", "content": str(i)}] for i in range(500)]
        )


def test_equal_requests_are_sent_once(tmp_path):
    """The replies are in order, the settings recorded, and equal requests paid once.

    A judge sends such requests, also at the same time.
    """
    prompts = [[{"role": "user", "content": f"question {i % 4}"}] for i in range(20)]
    with FakeLlm(good, delay=0.05) as server, ReplyStore(tmp_path / "s") as store:
        url = server.url.replace("//", "//user:pass@")
        settings = LlmSettings(
            "judge", temperature=0.0, base_url=url, extra={"max_tokens": None, "top_p": 0.5}
        )
        llm = Llm(settings, store)
        indices = []
        replies = llm.complete_all(prompts, lambda index, reply: indices.append(index))
        assert sorted(indices) == list(range(20)) and server.paid.total() == 4
        assert [reply.text for reply in replies[:4]] * 5 == [reply.text for reply in replies]
        assert replies[0].model == "m-0301" and store.tokens == 4 * 150
        assert llm.request(prompts[0]) == {
            "model": "judge",
            "messages": prompts[0],
            "temperature": 0.0,
            "top_p": 0.5,
        }
    assert "pass" not in str(settings.record()) and settings.record()["temperature"] == 0.0


def test_store_is_locked_and_removes_half_a_line(tmp_path):
    reply = {"text": "é", "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    path = tmp_path / "s"
    with ReplyStore(path) as store:
        store.put("ab", reply)
        with pytest.raises(ValueError, match="Another run"):
            ReplyStore(path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-5])
    with ReplyStore(path) as store:
        assert store.get("ab") == reply and store.get("cd") is None and store.tokens == 3
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"{}\n")
    with pytest.raises(ValueError, match=f"byte {len(whole)}"):
        ReplyStore(path)


def test_dry_run_sends_nothing(tmp_path, capsys):
    with FakeLlm(good) as server:
        dry = arguments(tmp_path, server.url, "--dry_run", "--price", "1", "2", source="joint_v2")
        assert main(dry) == 0
        assert "40 clips: 80 requests" in capsys.readouterr().out
        assert not server.headers and [path.name for path in tmp_path.iterdir()] == ["meta.json"]
        assert main([flag for flag in dry if flag != "--dry_run"]) == 0
        capsys.readouterr()
        assert main(dry) == 0
        assert "0 requests to send, 80 replies already stored" in capsys.readouterr().out


def test_sources(tmp_path):
    row = {"audio_id": "a"} | META
    texts = {name: message(source, row) for name, source in SOURCES.items()}
    assert texts["audioset_strong"] == "Sound Events: Sound of Dog (Sharp): [0.0s-1.0s]"
    events = [
        {"label": "Dog", "description": "sharp", "onset": 0, "offset": 1.2},
        {"label": "Car", "onset": 0, "offset": 9},
        {"label": "Dog", "description": "sharp", "onset": 2, "offset": 3},
    ]
    assert message(SOURCES["audioset_strong"], {"events": events, "caption": "A dog."}) == (
        "Sound Events: Dog (sharp): [0.0s-1.2s, 2.0s-3.0s]; Car: [0.0s-9.0s]; Description: A dog."
    )
    assert texts["mosei"] == (
        'Spoken words: "the rain has begun again"; Gender: male; '
        "Fundamental frequency: 130 Hz, low among all speakers, "
        "medium (120-135 Hz) among male speakers; Volume: high; Speed: slow; Emotion: sad; "
        "Sentiment: -2 (negative); Estimated age: 31 years"
    )
    of_closed_qa = {name: value for name, value in row.items() if name != "pitch_detail"} | {
        "pitch": 130.0
    }
    assert message(SOURCES["mosei"], of_closed_qa) == texts["mosei"].replace(
        "low among all speakers, ", ""
    )
    assert texts["fma"] == "Genre: Folk, Pop" and 'singing of "the rain' in texts["joint_v1"]
    assert [source.count for source in SOURCES.values()] == [10, 20, 20, 20, 10, 5, 10, 10]
    with pytest.raises(ValueError, match="no genre"):
        message(SOURCES["fma"], {"audio_id": "a"})
    for wrong in (
        {"gender": "boy"},
        {"pitch_detail": float("nan")},
        {"pitch_detail": "high"},
        {"sentiment": 4},
    ):
        with pytest.raises(ValueError, match="gender 'boy'|pitch|sentiment 4"):
            message(SOURCES["libritts"], row | wrong)


def test_pitch_ranks_by_gender():
    """The last bound is that of the gender; the original has ">240 Hz" for both."""
    assert [pitch_rank(hertz, "male") for hertz in (94.9, 95, 120, 135, 180)] == [
        "very low (<95 Hz)",
        "relatively low (95-120 Hz)",
        "medium (120-135 Hz)",
        "relatively high (135-180 Hz)",
        "very high (>180 Hz)",
    ]
    assert pitch_rank(300, "female") == "very high (>270 Hz)"


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_from_metadata_to_examples(tmp_path, source, capsys):
    bodies = []

    def answer(body: dict) -> dict:
        bodies.append(body)
        asks_for_paragraph = "paragraph" in body["messages"][0]["content"]
        return completion(
            f"Somebody sings in the rain, {LONG}." if asks_for_paragraph else pairs_of(body)
        )

    with FakeLlm(answer) as server:
        assert main(arguments(tmp_path, server.url, source=source, count=2)) == 0
    assert not [body for body in bodies if "$" in body["messages"][0]["content"]]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [list(row) for row in rows] == [
        ["instruction", "input", "audio_id", "dataset", "task", "output"]
    ] * len(rows)
    assert {row["task"] for row in rows} - {"joint audio and speech summarization"} == {
        "open-ended question"
    }
    assert len(rows) == (8 if source == "joint_v2" else 6)
    if source == "joint_v2":
        assert rows[0]["output"].startswith("Somebody sings") and len(bodies) == 4
        # The order of the clips is not fixed, because two clips are in flight at once.
        later = [
            body["messages"] for body in bodies if "paragraph" not in body["messages"][0]["content"]
        ]
        assert len(later) == 2 and all(
            rows[0]["output"] in messages[1]["content"] for messages in later
        )
        bodies = [body for body in bodies if body["messages"] in later]
    assert str(SOURCES[source].count) in bodies[-1]["messages"][0]["content"]


def test_bad_metadata_is_named_and_counted(tmp_path, capsys):
    with FakeLlm(good) as server:
        given = arguments(
            tmp_path, server.url, "--output", str(tmp_path / "rows.jsonl"), source="fma", count=3
        )
        rows = json.loads((tmp_path / "meta.json").read_text())
        del rows[1]["genre"]
        (tmp_path / "meta.json").write_text("\n".join(json.dumps(row) for row in rows))
        assert main(given) == 1
        assert "row 1: no genre" in capsys.readouterr().err
        assert main([*given, "--max_bad", "1"]) == 0 and server.paid.total() == 2
        lines = (tmp_path / "rows.jsonl").read_text().splitlines()
        assert [json.loads(line)["audio_id"] for line in lines] == ["clip0.wav"] * 3 + [
            "clip2.wav"
        ] * 3
        (tmp_path / "meta.json").write_text('[{"audio_id": ]')
        with pytest.raises(ValueError, match="line 1, column 15"):
            main(given)


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
    pairs, rejects = parse_pairs(text)
    assert [(pair.question, pair.answer) for pair in pairs] == ([expected] if expected else [])
    assert len(rejects) == (0 if expected else 1)
    whole = '{"q": "one", "a": "two"}'
    pairs, _ = parse_pairs(f"{whole}\n{text}\n{whole}")
    # The pairs before and after it are parsed.
    assert sum((pair.question, pair.answer) == ("one", "two") for pair in pairs) == 2


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
        pairs, rejects = parse_pairs(text)
        assert len(pairs) == 5 or rejects  # Nothing is lost silently.
        for pair in pairs:
            whole = iter(" ".join(part for item in sent for part in (item["q"], item["a"])))
            assert all(
                letter in whole for letter in f"{pair.question}{pair.answer}" if letter.isalnum()
            )


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


def test_local_model(tmp_path):
    """A tiny random model replaces an endpoint.

    Its replies are batched and stored, and greedy replies do not depend on the batch.
    """
    from tiny import write_llm

    write_llm(tmp_path / "llm")
    prompts = [[{"role": "user", "content": "dog " * (i + 1)}] for i in range(3)]
    settings = {"is_local": True, "temperature": 0.0, "max_tokens": 6}
    with ReplyStore(tmp_path / "s") as store:
        llm = Llm(LlmSettings(str(tmp_path / "llm"), **settings), store)
        replies = llm.complete_all(prompts)
        assert len(store.offsets) == 3 and all(
            0 < reply.completion_tokens <= 6 for reply in replies
        )
        assert llm.complete_all(prompts) == replies and llm.counts["answered"] == 3
    with ReplyStore(tmp_path / "t") as store:
        llm = Llm(LlmSettings(str(tmp_path / "llm"), concurrency=1, **settings), store)
        assert [reply.text for reply in llm.complete_all(prompts)] == [
            reply.text for reply in replies
        ]


def test_another_file_is_no_store_of_replies(tmp_path):
    """A file with one line without an end is not half a reply, and stays as it is."""
    foreign, half = tmp_path / "rows.json", tmp_path / "half.jsonl"
    foreign.write_text('[{"audio_id": "a.wav"}]')
    with pytest.raises(ValueError, match="rows.json, byte 0"):
        ReplyStore(foreign)
    assert foreign.read_text() == '[{"audio_id": "a.wav"}]'
    half.write_text('{"key": "0a')
    with ReplyStore(half) as store:
        assert not store.offsets
    assert half.read_bytes() == b""
