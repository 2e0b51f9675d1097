"""Reads the metadata of clips, and the examples that clips have from other sources.

A file is a JSON list, which is held in memory, or JSON lines, which are streamed. Every metadata
row is checked, with all fields that the source uses, before a first request is sent. A row that
repeats clip and facts is left out, because its questions would be paid, and written, twice.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qa_generation.filters import duplicate_keys
from qa_generation.metadata_prompts import MetadataRow, Source, message
from qa_generation.qa_json import Pair

Clips = dict[str, list[MetadataRow]]  # audio_id -> its metadata rows, in the order of the file


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
                text = line
                if line.lstrip().startswith("["):
                    text += file.read()
                data = json.loads(text)
                if isinstance(data, list):
                    yield from data
                else:
                    yield data
    except json.JSONDecodeError as error:
        position = f"line {number + error.lineno - 1}, column {error.colno}"
        raise ValueError(
            f"{path}, {position}: {error.msg}; a JSON list or JSON lines are needed"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: {error}; a JSON list or JSON lines in UTF-8 are needed"
        ) from None


@dataclass
class Metadata:
    """The metadata of clips.

    Args:
        clips: The metadata rows of each clip.
        errors: A message with the number from 0 for each row that cannot be used.
        num_repeats: Number of rows that repeat another.
    """

    clips: Clips = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    num_repeats: int = 0


def read_metadata(path: Path, source: Source, dataset: str) -> Metadata:
    """Read the metadata of clips.

    Args:
        dataset: The dataset of rows that name none.

    Raises:
        ValueError: The file is no JSON; the message states where.
    """
    metadata = Metadata()
    known_hashes = set()
    for index, row in enumerate(read_json(path)):
        try:
            if not isinstance(row, dict) or not row.get("audio_id"):
                raise ValueError("no audio_id")
            facts = message(source, row)
        except ValueError as error:
            metadata.errors.append(f"{path}, row {index}: {error}")
            continue
        audio_id = row["audio_id"]
        row_hash = hashlib.sha256(json.dumps([audio_id, facts]).encode()).digest()
        if row_hash in known_hashes:
            metadata.num_repeats += 1
            continue
        known_hashes.add(row_hash)
        row_with_dataset = row | {"dataset": row.get("dataset") or dataset}
        metadata.clips.setdefault(audio_id, []).append(row_with_dataset)
    return metadata


def read_pairs(paths: Iterable[Path], clips: Clips) -> dict[str, set[str]]:
    """Return the duplicate keys of the pairs that clips have in other dataset files.

    Raises:
        ValueError: A file holds something else than examples; the message states where.
    """
    keys: dict[str, set[str]] = {}
    for path in paths:
        for index, example in enumerate(read_json(path)):
            if not isinstance(example, dict):
                example = {}
            audio_id = example.get("audio_id")
            question = example.get("instruction")
            answer = example.get("output")
            if not all(isinstance(value, str) for value in (audio_id, question, answer)):
                raise ValueError(
                    f"{path}, example {index}: needs audio_id, instruction, output as texts"
                )
            if audio_id in clips:
                keys.setdefault(audio_id, set()).update(duplicate_keys(Pair(question, answer)))
    return keys
