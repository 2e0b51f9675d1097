"""Reads and writes the manifest of prepared clips, OUT/manifest.jsonl of `data.prepare_audio`.

The manifest says what happened to every source file. A run appends to it; the half line that a
killed run leaves is dropped by the next run. The lock on the folder ends with the process that
holds it, so that nothing has to be removed after kill -9.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ltu.data.dataset_io import ExampleWriter
from ltu.files import lock_file


@dataclass
class ManifestEntry:
    """What happened to a source file.

    Attributes:
        audio_id: its clip, relative to the output folder; None if it has none.
        file: the source file, relative to the input folder.
        status: "ok", or why there is no clip.
        size: of the source file, in bytes.
        mtime_ns: time of the last change of the source file.
        seconds: length of the clip.
        sampling_rate: of the source file, in Hz.
        channels: of the source file.
        bits: of a sample of the clip.
        clipped: number of samples beyond full scale.
        bytes: size of the clip.
        error: what is wrong, with a hint.
    """

    audio_id: str | None
    file: str
    status: str = "ok"
    size: int | None = None
    mtime_ns: int | None = None
    seconds: float | None = None
    sampling_rate: int | None = None
    channels: int | None = None
    bits: int | None = None
    clipped: int | None = None
    bytes: int | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Return the content of its line: `audio_id` and what is known."""
        known = {key: value for key, value in vars(self).items() if value is not None}
        return {"audio_id": self.audio_id, **known}


class AudioManifest:
    """The manifest of a folder of prepared clips.

    When a run has ended, the file is sorted and has one line for each clip or refused file. Leaving
    the `with` block releases the lock of the folder.

    Raises:
        ValueError: another run writes into the folder.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_file(folder / "manifest.lock", folder)
        self.folder = folder
        self.path = folder / "manifest.jsonl"
        self.entries: dict[str, ManifestEntry] = self._read()
        self.write([])
        self.file = open(self.path, "a", encoding="ascii")

    def _read(self) -> dict[str, ManifestEntry]:
        """Return audio_id -> entry. Refused files, which have no audio_id, are left out."""
        entries = {}
        if not self.path.is_file():
            return entries
        for line in self.path.read_bytes().split(b"\n"):
            try:
                entry = ManifestEntry(**json.loads(line))
            except (ValueError, TypeError):  # The line that a killed run did not finish.
                continue
            if entry.audio_id is not None:
                entries[entry.audio_id] = entry
        return entries

    def is_done(self, job: tuple[str, str], folder: Path) -> bool:
        """Return whether the clip of (source, audio_id) exists and its source is unchanged."""
        source, audio_id = job
        entry = self.entries.get(audio_id)
        if entry is None or entry.status != "ok":
            return False
        try:
            source_stat = (folder / source).stat()
            clip_stat = (self.folder / audio_id).stat()
        except OSError:
            return False
        is_same = (entry.size, entry.mtime_ns) == (source_stat.st_size, source_stat.st_mtime_ns)
        return is_same and entry.bytes == clip_stat.st_size

    def append(self, entry: ManifestEntry) -> None:
        """Add an entry and write its line."""
        self.entries[entry.audio_id] = entry
        self.file.write(json.dumps(entry.to_dict()) + "\n")
        self.file.flush()

    def write(self, refused: list[ManifestEntry]) -> None:
        """Write the whole manifest: the entries, sorted by audio_id, then the refused files."""
        entries = [self.entries[audio_id] for audio_id in sorted(self.entries)]
        with ExampleWriter(self.path) as file:
            for entry in entries + refused:
                file.write(entry.to_dict())

    def __enter__(self) -> "AudioManifest":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.lock.close()
