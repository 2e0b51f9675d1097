"""Writes examples as the row groups of a Parquet file, also with their clips in it.

Without clips, there is a column for each key. A null means that the example lacks the key, so that
the `audio_id` null is stored as "empty".

With clips, the column `audio` stands in the place of `audio_id`. It is a struct of the bytes of the
clip's file and the name of the file, null without a clip, and the metadata of the file say that it
is of the type Audio: the library `datasets` reads it as such. The bytes
are those of the file; nothing is decoded. A clip is stored once for each of its examples.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import pyarrow
import pyarrow.parquet

AUDIO_COLUMN = "audio"
AUDIO_TYPE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
# A row group with clips ends after so many rows, as in `datasets`, or after so many bytes: reading
# in random order reads half a group for each clip, and writing takes constant memory.
CLIPS_AT_ONCE = 100
CLIP_BYTES_AT_ONCE = 2**24


@dataclass(frozen=True)
class ClipContent:
    """What is stored of a clip.

    Attributes:
        content: the bytes of its file.
        name: of its file, without folders.
    """

    content: bytes
    name: str


class ParquetTable:
    """Writes examples to a Parquet file.

    The columns are those of the first row group and the usual keys.

    Args:
        file: to write to.
        keys: the usual keys of examples.
        rows_at_once: rows of a row group without clips.
        read_clip: returns the clip of an `audio_id`, or None if the id is that of no clip. Without
            it, clips are not stored.
    """

    def __init__(
        self,
        file: IO[bytes],
        keys: tuple[str, ...],
        rows_at_once: int,
        read_clip: Callable[[str | None], ClipContent | None] | None = None,
    ):
        self.file = file
        self.keys = keys
        self.rows_at_once = rows_at_once if read_clip is None else CLIPS_AT_ONCE
        self.read_clip = read_clip
        self.writer: pyarrow.parquet.ParquetWriter | None = None  # Once the columns are known.
        self.rows: list[dict[str, Any]] = []
        self.num_written = 0
        self.num_bytes = 0  # Of the clips in `rows`.

    def add(self, example: dict[str, Any]) -> None:
        """Add an example.

        Raises:
            ValueError: it does not fit the table, or its clip cannot be stored.
        """
        number = self.num_written + len(self.rows) + 1
        if self.read_clip is not None:
            example = self._with_clip(example, number)
        elif "audio_id" in example and example["audio_id"] is None:
            # A null would mean that the example lacks the key, which it must have.
            example["audio_id"] = "empty"
        if self.writer is not None:
            unknown = example.keys() - set(self.writer.schema.names)
            if unknown:
                raise ValueError(
                    f"example {number} fits no table: it has {min(unknown)!r}, which the first "
                    "examples lack"
                )
        self.rows.append(example)
        if len(self.rows) == self.rows_at_once or self.num_bytes >= CLIP_BYTES_AT_ONCE:
            self.flush()

    def _with_clip(self, example: dict[str, Any], number: int) -> dict[str, Any]:
        """Return an example with its clip in the place of its `audio_id`."""
        if AUDIO_COLUMN in example:
            raise ValueError(f"example {number} has {AUDIO_COLUMN!r} already. Rename the key")
        try:
            clip = self.read_clip(example.get("audio_id"))
        except (OSError, ValueError) as error:
            raise ValueError(f"example {number}: {error}") from error
        stored = None
        if clip is not None:
            stored = {"bytes": clip.content, "path": clip.name}
            self.num_bytes += len(clip.content)
        renamed = {}
        for key, value in example.items():
            if key == "audio_id":
                renamed[AUDIO_COLUMN] = stored
            else:
                renamed[key] = value
        return renamed

    def flush(self) -> None:
        """Write the examples that were added as a row group.

        Raises:
            ValueError: they do not fit the table.
        """
        first = self.num_written + 1
        last = self.num_written + len(self.rows)
        try:
            if self.writer is None:
                self._open()
            self.writer.write_table(pyarrow.Table.from_pylist(self.rows, self.writer.schema))
        except (pyarrow.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"examples {first} to {last} fit no table: {error}") from error
        self.num_written = last
        self.num_bytes = 0
        self.rows = []

    def _open(self) -> None:
        """Begin the file with the columns of the first examples."""
        columns = self._columns()
        metadata = None
        if self.read_clip is not None:
            features = {AUDIO_COLUMN: {"_type": "Audio"}}
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        self.writer = pyarrow.parquet.ParquetWriter(
            self.file,
            pyarrow.schema(columns, metadata),
            compression="zstd",
            # Clips do not repeat within a row group often enough for a dictionary.
            use_dictionary=[name for name, _ in columns if name != AUDIO_COLUMN],
            # A page ends after so many rows at the earliest; a page of clips is some of them.
            write_batch_size=1 if self.read_clip is not None else None,
        )

    def _columns(self) -> list[tuple[str, pyarrow.DataType]]:
        """Return name and type of every column.

        The keys of the first examples are first, in their order, then the usual keys. A column is
        of text unless these examples have other values.
        """
        names: dict[str, None] = {}  # An ordered set.
        for example in self.rows:
            names.update(dict.fromkeys(example))
        for key in self.keys:
            is_audio = key == "audio_id" and self.read_clip is not None
            names[AUDIO_COLUMN if is_audio else key] = None
        columns = []
        for name in names:
            if name == AUDIO_COLUMN and self.read_clip is not None:
                columns.append((name, AUDIO_TYPE))
                continue
            values = [example[name] for example in self.rows if example.get(name) is not None]
            is_text = all(isinstance(value, str) for value in values)
            column_type = pyarrow.string() if is_text else pyarrow.array(values).type
            if "struct<" in str(column_type):
                # pyarrow would drop keys that only later examples have in it, without an error.
                raise ValueError(f"{name!r} has keys of its own")
            columns.append((name, column_type))
        return columns

    def finish(self) -> None:
        """Write what is left, and end the file; raises as `flush`."""
        if self.rows or self.writer is None:
            self.flush()
        self.close()

    def close(self) -> None:
        """End the file. A writer that is not closed would write to a closed file later."""
        if self.writer is not None:
            self.writer.close()
