"""Writes the report of a measurement."""

import json
from pathlib import Path
from typing import Any

from ltu.files import write_json


def write_report(report: dict[str, Any], path: Path | None) -> None:
    """Write a report as JSON, if a file is given."""
    if path is not None:
        write_json(report, path)


def print_report(report: dict[str, Any]) -> None:
    """Print a report as JSON."""
    print(json.dumps(report, indent=1))
