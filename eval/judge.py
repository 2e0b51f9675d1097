"""Scores open-ended answers with a language model that judges each, as in the paper.

The judge runs through `qa_generation.llm`: any OpenAI-compatible endpoint, or a local model. Its
replies are stored. A reply counts if it is yes or no, or begins with one of them before a
punctuation mark. Other replies and failed requests are failures of the judge and are left out of
the metrics.

The prompt is the paper's (OpenReview thread nBZBPXdJlC). No source says how question and response
followed it.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from eval.scorer_interface import Context, EvaluationError, Outcome, start_items
from eval.tasks import Task
from ltu.models.locate_checkpoint import sha256_of_weights
from qa_generation.llm import GenerationStopped, Llm, LlmSettings, ReplyStore, RequestFailed

PROMPT = (
    "Below is a pair of question and response. Identify if the response answers the question. "
    "Return yes or no.\n\nQuestion: {question}\nResponse: {response}"
)
VERDICT = re.compile(
    r"""[\s"'*(]*(yes|no)["'*)]*\s*($|[.,;:!\n]|\s[-–—]).*""", re.IGNORECASE | re.DOTALL
)


class Judge:
    """A language model that judges answers.

    Args:
        settings: The model and how it generates.
        folder: Where its replies are stored, in a file of this judge alone.
    """

    def __init__(self, settings: LlmSettings, folder: str | Path):
        self.settings = settings
        self.weights = {}
        # A local model is a folder with weights or a hub id.
        if settings.is_local and Path(settings.model).is_dir():
            self.weights = {"weights": sha256_of_weights(settings.model)}
        digest = hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()
        self.replies = Path(folder, f"judge-{digest[:16]}.jsonl")

    def record(self) -> dict[str, Any]:
        """Return everything that decides a judgement."""
        return self.settings.record() | self.weights | {"prompt": PROMPT}

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str | RequestFailed]:
        """Return the reply to each (question, response), or the error of its request.

        Raises:
            EvaluationError: No more replies are generated (key, budget).
        """
        prompts = []
        for question, response in pairs:
            content = PROMPT.format(question=question, response=response)
            prompts.append([{"role": "user", "content": content}])
        try:
            with ReplyStore(self.replies) as store:
                replies = Llm(self.settings, store).complete_all(prompts)
        except (GenerationStopped, ValueError) as error:
            raise EvaluationError(
                f"The judge stopped: {error}. Run it again: replies are in {self.replies}."
            ) from None
        texts: list[str | RequestFailed] = []
        for reply in replies:
            if isinstance(reply, RequestFailed):
                texts.append(reply)
            else:
                texts.append(reply.text)
        return texts


def parse_verdict(reply: str) -> bool | None:
    """Return whether a reply says yes, None if it is neither yes nor no."""
    match = VERDICT.fullmatch(reply)
    if match is None:
        return None
    return match[1].lower() == "yes"


def open_ended(predictions: list[dict], task: Task, context: Context) -> Outcome:
    """Score answers with `context.judge`.

    Raises:
        EvaluationError: There is no judge, or it stopped.
    """
    if context.judge is None:
        raise EvaluationError(
            f"{context.source}: open-ended answers need a judge; name one with --judge_model."
        )
    # The reference is optional.
    with_reference = []
    for prediction in predictions:
        with_reference.append(prediction | {"ref": prediction.get("ref") or ""})
    items = start_items(with_reference, context)
    answered = []
    for item, prediction in zip(items, predictions, strict=True):
        item |= {"prompt": prediction["prompt"], "follows": False}
        if item["failed"] is None:
            answered.append(item)
    replies = context.judge([(item["prompt"], item["pred"]) for item in answered])
    for item, reply in zip(answered, replies, strict=True):
        if isinstance(reply, RequestFailed):
            item |= {"follows": None, "failed": "judge failed"}
            # The message differs between runs, so it is printed and not stored.
            print(f"  {item['audio_id']}: {reply}", file=sys.stderr)
            continue
        verdict = parse_verdict(reply)
        item |= {"reply": reply, "follows": verdict}
        if verdict is None:
            item["failed"] = "unparsed judgement"
    follows = np.array([item["follows"] for item in items], dtype=np.float64)  # None becomes nan

    def compute(indices: np.ndarray) -> dict[str, float]:
        judged = follows[indices][~np.isnan(follows[indices])]
        return {"following_rate": float(judged.mean()) if len(judged) else float("nan")}

    notes = [f"judge: {context.judge.record()}"]
    lost = int(np.isnan(follows).sum())
    if lost:
        notes.append(f"{lost} judgements failed or are unparsed: they are in no metric")
    return Outcome(items, compute, notes=notes)
