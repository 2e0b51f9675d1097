r"""Combines dataset files into one, in random order and constant memory.

    python -m data.combine --data_path A.json B.jsonl.gz --output_path C.json --seed 1
    python -m data.combine --recipe openaqa_all --data_path closed=A.json open=B.json \
        --output_path C.json
    python -m data.combine --list

A recipe (data/recipes/NAME.json, or a file of your own) names the parts of a dataset. For each part
it says how often the examples of a dataset are repeated, and the fraction of the questions that get
the prefix "Closed-ended question: ". A part may have several files. A published recipe also has the
published numbers of examples: every difference from them is listed.

The parts are read in the order in which they are given, and all files of a part before their
repetition.

Without a seed the original's lists have an arbitrary order. --original_shuffle gives the order that
its scripts would give after `random.seed(0)`: the questions that get the prefix are drawn example
by example, then the list is shuffled.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from data.provenance import audio_root_of, write_provenance, write_rows
from data.shuffle import add_order_flags, order_of, shuffle_rows
from ltu.data.dataset_io import encode_row, stream_rows
from ltu.files import run_command

RECIPES = Path(__file__).parent / "recipes"
CLOSED_ENDED = "Closed-ended question: "
RECIPE_KEYS = {"about", "parts", "expected"}
PART_KEYS = {"rows", "repeat", "closed_ended_share"}


def read_mixture(name: str) -> dict[str, Any]:
    """Read a recipe by its name or path.

    Raises:
        ValueError: there is no such recipe, or it has an unknown key.
    """
    path = RECIPES / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.json")))
        raise ValueError(f"No recipe {name!r}. Give a file, or one of {known}.")
    recipe = json.loads(path.read_text(encoding="utf-8"))
    unknown = recipe.keys() - RECIPE_KEYS
    for part in recipe["parts"].values():
        unknown |= part.keys() - PART_KEYS
    if unknown:
        raise ValueError(
            f"{path}: unknown keys {sorted(unknown)}; a part may have {sorted(PART_KEYS)}."
        )
    return recipe


def part_rows(
    path: Path, part: dict[str, Any], generator: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield the examples of a file, repeated and prefixed as its part of the recipe says.

    Args:
        path: the dataset file.
        part: the part of the recipe; `{}` changes nothing.
        generator: draws the questions that get the prefix.
    """
    repeats = {pattern.lower(): times for pattern, times in part.get("repeat", {}).items()}
    fraction = part.get("closed_ended_share", 0)
    for repetition in range(max([1, *repeats.values()])):
        for row in stream_rows(path):
            if repetition >= _times(row, repeats):
                continue
            if fraction and generator.random() < fraction:
                row["instruction"] = f"{CLOSED_ENDED}{row.get('instruction', '')}"
            yield row


def _times(row: dict[str, Any], repeats: dict[str, int]) -> int:
    """Return how often an example is repeated; `repeats` is pattern of a dataset -> times."""
    if not repeats:
        return 1
    dataset = str(row.get("dataset", "")).lower()
    for pattern, times in repeats.items():
        if fnmatchcase(dataset, pattern):
            return times
    return 1


class Counts(dict):
    """Numbers of examples by part, dataset and task."""

    def __init__(self) -> None:
        super().__init__(part=Counter(), dataset=Counter(), task=Counter())

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Count an example of a part."""
        self["part"][part] += 1
        self["dataset"][str(row.get("dataset"))] += 1
        self["task"][str(row.get("task"))] += 1


def differences(counts: Counts, recipe: dict[str, Any]) -> list[str]:
    """Return one line for each number that differs from the published one.

    A published number like `"683k"` was rounded to thousands.
    """
    expected = recipe.get("expected", {})
    published: list[tuple[str, str, int | str]] = []  # (kind, pattern, number)
    for name, part in recipe["parts"].items():
        if "rows" in part:
            published.append(("part", name, part["rows"]))
    for kind in ("dataset", "task"):
        for pattern, number in expected.get(kind, {}).items():
            published.append((kind, pattern, number))

    lines = []
    for kind, pattern, number in published:
        found = 0
        for name, count in counts[kind].items():
            if fnmatchcase(name.lower(), pattern.lower()):
                found += count
        if isinstance(number, str):
            is_equal = f"{found / 1000:.0f}k" == number
            shown = number
        else:
            is_equal = found == number
            shown = f"{number:,}"
        if not is_equal:
            lines.append(f"{kind} {pattern}: {found:,} examples, published {shown}")

    total = counts["part"].total()
    number = expected.get("rows")
    if number is not None and number != total:
        lines.append(f"all: {total:,} examples, published {number:,}")
    return lines


def parse_parts(
    given: list[str], recipe: dict[str, Any] | None, is_partial: bool
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
    known = ", ".join(f"{name}=FILE" for name in recipe["parts"])
    parts = []
    for entry in given:
        name, _, file = entry.partition("=")
        path = Path(file)
        if name not in recipe["parts"] or path == Path():
            raise ValueError(f"{name!r} is not a part of the recipe: give --data_path {known}.")
        parts.append((name, path))
    missing = recipe["parts"].keys() - {name for name, _ in parts}
    if missing and not is_partial:
        raise ValueError(
            f"No file for {', '.join(sorted(missing))}: give {known}, or --partial to leave parts "
            "out."
        )
    return parts


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data_path",
        nargs="+",
        metavar="[PART=]FILE",
        help="The dataset files to read: JSON lists, JSON lines or Parquet.",
    )
    parser.add_argument(
        "--output_path", type=Path, help="The dataset file to write; its suffix selects the format."
    )
    parser.add_argument("--recipe", help="The name or the file of a recipe.")
    parser.add_argument(
        "--partial", action="store_true", help="Leave out the parts that no file is given for."
    )
    parser.add_argument(
        "--no_shuffle", action="store_true", help="Write the examples in the order of the files."
    )
    parser.add_argument("--list", action="store_true", help="Print the recipes and their parts.")
    add_order_flags(parser)
    args = parser.parse_args(argv)
    if not args.list and not (args.data_path and args.output_path):
        parser.error("--data_path and --output_path are required")
    if args.no_shuffle and args.original_shuffle:
        parser.error("--no_shuffle and --original_shuffle exclude each other")
    return args


def print_recipes() -> None:
    """Print name, parts and description of every recipe in data/recipes."""
    for path in sorted(RECIPES.glob("*.json")):
        recipe = read_mixture(path.stem)
        parts = " ".join(f"{part}=FILE" for part in recipe["parts"])
        print(f"{path.stem}: {parts}\n  {recipe['about']}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print_recipes()
        return 0
    recipe = read_mixture(args.recipe) if args.recipe else None
    parts = parse_parts(args.data_path, recipe, args.partial)
    settings = recipe["parts"] if recipe else {}
    counts = Counts()

    def rows(generator: random.Random) -> Iterator[dict[str, Any]]:
        nonlocal counts
        counts = Counts()  # The original's order reads everything twice.
        for name, path in parts:
            for row in part_rows(path, settings.get(name, {}), generator):
                counts.add(name, row)
                yield row

    files = [path for _, path in parts]
    with write_rows(args.output_path, files) as output:
        if args.no_shuffle:
            lines = (encode_row(row) for row in rows(random.Random(args.seed)))
        else:
            lines = shuffle_rows(rows, args.output_path, args.seed, args.original_shuffle)
        for line in lines:
            output.write(line)

    order = {"order": "as given", "seed": args.seed} if args.no_shuffle else order_of(args)
    unlike = differences(counts, recipe) if recipe else []
    facts = {
        "recipe": recipe,
        "parts": [name for name, _ in parts],
        "rows": output.count,
        "counts": counts,
        **order,
        "differences": unlike,
        **audio_root_of(args.output_path, files),
    }
    write_provenance(args.output_path, "combine", files, **facts)
    print(f"{args.output_path}: {output.count:,} examples")
    for name, count in counts["part"].items():
        print(f"  {name}: {count:,}")
    for line in unlike:
        print(f"  differs: {line}")
    return 0


if __name__ == "__main__":
    run_command(main)
