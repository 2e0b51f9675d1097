"""Defines the flags that the commands of `data/` share."""

import argparse
import os
from pathlib import Path

from ltu.data.columns import add_column_flags, read_column_flags
from ltu.data.dataset_source import DatasetSource, find_dataset

INPUT_HELP = (
    "The dataset to read: a JSON list, JSON lines or Parquet; a folder of datasets' save_to_disk; "
    "or OWNER/NAME[:CONFIG[:SPLIT]] of the hub."
)
OUTPUT_HELP = "The dataset file to write; its suffix selects the format."


def command_parser(
    doc: str | None, data_path: str | None = INPUT_HELP, output_path: str | None = OUTPUT_HELP
) -> argparse.ArgumentParser:
    """Return a parser with the flags --data_path and --output_path.

    Args:
        doc: the docstring of the module, which becomes the help of the command.
        data_path: help text of --data_path; None leaves the flag out.
        output_path: help text of --output_path; None leaves the flag out.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if data_path:
        parser.add_argument("--data_path", required=True, type=Path, help=data_path)
        add_column_flags(parser)
    if output_path:
        parser.add_argument("--output_path", required=True, type=Path, help=output_path)
    return parser


def source_of(args: argparse.Namespace) -> DatasetSource:
    """Return the dataset that --data_path and --split name.

    Raises:
        OSError, ValueError: it is not there, or the split is not clear.
    """
    return find_dataset(args.data_path, read_column_flags(args).split)


def add_audio_root(parser: argparse.ArgumentParser) -> None:
    """Add --audio_root."""
    parser.add_argument(
        "--audio_root",
        type=Path,
        help="Folder of relative audio_ids (default: the folder of the dataset file).",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers, which must be at least 1."""
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=os.cpu_count(),
        help="The number of processes that decode (default: the number of CPUs).",
    )


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
