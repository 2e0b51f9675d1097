"""Reads the metadata of clips, and the examples that clips have from other sources.

A file is a JSON list, which is held in memory, or JSON lines, which are streamed. Every metadata
row is checked, with all fields that the source uses, before a first request is sent. A row that
repeats clip and facts is left out, because its questions would be paid, and written, twice.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qa_generation.filters import marks
from qa_generation.metadata_prompts import Row, Source, message
from qa_generation.qa_json import Pair

Clips = dict[str, list[Row]]  # audio_id -> its metadata rows, in the order of the file


def read_json(path: Path) -> Iterator[Any]:
    """Yield the items of a JSON list or of JSON lines.

    Raises:
        ValueError: The file is neither; the message states where.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                number += 1
                if not line.strip():
                    continue
                is_list = line.lstrip().startswith("[")
                data = json.loads(line + file.read() if is_list else line)
                yield from data if isinstance(data, list) else [data]
    except json.JSONDecodeError as error:
        position = f"line {number + error.lineno - 1}, column {error.colno}"
        raise ValueError(
            f"{path}, {position}: {error.msg}; a JSON list or JSON lines are needed"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: {error}; a JSON list or JSON lines in UTF-8 are needed"
        ) from None


def read_metadata(path: Path, source: Source, dataset: str) -> tuple[Clips, list[str], int]:
    """Read the metadata of clips.

    Returns:
        The clips, an error message with the number from 0 for each row that cannot be used, and the
        number of rows that repeat another.

    Raises:
        ValueError: The file is no JSON; the message states where.
    """
    clips: Clips = {}
    bad = []
    repeats = 0
    known = set()
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
        own_dataset = row.get("dataset") or dataset
        clips.setdefault(row["audio_id"], []).append(row | {"dataset": own_dataset})
    return clips, bad, repeats


def read_pairs(paths: Iterable[Path], clips: Clips) -> dict[str, set[str]]:
    """Return the marks of the questions and answers that clips have in other dataset files.

    Raises:
        ValueError: A file holds something else than examples; the message states where.
    """
    found: dict[str, set[str]] = {}
    names = ("audio_id", "instruction", "output")
    for path in paths:
        for index, row in enumerate(read_json(path)):
            values = [row.get(name) if isinstance(row, dict) else None for name in names]
            if not all(isinstance(value, str) for value in values):
                raise ValueError(f"{path}, row {index}: needs {', '.join(names)} as texts")
            audio_id, question, answer = values
            if audio_id in clips:
                found.setdefault(audio_id, set()).update(marks(Pair(question, answer)))
    return found
