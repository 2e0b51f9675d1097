"""Reads and writes folders of Whisper features.

A folder holds one safetensors file per clip, or the `.npz` files of the original, which are only
read.

In a safetensors file, the highest byte of every number (sign, exponent) is compressed. The other
bytes are noise, and are stored raw. Such a file is smaller than a compressed npz, and is read
several times as fast. It is written whole or not at all; a file that was damaged later is detected
by its length and checksum.

A clip that failed has a `.failed` marker and no features. The original wrote zeros instead, which
are never used.
"""

import hashlib
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ltu.files import replace_file

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


class Stored(NamedTuple):
    """The stored features of a clip. The original's files hold no transcript and no duration."""

    features: torch.Tensor  # (layers, 25, width)
    transcript: str | None = None
    seconds: float | None = None


def original_name(audio_id: str) -> str:
    """Return the original's name of a feature file: three folders of the clip, and its stem."""
    parts = audio_id.split("/")
    return f"{'_'.join(parts[-4:-1])}_{parts[-1].rpartition('.')[0]}.npz"


class FeatureStore:
    """A folder of features by `audio_id`, exactly as it is in the example.

    Args:
        folder: of `extract_whisper_feature`, or of the original's `.npz` files, which is only read.
        shape: (layers, 25, width) of the features that are needed. It is ignored if the folder
            itself states the shape.

    Attributes:
        description: `LtuAsFeatureExtractor.describe()` of the features; empty for the original's.

    Raises:
        FileNotFoundError: the folder holds no features of either kind.
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
            self.description = json.loads(file.read_text(encoding="utf-8"))["features"]
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
                "Choose another folder, or the same Whisper, --feature_precision and kind of "
                "device."
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

    def has(self, audio_id: str, with_transcript: bool = False) -> bool:
        """Return whether the features of a clip are stored.

        Args:
            with_transcript: whether a transcript must be stored with them.
        """
        if self.is_original:
            return not with_transcript and self._find_original(audio_id) is not None
        try:
            with safe_open(self.path_of(audio_id), "np") as file:
                if not with_transcript:
                    return True
                return json.loads(file.metadata()["clip"])["transcript"] is not None
        except (FileNotFoundError, SafetensorError):
            return False

    def write(
        self, audio_id: str, features: torch.Tensor, transcript: str | None, seconds: float | None
    ) -> None:
        """Store a clip.

        Args:
            audio_id: the name of the clip in its example.
            features: (layers, 25, width), in half or single precision.
            transcript: None if the clip was not transcribed.
            seconds: duration of the clip.

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
        clip = {
            "audio_id": audio_id,
            "transcript": transcript,
            "seconds": seconds,
            "shape": self.shape,
            "dtype": array.dtype.name,
            "sum": _checksum(high) + _checksum(low),
        }
        metadata = {"clip": json.dumps(clip, ensure_ascii=False)}
        replace_file(path, save({"high": high, "low": low}, metadata))
        path.with_suffix(".failed").unlink(missing_ok=True)

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
        paths = sorted(self.folder.glob("*/*.failed"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

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

    def _find_original(self, audio_id: str) -> Path | None:
        """Return the path of the original's features of a clip, or None if there are none."""
        stem = audio_id.rpartition("/")[2].rpartition(".")[0]
        for name in (original_name(audio_id), f"{stem}.npz"):
            path = self.folder / name
            if path.is_file() and not _is_zeros(path):
                return path
        return None


def _load(path: Path) -> Stored | None:
    """Read a safetensors file of features; return None if there is none.

    Raises:
        DamagedFeatures: the file cannot be read, or its checksum does not fit.
    """
    try:
        with safe_open(path, "np") as file:
            clip = json.loads(file.metadata()["clip"])
            high = file.get_tensor("high")
            low = file.get_tensor("low")
        if _checksum(high) + _checksum(low) != clip["sum"]:
            raise DamagedFeatures(path, "damaged: its checksum does not fit")
        highest = CODEC.decompress(high, decompressed_size=low.shape[1])
        bits = np.frombuffer(highest, np.uint8).astype(UNSIGNED_TYPES[clip["dtype"]])
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError) as error:
        raise DamagedFeatures(path, f"damaged ({error})") from error
    # Append the other bytes of each number, from the highest to the lowest.
    for plane in low:
        bits <<= 8
        bits |= plane
    features = torch.from_numpy(bits.view(clip["dtype"]).reshape(clip["shape"]))
    return Stored(features, clip["transcript"], clip["seconds"])


def _checksum(content: np.ndarray) -> int:
    """Return a cheap checksum, which leaves out at most the last seven bytes."""
    return int(np.frombuffer(content, np.uint64, content.size // 8).sum(dtype=np.uint64))


def _load_npz(path: Path) -> np.ndarray:
    """Read features (layers, 25, width) of the original.

    Raises:
        DamagedFeatures: the file cannot be read.
    """
    try:
        with np.load(path) as file:
            return file["arr_0"]
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFeatures(
            path, f"no features of the original ({error})", "Extract them again."
        ) from error


def _is_zeros(path: Path) -> bool:
    """Return whether a file of the original holds the zeros that mark a failure."""
    return path.stat().st_size < MAX_ZEROS_BYTES and not _load_npz(path).any()
