"""Reads clips that are stored in tables: Parquet files, and shards of a `datasets` folder.

Such a clip has a name that stands wherever a path of a clip can stand:

    esc50/train/data-00000-of-00001.arrow#audio[12]        TABLE_FILE#COLUMN[ROW], rows from 0
    clips.parquet#audio[3]

The column has binaries (the bytes of a file: wav, flac, mp3, ...) or structs of `bytes` and `path`,
as `datasets.Audio` stores them. A struct whose bytes are null is the file at its path, which is
absolute, or relative to the folder of the table. Nothing is copied to the disk.

An Arrow shard is mapped into memory. Of a Parquet file, each thread holds about `BATCH_BYTES` of
its last row group (at least a page, which writers make of up to 1,024 rows): reading clips in their
order reads the file once, but a clip elsewhere costs the reading of its row group up to that clip.
"""

import hashlib
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

from ltu.files import FileRecord, check_regular_file

# Only where there are tables. As in `ltu.data.dataset_io`, JSON needs no pyarrow.
if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

NAME = re.compile(r"(?s)(.+)#([^#]+)\[([0-9]+)\]")
PARQUET_MAGIC = (b"PAR1", b"PARE")  # The second one is that of encrypted files.
# How an Arrow stream ends. A file that is cut between two record batches lacks it.
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
BATCH_BYTES = 2**26  # Of the clips of a row group that are in memory, about.
MAX_OPEN_TABLES = 16  # In each thread.


class TableClipError(ValueError):
    """A clip of a table that cannot be read.

    Attributes:
        reason: "missing" or "unreadable", as in `ltu.data.audio.HINTS`.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class TableClip:
    """The position of a clip.

    Attributes:
        file: of the table.
        column: that has the clips.
        row: of the file, from 0.
    """

    file: str
    column: str
    row: int

    @classmethod
    def parse(cls, text: str | os.PathLike) -> "TableClip | None":
        """Return the clip that has this name, or None if it is that of a file.

        A file that has such a name is a file: `clip#1[2]` may be anything.
        """
        match = NAME.fullmatch(os.fspath(text))
        if match is None or os.path.lexists(text):
            return None
        return cls(match[1], match[2], int(match[3]))

    def __str__(self) -> str:
        return f"{self.file}#{self.column}[{self.row}]"


def read_clip_bytes(text: str | os.PathLike) -> bytes:
    """Return the bytes of the file that a clip is, by its name `TABLE_FILE#COLUMN[ROW]`.

    Raises:
        TableClipError: the name is that of no clip, or the clip cannot be read.
    """
    content = find_content(text)
    if isinstance(content, bytes):
        return content
    try:
        check_regular_file(content)
        return content.read_bytes()
    except (OSError, ValueError) as error:
        raise TableClipError("missing", f"its path is {content}: {error}") from error


def find_content(text: str | os.PathLike) -> bytes | Path:
    """Return the bytes of a clip, or the path of its file if the table has only this.

    Raises:
        TableClipError: as `read_clip_bytes`.
    """
    clip = TableClip.parse(text)
    if clip is None:
        raise TableClipError("missing", "is not TABLE_FILE#COLUMN[ROW]")
    entry, path = _take_apart(_read_entry(clip))
    content = entry.as_py()
    if not isinstance(content, bytes | NoneType):
        kind = type(content).__name__
        raise TableClipError("unreadable", f"the column {clip.column!r} has a {kind}, no bytes")
    if content:
        return content
    if content is None and path:
        return Path(clip.file).parent / path
    if content is None:
        raise TableClipError("unreadable", "its bytes are null, and it has no path")
    raise TableClipError("unreadable", "it has 0 bytes")


def name_of_clip(text: str | os.PathLike) -> str | None:
    """Return the name of the file that a clip of a table was, without folders, if it is known.

    Raises:
        TableClipError: the name is that of no clip, or the clip cannot be read.
    """
    clip = TableClip.parse(text)
    if clip is None:
        raise TableClipError("missing", "is not TABLE_FILE#COLUMN[ROW]")
    _, path = _take_apart(_read_entry(clip))
    return os.path.basename(path) if path else None


def version_of_clip(text: str | os.PathLike) -> str | None:
    """Return what changes when the content of a clip may have changed; None if it has none.

    It is the position of the clip, and size and time of change of the table; of a clip that is
    stored as a path, also those of its file.
    """
    clip = TableClip.parse(text)
    try:
        table = _open(clip)
        parts = [os.path.abspath(clip.file), *table.version, clip.column, clip.row]
        # The bytes of a clip are not copied here: this is asked for each clip of a run.
        if table.may_have_paths:
            entry, path = _take_apart(_read_entry(clip))
            if path and not entry.is_valid:
                file = Path(clip.file).parent / path
                check_regular_file(file)
                status = file.stat()
                parts += [os.path.abspath(file), status.st_size, status.st_mtime_ns]
    except (OSError, ValueError):
        return None
    return "\0".join(map(str, parts))


def _take_apart(entry: "pyarrow.Scalar") -> "tuple[pyarrow.Scalar, str | None]":
    """Return the bytes and the path of a value of a column of clips. The bytes are not copied."""
    import pyarrow

    if not isinstance(entry, pyarrow.StructScalar):
        return entry, None
    if not entry.is_valid:
        return pyarrow.scalar(None), None
    names = set(entry.keys())
    content = entry["bytes"] if "bytes" in names else pyarrow.scalar(None)
    path = entry["path"].as_py() if "path" in names else None
    return content, path


def clip_exists(path: str | os.PathLike) -> bool:
    """Return whether there is a clip: a file, or one in a table."""
    if TableClip.parse(path) is None:
        return os.path.isfile(path)
    return version_of_clip(path) is not None


def record_clip(path: str | os.PathLike) -> FileRecord:
    """Record a clip: a file, or one in a table. Its time is then that of the table.

    Raises:
        OSError, TableClipError: it cannot be read.
    """
    clip = TableClip.parse(path)
    if clip is None:
        return FileRecord.of(path)
    # The time is read first: if the table changes meanwhile, the record does not fit.
    mtime_ns = mtime_of_clip(path)
    content = read_clip_bytes(path)
    return FileRecord(len(content), mtime_ns, hashlib.sha256(content).hexdigest())


def fits_record(record: FileRecord, path: str | os.PathLike) -> bool:
    """Return whether a clip, a file or one in a table, still has the recorded content.

    It is only hashed if its time differs.
    """
    if TableClip.parse(path) is None:
        return record.fits(path)
    try:
        if mtime_of_clip(path) == record.mtime_ns:
            return True
        return sha256_of_clip(path) == record.sha256
    except (OSError, TableClipError):
        return False


def mtime_of_clip(path: str | os.PathLike) -> int:
    """Return the time of the last change of a file, or of the table of a clip, in nanoseconds.

    Raises:
        OSError: there is no such file.
    """
    clip = TableClip.parse(path)
    return os.stat(path if clip is None else clip.file).st_mtime_ns


def sha256_of_clip(text: str | os.PathLike) -> str:
    """Return the sha256 of the bytes of a clip: that of a file with these bytes.

    Raises:
        TableClipError: as `read_clip_bytes`.
    """
    return hashlib.sha256(read_clip_bytes(text)).hexdigest()


class _Column:
    """A column of clips that is open.

    Attributes:
        num_rows: of the table.
        may_have_paths: whether a clip may be stored as a path.
        version: size and time of change of the table.
    """

    num_rows: int
    may_have_paths: bool
    version: tuple[int, int]

    def read(self, row: int) -> "pyarrow.Scalar":
        """Return a value of the column; pyarrow's errors are not caught."""
        raise NotImplementedError


class _ArrowColumn(_Column):
    """A column of an Arrow stream, mapped into memory."""

    def __init__(self, path: str, column: str):
        self.rows = map_arrow(path).column(column)
        self.num_rows = len(self.rows)
        self.may_have_paths = True

    def read(self, row: int) -> "pyarrow.Scalar":
        return self.rows[row]


class _ParquetColumn(_Column):
    """A column of a Parquet file, of which a part of one row group is in memory."""

    def __init__(self, path: str, column: str):
        import pyarrow.parquet

        # Without read-ahead and threads, no more than a batch is in memory, and a forked worker
        # of a data loader can use the file.
        self.file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**16)
        self.file.schema_arrow.field(column)  # KeyError if there is none.
        self.column = column
        self.num_rows = self.file.metadata.num_rows
        self.may_have_paths = has_null_bytes(self.file, column)
        self.starts = [0]  # The first row of each row group, and the number of rows.
        metadata = self.file.metadata
        for group in range(metadata.num_row_groups):
            self.starts.append(self.starts[-1] + metadata.row_group(group).num_rows)
        self.group = -1
        self.batches: Iterator[pyarrow.RecordBatch] = iter(())  # The rest of the row group.
        self.batch: pyarrow.RecordBatch | None = None
        self.first = 0  # Row of the file at which the batch begins.
        self.next = 0  # Row of the file at which the next batch begins.

    def read(self, row: int) -> "pyarrow.Scalar":
        if self.batch is None or not self.first <= row < self.starts[self.group + 1]:
            self._open_group(row)
        while row >= self.next:
            self.batch = next(self.batches)
            self.first = self.next
            self.next += len(self.batch)
        return self.batch.column(self.column)[row - self.first]

    def _open_group(self, row: int) -> None:
        self.batch = None
        self.group = bisect_right(self.starts, row) - 1
        metadata = self.file.metadata.row_group(self.group)
        size = 0
        for number in range(metadata.num_columns):
            leaf = metadata.column(number)
            if leaf.path_in_schema.split(".")[0] == self.column:
                size += leaf.total_uncompressed_size
        rows_at_once = max(1, metadata.num_rows * BATCH_BYTES // max(size, BATCH_BYTES))
        self.batches = self.file.iter_batches(
            rows_at_once, row_groups=[self.group], columns=[self.column], use_threads=False
        )
        self.next = self.starts[self.group]


def map_arrow(path: str | os.PathLike) -> "pyarrow.Table":
    """Map an Arrow stream, such as a shard of a `datasets` folder, into memory.

    Raises:
        OSError, ValueError: it is missing, no Arrow stream, or cut.
    """
    import pyarrow

    check_regular_file(path)
    try:
        source = pyarrow.memory_map(os.fspath(path))
        if source.size() < len(END_OF_STREAM):
            raise ValueError(f"it has {source.size()} bytes")
        source.seek(source.size() - len(END_OF_STREAM))
        if source.read() != END_OF_STREAM:
            raise ValueError("it does not end as a complete one does")
        source.seek(0)
        return pyarrow.ipc.open_stream(source).read_all()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)} is not a complete Arrow stream ({error}). Copy or save it again."
        ) from error


def is_parquet(path: str | os.PathLike) -> bool:
    """Return whether a file begins as Parquet does.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return file.read(4) in PARQUET_MAGIC


def has_null_bytes(file: "pyarrow.parquet.ParquetFile", column: str) -> bool:
    """Return whether a Parquet column of clips may have one without bytes, by its statistics."""
    metadata = file.metadata
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            leaf = row_group.column(number)
            if leaf.path_in_schema not in (column, f"{column}.bytes"):
                continue
            statistics = leaf.statistics
            if statistics is None or not statistics.has_null_count or statistics.null_count:
                return True
    return False


class _OpenTables(threading.local):
    """The tables that a thread has open: a row group that is read in part has one reader."""

    def __init__(self):
        self.tables: dict[tuple[str, str], _Column] = {}


_open_tables = _OpenTables()


def _open(clip: TableClip) -> _Column:
    """Open the column of a clip, or return it if this thread has it open.

    Raises:
        TableClipError: there is no such table, column or row.
    """
    import pyarrow

    tables = _open_tables.tables
    key = (clip.file, clip.column)
    table = tables.pop(key, None)
    try:
        check_regular_file(clip.file)
        status = os.stat(clip.file)
        version = (status.st_size, status.st_mtime_ns)
        # A table that was replaced is opened again.
        if table is None or table.version != version:
            table = _open_column(clip)
            table.version = version
    except FileNotFoundError as error:
        raise TableClipError("missing", "no such table") from error
    except KeyError as error:
        raise TableClipError("missing", f"the table has no column {clip.column!r}") from error
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(error) from error
    if clip.row >= table.num_rows:
        raise TableClipError("missing", f"the table has {table.num_rows} rows, counted from 0")
    while len(tables) >= MAX_OPEN_TABLES:
        del tables[next(iter(tables))]
    tables[key] = table
    return table


def _open_column(clip: TableClip) -> _Column:
    if is_parquet(clip.file):
        return _ParquetColumn(clip.file, clip.column)
    return _ArrowColumn(clip.file, clip.column)


def _read_entry(clip: TableClip) -> "pyarrow.Scalar":
    """Return the value of a clip's column.

    Raises:
        TableClipError: it cannot be read.
    """
    import pyarrow

    table = _open(clip)
    try:
        return table.read(clip.row)
    except (pyarrow.ArrowException, OSError, ValueError, StopIteration) as error:
        # The reader may be in the middle of a row group.
        del _open_tables.tables[clip.file, clip.column]
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> TableClipError:
    """Return the error for a table that cannot be read, in one line."""
    reason = " ".join(str(error).split())
    return TableClipError("unreadable", f"its table cannot be read ({reason})")
