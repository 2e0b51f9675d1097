"""Replies of a language model on disk: what was answered once is never asked, or paid for, again.

Notable:
- One JSON line a reply, under the sha256 of all that its request says. `put` returns when the line is on the disk.
- Half a line, which a killed run leaves, is cut off when the file is opened again.
- Only places in the file are held in memory: about 150 bytes a reply.
- The lock ends with the process that holds it: two runs on one file would pay twice.
"""

import fcntl
import json
import os
from pathlib import Path

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
        self.file = self.path.open("a+b")
        self.places: dict[bytes, int] = {}  # sha256 -> offset
        self.spent = {"prompt_tokens": 0, "completion_tokens": 0}
        self.end = 0
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.file.seek(0)
            for line in self.file:
                if line.endswith(b"\n"):
                    self._note(line)
            self.file.seek(self.end)
            if not BEGINNING.startswith(tail := self.file.read(len(BEGINNING))):
                raise ValueError(f"it begins with {tail!r}")
            self.file.truncate(self.end)  # Half a reply, of a run that was killed.
        except BlockingIOError:
            raise ValueError(f"Another run is adding to {self.path}. Wait for it or stop it.") from None
        except (ValueError, KeyError, TypeError) as error:
            place = f"{self.path}, byte {self.end}"
            raise ValueError(f"{place}: not a reply ({error}). Remove that line, or name another file.") from None

    def _note(self, line: bytes) -> None:
        entry = json.loads(line)
        self.places[bytes.fromhex(entry["key"])] = self.end
        self.spent = {name: count + entry["reply"]["usage"][name] for name, count in self.spent.items()}
        self.end += len(line)

    def get(self, key: str) -> dict | None:
        """The reply to the request of this key, None if there is none."""
        place = self.places.get(bytes.fromhex(key))
        if place is None:
            return None
        self.file.seek(place)
        return json.loads(self.file.readline())["reply"]

    def put(self, key: str, reply: dict) -> None:
        """Add a reply with `usage`; it is on the disk when this returns."""
        line = json.dumps({"key": key, "reply": reply}).encode() + b"\n"
        self.file.write(line)  # At the end, as the file was opened to add.
        self.file.flush()
        os.fsync(self.file.fileno())
        self._note(line)

    @property
    def tokens(self) -> int:
        """What all replies cost, prompts included."""
        return sum(self.spent.values())

    def __enter__(self) -> "ReplyStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
