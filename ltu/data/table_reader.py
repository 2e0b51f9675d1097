"""Reads the examples of tables: Parquet files, and shards of a `datasets` folder.

Only the columns that are used are read. The clips stay in the table: an example has the name of its
clip (`ltu.data.table_clip`) as `audio_id`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltu.data.columns import (
    ColumnFlags,
    ColumnMap,
    features_of,
    is_clip_type,
    labels_of,
    map_columns,
)
from ltu.data.dataset_parser import DatasetError
from ltu.data.dataset_source import DatasetSource
from ltu.data.table_clip import (
    BATCH_BYTES,
    TableClip,
    TableClipError,
    has_null_bytes,
    map_arrow,
    read_clip_bytes,
)
from ltu.files import read_json_object

# Only where there are tables. As in `ltu.data.dataset_io`, JSON needs no pyarrow.
if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

ROWS_AT_ONCE = 8192
MAX_PATH_BYTES = 4096  # Of a path, on Linux.
INFO = "dataset_info.json"  # Of a split that `datasets` has saved.
# In a table, null says that an example lacks these.
OPTIONAL_KEYS = ("input", "dataset", "task")


def open_columns(source: DatasetSource, flags: ColumnFlags) -> ColumnMap | None:
    """Find the columns of a table that are used.

    Returns:
        None for a Parquet file whose columns are the keys of examples: one without a column of
        clips, if no flag names a column.

    Raises:
        DatasetError: as `map_columns`; or a file is damaged.
    """
    import pyarrow

    schema = _read_schema(source, source.files[0])
    has_clips = any(is_clip_type(column.type) for column in schema)
    if source.kind == "parquet" and not has_clips and not flags.renames:
        return None
    found = map_columns(schema, _read_features(source, schema), flags, source.name)
    if found.has_clips and not pyarrow.types.is_struct(
        schema.field(found.columns["audio_id"]).type
    ):
        _check_no_path(source, found.columns["audio_id"])
    return found


def _check_no_path(source: DatasetSource, column: str) -> None:
    """Check that the first value of a column of binaries is no path.

    Programs that know no type for text write paths as binaries, which look like clips.

    Raises:
        DatasetError: it is short, printable text.
    """
    first = str(TableClip(str(source.files[0]), column, 0))
    try:
        text = read_clip_bytes(first)[: MAX_PATH_BYTES + 1].decode()
    except (TableClipError, UnicodeDecodeError):  # The example with this clip is the error.
        return
    if len(text) <= MAX_PATH_BYTES and text.isprintable():
        raise DatasetError(
            f"{source.name}, example 1: {column!r} is a text in a column of binaries "
            f"({text[:80]!r}), not the bytes of an audio file. If it is a path, write the column "
            "as text."
        )


def map_all_columns(source: DatasetSource) -> ColumnMap | None:
    """Return all columns of a table by their own names, but for that of clips, the `audio_id`.

    Returns:
        None for a table without a column of clips.

    Raises:
        DatasetError: as `map_columns`; or a file is damaged.
    """
    schema = _read_schema(source, source.files[0])
    features = _read_features(source, schema)
    used = map_columns(schema, features, ColumnFlags(), source.name)
    if not used.has_clips:
        return None
    columns = {column.name: column.name for column in schema if not is_clip_type(column.type)}
    columns["audio_id"] = used.columns["audio_id"]
    unused = tuple(name for name in schema.names if name not in columns.values())
    return ColumnMap(columns, None, True, labels_of(features, source.name), unused)


def _read_features(source: DatasetSource, schema: "pyarrow.Schema") -> dict[str, Any]:
    """Return the features of a table, as `datasets` describes them, or nothing."""
    info = source.files[0].parent / INFO
    if source.kind == "arrow" and info.is_file():
        features = read_json_object(info).get("features")
        return features if isinstance(features, dict) else {}
    return features_of(schema)


def table_examples(source: DatasetSource, columns: ColumnMap) -> Iterator[dict[str, Any]]:
    """Yield the examples of a table, in constant memory.

    Raises:
        DatasetError: a file is damaged, or lacks a column that is used.
    """
    keys = {key: name for key, name in columns.columns.items() if key != "audio_id"}
    audio = columns.columns.get("audio_id")
    names = [*dict.fromkeys(keys.values())]
    for file in source.files:
        missing = set(columns.columns.values()) - set(_read_schema(source, file).names)
        if missing:
            raise DatasetError(
                f"{file} has no column {min(missing)!r}, but {source.files[0].name} has it. All "
                "files of a split must have the same columns."
            )
        row = 0
        for batch, has_audio in _batches(source, file, names, audio, columns.has_clips):
            values = {name: _values_of(batch, name, file, row) for name in names}
            if audio is not None and not columns.has_clips:
                audio_ids = _values_of(batch, audio, file, row)
            else:
                audio_ids = _clip_names(source, file, audio, row, has_audio)
            for index, audio_id in enumerate(audio_ids):
                texts = {key: values[name][index] for key, name in keys.items()}
                yield _make_example(columns, texts, audio_id)
            row += len(audio_ids)


def _make_example(
    columns: ColumnMap, texts: dict[str, Any], audio_id: str | None
) -> dict[str, Any]:
    """Return an example of the values of a row."""
    example = {}
    for key, value in texts.items():
        names = columns.labels.get(columns.columns[key])
        if names is not None:
            value = _label_of(value, names)
        if value is not None or key not in OPTIONAL_KEYS:
            example[key] = value
    if columns.question is not None:
        example["instruction"] = columns.question
    if "audio_id" in columns.columns:
        example["audio_id"] = audio_id
    return example


def _values_of(batch: "pyarrow.RecordBatch", name: str, file: Path, first: int) -> list[Any]:
    """Return the values of a column of the rows of a file from `first` on.

    Raises:
        DatasetError: one of them has no Python value, such as text that is not UTF-8.
    """
    column = batch.column(name)
    try:
        return column.to_pylist()
    except (OverflowError, ValueError):
        for row, value in enumerate(column, start=first):
            try:
                value.as_py()
            except (OverflowError, ValueError) as error:
                raise DatasetError(
                    f"{file}, row {row} (from 0): the value of the column {name!r} cannot be read "
                    f"({error}). Fix or remove the row."
                ) from error
        raise


def _clip_names(
    source: DatasetSource, file: Path, column: str | None, first: int, has_audio: list[bool]
) -> list[str | None]:
    """Return the name of the clip of each row from `first` on; None where there is none."""
    if column is None:
        return [None] * len(has_audio)
    table = os.path.relpath(file.absolute(), source.root.absolute())
    names = []
    for row, is_there in enumerate(has_audio, start=first):
        names.append(str(TableClip(table, column, row)) if is_there else None)
    return names


def _label_of(value: Any, names: list[str]) -> Any:
    """Return the name of a label; -1 stands for no label in `datasets`."""
    if value is None or value == -1:
        return None
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return value


def _batches(
    source: DatasetSource, file: Path, names: list[str], audio: str | None, has_clips: bool
) -> "Iterator[tuple[pyarrow.RecordBatch, list[bool]]]":
    """Yield parts of the columns `names` and of paths, and whether each row has a clip."""
    read = list(names)
    if audio is not None and not has_clips:
        read.append(audio)
    with _damage_of(file):
        if source.kind == "arrow":
            yield from _arrow_batches(file, read, audio)
        else:
            yield from _parquet_batches(file, read, audio if has_clips else None)


def _arrow_batches(
    file: Path, names: list[str], audio: str | None
) -> "Iterator[tuple[pyarrow.RecordBatch, list[bool]]]":
    table = map_arrow(file)
    # Take slices of the batches that are in the file: joined, the clips would be copied.
    for batch in table.to_batches(ROWS_AT_ONCE):
        has_audio = [True] * len(batch)
        if audio is not None:
            has_audio = batch.column(audio).is_valid().to_pylist()
        yield batch.select(names), has_audio


def _parquet_batches(
    path: Path, names: list[str], audio: str | None
) -> "Iterator[tuple[pyarrow.RecordBatch, list[bool]]]":
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**16) as file:
        rows = ROWS_AT_ONCE
        # Clips are read only to find those that are null, where the file says that there are some.
        looks_for_null = audio is not None and has_null_bytes(file, audio)
        read = dict.fromkeys(names)
        if looks_for_null:
            read[audio] = None
            size = max(path.stat().st_size, 1)
            rows = max(1, min(rows, file.metadata.num_rows * BATCH_BYTES // size))
        if not read:
            # Without columns, pyarrow would yield no rows.
            for start in range(0, file.metadata.num_rows, rows):
                count = min(rows, file.metadata.num_rows - start)
                yield pyarrow.record_batch([], names=[]), [True] * count
            return
        for batch in file.iter_batches(rows, columns=list(read), use_threads=False):
            has_audio = [True] * len(batch)
            if looks_for_null:
                has_audio = batch.column(audio).is_valid().to_pylist()
            yield batch, has_audio


def _read_schema(source: DatasetSource, file: Path) -> "pyarrow.Schema":
    import pyarrow.parquet

    with _damage_of(file):
        if source.kind == "arrow":
            return map_arrow(file).schema
        return pyarrow.parquet.read_schema(file)


@contextmanager
def _damage_of(file: Path) -> Iterator[None]:
    """Turn the errors of pyarrow into a DatasetError that names the file."""
    import pyarrow

    try:
        yield
    except DatasetError:
        raise
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:
        if str(file) in str(error):
            raise DatasetError(str(error)) from error
        reason = " ".join(str(error).split())
        raise DatasetError(f"{file}: cannot be read ({reason}). Copy or write it again.") from error
