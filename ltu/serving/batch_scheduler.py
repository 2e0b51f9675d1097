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

from ltu.inference.engine import LtuPipeline
from ltu.inference.requests import Answer
from ltu.serving.request_parser import ApiError, Job

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Meters:
    """What `/metrics` shows: counts, never contents."""

    def __init__(self) -> None:
        self.registry = one = CollectorRegistry()
        self.requests = Counter("ltu_requests", "Requests, by status code", ["code"], registry=one)
        self.answers = Counter("ltu_answers", "Questions, by what became of their clip", ["status"], registry=one)
        self.latency = Histogram("ltu_request_seconds", "To the last byte of an answer", buckets=SECONDS, registry=one)
        self.batch_size = Histogram("ltu_batch_size", "Of batches", buckets=(1, 2, 4, 8, 16, 32, 64), registry=one)
        self.waiting = Gauge("ltu_queue_depth", "Requests that wait for a batch", registry=one)
        self.tokens = Counter("ltu_tokens", "Tokens of prompts (audio and text) and answers", ["kind"], registry=one)
        self.heard = Counter("ltu_heard_seconds", "Seconds of audio heard", registry=one)


class Batcher(threading.Thread):
    """The thread that asks the model: at most `max_batch` requests at once, the first waits `max_wait` seconds."""

    def __init__(self, pipeline: LtuPipeline, meters: Meters, max_batch: int, max_wait: float):
        super().__init__(name="batches", daemon=True)
        self.pipeline, self.meters, self.max_batch, self.max_wait = pipeline, meters, max_batch, max_wait
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # None ends the thread.
        meters.waiting.set_function(self.jobs.qsize)

    def run(self) -> None:
        batch: list[Job | None] = []
        while None not in batch:
            batch = self._gather()
            jobs = [job for job in batch if job is not None and not job.is_over]
            left = len(batch) - len(jobs) - batch.count(None)  # Their clients went away while they waited.
            self.meters.answers.labels("cancelled").inc(left)
            if jobs:
                self._answer(jobs)

    def _gather(self) -> list[Job | None]:
        batch = [self.jobs.get()]
        if self.jobs.qsize() < self.max_batch - 1:
            time.sleep(self.max_wait)
        while batch[-1] is not None and len(batch) < self.max_batch and not self.jobs.empty():
            batch.append(self.jobs.get())
        return batch

    def _answer(self, jobs: list[Job]) -> None:
        self.meters.batch_size.observe(len(jobs))
        left, requests = dict(enumerate(jobs)), [job.request for job in jobs]

        def on_text(index: int, text: str) -> bool:
            return not (jobs[index].show(text) or jobs[index].is_over)

        try:
            for index, answer in self.pipeline.run(requests, len(jobs), on_text=on_text):
                self._deliver(left.pop(index), answer)
        except Exception as error:  # Whatever a batch dies of, the server lives on, and so do the innocent.
            log(error)
            for job in left.values():
                if len(jobs) == 1:
                    job.push(ApiError(500, "The model failed on this request.", None, "engine_error"))
                elif not job.is_over:
                    self._answer([job])

    def _deliver(self, job: Job, answer: Answer) -> None:
        reason = "stop" if job.show(answer.text, is_whole=True) else answer.finish_reason
        job.push(replace(answer, text=job.shown, finish_reason=reason))
        self.meters.answers.labels("cancelled" if reason == "cancelled" else answer.status).inc()
        self.meters.tokens.labels("prompt").inc(answer.prompt_tokens)
        self.meters.tokens.labels("new").inc(answer.new_tokens)
        self.meters.heard.inc(answer.seconds_heard)


def log(error: Exception) -> None:
    """Where it happened. Its message may quote a request, so it is left out."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logging.getLogger(__name__).error("%s\n%s", type(error).__name__, where)
