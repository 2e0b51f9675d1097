"""Rows of questions and answers: read, checked, and made into what the collator pads.

    python -m ltu.qa_dataset index all.json --base_model DIR        for millions of rows; see ltu.row_index

Notable:
- Everything that can be wrong with a row is found before training, in seconds, and said with file and row number. (Of
  more than 100,000 rows without an index, a question that fills the cutoff is found when its turn comes.)
- A clip that cannot be heard is skipped, counted and named; its row's place is taken by the next one, so steps and
  batch sizes stay. Features are never made up. More than `max_bad` such rows stop the run.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ltu.audio import AudioError, load_audio
from ltu.row_files import stream_rows
from ltu.row_parser import RowError

logger = logging.getLogger(__name__)
MAX_UNINDEXED = 100_000  # rows that are tokenised at the start of a run, in about half a minute
NO_AUDIO = (None, "", "empty")  # `audio_id` of a question without audio.
# What Whisper writes for silence: it learned from the subtitles of videos. In three casings, no others.
FAREWELL = re.compile(
    "|".join(
        f(f"{thanks} for watching") + "[.!]?" for thanks in ("Thanks", "Thank you") for f in (str, str.lower, str.upper)
    )
)


def read_rows(path: str | Path, audio_root: str | Path | None = None, need_output: bool = True) -> list[dict]:
    """All rows of `checked_rows`.

    Raises:
        RowError: as there.
    """
    return list(checked_rows(path, audio_root, need_output))


def checked_rows(
    path: str | Path, audio_root: str | Path | None = None, need_output: bool = True, max_errors: int = 10
) -> Iterator[dict]:
    """The rows `{"instruction", "input", "audio_id", "output", "dataset"?, "task"?}` of a file, one after another.

    Args:
        path: the file, in any format of `ltu.row_files`.
        audio_root: folder of relative `audio_id`s; by default the folder of the file.
        need_output: whether every row must have an answer (training) or may lack one (questions).

    Yields:
        the rows, each with `audio`: the path of its clip, or None.

    Raises:
        RowError: there is none; or, at the end, what is wrong with the first `max_errors` bad rows, by number (from 1).
    """
    path = Path(path)
    root, errors, number = Path(audio_root or path.parent), [], 0
    for number, row in enumerate(stream_rows(path), start=1):
        if reason := what_is_wrong(row, need_output):
            errors.append(f"{path}, row {number}: {reason}")
            if len(errors) == max_errors:
                break
        elif not errors:
            yield with_audio(row, root)
    if errors:
        raise RowError("\n".join(errors))
    if not number:
        raise RowError(f"{path} holds no rows.")


def with_audio(row: dict, root: Path) -> dict:
    """A row and `audio`: the path of its clip, or None."""
    audio_id = row.get("audio_id")
    return row | {"audio": None if audio_id in NO_AUDIO else str(root / audio_id)}


def no_answer_left(index: int, row: dict) -> RowError:
    return RowError(
        f"Row {index + 1}: no answer is left within --cutoff_len: the question alone fills it. Raise --cutoff_len or "
        f"shorten the question: {row['instruction'][:80]!r}"
    )


def what_is_wrong(row: dict, need_output: bool) -> str | None:
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
        max_bad: how many different rows this process may skip because their clip cannot be heard.
        lengths: (rows,) text ids of each, by which batches are grouped, where an index knows them. Otherwise the rows
            are tokenised here, unless there are too many: then `lengths` is None.
        numbers: of each row in its file, from 0; by default its place in `rows`.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        encode: Callable,
        read_features: Callable,
        max_bad: int = 0,
        lengths: torch.Tensor | None = None,
        numbers: torch.Tensor | None = None,
    ):
        self.rows = rows
        self.encode = encode
        self.read_features = read_features
        self.max_bad = max_bad
        self.numbers = range(len(rows)) if numbers is None else numbers
        self.lengths = lengths
        if lengths is None and len(rows) <= MAX_UNINDEXED:
            self.lengths = self._count_ids()
        # Shared memory, because each worker of the data loader is a process of its own.
        self.is_bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def _count_ids(self) -> torch.Tensor:
        lengths = torch.zeros(len(self.rows), dtype=torch.int32)
        for index, row in enumerate(tqdm(self.rows, desc="tokenising", unit="row", disable=len(self.rows) < 20_000)):
            ids, labels = self.encode(row)
            if max(labels) < 0:
                raise no_answer_left(int(self.numbers[index]), row)
            lengths[index] = len(ids)
        return lengths

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def skipped(self) -> list[str]:
        """`audio_id` of every row skipped so far."""
        return [self.rows[index]["audio_id"] for index in self.is_bad.nonzero()[:, 0].tolist()]

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self)):
            row = (index + offset) % len(self)
            content = self.rows[row]
            try:
                features = None if content["audio"] is None else self.read_features(content)
            except AudioError as error:
                self._skip(row, error)
                continue
            ids, labels = self.encode(content)
            if max(labels) < 0:
                raise no_answer_left(int(self.numbers[row]), content)
            return {"input_ids": ids, "labels": labels, "input_features": features}
        raise RowError(f"None of the {len(self)} rows has a clip that can be heard.")

    def _skip(self, row: int, error: AudioError) -> None:
        if not self.is_bad[row]:
            self.is_bad[row] = True
            logger.warning("Row %d skipped: %s", self.numbers[row] + 1, error)
        if int(self.is_bad.sum()) > self.max_bad:
            raise RowError(
                f"{int(self.is_bad.sum())} rows have a clip that cannot be heard, more than --max_bad {self.max_bad}. "
                f"The last: row {self.numbers[row] + 1}: {error} Mend the rows (--check_audio lists them all at "
                "start), or allow more with --max_bad."
            ) from error


if __name__ == "__main__":
    # Their own module: this one imports no transformers, so that data/ can use it.
    from ltu.row_index import main

    main()
