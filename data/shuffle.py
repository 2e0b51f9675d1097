"""Shuffles a dataset file of any size, in constant memory.

    python -m data.shuffle --data_path A.json --output_path B.json --seed 1
    python -m data.shuffle --data_path A.json --output_path B.json --original_shuffle
    python -m data.shuffle --data_path A.json --output_path B.parquet --embed_audio

The shuffle is exact: every order has the same probability. Each example gets a random key of 64
bits, and the examples are sorted by their keys with temporary files next to the output, each small
enough to be sorted in memory. The order depends only on the seed and the number of examples, not on
the file format, the memory or the machine.

--original_shuffle gives the order of Python's `random.seed(0); random.shuffle(examples)`, which the
original's lists would have with a seed. It needs 8 bytes of memory for each example and reads the
file twice.
"""

import argparse
import os
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.command_line import add_audio_root, command_parser, source_of
from data.embedded_clips import add_embed_flags, make_embedder, reader_of, resolve_ids
from data.provenance import clip_facts, write_examples, write_provenance
from data.temporary_files import temporary_folder
from ltu.data.columns import read_column_flags
from ltu.data.dataset_io import encode_line, typed_examples
from ltu.files import run_command

MAX_SORTED = 2**26  # Bytes of a file that is sorted in memory.
MAX_BUFFERED = 2**25  # Bytes of lines in memory before they are written to the files.
KEY = 16  # Hexadecimal digits of the key at the start of a line.
NUM_FILES = 256


class DiskSort:
    """Sorts lines by their keys, which are spread evenly over 64 bits, with 256 files in a folder.

    A file that is too large for the memory is sorted by a `DiskSort` of its own, which looks at the
    next two digits of the key.
    """

    def __init__(self, folder: str, depth: int = 0):
        self.folder = folder
        self.depth = depth  # Digits of the key that all lines have in common.
        self.buffered = 0  # Bytes.
        self.parts: list[list[bytes]] = [[] for _ in range(NUM_FILES)]

    def add(self, line: bytes) -> None:
        """Add a line, which begins with its key of 16 hexadecimal digits."""
        self.parts[int(line[self.depth : self.depth + 2], 16)].append(line)
        self.buffered += len(line)
        if self.buffered > MAX_BUFFERED:
            self._flush()

    def _flush(self) -> None:
        for number, lines in enumerate(self.parts):
            if lines:
                with open(self._path(number), "ab") as file:
                    file.write(b"\n".join(lines) + b"\n")
                lines.clear()
        self.buffered = 0

    def _path(self, number: int) -> str:
        # A string, because pathlib stores every name in memory.
        return f"{self.folder}/{self.depth}_{number:02x}"

    def __iter__(self) -> Iterator[bytes]:
        """Yield all lines in the order of their keys, without the keys."""
        self._flush()
        for number in range(NUM_FILES):
            path = self._path(number)
            if not os.path.exists(path):
                continue
            with open(path, "rb") as file:
                os.unlink(path)
                size = os.fstat(file.fileno()).st_size
                if size > MAX_SORTED and self.depth < KEY - 2:
                    finer = DiskSort(self.folder, self.depth + 2)
                    for line in file:
                        finer.add(line[:-1])
                    yield from finer
                    continue
                lines = file.read().split(b"\n")[:-1]
            for line in sorted(lines):
                yield line[KEY:]


def random_keys(seed: int) -> Iterator[int]:
    """Yield 64 random bits for each example."""
    generator = np.random.PCG64(seed)
    while True:
        yield from generator.random_raw(2**12).tolist()


def original_keys(count: int, generator: random.Random) -> Iterator[int]:
    """Return a key for each of `count` examples that puts it where `generator.shuffle` would.

    The keys are spread evenly over 64 bits.
    """
    order = array("I", range(count))
    generator.shuffle(order)
    position = np.empty(count, np.uint32)  # (count,)
    position[np.frombuffer(order, np.uint32)] = np.arange(count, dtype=np.uint32)
    step = 2**64 // max(1, count)
    return (int(index) * step for index in position)


def shuffle_examples(
    examples: Callable[[random.Random], Iterable[dict[str, Any]]],
    output: Path,
    seed: int,
    is_original: bool = False,
) -> Iterator[bytes]:
    """Yield encoded examples in random order.

    Args:
        examples: returns the examples; the generator is for whatever else is random. For the
            original's order it is called twice, because that order is sampled from the same
            generator, after the examples.
        output: the file to write. A folder next to it temporarily takes as many bytes.
        seed: of the order and of `examples`; the original's order has seed 0.
        is_original: whether to use the order of `random.shuffle`.

    Raises:
        ValueError: the number of examples changed between the two calls, or another run writes the
            same output.
    """
    seed_of_examples = 0 if is_original else seed
    generator = random.Random(seed_of_examples)
    if is_original:
        count = sum(1 for _ in examples(generator))
        keys = original_keys(count, generator)
    else:
        keys = random_keys(seed)
    changed = f"{output}: the input changed while it was read for the second time. Run it again."
    # Sort the encoded examples by their keys, on the disk.
    with temporary_folder(output, "shuffle") as folder:
        lines = DiskSort(folder)
        # A second generator with the same seed gives the same numbers as the first one did.
        for example in examples(random.Random(seed_of_examples)):
            key = next(keys, None)
            if key is None:
                raise ValueError(changed)
            lines.add(b"%016x" % key + encode_line(example))
        if is_original and next(keys, None) is not None:
            raise ValueError(changed)
        yield from lines


def add_order_flags(parser: argparse.ArgumentParser) -> None:
    """Add --seed and --original_shuffle."""
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="Seed of the random generator used for the order (default: 0).",
    )
    parser.add_argument(
        "--original_shuffle",
        action="store_true",
        help="Use the order of Python's random.seed(0); random.shuffle(examples).",
    )


def order_facts(seed: int, is_original: bool) -> dict[str, Any]:
    """Return the entries of a provenance file about the order."""
    if is_original:
        return {"order": "original", "seed": 0}
    return {"order": "random", "seed": seed}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    add_order_flags(parser)
    add_audio_root(parser)
    add_embed_flags(parser)
    args = parser.parse_args(argv)
    columns = read_column_flags(args)
    source = source_of(args)
    embedder = make_embedder(args, [source])

    def examples(_: random.Random) -> Iterable[dict[str, Any]]:
        return resolve_ids(embedder, typed_examples(source, columns), source)

    with write_examples(args.output_path, [source], reader_of(embedder)) as output:
        lines = shuffle_examples(examples, args.output_path, args.seed, args.original_shuffle)
        for line in lines:
            output.write(line)
    facts = {"num_examples": output.count}
    facts |= order_facts(args.seed, args.original_shuffle)
    facts |= clip_facts(args, args.output_path, [source], columns)
    write_provenance(args.output_path, "shuffle", [source], **facts)
    print(f"{args.output_path}: {output.count} examples")
    return 0


if __name__ == "__main__":
    run_command(main)
