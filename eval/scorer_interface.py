"""Defines the context that a scoring function gets and the outcome that it returns."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

# Statuses with an answer, see ltu.inference.requests.Answer. Predictions of the original have none.
ANSWERED = (None, "ok", "truncated", "truncated_file")
ANSWER_PREFIX = re.compile(
    r"""\A[\s"']*(?:audio caption|labels?|(?:music )?genre|emotion)\s*:""", re.IGNORECASE
)


class EvaluationError(ValueError):
    """Predictions cannot be scored. The message has file, number from 1, reason and hint."""


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
            items count as wrong.
        resamples: Number of bootstrap resamples.
        confusion: Names of the classes and (reference, predicted) counts of the answered items.
        notes: Notes for the report.
    """

    items: list[dict]
    compute: Callable[[np.ndarray], dict[str, float]]
    resamples: int = 1000
    confusion: tuple[list[str], np.ndarray] | None = None
    notes: list[str] = field(default_factory=list)


def without_answer_prefix(answer: str) -> str:
    """Remove a leading "Audio caption:" or the like from an answer, and the quotes around it."""
    return ANSWER_PREFIX.sub("", answer).strip("\"' \n")


def failure(prediction: dict, protocol: str) -> str | None:
    """Return the reason why a prediction has no answer, None if it has one.

    In the strict protocol an answer that consists of the prefix alone is empty. The original
    scores it.
    """
    if prediction.get("status") not in ANSWERED:
        return str(prediction["status"])
    if prediction.get("pred") is None:
        return "no answer"
    if protocol == "strict" and not without_answer_prefix(prediction["pred"]).strip():
        return "empty answer"
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
