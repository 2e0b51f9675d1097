"""Stores the replies of a language model on the disk, so that no request is sent and paid twice.

A reply is one JSON line, under the sha256 of everything that its request says. `put` returns when
the line is on the disk.

A line "sent" precedes each try, with the tokens that the try may cost. The reply cancels them, and
so does an error that nobody bills. The sum of the rest, `unanswered_tokens`, was sent without a
reply, also by a run that was killed.

Half a line, of a killed run or a full disk, is cut off: at once, before the next line, or when the
file is opened. Only the offsets in the file are held in memory: about 150 bytes for each reply. The
lock ends with its process: two runs on one file would pay twice.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from qa_generation.llm_types import Reply

BEGINNING = b'{"key": "'  # of every line


class ReplyStore:
    """A file of replies, open for reading and appending; a context manager.

    Args:
        path: The file. It and its folder are created if they do not exist.

    Raises:
        ValueError: Another run has it open, or a line is damaged (path and byte offset).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer, because a buffer would write again what a full disk refused.
        self.file: Any = self.path.open("a+b", buffering=0)
        self.offsets: dict[bytes, int] = {}  # sha256 -> offset
        self.tokens = 0  # tokens of all replies, prompts included
        self.unanswered_tokens = 0  # tokens reserved for tries without a reply
        self.end = 0  # offset after the last whole line
        self.is_torn = False  # there may be half a line after `end`
        if not lock_descriptor(self.file.fileno(), blocking=False):
            self.file.close()
            raise ValueError(f"Another run is adding to {self.path}. Wait for it or stop it.")
        try:
            self._read_all()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.file.close()
            raise ValueError(
                f"{self.path}, byte {self.end}: not a reply ({error}). "
                "Remove that line, or name another file."
            ) from None

    def _read_all(self) -> None:
        with self.path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    self._note(json.loads(line), len(line))
                elif not BEGINNING.startswith(line[: len(BEGINNING)]):
                    raise ValueError(f"it begins with {line[: len(BEGINNING)]!r}")
        self.file.truncate(self.end)  # Remove half a line of a killed run.

    def _note(self, entry: dict, size: int) -> None:
        """Account for a line that is in the file."""
        key = bytes.fromhex(entry["key"])
        if "reply" in entry or "sent" not in entry:
            reply = _reply_of(entry)
            self.tokens += reply.prompt_tokens + reply.completion_tokens
            self.offsets[key] = self.end
        self.unanswered_tokens += entry.get("sent", 0)
        self.end += size

    def get(self, key: str) -> Reply | None:
        """Return the reply to the request with this key, None if there is none.

        Raises:
            ValueError: Another process has truncated the file.
        """
        offset = self.offsets.get(bytes.fromhex(key))
        if offset is None:
            return None
        size = 8192
        data = os.pread(self.file.fileno(), size, offset)
        while b"\n" not in data:
            if len(data) < size:
                raise ValueError(
                    f"{self.path}, byte {offset}: a reply is gone; something else has cut the file."
                )
            size *= 2
            data = os.pread(self.file.fileno(), size, offset)
        return _reply_of(json.loads(data[: data.index(b"\n")]))

    def reserve(self, key: str, tokens: int) -> None:
        """Record the maximum cost of a try before it is sent; a negative number cancels it."""
        self._append({"key": key, "sent": tokens})

    def put(self, key: str, reply: Reply, sent: int = 0) -> None:
        """Add a reply; it is on the disk when this returns.

        Args:
            sent: Tokens that were reserved for the try that got the reply.

        Raises:
            OSError: The reply is not on the disk. All lines before it are, and the next line can be
                added.
        """
        stored_reply = {
            "text": reply.text,
            "finish_reason": reply.finish_reason,
            "model": reply.model,
            "usage": {
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.completion_tokens,
            },
        }
        entry: dict[str, Any] = {"key": key, "reply": stored_reply}
        if sent:
            entry["sent"] = -sent
        self._append(entry, is_synced=True)

    def _append(self, entry: dict, is_synced: bool = False) -> None:
        line = json.dumps(entry).encode() + b"\n"
        rest = line
        try:
            if self.is_torn:
                self.file.truncate(self.end)
            self.is_torn = True
            while rest:  # A disk that is nearly full takes a part of the line.
                rest = rest[self.file.write(rest) :]
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
        # If half a line could not be cut off, the next opening of the file does it.
        self.file.close()


def _reply_of(entry: dict[str, Any]) -> Reply:
    """Return the reply in an entry of the file."""
    reply = entry["reply"]
    usage = reply["usage"]
    return Reply(
        text=reply["text"],
        finish_reason=reply["finish_reason"],
        model=reply["model"],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
    )
