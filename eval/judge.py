"""Open-ended answers: a language model judges whether each answers its question, as in the paper.

Notable:
- It is asked by `qa_generation.llm`: any OpenAI-compatible endpoint, or a local model. Its replies are kept.
- A reply counts if it is yes or no, or begins so before a punctuation mark. Others, and requests that failed, are the
  judge's failures: in no figure.
- The prompt is the paper's (OpenReview thread nBZBPXdJlC); how question and response followed it is not sourced.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from eval.score_result import Context, EvaluationError, Outcome, start_items
from eval.tasks import Task
from ltu.models.checkpoint_folder import sha256_of_weights
from qa_generation.llm import Llm, LlmSettings, ReplyStore, RequestFailed, StopAsking

PROMPT = (
    "Below is a pair of question and response. Identify if the response answers the question. Return yes or no.\n\n"
    "Question: {question}\nResponse: {response}"
)
VERDICT = re.compile(
    r"""[\s"'*(]*(yes|no)["'*)]*\s*($|[.,;:!\n]|\s[-–—]).*""", re.IGNORECASE | re.DOTALL
)


class Judge:
    """Args:
    settings: the model and how it is asked.
    folder: where its replies are kept, in a file of this judge alone.
    """

    def __init__(self, settings: LlmSettings, folder: str | Path):
        self.settings = settings
        is_folder = settings.is_local and Path(settings.model).is_dir()  # Or it is a hub id.
        self.weights = {"weights": sha256_of_weights(settings.model)} if is_folder else {}
        digest = hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()
        self.replies = Path(folder, f"judge-{digest[:16]}.jsonl")

    def record(self) -> dict[str, Any]:
        return self.settings.record() | self.weights | {"prompt": PROMPT}

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str | RequestFailed]:
        """Replies to (question, response), or why there is none. EvaluationError: no more are given (key, budget)."""
        asked = [
            [{"role": "user", "content": PROMPT.format(question=q, response=r)}] for q, r in pairs
        ]
        try:
            with ReplyStore(self.replies) as store:
                replies = Llm(self.settings, store).complete_all(asked)
        except (StopAsking, ValueError) as error:
            raise EvaluationError(
                f"The judge stopped: {error}. Run it again: replies are in {self.replies}."
            ) from None
        return [reply if isinstance(reply, RequestFailed) else reply.text for reply in replies]


def parse_verdict(reply: str) -> bool | None:
    """Whether it says yes; None if it is neither yes nor no."""
    match = VERDICT.fullmatch(reply)
    return match[1].lower() == "yes" if match else None


def open_ended(rows: list[dict], task: Task, context: Context) -> Outcome:
    """Score answers by `context.judge`. EvaluationError: there is none, or it stopped."""
    if context.judge is None:
        raise EvaluationError(
            f"{context.source}: open-ended answers need a judge; name one with --judge_model."
        )
    started = start_items(
        [row | {"ref": row.get("ref") or ""} for row in rows], context
    )  # There may be no reference.
    items = [
        item | {"prompt": row["prompt"], "follows": False}
        for item, row in zip(started, rows, strict=True)
    ]
    answered = [item for item in items if item["failed"] is None]
    replies = context.judge([(item["prompt"], item["pred"]) for item in answered])
    for item, reply in zip(answered, replies, strict=True):
        if isinstance(reply, RequestFailed):
            item |= {"follows": None, "failed": "judge failed"}
            print(
                f"  {item['audio_id']}: {reply}", file=sys.stderr
            )  # Of which no two runs have the same.
            continue
        item |= {"reply": reply, "follows": parse_verdict(reply)}
        item["failed"] = "unparsed judgement" if item["follows"] is None else None
    follows = np.array([item["follows"] for item in items], dtype=np.float64)  # None: nan

    def compute(indices: np.ndarray) -> dict[str, float]:
        judged = follows[indices][~np.isnan(follows[indices])]
        return {"following_rate": float(judged.mean()) if len(judged) else float("nan")}

    notes = [f"judge: {context.judge.record()}"] if hasattr(context.judge, "record") else []
    if lost := int(np.isnan(follows).sum()):
        notes.append(f"{lost} judgements failed or are unparsed: they are in no figure")
    return Outcome(items, compute, notes=notes)
