"""Defines the context that a scoring function gets and the outcome that it returns.

In the strict protocol a missing answer counts as the worst answer that could be there: a metric
over all items is the lowest value (for errors the highest) that any answers in the gaps give. So
leaving out an answer never improves a metric, and with no answer at all each metric has its worst
value. `failure` decides what is missing; each scoring function computes that worst value of its
metrics, because the worst answer of one metric is not that of another:

- a fraction of right answers (accuracy, following rate): wrong;
- F1: a wrong class, for the macro F1 the one that lowers it most (`classification.choice_metrics`);
- AP and AUC: ranks above all others in the classes that the reference does not name, and is never
  found in those that it names (`classification.multi_label`);
- word error rate and age: the largest error of an item, which needs a bound because there is no
  worst answer (`speech`);
- captions: 0 where a metric is a mean over clips. BLEU and METEOR have no value, because a longer
  wrong caption always lowers the value of the others too (`captions`).

The original protocol counts missing answers as the original does, which may reward them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ltu.data.dataset_io import stream_examples
from ltu.inference.requests import ANSWERED_STATUSES

# Fields of every prediction.
FIELDS = ("prompt", "pred", "ref", "audio_id")
# Predictions of the original have no status.
ANSWERED = (None, *ANSWERED_STATUSES)
# Absolute values whose squares, of thousands of numbers, have a sum with the precision of float64.
USABLE_SIZES = (1e-100, 1e100)
ANSWER_PREFIX = re.compile(
    r"""\A[\s"']*(?:audio caption|labels?|(?:music )?genre|emotion)\s*:""", re.IGNORECASE
)


class EvaluationError(ValueError):
    """Predictions cannot be scored. The message has file, number from 1, reason and hint."""


def has_usable_size(embeddings: np.ndarray) -> np.ndarray:
    """Return (n,) bool: whether the norm of each embedding (n, dim) can be computed.

    The largest number of an embedding must be in USABLE_SIZES: the norm of a smaller or a larger
    one is 0, inexact or infinite, because it sums squares, and that of nan does not exist.
    """
    smallest, largest = USABLE_SIZES
    sizes = np.abs(embeddings).max(axis=1, initial=0)
    return (smallest <= sizes) & (sizes <= largest)  # a comparison with nan is false


class AnswerJudge(Protocol):
    """A judge of open-ended answers, such as `eval.judge.Judge`."""

    def record(self) -> dict[str, Any]:
        """Return everything that decides a judgement."""

    def __call__(self, pairs: list[tuple[str, str]]) -> Sequence[str | Exception]:
        """Return the reply to each (question, response), or the error of its request."""


@dataclass
class Context:
    """The settings of scoring that are the same for all predictions of a file.

    Args:
        protocol: "strict" or "original"; the latter reproduces the metrics of the original's
            evaluators, bugs included.
        embed: Maps texts to (n, dim) float64; called once, with all texts.
        whisper: audio_id -> transcript of Whisper.
        judge: The judge of open-ended answers.
        label_scores: (examples, classes) log-likelihoods, used instead of embeddings.
        source: Name of the file, for messages.
    """

    protocol: str = "strict"
    embed: Callable[[list[str]], np.ndarray] | None = None
    whisper: Mapping[str, str] | None = None
    judge: AnswerJudge | None = None
    label_scores: np.ndarray | None = None
    source: str = "predictions"

    def error(self, index: int, reason: str) -> EvaluationError:
        """Return an error about a prediction, counted from 0."""
        return EvaluationError(f"{self.source}, prediction {index + 1}: {reason}")


@dataclass
class Outcome:
    """The scored items and the function that computes metrics of any of them.

    Args:
        items: One for each scored unit, in order: audio_id, ref, pred, failed (None or a reason)
            and more.
        compute: Maps (m,) indices into `items`, repeats allowed, to all metrics by name. Failed
            items count as the worst answer (strict), or as the original counts them.
        resamples: Number of bootstrap resamples.
        confusion: Names of the classes and (reference, predicted) counts of the answered items.
        notes: Notes for the report.
        compute_all: Returns the metrics of all items, where they are not `compute` of all indices:
            a metric that any one answer can spoil is bounded there, or has no value.
    """

    items: list[dict]
    compute: Callable[[np.ndarray], dict[str, float]]
    resamples: int = 1000
    confusion: tuple[list[str], np.ndarray] | None = None
    notes: list[str] = field(default_factory=list)
    compute_all: Callable[[], dict[str, float]] | None = None

    def on_all(self) -> dict[str, float]:
        """Return the metrics of all items, {} if there are none."""
        if not self.items:
            return {}
        if self.compute_all is not None:
            return self.compute_all()
        return self.compute(np.arange(len(self.items)))


def without_answer_prefix(answer: str) -> str:
    """Remove a leading "Audio caption:" or the like from an answer, and the quotes around it."""
    return ANSWER_PREFIX.sub("", answer).strip("\"' \n")


def is_empty(text: str) -> bool:
    """Return whether a text has no letter and no digit: only spaces, punctuation or the like."""
    return not any(character.isalnum() for character in text)


def failure(prediction: dict, protocol: str) -> str | None:
    """Return the reason why a prediction has no answer, None if it has one.

    In the strict protocol an answer is empty if it has no letter and no digit behind its prefix.
    The original scores it.
    """
    if prediction.get("status") not in ANSWERED:
        return str(prediction["status"]) or "empty status"
    if prediction.get("pred") is None:
        return "no answer"
    if protocol == "strict" and is_empty(without_answer_prefix(prediction["pred"])):
        return "empty answer"
    return None


def load_predictions(path: Path) -> list[dict]:
    """Return the predictions of a file, each with `prompt`, `pred`, `ref` and `audio_id`.

    Raises:
        EvaluationError: A prediction lacks a field, or a field is neither text nor null; or there
            are no predictions.
    """
    predictions = list(stream_examples(path))
    for number, prediction in enumerate(predictions, start=1):
        lacking = sorted(set(FIELDS) - prediction.keys())
        reason = f"no {', '.join(lacking)}"
        if not lacking:
            reason = _malformed_field(prediction)
        if reason:
            raise EvaluationError(
                f"{path}, prediction {number}: {reason}. Generate the predictions again."
            )
    if not predictions:
        raise EvaluationError(f"{path} contains no predictions.")
    return predictions


def _malformed_field(prediction: dict) -> str | None:
    """Return which field is neither text nor null, None if there is none."""
    for key in FIELDS:
        if not isinstance(prediction[key], str | None):
            return f"{key!r} is a {type(prediction[key]).__name__}, not text"
    return None


def start_items(predictions: list[dict], context: Context) -> list[dict]:
    """Return one item for each prediction.

    Raises:
        EvaluationError: A prediction has no reference, or its answer is no text.
    """
    items = []
    for index, prediction in enumerate(predictions):
        if not isinstance(prediction.get("ref"), str):
            reason = '"ref" is no text. Every prediction needs its reference answer.'
            raise context.error(index, reason)
        if not isinstance(prediction.get("pred"), str | None):
            reason = f'"pred" is neither text nor null: {prediction["pred"]!r}. Fix it.'
            raise context.error(index, reason)
        item = {
            "audio_id": prediction.get("audio_id"),
            "ref": prediction["ref"],
            "pred": prediction.get("pred"),
            "failed": failure(prediction, context.protocol),
        }
        items.append(item)
    return items
