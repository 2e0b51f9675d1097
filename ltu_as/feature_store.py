"""A folder of Whisper features: ours, a safetensors file a clip, or the original's `.npz` files as they are.

Notable:
- The highest byte of every number (sign, exponent) shrinks well and is compressed; the other bytes are noise and stay
  raw. That is smaller than a compressed npz and read several times as fast.
- A file appears whole or not at all; what was cut or damaged since is found by its length and sum.
- A clip that failed has a `.failed` marker, never features. The original wrote zeros for it; they are never used.
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

WORDS = {"float16": np.uint16, "float32": np.uint32}
CODEC = pyarrow.Codec("zstd", compression_level=1)
SMALL = 65_536  # bytes; zeros compress to less, so only smaller npz files are looked into for them
EXTRACT = "python -m ltu_as.extract_whisper_feature"


class FeatureError(ValueError):
    """A file of features that cannot be used: its path, the reason and the way out."""

    def __init__(
        self, path: str | Path, reason: str, way_out: str = f"Delete it and run {EXTRACT} again."
    ):
        self.path, self.reason, self.way_out = str(path), reason, way_out
        super().__init__(f"{path}: {reason}. {way_out}")

    def __reduce__(self):  # As ltu.data.audio.AudioError: workers pickle their errors.
        return type(self), (self.path, self.reason, self.way_out)


class DamagedFeatures(FeatureError):
    """One file is cut or changed; the others may be whole."""


class Stored(NamedTuple):
    """What is kept of a clip; None is what the original's files do not hold."""

    features: torch.Tensor  # (layers, 25, width)
    transcript: str | None = None
    seconds: float | None = None


def original_name(audio_id: str) -> str:
    """The name that the original gives the features of a clip: its last three folders and its stem."""
    parts = audio_id.split("/")
    return f"{'_'.join(parts[-4:-1])}_{parts[-1].rpartition('.')[0]}.npz"


class FeatureStore:
    """Features by `audio_id`, exactly as it is in the row.

    Args:
        folder: of `extract_whisper_feature`, or one of the original's `.npz` files, which is only read.
        shape: (layers, 25, width) that the reader needs; a store of ours knows its own.

    Attributes:
        description: `LtuAsFeatureExtractor.describe()` of its features; empty for the original's.

    Raises:
        FileNotFoundError: the folder holds neither kind.
    """

    def __init__(self, folder: str | Path, shape: list[int] | None = None):
        self.folder = Path(folder)
        file = self.folder / "store.json"
        self.is_original = not file.is_file()
        if self.is_original and not any(self.folder.glob("*.npz")):
            raise FileNotFoundError(
                f"{folder} holds no features (store.json or .npz files). Make them: {EXTRACT}"
            )
        self.description: dict[str, Any] = (
            {} if self.is_original else json.loads(file.read_text())["features"]
        )
        self.shape = self.description.get("shape") or (shape and list(shape))

    @classmethod
    def create(cls, folder: str | Path, description: dict[str, Any]) -> "FeatureStore":
        """Open a store to write to, or make it.

        Raises:
            ValueError: it holds features of another model or precision, or is a folder of the original's.
        """
        file = Path(folder) / "store.json"
        if not file.is_file() and any(file.parent.glob("*.npz")):
            raise ValueError(
                f"{folder} holds .npz files of the original, which are only read. Choose another folder."
            )
        if not file.is_file():
            replace_file(
                file,
                json.dumps({"format": 1, "features": description}, indent=1).encode(),
                shared=True,
            )
        store = cls(folder)
        different = [
            f"{key} {store.description.get(key)} there, {description.get(key)} now"
            for key in (
                "fingerprint",
                "shape",
                "feature_precision",
                "computed_in",
                "transcription_model",
                "language",
            )
            if store.description.get(key) != description.get(key)
        ]
        if different:
            raise ValueError(
                f"{folder} holds features of Whisper {store.description['whisper_model']}, which differ from those of "
                f"{description['whisper_model']}: {'; '.join(different)}. Choose another folder, or the same Whisper, "
                "--feature_precision and kind of device."
            )
        return store

    def read(self, audio_id: str) -> Stored | None:
        """Features of a clip, or None where there are none.

        Raises:
            FeatureError: the file is damaged, or its features have another shape.
        """
        if self.is_original:
            path = self._find_original(audio_id)
            stored = path and Stored(torch.from_numpy(_load_npz(path)))
        else:
            path = self.path_of(audio_id)
            stored = _load(path)
        if stored is not None and self.shape and list(stored.features.shape) != self.shape:
            reason = f"its features are (layers, time, width) = {list(stored.features.shape)}, needed are {self.shape}"
            raise FeatureError(
                path, reason, "It is another Whisper's; give the folder that fits the checkpoint."
            )
        return stored

    def has(self, audio_id: str, with_transcript: bool = False) -> bool:
        """Whether the whole file of a clip is there (and a transcript in it)."""
        if self.is_original:
            return not with_transcript and self._find_original(audio_id) is not None
        try:
            with safe_open(self.path_of(audio_id), "np") as file:
                return (
                    not with_transcript
                    or json.loads(file.metadata()["clip"])["transcript"] is not None
                )
        except (FileNotFoundError, SafetensorError):
            return False

    def write(
        self, audio_id: str, features: torch.Tensor, transcript: str | None, seconds: float | None
    ) -> None:
        """Keep a clip: features (layers, 25, width) in half or single precision."""
        path = self.path_of(audio_id)
        if list(features.shape) != self.shape:
            raise FeatureError(
                path,
                f"{list(features.shape)} is not the store's {self.shape}",
                "Use its own Whisper.",
            )
        array = np.ascontiguousarray(features.numpy())
        words = array.view(WORDS[array.dtype.name]).reshape(-1)
        planes = [(words >> shift).astype(np.uint8) for shift in range(0, 8 * words.itemsize, 8)]
        high = np.frombuffer(CODEC.compress(planes.pop(), asbytes=True), np.uint8)
        low = np.stack(planes[::-1])  # (bytes of a number - 1, numbers)
        clip = {
            "audio_id": audio_id,
            "transcript": transcript,
            "seconds": seconds,
            "shape": self.shape,
        }
        clip |= {"dtype": array.dtype.name, "sum": _sum(high) + _sum(low)}
        replace_file(
            path, save({"high": high, "low": low}, {"clip": json.dumps(clip, ensure_ascii=False)})
        )
        path.with_suffix(".failed").unlink(missing_ok=True)

    def fail(self, audio_id: str, reason: str, detail: str) -> None:
        """Mark a clip as failed; a later `write` removes the mark."""
        mark = {"audio_id": audio_id, "reason": reason, "detail": detail}
        replace_file(
            self.path_of(audio_id).with_suffix(".failed"),
            json.dumps(mark, ensure_ascii=False).encode(),
        )

    def failures(self) -> list[dict[str, str]]:
        """The marks of failed clips: audio_id (of the original's: file name), reason, detail."""
        if self.is_original:
            zeros = [path.name for path in sorted(self.folder.glob("*.npz")) if _is_zeros(path)]
            return [
                {"audio_id": name, "reason": "zeros", "detail": "the original's mark of failure"}
                for name in zeros
            ]
        return [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(self.folder.glob("*/*.failed"))
        ]

    def path_of(self, audio_id: str) -> Path:
        """Where the features of a clip are written."""
        if self.is_original:
            raise ValueError(
                f"{self.folder} holds .npz files of the original, which are only read."
            )
        digest = hashlib.sha256(audio_id.encode()).hexdigest()[:16]
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(audio_id).stem)[:40]
        return self.folder / digest[:2] / f"{stem}-{digest}.safetensors"

    def _find_original(self, audio_id: str) -> Path | None:
        stem = audio_id.rpartition("/")[2].rpartition(".")[0]
        paths = (self.folder / name for name in (original_name(audio_id), f"{stem}.npz"))
        return next((path for path in paths if path.is_file() and not _is_zeros(path)), None)


def _load(path: Path) -> Stored | None:
    try:
        with safe_open(path, "np") as file:
            clip, high, low = (
                json.loads(file.metadata()["clip"]),
                file.get_tensor("high"),
                file.get_tensor("low"),
            )
        if _sum(high) + _sum(low) != clip["sum"]:
            raise DamagedFeatures(path, "damaged: its sum does not fit")
        words = np.frombuffer(CODEC.decompress(high, decompressed_size=low.shape[1]), np.uint8)
        words = words.astype(WORDS[clip["dtype"]])
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError) as error:
        raise DamagedFeatures(path, f"damaged ({error})") from error
    for plane in low:
        words <<= 8
        words |= plane
    features = torch.from_numpy(words.view(clip["dtype"]).reshape(clip["shape"]))
    return Stored(features, clip["transcript"], clip["seconds"])


def _sum(content: np.ndarray) -> int:
    """A cheap sum that nearly any damage changes; the last seven bytes may be left out."""
    return int(np.frombuffer(content, np.uint64, content.size // 8).sum(dtype=np.uint64))


def _load_npz(path: Path) -> np.ndarray:
    try:
        with np.load(path) as file:
            return file["arr_0"]
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFeatures(
            path, f"no features of the original ({error})", "Extract them again."
        ) from error


def _is_zeros(path: Path) -> bool:
    return path.stat().st_size < SMALL and not _load_npz(path).any()
