"""What the verbs of `data/` have in common as commands."""

import argparse
from pathlib import Path


def command_parser(
    doc: str | None, output: str | None = "rows, in the format of its ending"
) -> argparse.ArgumentParser:
    """A parser with --data_path and, unless `output` is None, --output_path; its help is the module's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data_path", required=True, type=Path, help="rows: JSON list, JSON lines or Parquet"
    )
    if output:
        parser.add_argument("--output_path", required=True, type=Path, help=output)
    return parser
