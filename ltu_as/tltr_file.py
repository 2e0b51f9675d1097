"""Reads and writes what a file of `ltu_as.pretrain_tltr` says besides its tensors."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ltu.files import check_regular_file

KEY = "pretraining"  # Of the metadata.


@dataclass(frozen=True)
class Pretraining:
    """How a TLTR was trained.

    Attributes:
        labels: the names of the classes.
        num_time_heads, num_layer_heads: its attention heads, which are in no tensor.
        features: `LtuAsFeatureExtractor.describe()` of its input, at least the shape.
    """

    labels: list[str]
    num_time_heads: int
    num_layer_heads: int
    features: dict[str, Any]

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata of a safetensors file."""
        return {KEY: json.dumps(asdict(self), ensure_ascii=False)}

    @classmethod
    def read(cls, path: str | Path) -> "Pretraining | None":
        """Return that of a file, or None for other files, such as those of Whisper-AT.

        Raises:
            OSError: there is no such file.
            ValueError: the file is damaged.
        """
        check_regular_file(path)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError:
            return None
        if KEY not in metadata:
            return None
        try:
            found = cls(**json.loads(metadata[KEY]))
            sizes = [*found.features["shape"], found.num_time_heads, found.num_layer_heads]
            if [type(size) for size in sizes] != [int] * 5:
                raise TypeError(sizes)
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged: it does not say how TLTR was trained. Copy or train it again."
            ) from error
        return found
