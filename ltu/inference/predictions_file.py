"""Writes a predictions file whole or not at all, and stores answers in a partial file meanwhile.

During a run, P.json.partial.jsonl has one line for each answer; rank r > 0 of torchrun writes
P.json.partial.r.jsonl. Each line has a key of everything that decides the answer: the clip by its
content, not by its name, and Whisper and the feature folder by their paths. A line is used only for
a question with the same key. Partial files of a killed run are merged into one before anything is
added. An incomplete line is dropped there, and any number of ranks can continue the run of any
other number. The lock is released with the processes that hold it, so nothing is left to clean up
after kill -9.
"""

import fcntl
import glob
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO

from ltu.files import check_output, replace_file
from ltu.inference.requests import Answer

# Hash of the clip's content (None without audio), question, transcript, mode, number of chunks;
# and a hash of the settings of the run.
Key = tuple[str | None, str, str | None, str, int | None, str]


class PredictionsFile:
    """One output of a run, for one of its ranks.

    Args:
        path: of the whole file, P.json.
        rank: of this process.
    """

    def __init__(self, path: str | Path, rank: int = 0):
        self.path = Path(path)
        self.rank = rank
        self.partial = Path(f"{path}.partial.jsonl")
        if rank:
            self.partial = Path(f"{path}.partial.{rank}.jsonl")
        self.lock_path = self.path.with_name(f".{self.path.name}.lock")
        self.locked: IO | None = None
        self.lines: IO | None = None

    def lock(self) -> None:
        """Lock the output against other runs. Rank 0 locks first, and then the others.

        Raises:
            ValueError: another run writes this output, or it is no file.
        """
        check_output(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.locked = self.lock_path.open("a")
        try:
            if self.rank == 0:
                fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Ranks share the lock, which excludes an exclusive one. The shared locks of filelock
            # need an SQLite database and cannot be made of an exclusive one.
            fcntl.flock(self.locked, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another run is writing {self.path} now. Wait for it or stop it, or give another "
                "--output_path."
            ) from None
        is_same_file = self.lock_path.exists() and os.path.samestat(
            self.lock_path.stat(), os.fstat(self.locked.fileno())
        )
        # A run that ended just now may have removed the file after it was opened here.
        if not is_same_file:
            self.close()
            self.lock()

    def close(self) -> None:
        """Release the lock and close the partial file."""
        for file in (self.lines, self.locked):
            if file is not None:
                file.close()

    def append(self, key: Key, answer: Answer) -> None:
        """Append an answer; it is on the disk when this returns."""
        self.lines = self.lines or self.partial.open("ab")
        self.lines.write(_line(key, answer))
        self.lines.flush()
        os.fsync(self.lines.fileno())

    def merge(self) -> dict[Key, Answer]:
        """Return all answers so far, and merge the partial files into that of rank 0.

        Questions that failed are not stored, so that the next run tries them again. Rank 0 calls
        this while no rank appends.
        """
        names = glob.glob(f"{glob.escape(str(self.path))}.partial*.jsonl")
        paths = [Path(name) for name in names]
        found: dict[Key, Answer] = {}
        for path in paths:
            for key, answer in _read(path):
                if key not in found or not found[key].answered:
                    found[key] = answer
        if paths:
            if self.lines:
                self.lines.close()
            self.lines = None
            lines = (_line(key, answer) for key, answer in found.items() if answer.answered)
            replace_file(self.partial, lines, is_synced=True)
        for path in set(paths) - {self.partial}:
            path.unlink()
        return found

    def write(self, entries: list[dict]) -> None:
        """Write the whole file."""
        text = json.dumps(entries, indent=1, ensure_ascii=False)
        content = text.encode("utf-8", "backslashreplace")  # Names of files may be no UTF-8.
        replace_file(self.path, content + b"\n", is_synced=True)

    def finish(self, keep_partial: bool) -> None:
        """Remove the lock, and the partial file unless it is needed. Only rank 0 calls this."""
        self.lock_path.unlink(missing_ok=True)
        if not keep_partial:
            self.partial.unlink(missing_ok=True)


def _line(key: Key, answer: Answer) -> bytes:
    return json.dumps({"key": key, "answer": asdict(answer)}).encode() + b"\n"


def _read(path: Path) -> Iterable[tuple[Key, Answer]]:
    with path.open("rb") as lines:
        for line in lines:
            try:
                content = json.loads(line)
                pair = tuple(content["key"]), Answer(**content["answer"])
            except (ValueError, TypeError, KeyError):
                continue  # An incomplete line, or one of another version: its question runs again.
            yield pair
