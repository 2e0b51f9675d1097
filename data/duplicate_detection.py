"""Detects equal values among any number of values, in constant memory."""

import hashlib
import os
from array import array
from collections.abc import Iterator

import numpy as np

from ltu.data.columns import ColumnFlags
from ltu.data.dataset_io import stream_examples
from ltu.data.dataset_source import DatasetSource

NUM_FILES = 256  # Each is small enough to be sorted in memory.
MAX_BUFFERED = 2**18  # Values in memory before they are written to the files.


class DuplicateDetector:
    """Stores the hash of each value, and a number that the caller gives it, in files of a folder.

    A value takes 16 bytes on disk. Only 64 bits of the hash are stored: among six million values,
    two different ones count as equal with a probability of one in a million.
    """

    def __init__(self, folder: str, name: str = "values"):
        self.folder = folder
        self.name = name
        self.hashes = array("q")
        self.numbers = array("q")

    def add(self, value: str, number: int = 0) -> None:
        """Add a value and its number, such as the number of its example."""
        content = value.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(content, digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest, "little", signed=True))
        self.numbers.append(number)
        if len(self.hashes) == MAX_BUFFERED:
            self._flush()

    def _flush(self) -> None:
        """Append the buffered values to the files; equal values go to the same file."""
        if not self.hashes:
            return
        hashes = np.frombuffer(self.hashes, np.int64)
        numbers = np.frombuffer(self.numbers, np.int64)
        table = np.stack([hashes, numbers], 1)  # (n, 2)
        file_number = hashes % NUM_FILES  # (n,)
        table = table[np.argsort(file_number, kind="stable")]
        ends = np.cumsum(np.bincount(file_number, minlength=NUM_FILES))[:-1]
        for number, part in enumerate(np.split(table, ends)):
            if not len(part):
                continue
            with open(self._path(number), "ab") as file:
                part.tofile(file)
        self.hashes = array("q")
        self.numbers = array("q")

    def _path(self, number: int) -> str:
        return f"{self.folder}/{self.name}_{number:02x}"

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield, for one file after the other, the numbers of first and of repeated occurrences.

        The files are removed, so this works once.

        Returns:
            arrays of shape (n,) and (m,), where n + m is the number of values in the file.
        """
        self._flush()
        for number in range(NUM_FILES):
            if not os.path.exists(self._path(number)):
                continue
            table = np.fromfile(self._path(number), np.int64).reshape(-1, 2)
            os.unlink(self._path(number))
            table = table[np.argsort(table[:, 0], kind="stable")]
            is_first = np.diff(table[:, 0], prepend=table[:1, 0] - 1) != 0
            yield table[is_first, 1], table[~is_first, 1]

    def count(self) -> int:
        """Return the number of different values."""
        return sum(len(firsts) for firsts, _ in self.parts())

    def firsts(self) -> np.ndarray:
        """Return the number of the first occurrence of every value, (n,) in ascending order."""
        numbers = [firsts for firsts, _ in self.parts()]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *numbers]))


def first_clips(
    source: DatasetSource, firsts: np.ndarray, columns: ColumnFlags
) -> Iterator[tuple[str, str]]:
    """Yield (audio_id, dataset) of the examples with these numbers, (n,) in ascending order."""
    wanted = iter(firsts.tolist())
    next_number = next(wanted, None)
    for number, example in enumerate(stream_examples(source, columns)):
        if number == next_number:
            yield example["audio_id"], str(example.get("dataset"))
            next_number = next(wanted, None)
