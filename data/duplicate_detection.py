"""Which of any number of values are equal, in constant memory."""

import hashlib
import os
from array import array
from collections.abc import Iterator

import numpy as np

PARTS = 256  # files, each small enough for the memory
HELD = 2**18  # values that wait to be written


class Distinct:
    """Values by 64 bits of their hash, each with a number, in files of a folder: 16 bytes a value.

    Two different values count as equal with a chance of one in a million among six million of them.
    """

    def __init__(self, folder: str, name: str = "values"):
        self.folder, self.name = folder, name
        self.hashes, self.numbers = array("q"), array("q")

    def add(self, value: object, number: int = 0) -> None:
        content = str(value).encode("utf-8", "surrogatepass")
        self.hashes.append(
            int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
        )
        self.numbers.append(number)
        if len(self.hashes) == HELD:
            self._flush()

    def _flush(self) -> None:
        if not self.hashes:
            return
        table = np.stack(
            [np.frombuffer(self.hashes, np.int64), np.frombuffer(self.numbers, np.int64)], 1
        )  # (n, 2)
        part = table[:, 0] % PARTS
        table = table[np.argsort(part, kind="stable")]
        ends = np.cumsum(np.bincount(part, minlength=PARTS))[:-1]
        for number, rows in enumerate(np.split(table, ends)):
            with open(self._path(number), "ab") as file:
                rows.tofile(file)
        self.hashes, self.numbers = array("q"), array("q")

    def _path(self, number: int) -> str:
        return f"{self.folder}/{self.name}_{number:02x}"

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(n,) numbers of first occurrences, and (m,) those of repetitions, of one part of the values after another."""
        self._flush()
        for number in range(PARTS):
            if not os.path.exists(self._path(number)):
                continue
            table = np.fromfile(self._path(number), np.int64).reshape(-1, 2)
            os.unlink(self._path(number))
            table = table[np.argsort(table[:, 0], kind="stable")]
            is_first = np.diff(table[:, 0], prepend=table[:1, 0] - 1) != 0
            yield table[is_first, 1], table[~is_first, 1]

    def count(self) -> int:
        """How many different values there are."""
        return sum(len(firsts) for firsts, _ in self.parts())

    def firsts(self) -> np.ndarray:
        """(n,) in ascending order: the number of the first occurrence of every value."""
        return np.sort(
            np.concatenate([np.zeros(0, np.int64), *(firsts for firsts, _ in self.parts())])
        )
