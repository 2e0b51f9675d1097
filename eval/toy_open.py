"""Scores the answers to open-ended questions about the held-out toy clips.

`eval.toy` prints these rows below its own table. Each held-out clip has one open-ended question,
in a phrasing that training never saw, and four things are counted:

- "sentences": the answer is a sentence, not a list of labels or another closed-ended answer.
- "own label": it names a sound of one category, which is the category in the model's own answer to
  the classification question about the same clip. An open-ended answer that is fluent but about
  another sound fails here.
- "right": that category is the right one.
- "distinct": the number of different answers, divided by the number of answers. A model that has
  learned a few sentences by heart gives few. "top five" is the fraction of answers that are one of
  the five most frequent. Both describe this set of answers, so they have no interval.
"""

import re
from collections import Counter
from dataclasses import dataclass

from eval.scorer_interface import EvaluationError, failure

# A sentence has at least this many words, so that "Yes." and "A dog." are none.
MIN_WORDS = 3
# Between the fields of closed-ended answers.
SEPARATORS = (";", "->")
ARTICLE = re.compile(r"\Aan? ")
TOP = 5  # The number of most frequent answers in "top five".


class Mentions:
    """Finds the sounds that a text names.

    Args:
        category_of_phrase: phrase of a label ("an alarm clock") -> category. Its article does not
            matter: "the alarm clock" names it too.
    """

    def __init__(self, category_of_phrase: dict[str, str]):
        self.category_of_phrase = {}
        for phrase, category in category_of_phrase.items():
            name = ARTICLE.sub("", phrase.lower())
            self.category_of_phrase[name] = category
        # Longer phrases first: "a steam train" does not name steam.
        phrases = sorted(self.category_of_phrase, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, phrases))
        self.pattern = re.compile(rf"\b({alternatives})s?\b")

    def categories(self, text: str) -> set[str]:
        """Return the categories of the sounds that a text names."""
        phrases = self.pattern.findall(text.lower())
        return {self.category_of_phrase[phrase] for phrase in phrases}


def is_sentence(answer: str, closed_prefixes: list[str]) -> bool:
    """Return whether an answer is a sentence, and neither a list nor a closed-ended answer.

    Args:
        answer: the answer.
        closed_prefixes: how the answers to closed-ended questions begin, such as "Labels:".
    """
    text = answer.strip()
    is_closed = text.lower().startswith(tuple(prefix.lower() for prefix in closed_prefixes))
    is_closed = is_closed or any(separator in text for separator in SEPARATORS)
    return not is_closed and len(text.split()) >= MIN_WORDS and text.endswith((".", "!", "?"))


def closed_prefixes(answers: dict[str, str]) -> list[str]:
    """Return how closed-ended answers begin, up to the first colon of their templates."""
    return sorted({template.split(":")[0] + ":" for template in answers.values()})


@dataclass
class OpenCounts:
    """The counts of a stage, over all its answers to open-ended questions.

    Attributes:
        sentences: whether each answer is a sentence.
        own_label: whether it names the category of the model's own label, and no other.
        right: whether it names the right category, and no other.
        texts: the answers, with single spaces and in lower case.
    """

    sentences: list[bool]
    own_label: list[bool]
    right: list[bool]
    texts: list[str]

    def extend(self, other: "OpenCounts") -> None:
        """Append the answers of another fold."""
        self.sentences += other.sentences
        self.own_label += other.own_label
        self.right += other.right
        self.texts += other.texts

    @property
    def num_distinct(self) -> int:
        return len(set(self.texts))

    @property
    def num_in_top(self) -> int:
        """The number of answers that are one of the most frequent ones."""
        return sum(count for _, count in Counter(self.texts).most_common(TOP))


def count(
    answers: list[dict],
    labels: list[dict],
    own_categories: list[str | None],
    right_categories: list[str],
    mentions: Mentions,
    prefixes: list[str],
) -> OpenCounts:
    """Score the open-ended answers of a stage on one fold.

    Args:
        answers: predictions for the open-ended questions.
        labels: predictions for the classification questions, about the same clips in this order.
        own_categories: the category that each of `labels` names, None if it cannot be read.
        right_categories: the category of each clip.
        mentions: finds the sounds that an answer names.
        prefixes: of `closed_prefixes`.

    Raises:
        EvaluationError: the predictions are about other clips.
    """
    if clips_of(answers) != clips_of(labels):
        raise EvaluationError(
            "open.json does not have the clips of right.json, in their order. Generate both again."
        )
    counts = OpenCounts([], [], [], [])
    for answer, own, right in zip(answers, own_categories, right_categories, strict=True):
        text = "" if failure(answer, "strict") else answer["pred"]
        named = mentions.categories(text)
        counts.sentences.append(is_sentence(text, prefixes))
        counts.own_label.append(named == {own})
        counts.right.append(named == {right})
        counts.texts.append(" ".join(text.lower().split()))
    return counts


def clips_of(predictions: list[dict]) -> list[str | None]:
    """Return the `audio_id` of each prediction."""
    return [prediction["audio_id"] for prediction in predictions]
