"""Interrupts a training at one of its writes, as kill -9 at that moment would.

Run as a module, it trains like `ltu.finetune`. Rank 0 kills itself at write KILL_AT_WRITE after the
file KILL_FROM exists.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ltu.files import run_command
from ltu.finetune import main
from ltu.training.trainer import LtuTrainer


class Interrupted(BaseException):
    """Stands for kill -9: no code of the project catches it."""


def damage(path: Path, kind: str) -> None:
    """Cut a file, delete it, or change the bytes in its middle."""
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "missing":
        path.unlink()
    else:
        third = len(content) // 3
        changed = bytes(255 - byte for byte in content[third : 2 * third])
        path.write_bytes(content[:third] + changed + content[2 * third :])


class Interruption:
    """Counts the writes of a process from the moment on at which a file exists.

    A write is that of a file by Python, torch or safetensors, or a change of a folder. A file that
    torch or safetensors write counts twice: before it exists, and when half of it is there.

    Args:
        number: the write at which the process is interrupted, from 1.
        start: the file.
        kills: kill the process instead of raising `Interrupted`.
    """

    EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")

    def __init__(self, number: int, start: Path, kills: bool = False):
        self.number = number
        self.start = start
        self.kills = kills
        self.count = 0
        self.is_active = True

    def on_event(self, event: str, arguments: tuple) -> None:
        """Count an audit event of Python, if it is a write."""
        if not self.is_active:
            return
        is_write = event in self.EVENTS
        if event == "open":
            path, mode, _ = arguments
            is_write = isinstance(path, str | Path) and bool(mode) and set(mode) & set("wax+")
        if is_write:
            self.on_write()

    def on_write(self, written: Path | None = None) -> None:
        """Count a write. If it is the one, half of the file `written` is removed."""
        if not self.is_active or not self.start.exists():
            return
        self.count += 1
        if self.count == self.number:
            self.is_active = False
            if written is not None:
                damage(written, "cut")
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Interrupted

    def wrap(self, write: Callable) -> Callable:
        """Wrap a function that writes a file whose path is one of its arguments."""

        def interrupted_write(*args: Any, **kwargs: Any) -> None:
            self.on_write()
            write(*args, **kwargs)
            for value in args:
                if isinstance(value, str | Path):
                    self.on_write(Path(value))

        return interrupted_write


ACTIVE: list[Interruption] = []


def audit(event: str, arguments: tuple) -> None:
    for interruption in ACTIVE:
        interruption.on_event(event, arguments)


sys.addaudithook(audit)


def interrupt_at_save(number: int, arguments: list[str], start: Path, kills: bool = False) -> int:
    """Train until the given write after the file `start` exists.

    Returns:
        How many writes there were. They are fewer than `number` if the run was not interrupted.
    """
    interruption = Interruption(number, start, kills)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", interruption.wrap(torch.save))
        save_file = interruption.wrap(safetensors.torch.save_file)
        patch.setattr("transformers.modeling_utils.safe_save_file", save_file)
        ACTIVE.append(interruption)
        try:
            main(arguments)
        except Interrupted:
            pass
        finally:
            ACTIVE.remove(interruption)
    return interruption.count


def limit_file_size(
    patch: pytest.MonkeyPatch, name: str, is_limited: Callable[..., bool], size: int
) -> None:
    """Let a method of the trainer write no file longer than `size` bytes, as on a full disk.

    Args:
        patch: undoes it.
        name: of the method.
        is_limited: called with the arguments of the method; whether this call is limited.
        size: in bytes.
    """
    stock_method = getattr(LtuTrainer, name)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited_method(*args: Any, **kwargs: Any) -> None:
        if is_limited(*args, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        try:
            stock_method(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    patch.setattr(LtuTrainer, name, limited_method)


def is_step_4(trainer: LtuTrainer, *_: Any, **__: Any) -> bool:
    return trainer.state.global_step == 4


def is_final_save(*_: Any, _internal_call: bool = False, **__: Any) -> bool:
    return not _internal_call


def send_sigterm(patch: pytest.MonkeyPatch) -> None:
    """Let SIGTERM come in the fifth micro-batch, the first one of step 3."""
    stock_loss = LtuTrainer.compute_loss
    calls = []

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return stock_loss(*args, **kwargs)

    patch.setattr(LtuTrainer, "compute_loss", compute_loss)


def killed_command() -> None:
    number = int(os.environ["KILL_AT_WRITE"]) if os.environ["RANK"] == "0" else 10**6
    interrupt_at_save(number, sys.argv[1:], Path(os.environ["KILL_FROM"]), kills=True)


if __name__ == "__main__":
    run_command(killed_command)
