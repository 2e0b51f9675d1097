"""What a scoring function gets besides the rows, and what it gives back."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Statuses with an answer, see ltu.inference.requests.Answer; the original's rows have none.
ANSWERED = (None, "ok", "truncated")
LEAD = re.compile(
    r"""\A[\s"']*(?:audio caption|labels?|(?:music )?genre|emotion)\s*:""", re.IGNORECASE
)


class EvaluationError(ValueError):
    """What cannot be scored; the message has file and row (from 1), the reason and the way out."""


@dataclass
class Context:
    """What is the same for all rows."""

    protocol: str = (
        "strict"  # or "original": the figures of the original's evaluators, slips included
    )
    embed: Callable[[list[str]], np.ndarray] | None = (
        None  # texts -> (n, dim) float64; asked once, for all texts
    )
    whisper: Mapping[str, str] | None = None  # audio_id -> Whisper's transcript
    judge: Callable[..., Any] | None = None  # of open-ended answers
    label_scores: np.ndarray | None = (
        None  # (rows, classes) log-likelihoods, in place of embeddings
    )
    source: str = "predictions"  # file, for messages

    def error(self, row: int, reason: str) -> EvaluationError:
        """An error about a row, counted from 0."""
        return EvaluationError(f"{self.source}, row {row + 1}: {reason}")


@dataclass
class Outcome:
    """What was scored.

    `compute` takes (m,) indices into `items`, repeats allowed, and returns all figures by name. Failed items are wrong.
    """

    items: list[
        dict
    ]  # one a scored unit, in order: audio_id, ref, pred, failed (None or a reason), and more
    compute: Callable[[np.ndarray], dict[str, float]]
    resamples: int = 1000  # of the bootstrap
    confusion: tuple[list[str], np.ndarray] | None = (
        None  # classes; (true, predicted) counts of what was answered
    )
    notes: list[str] = field(default_factory=list)


def without_lead(answer: str) -> str:
    """An answer without a leading "Audio caption:" or the like, and without quotes around it."""
    return LEAD.sub("", answer).strip("\"' \n")


def failure(row: dict, protocol: str) -> str | None:
    """Why a row has no answer; None if it has one. Strictly, a lead alone is none; the original scores it."""
    if row.get("status") not in ANSWERED:
        return str(row["status"])
    if row.get("pred") is None:
        return "no answer"
    return (
        "empty answer" if protocol == "strict" and not without_lead(row["pred"]).strip() else None
    )


def start_items(rows: list[dict], context: Context) -> list[dict]:
    """An item a row; EvaluationError for a row without a reference, or whose answer is no text."""
    for index, row in enumerate(rows):
        if not isinstance(row.get("ref"), str):
            raise context.error(
                index, '"ref" is no text. Predictions need the reference answer of every row.'
            )
        if not isinstance(row.get("pred"), str | None):
            raise context.error(
                index, f'"pred" is neither text nor null: {row["pred"]!r}. Mend it.'
            )
    keys = ("audio_id", "ref", "pred")
    return [
        {key: row.get(key) for key in keys} | {"failed": failure(row, context.protocol)}
        for row in rows
    ]
