"""What waits -> batches of the engine -> answers.

Notable:
- One thread asks the model. A batch begins when it is full, or when its first request has waited long enough; while it
  runs, the next one gathers.
- Between two tokens any request can be cancelled without the others. An exception of the engine fails its batch only.
"""

import logging
import queue
import threading
import time
import traceback
from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Answer
from ltu.serving.request_parser import ApiError, PendingRequest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """What `/metrics` shows: counts, never contents."""

    def __init__(self) -> None:
        self.registry = one = CollectorRegistry()
        self.requests = Counter("ltu_requests", "Requests, by status code", ["code"], registry=one)
        self.answers = Counter(
            "ltu_answers", "Questions, by what became of their clip", ["status"], registry=one
        )
        self.latency = Histogram(
            "ltu_request_seconds", "To the last byte of an answer", buckets=SECONDS, registry=one
        )
        self.batch_size = Histogram(
            "ltu_batch_size", "Of batches", buckets=(1, 2, 4, 8, 16, 32, 64), registry=one
        )
        self.waiting = Gauge("ltu_queue_depth", "Requests that wait for a batch", registry=one)
        self.tokens = Counter(
            "ltu_tokens", "Tokens of prompts (audio and text) and answers", ["kind"], registry=one
        )
        self.heard = Counter("ltu_heard_seconds", "Seconds of audio heard", registry=one)


class BatchScheduler(threading.Thread):
    """The thread that asks the model: at most `max_batch` requests at once, the first waits `max_wait` seconds."""

    def __init__(self, engine: LtuEngine, metrics: Metrics, max_batch: int, max_wait: float):
        super().__init__(name="batches", daemon=True)
        self.engine, self.metrics, self.max_batch, self.max_wait = (
            engine,
            metrics,
            max_batch,
            max_wait,
        )
        self.pending_requests: queue.SimpleQueue[PendingRequest | None] = (
            queue.SimpleQueue()
        )  # None ends the thread.
        metrics.waiting.set_function(self.pending_requests.qsize)

    def run(self) -> None:
        batch: list[PendingRequest | None] = []
        while None not in batch:
            batch = self._gather()
            pending_requests = [
                pending for pending in batch if pending is not None and not pending.is_over
            ]
            left = (
                len(batch) - len(pending_requests) - batch.count(None)
            )  # Their clients went away while they waited.
            self.metrics.answers.labels("cancelled").inc(left)
            if pending_requests:
                self._answer(pending_requests)

    def _gather(self) -> list[PendingRequest | None]:
        batch = [self.pending_requests.get()]
        if self.pending_requests.qsize() < self.max_batch - 1:
            time.sleep(self.max_wait)
        while (
            batch[-1] is not None
            and len(batch) < self.max_batch
            and not self.pending_requests.empty()
        ):
            batch.append(self.pending_requests.get())
        return batch

    def _answer(self, pending_requests: list[PendingRequest]) -> None:
        self.metrics.batch_size.observe(len(pending_requests))
        left, requests = (
            dict(enumerate(pending_requests)),
            [pending.request for pending in pending_requests],
        )

        def on_text(index: int, text: str) -> bool:
            return not (pending_requests[index].show(text) or pending_requests[index].is_over)

        try:
            for index, answer in self.engine.run(requests, len(pending_requests), on_text=on_text):
                self._deliver(left.pop(index), answer)
        except (
            Exception
        ) as error:  # Whatever a batch dies of, the server lives on, and so do the innocent.
            log(error)
            for pending in left.values():
                if len(pending_requests) == 1:
                    pending.push(
                        ApiError(500, "The model failed on this request.", None, "engine_error")
                    )
                elif not pending.is_over:
                    self._answer([pending])

    def _deliver(self, pending: PendingRequest, answer: Answer) -> None:
        reason = "stop" if pending.show(answer.text, is_whole=True) else answer.finish_reason
        pending.push(replace(answer, text=pending.shown, finish_reason=reason))
        self.metrics.answers.labels("cancelled" if reason == "cancelled" else answer.status).inc()
        self.metrics.tokens.labels("prompt").inc(answer.prompt_tokens)
        self.metrics.tokens.labels("new").inc(answer.new_tokens)
        self.metrics.heard.inc(answer.seconds_heard)


def log(error: Exception) -> None:
    """Where it happened. Its message may quote a request, so it is left out."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logging.getLogger(__name__).error("%s\n%s", type(error).__name__, where)
