"""What the authors released, as one table, and the way from a row of it to files on this disk.

    python -m ltu.released [--markdown]                  the names, or the whole table
    python -m ltu.released download NAME [--root DIR]    one row, into DIR/pretrained_mdls
    python -m ltu.released prep --kind ltu               toy set and default checkpoint (train_scripts/*/prep_train.sh)

Notable:
- The authors round sizes and give no hashes: a sha256 stands here only where somebody published it.
"""

import argparse
from dataclasses import asdict, fields
from pathlib import Path

from ltu.checkpoints.released_files import PREP, TABLE, VICUNA, Released, download, prep, size_of
from ltu.files import run_command


def main(argv: list[str] | None = None) -> None:
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    parser.add_argument("command", nargs="?", choices=("list", "download", "prep"), default="list")
    parser.add_argument("name", nargs="?", help="of download: a row")
    parser.add_argument("--markdown", action="store_true", help="of list: the whole table")
    parser.add_argument("--kind", choices=sorted(PREP), default="ltu")
    parser.add_argument(
        "--full", action="store_true", help="also the sets and subsets that the stage scripts read"
    )
    parser.add_argument(
        "--eval", action="store_true", help="also the authors' evaluation questions, for eval.run"
    )
    parser.add_argument(
        "--from", dest="source", help="folder or address with files of the table's names"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print links, sizes, places and commands only"
    )
    parser.add_argument(
        "--llm", default=VICUNA, help="language model of the checkpoint: folder or hub id"
    )
    parser.add_argument(
        "--root", type=Path, default=Path("."), help="where pretrained_mdls and data lie"
    )
    args = parser.parse_args(argv)
    if args.command == "prep":
        prep(args)
    elif args.command == "download":
        print(
            download(
                args.name or parser.error("download needs a NAME"),
                args.root / "pretrained_mdls",
                args.source,
            )
        )
    elif args.markdown:
        names = [field.name for field in fields(Released)]
        print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
        for row in TABLE:
            cells = asdict(row) | {"link": f"[{row.file}]({row.url})", "size": size_of(row)}
            print(f"| {' | '.join('' if cell is None else str(cell) for cell in cells.values())} |")
    else:
        print(
            "\n".join(f"{row.name:26} {row.kind:8} {size_of(row):13} {row.note}" for row in TABLE)
        )


if __name__ == "__main__":
    run_command(main, KeyError)
