"""Starts the processes that decode clips. They end with their parent."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

import torch


def decoding_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of processes with one torch thread each.

    A process that is forked from one with threads can hang. The fork server is started before there
    are any.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ltu.data.audio"])  # Imports torch, once for all workers.
    return ProcessPoolExecutor(workers, context, _start_worker)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent tells its workers to stop.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker with its parent. After kill -9 of the parent it would wait forever."""
    multiprocessing.parent_process().join()
    os._exit(1)
