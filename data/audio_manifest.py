"""What became of every source file of `data.prepare_audio`: OUT/manifest.jsonl.

Notable:
- Appended to while a run lasts; half a line, which a killed run leaves, is dropped by the next.
- The lock ends with the process that holds it, so there is nothing to clear away after kill -9.
"""

import json
from pathlib import Path

from ltu.data.dataset_files import RowWriter
from ltu.files import lock_file


class Ledger:
    """The ledger of a folder of prepared clips; sorted, one line a clip or refused file, once a run has ended.

    A context manager: at its end other runs may write into the folder.

    Raises:
        ValueError: another run writes into the folder.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_file(folder / "ledger.lock", folder)
        self.folder, self.path = folder, folder / "manifest.jsonl"
        self.entries: dict[str, dict] = {}
        for line in self.path.read_bytes().split(b"\n") if self.path.is_file() else ():
            try:
                entry = json.loads(line)
                if entry["audio_id"] is not None:  # Refusals are found anew.
                    self.entries[entry["audio_id"]] = entry
            except ValueError:  # A line that a killed run did not finish.
                continue
        self.write([])
        self.file = open(self.path, "a", encoding="ascii")

    def is_done(self, job: tuple[str, str], folder: Path) -> bool:
        """Whether the clip of (source, audio_id) is there, and was made of the source as it is."""
        entry = self.entries.get(job[1], {})
        try:
            found, made = (folder / job[0]).stat(), (self.folder / job[1]).stat()
        except OSError:
            return False
        is_same = (entry.get("size"), entry.get("mtime_ns")) == (found.st_size, found.st_mtime_ns)
        return entry.get("status") == "ok" and is_same and entry["bytes"] == made.st_size

    def append(self, entry: dict) -> None:
        self.entries[entry["audio_id"]] = entry
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def write(self, refused: list[dict]) -> None:
        with RowWriter(self.path) as file:
            for entry in [self.entries[audio_id] for audio_id in sorted(self.entries)] + refused:
                file.write(entry)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.lock.close()
