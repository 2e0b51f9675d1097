"""Lists what the authors released, downloads it, and prepares the data and checkpoint of a model.

    python -m ltu.released [--markdown]                  the names, or the whole table
    python -m ltu.released download NAME [--root DIR]    one row, into DIR/pretrained_mdls
    python -m ltu.released prep --kind ltu               toy set and default checkpoint

train_scripts/*/prep_train.sh runs `prep`. The authors round sizes and publish no hashes: a row has
a sha256 only where somebody published it.
"""

import argparse
from dataclasses import asdict, fields
from pathlib import Path

from ltu.checkpoints.released_files import (
    PREP,
    TABLE,
    VICUNA,
    Released,
    address,
    download,
    find,
    prep,
    size_of,
)
from ltu.files import run_command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("list", "download", "prep"),
        default="list",
        help="What to do. The default lists the table.",
    )
    parser.add_argument("name", nargs="?", help="The row to download.")
    parser.add_argument(
        "--markdown", action="store_true", help="Print the whole table as markdown."
    )
    parser.add_argument(
        "--kind", choices=sorted(PREP), default="ltu", help="The model that prep prepares."
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="Also prepare the sets and subsets that the stage scripts read.",
    )
    parser.add_argument(
        "--eval",
        action="store_true",
        help="Also download the authors' evaluation questions, for eval.run.",
    )
    parser.add_argument(
        "--mirror",
        metavar="DIR_OR_URL",
        help="Take the files, which have the table's names, from a folder or the address of one.",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Print links, sizes, paths and commands, and do nothing.",
    )
    parser.add_argument(
        "--llm",
        default=VICUNA,
        help="The language model of the checkpoint: a folder or a hub id.",
    )
    parser.add_argument(
        "--root", type=Path, default=Path("."), help="The folder of pretrained_mdls and data."
    )
    args = parser.parse_args(argv)
    if args.command == "prep":
        prep(
            args.kind,
            args.root,
            args.llm,
            mirror=args.mirror,
            with_full_set=args.full,
            with_eval=args.eval,
            dry_run=args.dry_run,
        )
    elif args.command == "download":
        if not args.name:
            parser.error("download needs a NAME")
        row = find(args.name)
        folder = args.root / "pretrained_mdls"
        print(f"{row.name}: {address(row, args.mirror)} ({size_of(row)}) -> {folder}")
        if not args.dry_run:
            print(download(row, folder, args.mirror))
    elif args.markdown:
        print_markdown()
    else:
        for row in TABLE:
            print(f"{row.name:26} {row.kind:8} {size_of(row):13} {row.note}")


def print_markdown() -> None:
    """Print the table, one column for each field of a row."""
    names = [field.name for field in fields(Released)]
    print(f"| {' | '.join(names)} |")
    print(f"|{'---|' * len(names)}")
    for row in TABLE:
        cells = asdict(row) | {"link": f"[{row.file}]({row.url})", "size": size_of(row)}
        texts = ["" if cell is None else str(cell) for cell in cells.values()]
        print(f"| {' | '.join(texts)} |")


if __name__ == "__main__":
    run_command(main)
