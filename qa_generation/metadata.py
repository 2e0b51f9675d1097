"""Files that are read before anything is asked: metadata by clip, and rows that clips have from other sources.

Notable:
- A file is a JSON list, which is held in memory, or JSON lines, which are streamed.
- Every row is checked, with all fields that the source uses, before a first request is made.
- A row whose clip and facts have come before is left out: its questions would be paid, and written, twice.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qa_generation.filters import marks
from qa_generation.qa_json import Pair
from qa_generation.sources import Row, Source, message

Clips = dict[str, list[Row]]  # audio_id -> its rows, in the order of the file


def read_json(path: Path) -> Iterator[Any]:
    """The rows of a JSON list or of JSON lines. ValueError: neither; says where."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                number += 1
                if not line.strip():
                    continue
                data = json.loads(line + file.read() if line.lstrip().startswith("[") else line)
                yield from data if isinstance(data, list) else [data]
    except json.JSONDecodeError as error:
        place = f"line {number + error.lineno - 1}, column {error.colno}"
        raise ValueError(
            f"{path}, {place}: {error.msg}; a JSON list or JSON lines are needed"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: {error}; a JSON list or JSON lines in UTF-8 are needed"
        ) from None


def read_metadata(path: Path, source: Source, dataset: str) -> tuple[Clips, list[str], int]:
    """Clips to ask about; of each row that cannot be asked its number from 0 and the reason; how many repeat one.

    Raises:
        ValueError: not JSON; says where.
    """
    clips: Clips = {}
    bad, repeats, known = [], 0, set()
    for index, row in enumerate(read_json(path)):
        try:
            if not isinstance(row, dict) or not row.get("audio_id"):
                raise ValueError("no audio_id")
            facts = message(source, row)
        except ValueError as error:
            bad.append(f"{path}, row {index}: {error}")
            continue
        mark = hashlib.sha256(json.dumps([row["audio_id"], facts]).encode()).digest()
        if mark in known:
            repeats += 1
            continue
        known.add(mark)
        clips.setdefault(row["audio_id"], []).append(
            row | {"dataset": row.get("dataset") or dataset}
        )
    return clips, bad, repeats


def read_pairs(paths: Iterable[Path], clips: Clips) -> dict[str, set[str]]:
    """Marks of the questions and answers that clips have in other files of rows.

    Raises:
        ValueError: a file is not of rows; says where.
    """
    found: dict[str, set[str]] = {}
    for path in paths:
        for index, row in enumerate(read_json(path)):
            names = ("audio_id", "instruction", "output")
            values = [row.get(name) if isinstance(row, dict) else None for name in names]
            if not all(isinstance(value, str) for value in values):
                raise ValueError(f"{path}, row {index}: needs {', '.join(names)} as texts")
            if values[0] in clips:
                found.setdefault(values[0], set()).update(marks(Pair(*values[1:])))
    return found
