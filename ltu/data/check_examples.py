"""Reads the examples of a dataset file and checks them.

Everything that can be wrong with an example is found before training, in seconds, and reported with
the file and the number of the example. The exception: in a dataset file of more than 100,000
examples without an index, a question that fills the cutoff is found when the example is used.

Every example must have `audio_id`, and a key that no command uses is an error unless
`--ignored_keys` names it. Other frameworks call the clip `audio` or `path`: if such a key were
ignored, the whole file would be text only, without a word.
"""

import argparse
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from tqdm import tqdm

from ltu.data.audio import AudioError, Downmix, decode_audio
from ltu.data.columns import ColumnFlags
from ltu.data.dataset_io import (
    AUDIO_HINT,
    KEYS,
    find_columns,
    label_key,
    stream_source,
    wrong_type,
)
from ltu.data.dataset_parser import DatasetError
from ltu.data.dataset_source import DatasetSource, find_dataset

logger = logging.getLogger(__name__)

NO_AUDIO = (None, "", "empty")  # `audio_id` of a question without audio.

# Names that other frameworks and data sets have for our keys, in lower case without punctuation.
OTHER_NAMES = {
    "audio_id": (
        "audio audios audiofile audiofilename audiofilepath audiopath audiourl clip clipid "
        "clippath file fileid filename filepath path recording sound soundpath url wav wavfile "
        "wavid wavpath"
    ),
    "input": "asr context speech spokentext text transcript transcription whispertext",
    "output": (
        "answer answers assistant caption completion gold groundtruth label labels reference "
        "response solution target"
    ),
    "instruction": "human prompt prompts query question questions user",
}
MIN_SIMILARITY = 0.8  # Of a misspelled key and the key that is meant, by difflib.

IGNORED_KEYS_HELP = (
    "Further keys of the examples that are ignored, separated by commas, for example id,split. Any "
    "other key that is not used is an error."
)


def _spelling(key: str) -> str:
    """Return a key in lower case without punctuation."""
    return re.sub(r"[\W_]+", "", key).lower()


def _spellings_of_keys() -> dict[str, str]:
    """Return the key that each known spelling means."""
    found = {_spelling(key): key for key in KEYS}
    for key, names in OTHER_NAMES.items():
        found |= dict.fromkeys(names.split(), key)
    return found


MEANT_KEYS = _spellings_of_keys()


def meant_key(key: str) -> str | None:
    """Return the key of an example that an unknown key probably means, or None."""
    spelling = _spelling(key)
    close = get_close_matches(spelling, MEANT_KEYS, n=1, cutoff=MIN_SIMILARITY)
    return MEANT_KEYS[close[0]] if close else None


def add_ignored_keys(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--ignored_keys`, whose value `parse_ignored_keys` takes."""
    parser.add_argument("--ignored_keys", default="", help=IGNORED_KEYS_HELP)


def parse_ignored_keys(text: str) -> frozenset[str]:
    """Return the keys that a value of `--ignored_keys` names.

    Raises:
        ValueError: one of them is used.
    """
    keys = frozenset(key.strip() for key in text.split(",") if key.strip())
    used = sorted(keys & set(KEYS))
    if used:
        raise ValueError(
            f"--ignored_keys {text}: {', '.join(used)} is used. Remove the key from the examples."
        )
    return keys


def read_examples(
    path: str | Path | DatasetSource,
    audio_root: str | Path | None = None,
    need_output: bool = True,
    ignored_keys: Collection[str] = (),
    columns: ColumnFlags | None = None,
) -> list[dict]:
    """Return all examples of `checked_examples`.

    Raises:
        DatasetError: as `checked_examples`.
    """
    return list(checked_examples(path, audio_root, need_output, ignored_keys, columns))


def checked_examples(
    path: str | Path | DatasetSource,
    audio_root: str | Path | None = None,
    need_output: bool = True,
    ignored_keys: Collection[str] = (),
    columns: ColumnFlags | None = None,
    max_errors: int = 10,
) -> Iterator[dict]:
    """Yield the examples `{"instruction", "input"?, "audio_id", "output", "dataset"?, "task"?}`.

    Args:
        path: the dataset file, in any format of `ltu.data.dataset_io`; or what `find_dataset` has
            found.
        audio_root: folder of relative `audio_id`s; by default the folder of the file. Clips that
            lie in a table have none.
        need_output: whether every example must have an answer (training) or may lack one
            (questions).
        ignored_keys: keys that examples may have besides these.
        columns: the split, and the names of the columns.
        max_errors: after so many invalid examples, reading stops.

    Yields:
        the examples, each with `audio`: the path of its clip, or None.

    Raises:
        DatasetError: the file has no examples; or, at the end, examples are invalid. The message
            lists the first `max_errors` of them by number (from 1).
    """
    columns = columns or ColumnFlags()
    source = find_dataset(path, columns.split)
    found = find_columns(source, columns)
    if found is not None:
        found.check(source.name, need_output, has_root=audio_root is not None)
    names = columns.names if found is None else found.columns
    root = Path(audio_root or source.root)
    errors = []
    number = 0
    for number, example in enumerate(stream_source(source, columns), start=1):
        reason = what_is_wrong(example, need_output, ignored_keys, names)
        if reason:
            errors.append(f"{source.name}, example {number}: {reason}")
            if len(errors) == max_errors:
                break
        elif not errors:
            yield with_audio(example, root)
    if errors:
        raise DatasetError("\n".join(errors))
    if not number:
        raise DatasetError(f"{source.name} contains no examples.")


def with_audio(example: dict, root: Path) -> dict:
    """Return an example with `audio`: the path of its clip, or None."""
    audio_id = example.get("audio_id")
    path = None if audio_id in NO_AUDIO else str(root / audio_id)
    return example | {"audio": path}


def what_is_wrong(
    example: dict,
    need_output: bool,
    ignored_keys: Collection[str] = (),
    names: Mapping[str, str] | None = None,
) -> str | None:
    """Return why an example is invalid and what to do, or None.

    Args:
        example: the example, as it is in the dataset file.
        need_output: whether it must have an answer.
        ignored_keys: keys that it may have besides `KEYS`.
        names: the columns that its values are of, by key, where they have other names.
    """
    return (
        _what_is_wrong_with_keys(example, need_output, ignored_keys)
        or wrong_type(example, names)
        or _what_is_wrong_with_texts(example, need_output, names or {})
    )


def _what_is_wrong_with_keys(
    example: dict, need_output: bool, ignored_keys: Collection[str]
) -> str | None:
    unknown = [key for key in example if key not in KEYS and key not in ignored_keys]

    # A key that is missing may be there under another name.
    required = ("instruction", "output", "audio_id") if need_output else ("instruction", "audio_id")
    for key in required:
        if key in example:
            continue
        for other in unknown:
            if meant_key(other) == key:
                return f"no {key!r}, but {other!r}. Rename {other!r} to {key!r}."
        hint = f" {AUDIO_HINT}" if key == "audio_id" else ""
        return f"no {key!r}; it has {sorted(example)}.{hint}"

    if unknown:
        key = unknown[0]
        meant = meant_key(key)
        rename = f"If {meant!r} is meant, rename it. " if meant else ""
        return (
            f"unknown key {key!r}; the keys are {', '.join(KEYS)}. {rename}To ignore it: "
            f"--ignored_keys {','.join(unknown)}"
        )
    return None


def _what_is_wrong_with_texts(
    example: dict, need_output: bool, names: Mapping[str, str]
) -> str | None:
    for key in ("instruction", "output") if need_output else ("instruction",):
        if example[key] is None:
            # datasets writes the label -1 for none.
            kind = "null, or the label -1" if names else "null"
            return f"{label_key(key, names)} is {kind}. Remove the example."
    if need_output and not example["output"].strip():
        label = label_key("output", names)
        return f"{label} is empty. Write the answer, or remove the example."
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
            f"Clips of {path} that cannot be decoded: {len(errors)}, more than --max_bad "
            f"{max_bad}:\n{list_errors(errors)}"
        )


def check_audio(examples: list[dict], downmix: Downmix = "first") -> dict[str, AudioError]:
    """Decode every clip once and return the errors of those that cannot be decoded, by path.

    Clips whose files end before the length in their header are no errors. A warning counts them and
    names the first.

    Args:
        examples: of `read_examples`.
        downmix: how several channels become one, for `decode_audio`.
    """
    errors = {}
    cut_short = []
    # In the order of the examples: a table is then read once from its start to its end.
    paths = list(dict.fromkeys(example["audio"] for example in examples if example["audio"]))
    for path in tqdm(paths, desc="checking audio", unit="clip"):
        try:
            clip = decode_audio(path, downmix=downmix)
        except AudioError as error:
            errors[path] = error
            continue
        if clip.is_cut_short:
            cut_short.append(f"  {path}: {clip.seconds:.2f} of {clip.expected_seconds:.2f} s")
    if cut_short:
        logger.warning(
            "%d of %d clips are cut short: their files end before the length that their headers "
            "promise. What they have is used.\n%s",
            len(cut_short),
            len(paths),
            "\n".join(cut_short[:MAX_LISTED_CLIPS]),
        )
    return errors
