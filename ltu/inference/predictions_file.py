"""A file of answers that is written whole or not at all, and what is kept of it meanwhile.

Notable:
- While a run lasts, P.json.partial.jsonl has one line an answer; rank r > 0 of torchrun writes P.json.partial.r.jsonl.
- A line counts for a question only if all that decides its answer is the same: its key. No file's name is part of it.
- What a killed run left is brought into one file before anything is added: half a line falls out there, and any number
  of ranks goes on with what any other number left.
- The lock ends with the processes that hold it, so there is nothing to clear away after kill -9.
"""

import fcntl
import glob
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO

from ltu.files import replace_file
from ltu.inference.requests import Answer

# Hash of the clip's content (None without audio), question, transcript, mode, chunks; hash of what a run sets for all.
Key = tuple[str | None, str, str | None, str, int | None, str]


class AnswerFile:
    """One output of a run, for one of its ranks.

    Args:
        path: of the whole file, P.json.
        rank: of this process.
    """

    def __init__(self, path: str | Path, rank: int = 0):
        self.path, self.rank = Path(path), rank
        self.partial = Path(f"{path}.partial.{rank}.jsonl" if rank else f"{path}.partial.jsonl")
        self.lock_path = self.path.with_name(f".{self.path.name}.lock")
        self.locked: IO | None = None
        self.lines: IO | None = None

    def lock(self) -> None:
        """Keep other runs away. Rank 0 goes first and finds out whether there is one; then the others.

        Raises:
            ValueError: another run writes this output.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.locked = self.lock_path.open("a")
        try:
            if self.rank == 0:
                fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(
                self.locked, fcntl.LOCK_SH | fcntl.LOCK_NB
            )  # Ranks share it; that keeps an exclusive one away.
        except BlockingIOError:
            raise ValueError(
                f"Another run is writing {self.path} now. Wait for it or stop it, or give another --output_path."
            ) from None
        is_there = self.lock_path.exists() and os.path.samestat(
            self.lock_path.stat(), os.fstat(self.locked.fileno())
        )
        if (
            not is_there
        ):  # A run that ended just now removed the file between its opening and its locking.
            self.close()
            self.lock()

    def close(self) -> None:
        """Let go of the lock, and of the partial file."""
        for file in (self.lines, self.locked):
            if file is not None:
                file.close()

    def append(self, key: Key, answer: Answer) -> None:
        """Add an answer; it is on the disk when this returns."""
        self.lines = self.lines or self.partial.open("ab")
        self.lines.write(_line(key, answer))
        self.lines.flush()
        os.fsync(self.lines.fileno())

    def merge(self) -> dict[Key, Answer]:
        """All answers so far. What was answered is brought into rank 0's partial file; what failed is not kept, so that
        the next run tries it again. Rank 0 calls this, when no rank is adding."""
        places = [
            Path(place) for place in glob.glob(f"{glob.escape(str(self.path))}.partial*.jsonl")
        ]
        found: dict[Key, Answer] = {}
        for key, answer in (pair for place in places for pair in _read(place)):
            if key not in found or not found[key].answered:
                found[key] = answer
        if places:
            self.lines = self.lines.close() if self.lines else None
            lines = (_line(key, answer) for key, answer in found.items() if answer.answered)
            replace_file(self.partial, lines, is_synced=True)
        for place in set(places) - {self.partial}:
            place.unlink()
        return found

    def write(self, entries: list[dict]) -> None:
        """The whole file."""
        text = json.dumps(entries, indent=1, ensure_ascii=False)
        content = text.encode("utf-8", "backslashreplace")  # Names of files may be no UTF-8.
        replace_file(self.path, content + b"\n", is_synced=True)

    def finish(self, keep_partial: bool) -> None:
        """Leave nothing but the whole file, and what failed questions want to go on from. Rank 0 only."""
        for place in [self.lock_path] if keep_partial else [self.partial, self.lock_path]:
            place.unlink(missing_ok=True)


def _line(key: Key, answer: Answer) -> bytes:
    return json.dumps({"key": key, "answer": asdict(answer)}).encode() + b"\n"


def _read(place: Path) -> Iterable[tuple[Key, Answer]]:
    with place.open("rb") as lines:
        for line in lines:
            try:
                content = json.loads(line)
                pair = tuple(content["key"]), Answer(**content["answer"])
            except (ValueError, TypeError, KeyError):
                continue  # Half a line, or one of another version: its question is asked again.
            yield pair
