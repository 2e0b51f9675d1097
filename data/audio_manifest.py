"""Reads and writes the manifest of prepared clips, OUT/manifest.jsonl of `data.prepare_audio`.

The manifest says what happened to every source file. A run appends to it; the half line that a
killed run leaves is dropped by the next run. Any other line that is not one of the manifest is an
error: a folder of another program may have a file of that name.

The lock on the folder ends with the process that holds it, so that nothing has to be removed after
kill -9.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from ltu.data.dataset_io import ExampleWriter
from ltu.files import lock_file

# What every clip has.
KEYS_OF_CLIP = ("audio_id", "seconds", "clipped", "bytes")


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
        downmix: how the channels of the source file became one; None in an older manifest, whose
            clips are the first channel.
        warning: what to know about the source file, such as that it is cut short.
        error: what is wrong, with a hint.
    """

    audio_id: str | None
    file: str
    status: str = "ok"
    size: int | None = None
    mtime_ns: int | None = None
    seconds: float | int | None = None
    sampling_rate: int | None = None
    channels: int | None = None
    bits: int | None = None
    clipped: int | None = None
    bytes: int | None = None
    downmix: str | None = None
    warning: str | None = None
    error: str | None = None

    @classmethod
    def of(cls, content: object) -> "ManifestEntry":
        """Return the entry of a line's JSON.

        Raises:
            ValueError: it is not one; the message has the reason.
        """
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}, not an object")
        types = get_type_hints(cls)
        for key in ("audio_id", "file"):
            if key not in content:
                raise ValueError(f"it has no {key!r}")
        for key, value in content.items():
            if key not in types:
                raise ValueError(f"it has an unknown key {key!r}")
            if not isinstance(value, types[key]):
                raise ValueError(f"{key!r} is a {type(value).__name__}")
        entry = cls(**content)
        for key in KEYS_OF_CLIP:
            if entry.status == "ok" and getattr(entry, key) is None:
                raise ValueError(f"it is of a clip and has no {key!r}")
        return entry

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Return the content of its line: `audio_id` and what is known."""
        known = {key: value for key, value in vars(self).items() if value is not None}
        return {"audio_id": self.audio_id, **known}


class AudioManifest:
    """The manifest of a folder of prepared clips.

    When a run has ended, the file is sorted and has one line for each clip or refused file. Leaving
    the `with` block releases the lock of the folder.

    Raises:
        ValueError: another run writes into the folder, or its manifest.jsonl is no manifest.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_file(folder / "manifest.lock", folder)
        self.folder = folder
        self.path = folder / "manifest.jsonl"
        try:
            self.entries: dict[str, ManifestEntry] = self._read()
        except ValueError:
            self.lock.close()
            raise
        self.write([])
        self.file = open(self.path, "a", encoding="ascii")

    def _read(self) -> dict[str, ManifestEntry]:
        """Return audio_id -> entry. Refused files, which have no audio_id, are left out.

        Raises:
            ValueError: a line is not one of the manifest.
        """
        entries = {}
        if not self.path.is_file():
            return entries
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                entry = ManifestEntry.of(json.loads(line))
            except (ValueError, RecursionError) as error:
                # What follows the last line break is empty, or the line that a killed run did not
                # finish.
                if number == len(lines):
                    break
                raise ValueError(
                    f"{self.path}, line {number}: not a line of data.prepare_audio: {error}. If "
                    "the file is of another program, give another --output_dir; else remove the "
                    "line, and its clip is prepared again."
                ) from error
            if entry.audio_id is not None:
                entries[entry.audio_id] = entry
        return entries

    def is_done(self, job: tuple[str, str], folder: Path, downmix: str = "first") -> bool:
        """Return whether the clip of (source, audio_id) exists and its source is unchanged.

        Args:
            job: source file and audio_id.
            folder: of the source files.
            downmix: how several channels become one; it must be that of the clip.
        """
        source, audio_id = job
        entry = self.entries.get(audio_id)
        if entry is None or entry.status != "ok":
            return False
        if entry.channels != 1 and (entry.downmix or "first") != downmix:
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
