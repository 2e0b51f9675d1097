"""Runs torchrun so that SIGTERM leaves the ranks time to save, and has an exit status of its own.

    python -m train_scripts.torchrun --nproc_per_node 4 -m ltu.finetune ...

The flags are those of torchrun. On SIGTERM, torchrun would kill the ranks after 30 seconds, in
which the checkpoint of a large model is not written, and exit with 1, as after an error. Here
SIGTERM is only forwarded to the ranks, which stop by themselves.

Exit status: 0; 143 when SIGTERM has ended the ranks; after an error, that of the rank that failed.
"""

import signal
import sys
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

STOPPED = 128 + signal.SIGTERM  # Exit status of a rank that SIGTERM has ended, as in ltu.finetune.
HANDLED = "SIGINT,SIGHUP,SIGQUIT"  # Signals that torchrun handles as usual.


def forward(number: int, _: FrameType | None) -> None:
    """Send a signal to the ranks; if none has started yet, exit."""
    ranks = psutil.Process().children()
    if not ranks:
        sys.exit(128 + number)
    for rank in ranks:
        rank.send_signal(number)


def exit_status(error: ChildFailedError) -> int:
    """Return the exit status of ranks of which at least one has failed.

    torchrun sends SIGTERM to the other ranks when one fails, so theirs counts only if all have it.
    """
    statuses = []
    for failure in error.failures.values():
        code = failure.exitcode  # The negative number of the signal that has killed the rank.
        statuses.append(code if code > 0 else 128 - code)
    failed = [status for status in statuses if status != STOPPED]
    return failed[0] if failed else STOPPED


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, forward)
    try:
        torchrun(["--signals_to_handle", HANDLED, *argv])
    except ChildFailedError as error:
        status = exit_status(error)
        if status != STOPPED:
            print(error, file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
