"""Collects pending requests into batches and runs them on the engine.

One thread runs the model. A batch starts when it is full, or when no request is about to join it;
it waits for those at most `max_wait` seconds. An answer is delivered when it is complete, while the
others of its batch run on. Once each row of a batch has generated `tokens_per_turn` tokens and
other requests wait, the batch is paused: its requests go to the end of the queue, and continue
later where they stopped. So a short request does not wait for the end of long answers.

Between two tokens any request can be cancelled without an effect on the others. If a batch fails,
its requests are retried one by one, and only the one that fails gets an error.
"""

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

from ltu.files import missing_package
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Answer, Request
from ltu.serving.request_parser import ApiError, PendingRequest

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
except ImportError as error:
    raise missing_package(error, "serve") from error

LATENCY_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)  # seconds
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # requests


class Metrics:
    """The metrics of `/metrics`: counts and durations, never the content of a request."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.requests = Counter(
            "ltu_requests",
            "Chat completions, and requests that failed, by status code.",
            ["code"],
            registry=registry,
        )
        self.answers = Counter(
            "ltu_answers",
            "Questions, by the status of their answer.",
            ["status"],
            registry=registry,
        )
        self.latency = Histogram(
            "ltu_request_seconds",
            "Seconds until the last byte of an answer was sent.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "ltu_batch_size", "Requests in a batch.", buckets=BATCH_SIZE_BUCKETS, registry=registry
        )
        self.waiting = Gauge(
            "ltu_queue_depth", "Requests that wait for a batch.", registry=registry
        )
        self.tokens = Counter(
            "ltu_tokens",
            "Tokens of prompts (audio and text) and of answers.",
            ["kind"],
            registry=registry,
        )
        self.audio_seconds = Counter(
            "ltu_audio_seconds", "Seconds of audio that were encoded.", registry=registry
        )
        self.closed_connections = Counter(
            "ltu_closed_connections",
            "Connections that the server closed: too_many, not_received (a request did not arrive "
            "in time) or not_read (a reply was not).",
            ["reason"],
            registry=registry,
        )
        self.connections = Gauge("ltu_connections", "Open connections.", registry=registry)
        self.arriving_bytes = Gauge(
            "ltu_arriving_bytes",
            "Bytes of bodies that have not arrived completely.",
            registry=registry,
        )


@dataclass(frozen=True)
class BatchSettings:
    """How batches are made.

    Args:
        max_batch: the largest number of requests in a batch.
        max_wait: seconds that a batch waits for requests that are about to join it.
        tokens_per_turn: tokens after which a batch is paused if other requests wait; 0 for never.
        max_paused_bytes: the largest size of the key-value caches of paused requests. Beyond it
            their keys and values are computed again.
    """

    max_batch: int
    max_wait: float
    tokens_per_turn: int
    max_paused_bytes: int


class BatchScheduler(threading.Thread):
    """The thread that runs the model.

    Args:
        engine: generates the answers.
        metrics: counts batches, tokens and answers.
        settings: how batches are made.
        count_arriving: returns the number of complete requests that are not in the queue yet.
    """

    def __init__(
        self,
        engine: LtuEngine,
        metrics: Metrics,
        settings: BatchSettings,
        count_arriving: Callable[[], int],
    ):
        super().__init__(name="batches", daemon=True)
        self.engine = engine
        self.metrics = metrics
        self.settings = settings
        self.count_arriving = count_arriving
        self.paused_bytes = 0  # of the caches of paused requests in the queue
        # None ends the thread.
        self.pending_requests: queue.SimpleQueue[PendingRequest | None] = queue.SimpleQueue()
        metrics.waiting.set_function(self.pending_requests.qsize)

    def run(self) -> None:
        is_last = False
        while not is_last:
            batch = self._gather()
            is_last = None in batch
            received = [pending for pending in batch if pending is not None]
            # Drop the requests whose clients disconnected while they waited.
            active = [pending for pending in received if not pending.is_over]
            self.metrics.answers.labels("cancelled").inc(len(received) - len(active))
            if active:
                self._answer(active)

    def _gather(self) -> list[PendingRequest | None]:
        """Wait for a request and return it with those that followed; None, if there, is last."""
        batch = [self._take(timeout=None)]
        deadline = time.monotonic() + self.settings.max_wait
        while batch[-1] is not None and len(batch) < self.settings.max_batch:
            seconds_left = 0.0
            # A paused request has waited already.
            if batch[0].request.paused is None and self.count_arriving() > 0:
                seconds_left = max(0.0, deadline - time.monotonic())
            try:
                batch.append(self._take(seconds_left))
            except queue.Empty:
                break
        return batch

    def _take(self, timeout: float | None) -> PendingRequest | None:
        """Take a request from the queue. Raises queue.Empty if there is none in time."""
        pending = self.pending_requests.get(timeout=timeout)
        if pending is not None:
            self.paused_bytes -= paused_size(pending.request)
        return pending

    def _pause(self, pending: PendingRequest, request: Request) -> None:
        """Put a request that was paused at the end of the queue."""
        pending.request = request
        # The last of the queue waits longest, so its cache is the one to drop.
        if self.paused_bytes + paused_size(request) > self.settings.max_paused_bytes:
            request.paused.cache = None
        self.paused_bytes += paused_size(request)
        self.pending_requests.put(pending)

    def _answer(self, batch: list[PendingRequest]) -> None:
        """Run the engine on a batch and deliver each answer as soon as it is complete."""
        self.metrics.batch_size.observe(len(batch))
        unanswered = dict(enumerate(batch))
        requests = [pending.request for pending in batch]
        # The engine computes requests with other settings one group after the other.
        begun: set[int] = set()

        def is_turn_over(num_tokens: int) -> bool:
            others_wait = len(begun) < len(batch) or not self.pending_requests.empty()
            return 0 < self.settings.tokens_per_turn <= num_tokens and others_wait

        def on_text(index: int, text: str) -> bool:
            begun.add(index)
            found_stop = batch[index].show(text)
            return not (found_stop or batch[index].is_over)

        def on_answer(index: int, answer: Answer) -> None:
            self._deliver(unanswered.pop(index), answer)

        try:
            for index, result in self.engine.run(
                requests,
                len(batch),
                on_text=on_text,
                on_answer=on_answer,
                is_turn_over=is_turn_over,
            ):
                if isinstance(result, Request):
                    self._pause(unanswered.pop(index), result)
                elif index in unanswered:
                    on_answer(index, result)
        # Catch everything, also a bug: if the thread ended here, every request would wait until its
        # timeout. No list of types is enough, because a GPU that is full or broken raises several,
        # and a bug in the model or in a library any other. The requests run again one by one, so
        # that only the one that fails gets an error. The log has the traceback, and the metric
        # `ltu_answers` counts the failures.
        except Exception as error:
            log_without_message(error)
            for pending in unanswered.values():
                if len(batch) == 1:
                    self._fail(pending)
                elif not pending.is_over:
                    self._answer([pending])

    def _fail(self, pending: PendingRequest) -> None:
        """Push the error of a request that the model fails on, and count it."""
        message = "The model failed on this request; the server's log has the reason."
        pending.push(ApiError(500, message, None, "engine_error"))
        self.metrics.answers.labels("failed").inc()

    def _deliver(self, pending: PendingRequest, answer: Answer) -> None:
        """Push the complete answer, cut at a stop sequence, and count it."""
        found_stop = pending.show(answer.text, is_whole=True)
        answer = replace(answer, text=pending.shown)
        if found_stop:
            answer.finish_reason = "stop"
        pending.push(answer)
        if answer.finish_reason == "cancelled":
            self.metrics.answers.labels("cancelled").inc()
        else:
            self.metrics.answers.labels(answer.status).inc()
        self.metrics.tokens.labels("prompt").inc(answer.prompt_tokens)
        self.metrics.tokens.labels("new").inc(answer.new_tokens)
        self.metrics.audio_seconds.inc(answer.seconds_heard)


def paused_size(request: Request) -> int:
    """Return the bytes of the key-value cache of a request that was paused; 0 for any other."""
    if request.paused is None or request.paused.cache is None:
        return 0
    return request.paused.cache.nbytes


def log_without_message(error: Exception) -> None:
    """Log the type and the traceback of an error without its message, which may quote a request."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    logging.getLogger(__name__).error("%s\n%s", type(error).__name__, trace)
