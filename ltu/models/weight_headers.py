"""Reads names, shapes and dtypes of stored tensors, without reading the tensors."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ltu.files import check_regular_file

MAX_HEADER_BYTES = 100_000_000  # As in the library.
LENGTH_BYTES = 8  # A file begins with the length of its header.


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


def read_header(file: Path) -> bytes:
    """Return the header of a safetensors file.

    Raises:
        OSError: there is no such file.
        ValueError: it is no regular file, or has no header of a possible length.
    """
    check_regular_file(file)
    num_left = file.stat().st_size - LENGTH_BYTES
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if not 0 < length <= min(num_left, MAX_HEADER_BYTES):
            raise ValueError(
                f"{file} is damaged (a header of {length:,} bytes, with {max(num_left, 0):,} bytes "
                "left). Copy or write it again."
            )
        return stream.read(length)


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of safetensors files by key.

    Raises:
        ValueError: a file is damaged, or is no regular file.
    """
    found = {}
    for file in files:
        read_header(file)
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  the file is no dict
                    part = tensors.get_slice(key)
                    found[key] = StoredTensor(tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, MemoryError) as error:  # It is mapped whole.
            raise ValueError(f"{file} is damaged ({error}). Copy or write it again.") from error
    return found
