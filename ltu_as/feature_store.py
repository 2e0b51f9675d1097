"""Reads and writes folders of Whisper features.

A folder holds one safetensors file per clip, or the `.npz` files of the original, which are only
read.

In a safetensors file, the highest byte of every number (sign, exponent) is compressed. The other
bytes are noise, and are stored raw. Such a file is smaller than a compressed npz, and is read
several times as fast. It is written whole or not at all; a file that was damaged later is detected
by its length and checksum.

A file records what the audio was (`ltu.files.FileRecord`). If a clip is replaced under the same
name, its features are stale: they are not used, and are extracted again. Where the audio is not
there, nothing can be compared, and features are used as they are. So are features without a record:
those of the original, and those of earlier versions.

A clip that failed has a `.failed` marker and no features. The original wrote zeros instead, which
are never used.
"""

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ltu.data.audio import AudioSource
from ltu.data.table_clip import (
    TableClip,
    clip_exists,
    fits_record,
    mtime_of_clip,
    record_clip,
)
from ltu.files import FileRecord, check_regular_file, read_json_object, replace_file

# The unsigned integers of the same size, by the name of a float type.
UNSIGNED_TYPES = {"float16": np.uint16, "float32": np.uint32}
CODEC = pyarrow.Codec("zstd", compression_level=1)
# Bytes of an npz file. One of zeros is smaller, so larger files are not read to look for zeros.
MAX_ZEROS_BYTES = 65_536
EXTRACT = "python -m ltu_as.extract_whisper_feature"
# Keys of `LtuAsFeatureExtractor.describe()` in which all features of a folder must agree.
COMPARED_SETTINGS = (
    "fingerprint",
    "shape",
    "feature_precision",
    "computed_in",
    "transcription_model",
    "language",
    "transcript_rule",
    "channels",
    "loop_short_clips",
)


class FeatureError(ValueError):
    """A file of features cannot be used. The message has its path, the reason and a hint."""

    def __init__(
        self, path: str | Path, reason: str, hint: str = f"Delete it and run {EXTRACT} again."
    ):
        self.path = str(path)
        self.reason = reason
        self.hint = hint
        super().__init__(f"{path}: {reason}. {hint}")

    def __reduce__(self):
        # Workers of a data loader pickle their errors, as for ltu.data.audio.AudioError.
        return type(self), (self.path, self.reason, self.hint)


class DamagedFeatures(FeatureError):
    """One file was cut or changed; the others may be whole."""


class StaleFeatures(ValueError):
    """The stored features of a clip are those of other audio."""


class ClipState(Enum):
    """What a store holds of a clip, by the words that an extraction prints."""

    KEPT = "kept"
    MOVED = "moved"  # The same audio with another time; it had to be hashed.
    NEW = "new"
    CHANGED = "changed"  # Features of other audio.
    UNRECORDED = "without a record of the audio"
    UNTRANSCRIBED = "without a transcript"

    @property
    def is_complete(self) -> bool:
        return self in (ClipState.KEPT, ClipState.MOVED)


@dataclass
class ClipHeader:
    """What a file of features says besides the features.

    Attributes:
        audio_id: the name of the clip in its example.
        transcript: None if the clip was not transcribed.
        seconds: duration of the clip.
        shape: (layers, time, width).
        dtype: "float16" or "float32".
        sum: checksum of the compressed features.
        source: what the audio was; None in the files of earlier versions.
        is_cut_short: whether the file of the audio ended before the length in its header.
        warnings: those of `ltu.data.audio.Waveform`.
    """

    audio_id: str
    transcript: str | None
    seconds: float | None
    shape: list[int]
    dtype: str
    sum: int
    source: FileRecord | None = None
    is_cut_short: bool = False
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, file: safe_open) -> "ClipHeader":
        """Read the header of an open file.

        Raises:
            KeyError, TypeError, ValueError: it is no file of features.
        """
        header = cls(**json.loads(file.metadata()["clip"]))
        if header.source is not None:
            header.source = FileRecord(**header.source)
        return header

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata of a safetensors file."""
        return {"clip": json.dumps(asdict(self), ensure_ascii=False)}


class Stored(NamedTuple):
    """The stored features of a clip. The original's files hold the features only."""

    features: torch.Tensor  # (layers, time, width)
    transcript: str | None = None
    seconds: float | None = None
    is_cut_short: bool = False
    warnings: tuple[str, ...] = ()


def original_name(audio_id: str) -> str:
    """Return the original's name of a feature file: three folders of the clip, and its stem."""
    parts = audio_id.split("/")
    return f"{'_'.join(parts[-4:-1])}_{parts[-1].rpartition('.')[0]}.npz"


class FeatureStore:
    """A folder of features by `audio_id`, exactly as it is in the example.

    Args:
        folder: of `extract_whisper_feature`, or of the original's `.npz` files, which is only read.
        shape: (layers, time, width) of the features that are needed. It is ignored if the folder
            itself states the shape.

    Attributes:
        description: `LtuAsFeatureExtractor.describe()` of the features; empty for the original's.

    Raises:
        FileNotFoundError: the folder holds no features of either kind.
        ValueError: its `store.json` is damaged.
    """

    def __init__(self, folder: str | Path, shape: list[int] | None = None):
        self.folder = Path(folder)
        file = self.folder / "store.json"
        self.is_original = not file.is_file()
        if self.is_original and not any(self.folder.glob("*.npz")):
            raise FileNotFoundError(
                f"{folder} holds no features (store.json or .npz files). Make them: {EXTRACT}"
            )
        self.description: dict[str, Any] = {}
        if not self.is_original:
            self.description = _read_description(file)
        self.shape = self.description.get("shape") or (shape and list(shape))

    @classmethod
    def create(cls, folder: str | Path, description: dict[str, Any]) -> "FeatureStore":
        """Open a folder to write features to; create it if need be.

        Args:
            description: `LtuAsFeatureExtractor.describe()` of the features to write.

        Raises:
            ValueError: the folder holds features of another model or precision, or those of the
                original.
        """
        file = Path(folder) / "store.json"
        if not file.is_file() and any(file.parent.glob("*.npz")):
            raise ValueError(
                f"{folder} holds .npz files of the original, which are only read. Choose another "
                "folder."
            )
        if not file.is_file():
            content = json.dumps({"format": 1, "features": description}, indent=1)
            replace_file(file, content.encode(), shared=True)
        store = cls(folder)
        differences = []
        for key in COMPARED_SETTINGS:
            old = store.description.get(key)
            new = description.get(key)
            if old != new:
                differences.append(f"{key} {old} there, {new} now")
        if differences:
            raise ValueError(
                f"{folder} holds features of Whisper {store.description['whisper_model']}, which "
                f"differ from those of {description['whisper_model']}: {'; '.join(differences)}. "
                "Choose another folder, or the same Whisper, settings and kind of device."
            )
        return store

    def read(self, audio_id: str) -> Stored | None:
        """Return the features of a clip, or None if there are none.

        Raises:
            FeatureError: the file is damaged, or its features have another shape.
        """
        if self.is_original:
            path = self._find_original(audio_id)
            if path is None:
                return None
            stored = Stored(torch.from_numpy(_load_npz(path)))
        else:
            path = self.path_of(audio_id)
            stored = _load(path)
        if stored is not None and self.shape and list(stored.features.shape) != self.shape:
            raise FeatureError(
                path,
                f"its features are (layers, time, width) = {list(stored.features.shape)}, needed "
                f"are {self.shape}",
                "It is another Whisper's; give the folder that fits the checkpoint.",
            )
        return stored

    def find_file(self, audio_id: str) -> Path | None:
        """Return the path of the features of a clip, which may be damaged, or None."""
        if self.is_original:
            return self._find_original(audio_id)
        path = self.path_of(audio_id)
        return path if path.is_file() else None

    def has(self, audio_id: str, with_transcript: bool = False) -> bool:
        """Return whether the features of a clip are stored.

        Args:
            with_transcript: whether a transcript must be stored with them.
        """
        if self.is_original:
            return not with_transcript and self._find_original(audio_id) is not None
        header = self._read_header(audio_id)
        if header is None:
            return False
        return not with_transcript or header.transcript is not None

    def state_of(self, audio_id: str, path: str | Path, with_transcript: bool = False) -> ClipState:
        """Return what an extraction of a clip has to do.

        Args:
            path: the audio. If it is not there, the features are kept.
            with_transcript: whether a transcript must be stored with the features.
        """
        header = self._read_header(audio_id)
        if header is None:
            return ClipState.NEW
        has_sound = clip_exists(path)
        if has_sound and header.source is None:
            return ClipState.UNRECORDED
        if has_sound and not fits_record(header.source, path):
            return ClipState.CHANGED
        if with_transcript and header.transcript is None:
            return ClipState.UNTRANSCRIBED
        if has_sound and mtime_of_clip(path) != header.source.mtime_ns:
            return ClipState.MOVED
        return ClipState.KEPT

    def is_stale(self, audio_id: str, audio: AudioSource) -> bool:
        """Return whether the stored features of a clip are those of other audio.

        They are not if there is nothing to compare: no record, no file, or an array as audio.

        Args:
            audio: the audio as it is now. A file is hashed only if its time differs from the
                record.
        """
        header = None if self.is_original else self._read_header(audio_id)
        if header is None or header.source is None:
            return False
        if isinstance(audio, bytes):
            is_same_size = len(audio) == header.source.size
            return not is_same_size or hashlib.sha256(audio).hexdigest() != header.source.sha256
        if isinstance(audio, str | Path) and clip_exists(audio):
            return not fits_record(header.source, audio)
        return False

    def check_current(self, audio_id: str, audio: AudioSource) -> None:
        """Check that stored features are those of the audio, as in `is_stale`.

        Raises:
            StaleFeatures: they are those of other audio.
        """
        if self.is_stale(audio_id, audio):
            raise StaleFeatures(
                f"{audio_id}: the audio has changed since its features were stored in "
                f"{self.folder}. Extract them again (clips that did not change are kept): "
                f"{EXTRACT} --data_path DATA --model DIR --output_dir {self.folder}"
            )

    def write(
        self,
        audio_id: str,
        features: torch.Tensor,
        transcript: str | None,
        seconds: float | None,
        source: FileRecord | None = None,
        is_cut_short: bool = False,
        warnings: Sequence[str] = (),
    ) -> None:
        """Store a clip.

        Args:
            audio_id: the name of the clip in its example.
            features: (layers, time, width), in half or single precision.
            transcript: None if the clip was not transcribed.
            seconds: duration of the clip.
            source: what the audio was before it was decoded. Without it, a change of the audio is
                not noticed.
            is_cut_short, warnings: as in `ltu.data.audio.Waveform`; each answer says them.

        Raises:
            FeatureError: the features have another shape.
        """
        path = self.path_of(audio_id)
        if list(features.shape) != self.shape:
            raise FeatureError(
                path,
                f"{list(features.shape)} is not the store's {self.shape}",
                "Use its own Whisper.",
            )
        array = np.ascontiguousarray(features.numpy())
        bits = array.view(UNSIGNED_TYPES[array.dtype.name]).reshape(-1)
        # One array per byte of a number, from the lowest to the highest.
        planes = [(bits >> shift).astype(np.uint8) for shift in range(0, 8 * bits.itemsize, 8)]
        high = np.frombuffer(CODEC.compress(planes.pop(), asbytes=True), np.uint8)
        low = np.stack(planes[::-1])  # (bytes of a number - 1, numbers), the highest first
        checksum = _checksum(high) + _checksum(low)
        header = ClipHeader(
            audio_id,
            transcript,
            seconds,
            self.shape,
            array.dtype.name,
            checksum,
            source,
            is_cut_short,
            list(warnings),
        )
        replace_file(path, save({"high": high, "low": low}, header.to_metadata()))
        path.with_suffix(".failed").unlink(missing_ok=True)

    def renew_record(self, audio_id: str, path: str | Path) -> None:
        """Record the time of audio of `ClipState.MOVED`, so that no reader has to hash it."""
        source = record_clip(path)
        with _open(self.path_of(audio_id)) as file:
            header = ClipHeader.of(file)
            tensors = {name: file.get_tensor(name) for name in ("high", "low")}
        if source.sha256 == header.source.sha256:  # It may have changed just now.
            header.source = source
            replace_file(self.path_of(audio_id), save(tensors, header.to_metadata()))

    def remove(self, audio_id: str) -> None:
        """Remove the features of a clip."""
        self.path_of(audio_id).unlink(missing_ok=True)

    def fail(self, audio_id: str, reason: str, detail: str) -> None:
        """Mark a clip as failed; a later `write` removes the marker."""
        marker = {"audio_id": audio_id, "reason": reason, "detail": detail}
        replace_file(
            self.path_of(audio_id).with_suffix(".failed"),
            json.dumps(marker, ensure_ascii=False).encode(),
        )

    def failures(self) -> list[dict[str, str]]:
        """Return the markers of failed clips, each with audio_id, reason and detail.

        For a folder of the original, the audio_id is the name of the feature file.
        """
        if self.is_original:
            names = [path.name for path in sorted(self.folder.glob("*.npz")) if _is_zeros(path)]
            return [
                {"audio_id": name, "reason": "zeros", "detail": "the original's mark of failure"}
                for name in names
            ]
        return [read_json_object(path) for path in sorted(self.folder.glob("*/*.failed"))]

    def path_of(self, audio_id: str) -> Path:
        """Return the path of the file to write the features of a clip to.

        Raises:
            ValueError: the folder is one of the original.
        """
        if self.is_original:
            raise ValueError(
                f"{self.folder} holds .npz files of the original, which are only read."
            )
        digest = hashlib.sha256(audio_id.encode()).hexdigest()[:16]
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(audio_id).stem)[:40]
        return self.folder / digest[:2] / f"{stem}-{digest}.safetensors"

    def _read_header(self, audio_id: str) -> ClipHeader | None:
        """Return the header of a clip's file; None if there is none, or if it is damaged."""
        try:
            with _open(self.path_of(audio_id)) as file:
                return ClipHeader.of(file)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None

    def _find_original(self, audio_id: str) -> Path | None:
        """Return the path of the original's features of a clip, or None if there are none."""
        if TableClip.parse(audio_id) is not None:  # Its table would give its name to all clips.
            return None
        stem = audio_id.rpartition("/")[2].rpartition(".")[0]
        for name in (original_name(audio_id), f"{stem}.npz"):
            path = self.folder / name
            if path.is_file() and not _is_zeros(path):
                return path
        return None


def _open(path: Path) -> safe_open:
    """Open a safetensors file of features.

    Raises:
        OSError, SafetensorError, ValueError: it is missing or damaged, or no regular file.
    """
    check_regular_file(path)
    return safe_open(path, "np")


def _read_description(path: Path) -> dict[str, Any]:
    """Return `LtuAsFeatureExtractor.describe()` of the features of a folder, from its `store.json`.

    Raises:
        ValueError: the file is damaged.
    """
    description = read_json_object(path).get("features")
    if not isinstance(description, dict):
        description = {}
    shape = description.get("shape")
    has_shape = isinstance(shape, list) and [type(size) for size in shape] == [int] * 3
    if not has_shape or not isinstance(description.get("whisper_model"), str):
        raise ValueError(
            f"{path} is damaged: it does not say of which Whisper and of which shape the features "
            "are. Copy it again, or extract the features again into another folder."
        )
    return description


def _load(path: Path) -> Stored | None:
    """Read a safetensors file of features; return None if there is none.

    Raises:
        DamagedFeatures: the file cannot be read, or its checksum does not fit.
    """
    try:
        with _open(path) as file:
            header = ClipHeader.of(file)
            high = file.get_tensor("high")
            low = file.get_tensor("low")
        if _checksum(high) + _checksum(low) != header.sum:
            raise ValueError("its checksum does not fit")
        highest = CODEC.decompress(high, decompressed_size=low.shape[1])
        bits = np.frombuffer(highest, np.uint8).astype(UNSIGNED_TYPES[header.dtype])
        # Append the other bytes of each number, from the highest to the lowest.
        for plane in low:
            bits <<= 8
            bits |= plane
        features = torch.from_numpy(bits.view(header.dtype).reshape(header.shape))
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFeatures(path, f"damaged ({error})") from error
    return Stored(
        features, header.transcript, header.seconds, header.is_cut_short, tuple(header.warnings)
    )


def _checksum(content: np.ndarray) -> int:
    """Return a cheap checksum, which leaves out at most the last seven bytes."""
    return int(np.frombuffer(content, np.uint64, content.size // 8).sum(dtype=np.uint64))


def _load_npz(path: Path) -> np.ndarray:
    """Read features (layers, time, width) of the original.

    Raises:
        DamagedFeatures: the file cannot be read.
    """
    try:
        check_regular_file(path)
        with np.load(path) as file:
            return file["arr_0"]
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFeatures(
            path, f"no features of the original ({error})", "Extract them again."
        ) from error


def _is_zeros(path: Path) -> bool:
    """Return whether a file of the original holds the zeros that mark a failure."""
    return path.stat().st_size < MAX_ZEROS_BYTES and not _load_npz(path).any()
