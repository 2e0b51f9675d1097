"""Writes the report of a measurement."""

import json
from pathlib import Path
from typing import Any

from ltu.files import replace_file


def write_report(report: dict[str, Any], path: Path | None) -> None:
    """Write a report as JSON, if a file is given."""
    if path is None:
        return
    text = json.dumps(report, indent=1) + "\n"
    replace_file(path, text.encode())


def print_report(report: dict[str, Any]) -> None:
    """Print a report as JSON."""
    print(json.dumps(report, indent=1))
