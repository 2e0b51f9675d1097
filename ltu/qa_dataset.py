"""Rows of questions and answers: read, checked, and made into what the collator pads.

Notable:
- Everything that can be wrong with a row is found before training, in seconds, and said with file and row number.
- A clip that cannot be heard is skipped, counted and named; its row's place is taken by the next one, so steps and
  batch sizes stay. Features are never made up. More than `max_bad` such rows stop the run.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ltu.audio import AudioError, load_audio

logger = logging.getLogger(__name__)
NO_AUDIO = (None, "", "empty")  # `audio_id` of a question without audio.
# What Whisper writes for silence: it learned from the subtitles of videos. In three casings, no others.
FAREWELL = re.compile(
    "|".join(
        f(f"{thanks} for watching") + "[.!]?" for thanks in ("Thanks", "Thank you") for f in (str, str.lower, str.upper)
    )
)


class RowError(ValueError):
    """A row that cannot be used; the message has file, row, reason and the way out."""


def read_rows(
    path: str | Path, audio_root: str | Path | None = None, need_output: bool = True, max_errors: int = 10
) -> list[dict]:
    """Read a JSON list or JSON lines of `{"instruction", "input", "audio_id", "output", "dataset"?, "task"?}`.

    Args:
        path: the file.
        audio_root: folder of relative `audio_id`s; by default the folder of the file.
        need_output: whether every row must have an answer (training) or may lack one (questions).

    Returns:
        the rows, each with `audio`: the path of its clip, or None.

    Raises:
        RowError: what is wrong with the first `max_errors` bad rows, by number (from 1).
    """
    path = Path(path)
    if not path.is_file():
        raise RowError(
            f"{path} is not there. --data_path takes a JSON list or JSON lines of questions; see the README for the "
            "row format."
        )
    root = Path(audio_root) if audio_root else path.parent
    rows, errors = [], []
    for number, row in enumerate(_parse(path), start=1):
        reason = what_is_wrong(row, need_output)
        if reason:
            errors.append(f"{path}, row {number}: {reason}")
            if len(errors) == max_errors:
                break
            continue
        audio_id = row.get("audio_id")
        rows.append(row | {"audio": None if audio_id in NO_AUDIO else str(root / audio_id)})
    if errors:
        raise RowError("\n".join(errors))
    if not rows:
        raise RowError(f"{path} holds no rows.")
    return rows


def _parse(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip()[:1] == "[":
            yield from json.loads(text)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise RowError(
                        f"{path}, line {number}: not JSON ({error}). The file must be a JSON list or one JSON "
                        "object a line."
                    ) from error
    except json.JSONDecodeError as error:
        raise RowError(f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise RowError(f"{path}: not UTF-8 at byte {error.start}.") from error


def what_is_wrong(row: Any, need_output: bool) -> str | None:
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, not an object with instruction, audio_id and output"
    for key in ("instruction", "output") if need_output else ("instruction",):
        if key not in row:
            return f"no {key!r}; it has {sorted(row)}"
    for key in ("instruction", "input", "output"):
        if row.get(key) is not None and not isinstance(row[key], str):
            return f"{key!r} is a {type(row[key]).__name__}, not text"
    if row["instruction"] is None or (need_output and row["output"] is None):
        return "'instruction' or 'output' is null"
    if not isinstance(row.get("audio_id"), str | None):
        return (
            f"'audio_id' is a {type(row['audio_id']).__name__}; give a path, or \"empty\" for a question without audio"
        )
    return None


def clean_transcript(text: str) -> str:
    """Whisper's transcript without its farewells to a video's viewers, and without white space at its ends."""
    return FAREWELL.sub("", text).strip()


def check_audio(rows: list[dict]) -> dict[str, AudioError]:
    """Load every clip once; what cannot be heard, by path."""
    bad = {}
    for audio in tqdm(sorted({row["audio"] for row in rows if row["audio"]}), desc="checking audio", unit="clip"):
        try:
            load_audio(audio)
        except AudioError as error:
            bad[audio] = error
    return bad


class QaDataset(Dataset):
    """Rows as ids, labels and features.

    Args:
        rows: of `read_rows`.
        encode: row -> (ids, labels); `LtuProcessor.encode_example` with its settings.
        read_features: row -> what the ear takes; `LtuProcessor.read_features`.
        max_bad: how many different rows may be skipped because their clip cannot be heard.
    """

    def __init__(self, rows: list[dict], encode: Callable, read_features: Callable, max_bad: int = 0):
        self.rows = rows
        self.encode = encode
        self.read_features = read_features
        self.max_bad = max_bad
        self.lengths = torch.zeros(len(rows), dtype=torch.int32)  # Text ids of each row, by which batches are grouped.
        for index, row in enumerate(tqdm(rows, desc="tokenising", unit="row", disable=len(rows) < 20_000)):
            ids, labels = encode(row)
            if max(labels) < 0:
                raise RowError(
                    f"Row {index + 1}: no answer is left within --cutoff_len: the question alone fills it. Raise "
                    f"--cutoff_len or shorten the question: {row['instruction'][:80]!r}"
                )
            self.lengths[index] = len(ids)
        # Shared memory, because each worker of the data loader is a process of its own.
        self.is_bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def skipped(self) -> list[str]:
        """`audio_id` of every row skipped so far."""
        return [self.rows[index]["audio_id"] for index in self.is_bad.nonzero()[:, 0].tolist()]

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self)):
            row = (index + offset) % len(self)
            try:
                features = None if self.rows[row]["audio"] is None else self.read_features(self.rows[row])
            except AudioError as error:
                self._skip(row, error)
                continue
            ids, labels = self.encode(self.rows[row])
            return {"input_ids": ids, "labels": labels, "input_features": features}
        raise RowError(f"None of the {len(self)} rows has a clip that can be heard.")

    def _skip(self, row: int, error: AudioError) -> None:
        if not self.is_bad[row]:
            self.is_bad[row] = True
            logger.warning("Row %d skipped: %s", row + 1, error)
        if int(self.is_bad.sum()) > self.max_bad:
            raise RowError(
                f"{int(self.is_bad.sum())} rows have a clip that cannot be heard, more than --max_bad "
                f"{self.max_bad}. The last: row "
                f"{row + 1}: {error} Mend the rows (--check_audio lists them all at start), or allow more with "
                "--max_bad."
            ) from error
