"""Reads names, shapes and dtypes of stored tensors, without reading the tensors."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ltu.files import check_regular_file


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, by its header.

    Attributes:
        dtype: by the name in safetensors, such as "F32".
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of safetensors files by key.

    Raises:
        ValueError: a file is damaged, or is no regular file.
    """
    found = {}
    for file in files:
        check_regular_file(file)
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  the file is no dict
                    part = tensors.get_slice(key)
                    found[key] = StoredTensor(tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}). Copy or write it again.") from error
    return found
