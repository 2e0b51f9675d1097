"""Open-ended answers: a language model judges whether each answers its question, as in the paper.

    judge = Judge(LlmSettings("gpt-4o", temperature=0.0, max_tokens=16), "exp/eval_cache/judge.jsonl")
    judge.record()      # model, temperature, endpoint and prompt, for the report

Notable:
- It is asked by `qa_generation.llm`: any OpenAI-compatible endpoint, or a local model (`is_local=True`). Its replies
  are kept, so a run that was stopped goes on, and a second one asks nothing.
- A reply counts if it is yes or no, or begins so before a punctuation mark. Others are "unparsed" and never guessed.
- The prompt is the paper's (OpenReview thread nBZBPXdJlC); how question and response followed it is not sourced.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from eval.outcome import Context, EvaluationError, Outcome, failure
from eval.tasks import Task
from qa_generation.llm import Llm, LlmSettings, ReplyStore, RequestFailed, StopAsking

PROMPT = (
    "Below is a pair of question and response. Identify if the response answers the question. Return yes or no.\n\n"
    "Question: {question}\nResponse: {response}"
)
VERDICT = re.compile(r"""[\s"'*(]*(yes|no)["'*)]*\s*($|[.,;:!\n]|\s[-–—]).*""", re.IGNORECASE | re.DOTALL)


class Judge:
    """Args:
    settings: the model and how it is asked.
    replies: file in which its replies are kept.
    """

    def __init__(self, settings: LlmSettings, replies: str | Path):
        self.settings, self.replies = settings, replies

    def record(self) -> dict[str, Any]:
        return self.settings.record() | {"prompt": PROMPT}

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str | RequestFailed]:
        """Replies to (question, response), or why there is none.

        Raises:
            EvaluationError: no more are given: key, account, budget or endpoint.
        """
        contents = [PROMPT.format(question=question, response=response) for question, response in pairs]
        try:
            with ReplyStore(self.replies) as store:
                asked = [[{"role": "user", "content": content}] for content in contents]
                replies = Llm(self.settings, store).complete_all(asked)
        except (StopAsking, ValueError) as error:
            raise EvaluationError(f"The judge stopped: {error}. Run it again: replies are in {self.replies}.") from None
        return [reply if isinstance(reply, RequestFailed) else reply.text for reply in replies]


def parse_verdict(reply: str) -> bool | None:
    """Whether it says yes; None if it is neither yes nor no."""
    match = VERDICT.fullmatch(reply)
    return match[1].lower() == "yes" if match else None


def open_ended(rows: list[dict], task: Task, context: Context) -> Outcome:
    """Score answers by `context.judge`. Those that failed, or whose reply is unparsed, follow no instruction.

    Raises:
        EvaluationError: there is no judge, or it stopped.
    """
    if context.judge is None:
        raise EvaluationError(f"{context.source}: open-ended answers need a judge; name one with --judge_model.")
    keys = ("audio_id", "prompt", "ref", "pred")  # A reference there may be; the judge does not see it.
    items = [{key: row.get(key) for key in keys} | {"failed": failure(row, context.protocol)} for row in rows]
    answered = [item for item in items if item["failed"] is None]
    replies = context.judge([(item["prompt"], item["pred"]) for item in answered])
    for item, reply in zip(answered, replies, strict=True):
        if isinstance(reply, RequestFailed):
            item["failed"] = f"judge: {reply}"
            continue
        item["reply"], item["follows"] = reply, parse_verdict(reply)
        item["failed"] = "unparsed" if item["follows"] is None else None
    follows = np.array([item.get("follows") is True for item in items], dtype=np.float64)
    notes = [f"judge: {context.judge.record()}"] if hasattr(context.judge, "record") else []
    return Outcome(items, lambda indices: {"following_rate": float(follows[indices].mean())}, notes=notes)
