"""Reads the examples of a dataset file and checks them.

Everything that can be wrong with an example is found before training, in seconds, and reported with
the file and the number of the example. The exception: in a dataset file of more than 100,000
examples without an index, a question that fills the cutoff is found when the example is used.
"""

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ltu.data.audio import AudioError, load_audio
from ltu.data.dataset_io import stream_examples
from ltu.data.dataset_parser import DatasetError

NO_AUDIO = (None, "", "empty")  # `audio_id` of a question without audio.


def read_examples(
    path: str | Path, audio_root: str | Path | None = None, need_output: bool = True
) -> list[dict]:
    """Return all examples of `checked_examples`.

    Raises:
        DatasetError: as `checked_examples`.
    """
    return list(checked_examples(path, audio_root, need_output))


def checked_examples(
    path: str | Path,
    audio_root: str | Path | None = None,
    need_output: bool = True,
    max_errors: int = 10,
) -> Iterator[dict]:
    """Yield the examples `{"instruction", "input", "audio_id", "output", "dataset"?, "task"?}`.

    Args:
        path: the dataset file, in any format of `ltu.data.dataset_io`.
        audio_root: folder of relative `audio_id`s; by default the folder of the file.
        need_output: whether every example must have an answer (training) or may lack one
            (questions).
        max_errors: after so many invalid examples, reading stops.

    Yields:
        the examples, each with `audio`: the path of its clip, or None.

    Raises:
        DatasetError: the file has no examples; or, at the end, examples are invalid. The message
            lists the first `max_errors` of them by number (from 1).
    """
    path = Path(path)
    root = Path(audio_root or path.parent)
    errors = []
    number = 0
    for number, example in enumerate(stream_examples(path), start=1):
        reason = what_is_wrong(example, need_output)
        if reason:
            errors.append(f"{path}, example {number}: {reason}")
            if len(errors) == max_errors:
                break
        elif not errors:
            yield with_audio(example, root)
    if errors:
        raise DatasetError("\n".join(errors))
    if not number:
        raise DatasetError(f"{path} contains no examples.")


def with_audio(example: dict, root: Path) -> dict:
    """Return an example with `audio`: the path of its clip, or None."""
    audio_id = example.get("audio_id")
    path = None if audio_id in NO_AUDIO else str(root / audio_id)
    return example | {"audio": path}


def no_answer_left(index: int, example: dict) -> DatasetError:
    """Return the error of an example (`index` from 0) whose question alone fills the cutoff."""
    return DatasetError(
        f"Example {index + 1}: no answer is left within --cutoff_len: the question alone fills it. "
        f"Raise --cutoff_len or shorten the question: {example['instruction'][:80]!r}"
    )


def what_is_wrong(example: dict, need_output: bool) -> str | None:
    """Return why an example is invalid, or None."""
    required = ("instruction", "output") if need_output else ("instruction",)
    for key in required:
        if key not in example:
            return f"no {key!r}; it has {sorted(example)}"
    for key in ("instruction", "input", "output"):
        value = example.get(key)
        if value is not None and not isinstance(value, str):
            return f"{key!r} is a {type(value).__name__}, not text"
    if example["instruction"] is None or (need_output and example["output"] is None):
        return "'instruction' or 'output' is null"
    audio_id = example.get("audio_id")
    if not isinstance(audio_id, str | None):
        return (
            f"'audio_id' is a {type(audio_id).__name__}; "
            'give a path, or "empty" for a question without audio'
        )
    return None


MAX_LISTED_CLIPS = 20  # Errors of clips in a message.


def list_errors(errors: dict[str, AudioError]) -> str:
    """Return the first errors of clips, one a line."""
    return "\n".join(f"  {error}" for error in list(errors.values())[:MAX_LISTED_CLIPS])


def check_num_errors(errors: dict[str, AudioError], path: str | Path, max_bad: int = 0) -> None:
    """Check how many clips of a dataset file cannot be decoded.

    Raises:
        DatasetError: they are more than `max_bad`.
    """
    if len(errors) > max_bad:
        raise DatasetError(
            f"{len(errors)} clips of {path} cannot be decoded, more than --max_bad {max_bad}:\n"
            f"{list_errors(errors)}"
        )


def check_audio(examples: list[dict]) -> dict[str, AudioError]:
    """Decode every clip once and return the errors of those that cannot be decoded, by path."""
    errors = {}
    paths = sorted({example["audio"] for example in examples if example["audio"]})
    for path in tqdm(paths, desc="checking audio", unit="clip"):
        try:
            load_audio(path)
        except AudioError as error:
            errors[path] = error
    return errors
