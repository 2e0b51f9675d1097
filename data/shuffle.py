"""Shuffle a file of rows of any size, in constant memory.

    python -m data.shuffle --data_path A.json --output_path B.json --seed 1
    python -m data.shuffle --data_path A.json --output_path B.json --original_shuffle

Notable:
- Exact: every order is as likely as any other. Each row gets a random key of 64 bits; rows are brought into the order
  of their keys by way of files beside the output, each small enough to be sorted in memory.
- The order depends on the seed and the number of rows alone: not on the format, the memory or the machine.
- --original_shuffle gives the order of Python's `random.seed(0); random.shuffle(rows)`, which the original's lists
  would have had with a seed; it holds 8 bytes a row and reads the rows twice.
"""

import argparse
import os
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.command_line import command_parser
from data.provenance import audio_root_of, write_provenance, write_rows
from data.temporary_files import scratch_folder
from ltu.data.dataset_files import encode_row, stream_rows
from ltu.files import run_command

MAX_PART = 2**26  # bytes of a file that is sorted in memory
MAX_HELD = 2**25  # bytes of lines that wait to be written
KEY = 16  # hexadecimal digits in front of a line


class DiskSort:
    """Lines in the order of their keys, which are spread evenly over 64 bits: by way of 256 files in a folder."""

    def __init__(self, folder: str, depth: int = 0):
        self.folder, self.depth, self.held = folder, depth, 0
        self.parts: list[list[bytes]] = [[] for _ in range(256)]

    def add(self, line: bytes) -> None:
        """Take a line (its key, 16 hexadecimal digits, comes first)."""
        self.parts[int(line[self.depth : self.depth + 2], 16)].append(line)
        self.held += len(line)
        if self.held > MAX_HELD:
            self._flush()

    def _flush(self) -> None:
        for number, lines in enumerate(self.parts):
            if lines:
                with open(self._path(number), "ab") as file:
                    file.write(b"\n".join(lines) + b"\n")
                lines.clear()
        self.held = 0

    def _path(self, number: int) -> str:
        return (
            f"{self.folder}/{self.depth}_{number:02x}"  # pathlib would keep every name in memory.
        )

    def __iter__(self) -> Iterator[bytes]:
        """All lines, without their keys."""
        self._flush()
        for number in range(256):
            path = self._path(number)
            if not os.path.exists(path):
                continue
            with open(path, "rb") as file:
                os.unlink(path)
                if os.fstat(file.fileno()).st_size > MAX_PART and self.depth < KEY - 2:
                    finer = DiskSort(self.folder, self.depth + 2)
                    for line in file:
                        finer.add(line[:-1])
                    yield from finer
                    continue
                lines = file.read().split(b"\n")[:-1]
            for line in sorted(lines):
                yield line[KEY:]


def random_keys(seed: int) -> Iterator[int]:
    """64 random bits for each row."""
    generator = np.random.PCG64(seed)
    while True:
        yield from generator.random_raw(2**12).tolist()


def original_keys(count: int, chance: random.Random) -> Iterator[int]:
    """For each of `count` rows: where `chance.shuffle` would put it in a list, spread over 64 bits."""
    order = array("I", range(count))
    chance.shuffle(order)
    place = np.empty(count, np.uint32)  # (count,)
    place[np.frombuffer(order, np.uint32)] = np.arange(count, dtype=np.uint32)
    step = 2**64 // max(1, count)
    return (int(at) * step for at in place)


def shuffle_rows(
    rows: Callable[[random.Random], Iterable[dict[str, Any]]],
    output: Path,
    seed: int,
    is_original: bool = False,
) -> Iterator[bytes]:
    """Encoded rows in random order.

    Args:
        rows: gives the rows, drawing from the generator what else is left to chance; called twice for the original's
            order, which comes from the same generator after them.
        output: where they are to go; a folder beside it takes as many bytes as the rows meanwhile.
        seed: of both; the original's order has 0.

    Raises:
        ValueError: the second time there are other numbers of rows; another run writes the same output.
    """
    chance = random.Random(0 if is_original else seed)
    keys = original_keys(sum(1 for _ in rows(chance)), chance) if is_original else random_keys(seed)
    changed = f"{output}: the rows changed while they were read for the second time. Run it again."
    with scratch_folder(output, "shuffle") as folder:
        lines = DiskSort(folder)
        # Two generators of one seed: the second pass draws what the first did.
        for row in rows(random.Random(0 if is_original else seed)):
            if (key := next(keys, None)) is None:
                raise ValueError(changed)
            lines.add(b"%016x" % key + encode_row(row))
        if is_original and next(keys, None) is not None:
            raise ValueError(changed)
        yield from lines


def add_order_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the order (0)")
    text = "the order of Python's random.seed(0); random.shuffle(rows)"
    parser.add_argument("--original_shuffle", action="store_true", help=text)


def order_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a recipe file says of these flags."""
    return (
        {"order": "original", "seed": 0}
        if args.original_shuffle
        else {"order": "random", "seed": args.seed}
    )


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    add_order_flags(parser)
    args = parser.parse_args(argv)
    with write_rows(args.output_path, [args.data_path]) as output:
        rows = shuffle_rows(
            lambda _: stream_rows(args.data_path),
            args.output_path,
            args.seed,
            args.original_shuffle,
        )
        for line in rows:
            output.write(line)
    facts = order_of(args) | audio_root_of(args.output_path, [args.data_path])
    write_provenance(args.output_path, "shuffle", [args.data_path], rows=output.count, **facts)
    print(f"{args.output_path}: {output.count} rows")
    return 0


if __name__ == "__main__":
    run_command(main)
