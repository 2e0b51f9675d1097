"""Runs each request as soon as it arrives, for an engine whose requests do not wait for each other.

Another server generates, and batches what reaches it by itself. A batch of ours would only let
requests wait for each other.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ltu.inference.engine import LtuEngine
from ltu.serving.batch_scheduler import BatchScheduler, BatchSettings, Metrics
from ltu.serving.request_parser import PendingRequest


class ConcurrentScheduler(BatchScheduler):
    """The thread that starts requests, at most `max_batch` of them at the same time.

    Args: as of `BatchScheduler`; nothing waits for a batch or is paused.
    """

    def __init__(
        self,
        engine: LtuEngine,
        metrics: Metrics,
        settings: BatchSettings,
        count_arriving: Callable[[], int],
    ):
        super().__init__(engine, metrics, settings, count_arriving)
        self.free = threading.Semaphore(settings.max_batch)

    def run(self) -> None:
        with ThreadPoolExecutor(self.settings.max_batch, "requests") as pool:
            while True:
                self.free.acquire()
                pending = self.pending_requests.get()
                if pending is None:
                    return
                pool.submit(self._run_one, pending)

    def _run_one(self, pending: PendingRequest) -> None:
        """Answer a request, unless its client disconnected while it waited."""
        try:
            if pending.is_over:
                self.metrics.answers.labels("cancelled").inc()
            else:
                self._answer([pending])
        finally:
            self.free.release()
