"""Rows of questions and answers: read, checked, and made into what the collator pads.

    python -m ltu.index_dataset all.json --base_model DIR        for millions of rows; see ltu.training.dataset_index

Notable:
- Everything that can be wrong with a row is found before training, in seconds, and said with file and row number. (Of
  more than 100,000 rows without an index, a question that fills the cutoff is found when its turn comes.)
- A clip that cannot be heard is skipped, counted and named; its row's place is taken by the next one, so steps and
  batch sizes stay. Features are never made up. More than `max_bad` such rows stop the run.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ltu.data.audio import AudioError, load_audio
from ltu.data.dataset_files import stream_rows
from ltu.data.dataset_parser import RowError

logger = logging.getLogger(__name__)
NO_AUDIO = (None, "", "empty")  # `audio_id` of a question without audio.


def read_rows(
    path: str | Path, audio_root: str | Path | None = None, need_output: bool = True
) -> list[dict]:
    """All rows of `checked_rows`.

    Raises:
        RowError: as there.
    """
    return list(checked_rows(path, audio_root, need_output))


def checked_rows(
    path: str | Path,
    audio_root: str | Path | None = None,
    need_output: bool = True,
    max_errors: int = 10,
) -> Iterator[dict]:
    """The rows `{"instruction", "input", "audio_id", "output", "dataset"?, "task"?}` of a file, one after another.

    Args:
        path: the file, in any format of `ltu.data.dataset_files`.
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
        return f"'audio_id' is a {type(row['audio_id']).__name__}; give a path, or \"empty\" for a question without audio"
    return None


def check_audio(rows: list[dict]) -> dict[str, AudioError]:
    """Load every clip once; what cannot be heard, by path."""
    bad = {}
    for audio in tqdm(
        sorted({row["audio"] for row in rows if row["audio"]}), desc="checking audio", unit="clip"
    ):
        try:
            load_audio(audio)
        except AudioError as error:
            bad[audio] = error
    return bad
