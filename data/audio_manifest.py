"""Reads and writes the manifest of prepared clips, OUT/manifest.jsonl of `data.prepare_audio`.

The manifest says what happened to every source file. A run appends to it; the half line that a
killed run leaves is dropped by the next run. The lock on the folder ends with the process that
holds it, so that nothing has to be removed after kill -9.
"""

import json
from pathlib import Path

from ltu.data.dataset_io import RowWriter
from ltu.files import lock_file


class AudioManifest:
    """The manifest of a folder of prepared clips.

    Once a run has ended, the file is sorted and has one line for each clip or refused file. As a
    context manager it ends with other runs being able to write into the folder.

    Raises:
        ValueError: another run writes into the folder.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_file(folder / "manifest.lock", folder)
        self.folder = folder
        self.path = folder / "manifest.jsonl"
        self.entries: dict[str, dict] = self._read()
        self.write([])
        self.file = open(self.path, "a", encoding="ascii")

    def _read(self) -> dict[str, dict]:
        """Return audio_id -> entry. Refused files, which have no audio_id, are left out."""
        entries = {}
        if not self.path.is_file():
            return entries
        for line in self.path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                if entry["audio_id"] is not None:
                    entries[entry["audio_id"]] = entry
            except ValueError:  # The line that a killed run did not finish.
                continue
        return entries

    def is_done(self, job: tuple[str, str], folder: Path) -> bool:
        """Return whether the clip of (source, audio_id) exists and its source is unchanged."""
        source, audio_id = job
        entry = self.entries.get(audio_id, {})
        try:
            source_stat = (folder / source).stat()
            clip_stat = (self.folder / audio_id).stat()
        except OSError:
            return False
        recorded = (entry.get("size"), entry.get("mtime_ns"))
        is_same = recorded == (source_stat.st_size, source_stat.st_mtime_ns)
        return entry.get("status") == "ok" and is_same and entry["bytes"] == clip_stat.st_size

    def append(self, entry: dict) -> None:
        """Add an entry and write its line."""
        self.entries[entry["audio_id"]] = entry
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def write(self, refused: list[dict]) -> None:
        """Write the whole manifest: the entries, sorted by audio_id, then the refused files."""
        entries = [self.entries[audio_id] for audio_id in sorted(self.entries)]
        with RowWriter(self.path) as file:
            for entry in entries + refused:
                file.write(entry)

    def __enter__(self) -> "AudioManifest":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.lock.close()
