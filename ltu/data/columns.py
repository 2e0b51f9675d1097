"""Says which columns of a data set are the clip, the question, the answer and the transcript.

The examples of this project have the keys `instruction`, `input`, `audio_id` and `output`. Data
sets of other people have other names: `ColumnFlags` are the flags by which a user gives them, and
`ColumnMap` is what they mean for one table. Both work for every format.

Without flags, columns with the names of the keys are used, in tables also `question` and `answer`.
A column of clips (of the type Audio of the library `datasets`, or of the bytes of files) is found
by its type. A column of labels (ClassLabel) gives the names of its labels.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ltu.data.dataset_parser import DatasetError

if TYPE_CHECKING:
    import pyarrow

AUDIO_NAMES = ("audio_id", "audio")  # Columns that are the clip without a flag, the first of them.
# Columns that are questions and answers of a table if no flag and no key names them. `text` is none
# of them: it is the transcript of one data set and the answer of another.
OTHER_COLUMNS = {"instruction": "question", "output": "answer"}
TEXT_KEYS = ("instruction", "input", "output", "dataset", "task")


@dataclass
class ColumnFlags:
    """Flags that name a split of a data set, and its columns."""

    split: str | None = field(
        default=None,
        metadata={"help": "The split of a data set that has several, or of one on the hub."},
    )
    audio_column: str | None = field(
        default=None,
        metadata={
            "help": "The column of clips: paths, bytes, or the type Audio of datasets, which is "
            "found without this flag."
        },
    )
    question_column: str | None = field(
        default=None, metadata={"help": "The column of questions (instruction)."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "The column of answers (output)."}
    )
    transcript_column: str | None = field(
        default=None, metadata={"help": "The column of transcripts (input)."}
    )
    question: str | None = field(
        default=None,
        metadata={
            "help": "The question of every example, for a data set that has none, for example "
            "'What is said?'."
        },
    )

    def __post_init__(self) -> None:
        if self.question is not None and self.question_column is not None:
            raise ValueError(
                "--question and --question_column both say where questions come from. Leave one "
                "of them out."
            )

    @property
    def names(self) -> dict[str, str]:
        """The columns that are given, by the keys of examples."""
        given = {
            "audio_id": self.audio_column,
            "instruction": self.question_column,
            "output": self.answer_column,
            "input": self.transcript_column,
        }
        return {key: column for key, column in given.items() if column is not None}

    @property
    def renames(self) -> bool:
        """Whether anything but the split is given."""
        return bool(self.names) or self.question is not None

    def to_json(self) -> dict[str, str]:
        """Return the flags that are given, but for the split."""
        names = [found.name for found in fields(ColumnFlags) if found.name != "split"]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def rename_keys(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return an example of JSON with the keys that the flags mean.

        Raises:
            DatasetError: it lacks a key that a flag names.
        """
        if not self.renames:
            return example
        names = self.names
        renamed = {}
        for key, column in names.items():
            if column not in example:
                raise DatasetError(
                    f"no {column!r}, which {FLAG_OF_KEY[key]} names; it has {sorted(example)}"
                )
            renamed[key] = example[column]
        if self.question is not None:
            renamed["instruction"] = self.question
        used = {*names.values(), *renamed}
        return renamed | {key: value for key, value in example.items() if key not in used}

    def describe(self) -> list[str]:
        """Return what the start of a run prints about a JSON file; nothing without flags."""
        return [f"columns: {_describe(self.names, self.question)}"] if self.renames else []


FLAG_OF_KEY = {
    "audio_id": "--audio_column",
    "instruction": "--question_column",
    "output": "--answer_column",
    "input": "--transcript_column",
}


def add_column_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ColumnFlags`, which `read_column_flags` reads."""
    group = parser.add_argument_group("columns of the data set")
    for found in fields(ColumnFlags):
        group.add_argument(f"--{found.name}", help=found.metadata["help"])


def read_column_flags(args: argparse.Namespace) -> ColumnFlags:
    """Return the flags that `add_column_flags` has added.

    Raises:
        ValueError: they cannot be used together.
    """
    return ColumnFlags(**{found.name: getattr(args, found.name) for found in fields(ColumnFlags)})


@dataclass(frozen=True)
class ColumnMap:
    """The columns of a table that are used.

    Attributes:
        columns: by the keys of examples.
        question: of every example, instead of a column.
        has_clips: whether the column of `audio_id` has clips, not paths.
        labels: names of labels, by column.
        unused: the other columns.
    """

    columns: dict[str, str]
    question: str | None
    has_clips: bool
    labels: dict[str, list[str]]
    unused: tuple[str, ...]

    def describe(self) -> list[str]:
        """Return the line that the start of a run prints."""
        line = f"columns: {_describe(self.columns, self.question)}"
        if self.unused:
            line += f"; not used: {', '.join(self.unused)}"
        return [line]

    def check(self, path: object, need_output: bool, has_root: bool) -> None:
        """Check that the columns suffice.

        Args:
            path: of the data set, for messages.
            need_output: whether there must be answers.
            has_root: whether `--audio_root` is given.

        Raises:
            DatasetError: they do not, or `--audio_root` would have no effect.
        """
        for key in ("audio_id", "instruction", "output"):
            if key != "output" or need_output:
                self.require(key, path)
        if has_root and self.has_clips:
            raise DatasetError(
                f"--audio_root has no effect: the clips of {path} are in the table itself. Leave "
                "the flag out."
            )

    def require(self, key: str, path: object) -> None:
        """Check that there is a column for a key.

        Raises:
            DatasetError: there is none; the message lists the columns.
        """
        if key in self.columns or (key == "instruction" and self.question is not None):
            return
        columns = [*dict.fromkeys(self.columns.values()), *self.unused]
        kinds = {"audio_id": "clips", "instruction": "questions", "output": "answers"}
        hint = f"Name it with {FLAG_OF_KEY[key]}"
        if key == "instruction":
            hint += ", or give one question for all with --question"
        raise DatasetError(
            f"{path}: no column of {kinds[key]} is known; the columns are {', '.join(columns)}. "
            f"{hint}."
        )


def _describe(columns: Mapping[str, str], question: str | None) -> str:
    parts = [f"{key} from {column!r}" for key, column in columns.items()]
    if question is not None:
        parts.append(f"instruction is {question!r} (--question)")
    return ", ".join(parts)


def map_columns(
    schema: "pyarrow.Schema", features: dict[str, Any], flags: ColumnFlags, path: object
) -> ColumnMap:
    """Find the columns of a table that are used.

    Args:
        schema: of the table.
        features: as `datasets` describes them in dataset_info.json; may be empty.
        flags: of the user.
        path: of the data set, for messages.

    Raises:
        DatasetError: a column that a flag names is not there, or it is not clear which column has
            the clips.
    """
    if len(set(schema.names)) < len(schema.names):
        raise DatasetError(f"{path} has two columns of one name: {', '.join(schema.names)}.")
    for key, column in flags.names.items():
        if column not in schema.names:
            raise DatasetError(
                f"{path} has no column {column!r}, which {FLAG_OF_KEY[key]} names; its columns are "
                f"{', '.join(schema.names)}."
            )
    columns = {}
    audio = flags.audio_column or _find_audio_column(schema, features, path)
    if audio is not None:
        columns["audio_id"] = audio
    for key in TEXT_KEYS:
        if key == "instruction" and flags.question is not None:
            continue
        if key in flags.names:
            columns[key] = flags.names[key]
        elif key in schema.names and key != audio:
            columns[key] = key
        elif _is_free(OTHER_COLUMNS.get(key), schema, flags):
            columns[key] = OTHER_COLUMNS[key]
    labels = {}
    for column, names in labels_of(features, path).items():
        if column in columns.values():
            labels[column] = names
    for key in ("dataset", "task"):
        # Others use these names for other things: numbers, lists.
        column = columns.get(key)
        if column is not None and column not in labels and not _is_text(schema.field(column).type):
            del columns[key]
    has_clips = audio is not None and is_clip_type(schema.field(audio).type)
    if has_clips and "#" in audio:
        raise DatasetError(f"{path}: the name of the column {audio!r} has a #. Rename it.")
    used = set(columns.values())
    unused = tuple(name for name in schema.names if name not in used)
    return ColumnMap(columns, flags.question, has_clips, labels, unused)


def _is_free(column: str | None, schema: "pyarrow.Schema", flags: ColumnFlags) -> bool:
    """Return whether a table has a column that no flag names."""
    return column in schema.names and column not in flags.names.values()


def _find_audio_column(
    schema: "pyarrow.Schema", features: dict[str, Any], path: object
) -> str | None:
    for name in AUDIO_NAMES:
        if name in schema.names:
            return name
    found = []
    for column in schema:
        # Images and videos are structs of bytes and path, too.
        feature = features.get(column.name)
        kind = feature.get("_type", "Audio") if isinstance(feature, dict) else "Audio"
        if is_clip_type(column.type) and kind in ("Audio", "Value"):
            found.append(column.name)
    if len(found) > 1:
        raise DatasetError(
            f"{path} has several columns of clips: {', '.join(found)}. Choose one with "
            "--audio_column."
        )
    return found[0] if found else None


def is_clip_type(kind: "pyarrow.DataType") -> bool:
    """Return whether a column of a type has clips: bytes, or structs of bytes and path."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        return "bytes" in names and is_clip_type(kind.field("bytes").type)
    return (
        pyarrow.types.is_binary(kind)
        or pyarrow.types.is_large_binary(kind)
        or pyarrow.types.is_binary_view(kind)
    )


def _is_text(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pyarrow.types.is_string(kind)
        or pyarrow.types.is_large_string(kind)
        or pyarrow.types.is_string_view(kind)
    )


def labels_of(features: dict[str, Any], path: object) -> dict[str, list[str]]:
    """Return the names of the labels of each column of the type ClassLabel.

    Raises:
        DatasetError: the labels of a column of `path` have no names.
    """
    labels = {}
    for column, feature in features.items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            names = feature.get("names")
            if not isinstance(names, list):
                raise DatasetError(f"{path}: the labels of the column {column!r} have no names.")
            labels[column] = [str(name) for name in names]
    return labels


def features_of(schema: "pyarrow.Schema") -> dict[str, Any]:
    """Return the features that `datasets` writes into the metadata of a table, or nothing."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}
