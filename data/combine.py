"""Combine files of rows into one data set, in random order and constant memory.

    python -m data.combine --data_path A.json B.jsonl.gz --output_path C.json --seed 1
    python -m data.combine --recipe openaqa_all --data_path closed=A.json open=B.json --output_path C.json
    python -m data.combine --list

Notable:
- A recipe (data/recipes/NAME.json, or a file of one's own) names parts. For each: how often rows of a dataset are
  repeated, and the share of its questions that "Closed-ended question: " is put in front of. A part may have several
  files. A published recipe also has the published numbers of rows: what differs from them is listed.
- Parts are read in the order in which they are given, files before their repetition.
- Without a seed the original's lists have any order. --original_shuffle gives the one that its scripts would give
  after `random.seed(0)`: the shares are drawn row by row, then the list is shuffled.
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
from ltu.data.dataset_files import encode_row, stream_rows
from ltu.files import run_command

RECIPES = Path(__file__).parent / "recipes"
CLOSED_ENDED = "Closed-ended question: "
PART_KEYS = {"rows", "repeat", "closed_ended_share"}


def read_mixture(name: str) -> dict[str, Any]:
    """A recipe by its name or path.

    Raises:
        ValueError: there is none, or it has something unknown.
    """
    path = RECIPES / f"{name}.json"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(place.stem for place in RECIPES.glob("*.json")))
        raise ValueError(f"No recipe {name!r}. Give a file, or one of {known}.")
    recipe = json.loads(path.read_text(encoding="utf-8"))
    unknown = recipe.keys() - {"about", "parts", "expected"}
    unknown |= {key for part in recipe["parts"].values() for key in part.keys() - PART_KEYS}
    if unknown:
        raise ValueError(f"{path}: unknown {sorted(unknown)}; a part may have {sorted(PART_KEYS)}.")
    return recipe


def part_rows(path: Path, part: dict[str, Any], chance: random.Random) -> Iterator[dict[str, Any]]:
    """The rows of a file as its part of the recipe has them."""
    repeat = {pattern.lower(): times for pattern, times in part.get("repeat", {}).items()}
    share = part.get("closed_ended_share", 0)
    for turn in range(max([1, *repeat.values()])):
        for row in stream_rows(path):
            dataset = str(row.get("dataset", "")).lower()
            times = (
                next((n for pattern, n in repeat.items() if fnmatchcase(dataset, pattern)), 1)
                if repeat
                else 1
            )
            if turn >= times:
                continue
            if share and chance.random() < share:
                row["instruction"] = f"{CLOSED_ENDED}{row.get('instruction', '')}"
            yield row


class Counts(dict):
    """Rows by part, dataset and task."""

    def __init__(self) -> None:
        super().__init__(part=Counter(), dataset=Counter(), task=Counter())

    def add(self, part: str, row: dict[str, Any]) -> None:
        self["part"][part] += 1
        self["dataset"][str(row.get("dataset"))] += 1
        self["task"][str(row.get("task"))] += 1


def differences(counts: Counts, recipe: dict[str, Any]) -> list[str]:
    """What is not as published, a line each. `"683k"` is a number that was published rounded."""
    expected = recipe.get("expected", {})
    parts = {name: part["rows"] for name, part in recipe["parts"].items() if "rows" in part}
    wanted = [("part", name, number) for name, number in parts.items()]
    wanted += [
        (kind, name, n)
        for kind in ("dataset", "task")
        for name, n in expected.get(kind, {}).items()
    ]
    lines = []
    for kind, pattern, number in wanted:
        found = sum(
            n for name, n in counts[kind].items() if fnmatchcase(name.lower(), pattern.lower())
        )
        is_rounded = isinstance(number, str)
        if (f"{found / 1000:.0f}k" if is_rounded else found) != number:
            number = number if is_rounded else f"{number:,}"
            lines.append(f"{kind} {pattern}: {found:,} rows, published {number}")
    found, number = counts["part"].total(), expected.get("rows")
    return lines + (
        [f"all: {found:,} rows, published {number:,}"] if number not in (None, found) else []
    )


def parse_parts(
    given: list[str], recipe: dict[str, Any] | None, is_partial: bool
) -> list[tuple[str, Path]]:
    """`NAME=FILE` of a recipe, or files -> (part, path) in the order of the files.

    Raises:
        ValueError: a part is unknown or missing.
    """
    if recipe is None:
        return [(name, Path(name)) for name in given]
    parts = [(name, Path(path)) for name, _, path in (entry.partition("=") for entry in given)]
    known = ", ".join(f"{name}=FILE" for name in recipe["parts"])
    for name, path in parts:
        if name not in recipe["parts"] or path == Path():
            raise ValueError(f"{name!r} is no part of the recipe: give --data_path {known}.")
    missing = recipe["parts"].keys() - {name for name, _ in parts}
    if missing and not is_partial:
        raise ValueError(
            f"No file for {', '.join(sorted(missing))}: give {known}, or --partial to go without."
        )
    return parts


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data_path", nargs="+", metavar="[PART=]FILE", help="JSON list, JSON lines or Parquet"
    )
    parser.add_argument("--output_path", type=Path)
    parser.add_argument("--recipe", help="name or file of a recipe")
    parser.add_argument(
        "--partial", action="store_true", help="go without the parts that no file is given for"
    )
    parser.add_argument("--no_shuffle", action="store_true", help="keep the order of the files")
    parser.add_argument("--list", action="store_true", help="print the recipes and their parts")
    add_order_flags(parser)
    args = parser.parse_args(argv)
    if not args.list and not (args.data_path and args.output_path):
        parser.error("--data_path and --output_path are needed")
    if args.no_shuffle and args.original_shuffle:
        parser.error("--no_shuffle and --original_shuffle exclude each other")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        for path in sorted(RECIPES.glob("*.json")):
            recipe = read_mixture(path.stem)
            print(
                f"{path.stem}: {' '.join(f'{part}=FILE' for part in recipe['parts'])}\n  {recipe['about']}"
            )
        return 0
    recipe = read_mixture(args.recipe) if args.recipe else None
    parts = parse_parts(args.data_path, recipe, args.partial)
    settings = recipe["parts"] if recipe else {}

    def rows(chance: random.Random) -> Iterator[dict[str, Any]]:
        nonlocal counts
        counts = Counts()  # The original's order takes two passes.
        for name, path in parts:
            for row in part_rows(path, settings.get(name, {}), chance):
                counts.add(name, row)
                yield row

    counts = Counts()
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
    }
    facts |= {"differences": unlike} | audio_root_of(args.output_path, files)
    write_provenance(args.output_path, "combine", files, **facts)
    print(f"{args.output_path}: {output.count:,} rows")
    for name, count in counts["part"].items():
        print(f"  {name}: {count:,}")
    for line in unlike:
        print(f"  differs: {line}")
    return 0


if __name__ == "__main__":
    run_command(main)
