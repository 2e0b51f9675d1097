"""Replies of a language model on disk: what was answered once is never asked, or paid for, again.

Notable:
- One JSON line a reply, under the sha256 of all that its request says. `put` returns when the line is on the disk.
- A line "sent" stands before each try with the tokens that it may cost. They are taken back by the reply, or where
  nobody bills the try; the sum of what is left, `lost`, was sent without a reply, also by a run that was killed.
- Half a line, of a killed run or a full disk, is cut off: at once, before the next line, or when the file is opened.
- Only places in the file are held in memory: about 150 bytes a reply.
- The lock ends with the process that holds it: two runs on one file would pay twice.
"""

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

BEGINNING = b'{"key": "'  # of every line


class ReplyStore:
    """A file of replies, open for reading and adding; a context manager.

    Args:
        path: made, with its folder, where it is not there.

    Raises:
        ValueError: another run has it open, or a line is damaged (path and byte offset).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file: Any = self.path.open(
            "a+b", buffering=0
        )  # A buffer would write again what a full disk refused.
        self.places: dict[bytes, int] = {}  # sha256 -> offset
        self.tokens = self.lost = self.end = 0  # tokens: what all replies cost, prompts included
        self.is_torn = False
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read_all()
        except BlockingIOError:
            self.file.close()
            raise ValueError(
                f"Another run is adding to {self.path}. Wait for it or stop it."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.file.close()
            place = f"{self.path}, byte {self.end}"
            raise ValueError(
                f"{place}: not a reply ({error}). Remove that line, or name another file."
            ) from None

    def _read_all(self) -> None:
        with self.path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    self._note(json.loads(line), len(line))
                elif not BEGINNING.startswith(line[: len(BEGINNING)]):
                    raise ValueError(f"it begins with {line[: len(BEGINNING)]!r}")
        self.file.truncate(self.end)  # Half a line, of a run that was killed.

    def _note(self, entry: dict, size: int) -> None:
        key = bytes.fromhex(entry["key"])
        if "reply" in entry or "sent" not in entry:
            usage = entry["reply"]["usage"]
            self.tokens += usage["prompt_tokens"] + usage["completion_tokens"]
            self.places[key] = self.end
        self.lost += entry.get("sent", 0)
        self.end += size

    def get(self, key: str) -> dict | None:
        """The reply to the request of this key, None if there is none."""
        place = self.places.get(bytes.fromhex(key))
        if place is None:
            return None
        size = 8192
        while b"\n" not in (data := os.pread(self.file.fileno(), size, place)):
            if len(data) < size:
                raise ValueError(
                    f"{self.path}, byte {place}: a reply is gone; something else has cut the file."
                )
            size *= 2
        return json.loads(data[: data.index(b"\n")])["reply"]

    def reserve(self, key: str, tokens: int) -> None:
        """Note what a try may cost that is about to be sent; negative: nobody bills it."""
        self._append({"key": key, "sent": tokens})

    def put(self, key: str, reply: dict, sent: int = 0) -> None:
        """Add a reply with `usage`; it is on the disk when this returns.

        Args:
            sent: tokens that were reserved for the try that brought it.

        Raises:
            OSError: it is not on the disk; all that was there before is, and so is its place for the next one.
        """
        self._append(
            {"key": key, "reply": reply} | ({"sent": -sent} if sent else {}), is_synced=True
        )

    def _append(self, entry: dict, is_synced: bool = False) -> None:
        left = line = json.dumps(entry).encode() + b"\n"
        try:
            if self.is_torn:
                self.file.truncate(self.end)
            self.is_torn = True
            while left:  # A disk that is about to be full takes a part.
                left = left[self.file.write(left) :]
            if is_synced:
                os.fsync(self.file.fileno())
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(self.end)
                self.is_torn = False
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.is_torn = False
        self._note(entry, len(line))

    def __enter__(self) -> "ReplyStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()  # Half a line that could not be cut off is cut off when the file is opened again.
