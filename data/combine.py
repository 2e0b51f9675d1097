r"""Combines dataset files into one, in random order and constant memory.

    python -m data.combine --data_path A.json B.jsonl.gz --output_path C.json --seed 1
    python -m data.combine --recipe openaqa_all --data_path closed=A.json open=B.json \
        --output_path C.json
    python -m data.combine --list

A recipe (data/recipes/NAME.json, or a file of your own) names the parts of a dataset. For each part
it says how often the examples of a dataset are repeated, and the fraction of the questions that get
the prefix "Closed-ended question: ". A part may have several files. A published recipe also has the
published numbers of examples: every difference from them is listed.

The files are read in the order in which they are given. A file is read again for its repeated
examples before the next file is read.

Transcripts that are in the data (`input`) are cleaned: hallucinated outros of Whisper ("Thanks for
watching!") and white space at both ends are removed, as from the transcripts of new clips. A recipe
may name another rule, and --transcripts overrides it: `original` removes white space from the start
only, as in the data of the released LTU-AS checkpoints; `unchanged` removes nothing. A recipe may
also replace parts of audio_ids, such as a former folder of VoxCeleb, unless --keep_audio_ids is
given. All changes are counted in the provenance file.

A recipe repeats every example exactly so many times. The original samples the additional examples
at random with replacement; --original_repeats does so for the examples of each dataset in each
file, so that some are repeated more often than others, and some are not repeated.

Without a seed the original's lists have an arbitrary order. --original_shuffle gives the order that
its scripts would give after `random.seed(0)`: the questions that get the prefix are sampled
example by example, then the list is shuffled.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from data.command_line import INPUT_HELP, OUTPUT_HELP, command_parser
from data.corrections import Corrections
from data.embedded_clips import add_embed_flags, make_embedder, reader_of, resolve_ids
from data.provenance import clip_facts, write_examples, write_provenance
from data.shuffle import DiskSort, add_order_flags, order_facts, shuffle_examples
from data.temporary_files import temporary_folder
from ltu.data.columns import ColumnFlags, add_column_flags, read_column_flags
from ltu.data.dataset_io import encode_line, typed_examples
from ltu.data.dataset_source import DatasetSource, find_dataset
from ltu.data.transcripts import TRANSCRIPT_RULES
from ltu.files import run_command

RECIPES = Path(__file__).parent / "recipes"
CLOSED_ENDED = "Closed-ended question: "


class RecipePart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a recipe; the defaults change nothing.

    Attributes:
        num_examples: the published number of examples.
        repeat: pattern of a dataset -> how often its examples are repeated.
        closed_ended_fraction: fraction of the questions that get the prefix.
    """

    num_examples: int | None = None
    repeat: dict[str, int] = {}
    closed_ended_fraction: float = 0.0


class PublishedNumbers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Published numbers of examples of a whole recipe.

    A number like `"683k"` was rounded to thousands.

    Attributes:
        num_examples: of the whole recipe.
        dataset: pattern of a dataset -> its number.
        task: pattern of a task -> its number.
    """

    num_examples: int | None = None
    dataset: dict[str, int | str] = {}
    task: dict[str, int | str] = {}


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The parts of a dataset and what was published about it.

    Attributes:
        parts: name -> part.
        about: description.
        transcripts: rule that cleans transcripts.
        audio_id_replacements: part of an `audio_id` -> what replaces it.
        expected: published numbers.
    """

    parts: dict[str, RecipePart]
    about: str = ""
    transcripts: Literal["clean", "original", "unchanged"] = "clean"
    audio_id_replacements: dict[str, str] = {}
    expected: PublishedNumbers = PublishedNumbers()


def read_recipe(name: str) -> Recipe:
    """Read a recipe by its name or path.

    Raises:
        ValueError: there is no such recipe, or it is not a valid one.
    """
    path = RECIPES / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.json")))
        raise ValueError(f"No recipe {name!r}. Give a file, or one of {known}.")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Recipe)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        known = ", ".join(RecipePart.__struct_fields__)
        raise ValueError(f"{path}: {error}. A part may have {known}.") from error


def part_examples(
    source: DatasetSource,
    part: RecipePart,
    generator: random.Random,
    columns: ColumnFlags,
    folder: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the examples of a dataset, repeated and prefixed as its part of the recipe says.

    Args:
        source: the dataset.
        part: the part of the recipe.
        generator: samples the questions that get the prefix, and what is repeated.
        columns: of the dataset.
        folder: for temporary files. If it is given, examples are repeated as in the original.
    """
    repeats = {pattern.lower(): times for pattern, times in part.repeat.items()}
    fraction = part.closed_ended_fraction
    if folder is not None and repeats:
        examples = resampled_examples(source, repeats, generator, columns, folder)
    else:
        examples = repeated_examples(source, repeats, columns)
    for example in examples:
        if fraction and generator.random() < fraction:
            example["instruction"] = f"{CLOSED_ENDED}{example.get('instruction', '')}"
        yield example


def repeated_examples(
    source: DatasetSource, repeats: dict[str, int], columns: ColumnFlags
) -> Iterator[dict[str, Any]]:
    """Yield every example as often as its dataset is repeated.

    Args:
        source: the dataset file or folder.
        repeats: pattern of a dataset -> how often its examples are repeated.
        columns: of the source.
    """
    for repetition in range(max([1, *repeats.values()])):
        for example in typed_examples(source, columns):
            if repetition < repeats.get(_pattern_of(example, repeats), 1):
                yield example


def resampled_examples(
    source: DatasetSource,
    repeats: dict[str, int],
    generator: random.Random,
    columns: ColumnFlags,
    folder: str,
) -> Iterator[dict[str, Any]]:
    """Yield every example once, then random ones, as the original does.

    A dataset of n examples that is repeated r times has n (r - 1) additional examples, each of them
    sampled from all n with `random.choices`. They are yielded in the order in which they are
    sampled. Two numbers of 8 bytes for each are in memory.

    Args:
        source: the dataset file or folder, which is read twice.
        repeats: pattern of a dataset -> r.
        generator: samples the examples.
        columns: of the source.
        folder: for temporary files, which take as many bytes as the additional examples.

    Raises:
        ValueError: the number of examples changed between the two readings.
    """
    counts: Counter[str] = Counter()  # Pattern -> n.
    for example in typed_examples(source, columns):
        pattern = _pattern_of(example, repeats)
        if pattern is not None:
            counts[pattern] += 1
        if repeats.get(pattern, 1) > 0:
            yield example

    # Sample examples by their numbers within the dataset, one dataset after the other.
    sampled: dict[str, SampledNumbers] = {}
    num_sampled = 0
    for pattern, times in repeats.items():
        num_additional = counts[pattern] * max(0, times - 1)
        chosen = generator.choices(range(counts[pattern]), k=num_additional)
        numbers = np.array(chosen, np.int64)  # (num_additional,)
        order = np.argsort(numbers, kind="stable")
        sampled[pattern] = SampledNumbers(numbers[order], num_sampled + order)
        num_sampled += num_additional

    # Read the file again, and sort the sampled examples by their positions, on the disk.
    lines = DiskSort(folder)
    step = 2**64 // max(1, num_sampled)
    read: Counter[str] = Counter()
    for example in typed_examples(source, columns):
        pattern = _pattern_of(example, repeats)
        if pattern is None:
            continue
        numbers, positions = sampled[pattern]
        begin, end = np.searchsorted(numbers, [read[pattern], read[pattern] + 1])
        for position in positions[begin:end].tolist():
            lines.add(b"%016x" % (position * step) + encode_line(example))
        read[pattern] += 1
    if read != counts:
        raise ValueError(
            f"{source.name} changed while it was read for the second time. Run it again."
        )
    for line in lines:
        yield json.loads(line)


class SampledNumbers(NamedTuple):
    """Which examples of a dataset were sampled.

    Attributes:
        numbers: of the examples, (n,), in ascending order.
        positions: position of each among all sampled examples, (n,).
    """

    numbers: np.ndarray
    positions: np.ndarray


def _pattern_of(example: dict[str, Any], repeats: dict[str, int]) -> str | None:
    """Return the first pattern of a dataset that the example matches, or None."""
    dataset = str(example.get("dataset", "")).lower()
    return next((pattern for pattern in repeats if fnmatchcase(dataset, pattern)), None)


@dataclass
class Counts:
    """Numbers of examples by part, dataset and task."""

    part: Counter[str] = field(default_factory=Counter)
    dataset: Counter[str] = field(default_factory=Counter)
    task: Counter[str] = field(default_factory=Counter)

    def add(self, part: str, example: dict[str, Any]) -> None:
        """Count an example of a part."""
        self.part[part] += 1
        self.dataset[str(example.get("dataset"))] += 1
        self.task[str(example.get("task"))] += 1


def differences(counts: Counts, recipe: Recipe) -> list[str]:
    """Return one line for each number that differs from the published one."""
    parts = {}
    for name, part in recipe.parts.items():
        if part.num_examples is not None:
            parts[name] = part.num_examples
    lines = []
    for kind, published, found in (
        ("part", parts, counts.part),
        ("dataset", recipe.expected.dataset, counts.dataset),
        ("task", recipe.expected.task, counts.task),
    ):
        for pattern, number in published.items():
            count = 0
            for name, count_of_name in found.items():
                if fnmatchcase(name.lower(), pattern.lower()):
                    count += count_of_name
            if not _is_equal(count, number):
                shown = number if isinstance(number, str) else f"{number:,}"
                lines.append(f"{kind} {pattern}: {count:,} examples, published {shown}")

    total = counts.part.total()
    number = recipe.expected.num_examples
    if number is not None and number != total:
        lines.append(f"all: {total:,} examples, published {number:,}")
    return lines


def _is_equal(count: int, published: int | str) -> bool:
    """Return whether a count equals a published number, which may be rounded, such as "683k"."""
    if isinstance(published, str):
        return f"{count / 1000:.0f}k" == published
    return count == published


def parse_parts(
    given: list[str], recipe: Recipe | None, is_partial: bool
) -> list[tuple[str, Path]]:
    """Parse the values of --data_path.

    Args:
        given: `NAME=FILE` for a part of the recipe, or files if there is no recipe.
        recipe: the recipe, if there is one.
        is_partial: whether parts of the recipe may be missing.

    Returns:
        (part, path) in the order of the files.

    Raises:
        ValueError: a part is unknown or missing.
    """
    if recipe is None:
        return [(name, Path(name)) for name in given]
    known = ", ".join(f"{name}=FILE" for name in recipe.parts)
    parts = []
    for entry in given:
        name, _, file = entry.partition("=")
        path = Path(file)
        if name not in recipe.parts or path == Path():
            raise ValueError(f"{name!r} is not a part of the recipe: give --data_path {known}.")
        parts.append((name, path))
    missing = recipe.parts.keys() - {name for name, _ in parts}
    if missing and not is_partial:
        raise ValueError(
            f"No file for {', '.join(sorted(missing))}: give {known}, or --partial to leave parts "
            "out."
        )
    return parts


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--data_path",
        nargs="+",
        metavar="[PART=]FILE",
        help=f"{INPUT_HELP} Several can be given.",
    )
    add_column_flags(parser)
    parser.add_argument("--output_path", type=Path, help=OUTPUT_HELP)
    parser.add_argument("--recipe", help="The name or the file of a recipe.")
    parser.add_argument(
        "--partial", action="store_true", help="Leave out the parts that no file is given for."
    )
    parser.add_argument(
        "--no_shuffle", action="store_true", help="Write the examples in the order of the files."
    )
    parser.add_argument(
        "--transcripts",
        choices=TRANSCRIPT_RULES,
        help="The rule that cleans transcripts (default: the rule of the recipe, or clean).",
    )
    parser.add_argument(
        "--keep_audio_ids",
        action="store_true",
        help="Do not replace the parts of audio_ids that the recipe replaces.",
    )
    parser.add_argument(
        "--original_repeats",
        action="store_true",
        help="Sample repeated examples with replacement, as the original does.",
    )
    parser.add_argument("--list", action="store_true", help="Print the recipes and their parts.")
    add_order_flags(parser)
    add_embed_flags(parser)
    args = parser.parse_args(argv)
    if not args.list and not (args.data_path and args.output_path):
        parser.error("--data_path and --output_path are required")
    if args.no_shuffle and args.original_shuffle:
        parser.error("--no_shuffle and --original_shuffle exclude each other")
    return args


def check_effects(
    args: argparse.Namespace, recipe: Recipe | None, parts: list[tuple[str, Path]]
) -> None:
    """Check that the flags about the recipe have an effect.

    Raises:
        ValueError: the recipe repeats or replaces nothing.
    """
    name = args.recipe or "no recipe"
    if args.original_repeats:
        given = [recipe.parts[part] for part, _ in parts] if recipe else []
        if not any(part.repeat for part in given):
            raise ValueError(f"--original_repeats: {name} repeats none of the files. Leave it out.")
    if args.keep_audio_ids and not (recipe and recipe.audio_id_replacements):
        raise ValueError(f"--keep_audio_ids: {name} replaces no audio_ids. Leave it out.")


def make_corrections(args: argparse.Namespace, recipe: Recipe | None) -> Corrections:
    """Return the corrections that a recipe and the flags ask for, with counts of 0."""
    recipe = recipe or Recipe({})
    replacements = {} if args.keep_audio_ids else recipe.audio_id_replacements
    return Corrections(args.transcripts or recipe.transcripts, replacements)


def print_recipes() -> None:
    """Print name, parts and description of every recipe in data/recipes."""
    for path in sorted(RECIPES.glob("*.json")):
        recipe = read_recipe(path.stem)
        parts = " ".join(f"{part}=FILE" for part in recipe.parts)
        print(f"{path.stem}: {parts}\n  {recipe.about}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print_recipes()
        return 0
    recipe = read_recipe(args.recipe) if args.recipe else None
    parts = parse_parts(args.data_path, recipe, args.partial)
    check_effects(args, recipe, parts)
    columns = read_column_flags(args)
    sources = [find_dataset(path, columns.split) for _, path in parts]
    embedder = make_embedder(args, sources)
    part_of = recipe.parts if recipe else {}
    counts = Counts()
    corrections = make_corrections(args, recipe)

    def examples(generator: random.Random) -> Iterator[dict[str, Any]]:
        nonlocal counts, corrections
        # The original's order reads everything twice.
        counts = Counts()
        corrections = make_corrections(args, recipe)
        for (name, _), source in zip(parts, sources, strict=True):
            part = part_of.get(name, RecipePart())
            yield from resolve_ids(embedder, part_of_output(name, source, part, generator), source)

    def part_of_output(
        name: str, source: DatasetSource, part: RecipePart, generator: random.Random
    ) -> Iterator[dict[str, Any]]:
        for example in part_examples(source, part, generator, columns, folder):
            corrections.apply(example)
            counts.add(name, example)
            yield example

    # Write the examples in random order, or in that of the files.
    if args.original_repeats:
        repeats_folder = temporary_folder(args.output_path, "combine")
    else:
        repeats_folder = nullcontext()
    writer = write_examples(args.output_path, sources, reader_of(embedder))
    with repeats_folder as folder, writer as output:
        if args.no_shuffle:
            lines = (encode_line(example) for example in examples(random.Random(args.seed)))
        else:
            lines = shuffle_examples(examples, args.output_path, args.seed, args.original_shuffle)
        for line in lines:
            output.write(line)

    # Record the counts, and compare them with the published ones.
    order = order_facts(args.seed, args.original_shuffle)
    if args.no_shuffle:
        order = {"order": "as given", "seed": args.seed}
    unlike = differences(counts, recipe) if recipe else []
    facts = {
        "recipe": msgspec.to_builtins(recipe),
        "parts": [name for name, _ in parts],
        "num_examples": output.count,
        "counts": vars(counts),
        **order,
        "repeats": "original" if args.original_repeats else "exact",
        "corrections": corrections.to_dict(),
        "differences": unlike,
        **clip_facts(args, args.output_path, sources, columns),
    }
    write_provenance(args.output_path, "combine", sources, **facts)
    print(f"{args.output_path}: {output.count:,} examples")
    for name, count in counts.part.items():
        print(f"  {name}: {count:,}")
    for line in corrections.lines():
        print(f"  corrected: {line}")
    for line in unlike:
        print(f"  differs: {line}")
    return 0


if __name__ == "__main__":
    run_command(main)
