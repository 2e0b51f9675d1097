"""Chooses how many processes load examples (`--num_workers auto`).

The number has no effect on the order of examples, so a resumed run may use another one.
"""

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ltu.data.audio import AudioError
from ltu.training.dataset import NoAnswerError, QaDataset

# Examples per second that one GPU must get: twice what a language model of 7B trains on an H100.
TARGET_RATE = 250
NUM_MEASURED = 8  # Examples that are loaded to measure how long one takes.
# On a GPU: with fewer, one long clip would hold up training; more do not help.
MIN_WORKERS = 2
MAX_WORKERS = 16
CPU_WORKERS = 2  # Where training needs the same cores.


@dataclass(frozen=True)
class WorkerChoice:
    """A number of processes that load examples, and why it was chosen."""

    num_workers: int
    reason: str

    def describe(self) -> str:
        """Return the line that a run prints at its start."""
        return f"--num_workers auto: {self.num_workers} ({self.reason})"


def count_cores() -> int:
    """Return the number of CPU cores for this process, of those that its node shares."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def measure_seconds(dataset: QaDataset, indices: Iterable[int]) -> float | None:
    """Return the mean time in seconds to load an example, in one thread as a worker does.

    Examples that cannot be used do not count, and are not marked as skipped.

    Args:
        dataset: the examples to train on.
        indices: examples to load. The first one is not timed: it opens libraries and models.

    Returns:
        None if none can be used.
    """
    times = []
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index in indices:
            start = time.perf_counter()
            try:
                dataset.load(index)
            except (AudioError, NoAnswerError):
                continue
            times.append(time.perf_counter() - start)
            if len(times) > NUM_MEASURED:
                break
    finally:
        torch.set_num_threads(num_threads)
    timed = times[1:] or times
    return sum(timed) / len(timed) if timed else None


def choose_num_workers(
    dataset: QaDataset, indices: Iterable[int], has_accelerator: bool, needs_gpu: bool
) -> WorkerChoice:
    """Choose the number of workers of this process.

    Args:
        dataset: the examples to train on.
        indices: of the first examples of the run.
        has_accelerator: whether training leaves the cores of the CPU to the workers.
        needs_gpu: whether features are computed on the GPU, which a forked process cannot use.
    """
    if needs_gpu:
        return WorkerChoice(0, "features are computed on the GPU, in the process that trains")
    cores = count_cores()
    if not has_accelerator:
        workers = min(CPU_WORKERS, cores)
        return WorkerChoice(workers, f"training needs the CPU itself; cores: {cores}")
    seconds = measure_seconds(dataset, indices)
    if seconds is None:
        return WorkerChoice(min(MIN_WORKERS, cores), "no example could be loaded to measure it")
    wanted = math.ceil(seconds * TARGET_RATE)
    # One core is left to the process that trains.
    workers = min(max(wanted, MIN_WORKERS), MAX_WORKERS, max(1, cores - 1))
    reason = (
        f"an example takes {1000 * seconds:.1f} ms, so {TARGET_RATE} examples/s need {wanted}; "
        f"cores: {cores}"
    )
    return WorkerChoice(workers, reason)
