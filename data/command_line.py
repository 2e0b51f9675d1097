"""Defines the flags that the commands of `data/` share."""

import argparse
from pathlib import Path

OUTPUT_HELP = "The dataset file to write; its suffix selects the format."


def command_parser(doc: str | None, output: str | None = OUTPUT_HELP) -> argparse.ArgumentParser:
    """Return a parser with --data_path and, unless `output` is None, --output_path.

    Args:
        doc: the docstring of the module, which becomes the help of the command.
        output: help text of --output_path.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data_path",
        required=True,
        type=Path,
        help="The dataset file to read: a JSON list, JSON lines or Parquet.",
    )
    if output:
        parser.add_argument("--output_path", required=True, type=Path, help=output)
    return parser
