"""Ends a training at SIGTERM after the current step, with a checkpoint.

Slurm, `timeout` and a shell that ends send SIGTERM to all processes of a job, so a rank can get it
twice, and its workers that load audio get it too. A rank stays stoppable until it has saved, and
its workers do not stop before it.
"""

import atexit
import multiprocessing
import multiprocessing.util  # Registers the exit function that must come after ours.
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 128 + signal.SIGTERM  # Exit status of a run that SIGTERM has ended.


@contextmanager
def on_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """Call a function at every SIGTERM, instead of ending the process."""

    def handle(_: int, __: FrameType | None) -> None:
        stop()

    handler = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def ignore_stop_signals(_: int) -> None:
    """Let a worker of a data loader ignore SIGTERM and Ctrl-C, which its parent gets too.

    It ends when the data loader ends.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def kill_workers_at_exit() -> None:
    """Kill workers that ignore SIGTERM and are left when this process ends.

    Python sends SIGTERM to them and then waits for their end, which would not come.
    """
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    # torch raises an error at the death of a worker, which would be a traceback after the line with
    # which a command ends.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()
