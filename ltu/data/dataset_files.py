"""Files of rows, read and written one row at a time: JSON list, JSON lines (`.jsonl`), Parquet; also `.gz` and `.zst`.

Notable:
- A file is known by its first bytes when it is read, by its name when it is written.
- A row keeps its keys and their order. Parquet has a column for each key: a null in it means that the row lacks the
  key, and no key may be in a later row only. Keys within a value make it no table.
- A file has its name only when it is whole and on the disk.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from ltu.data.dataset_parser import LineSplitter, ListSplitter, RowError
from ltu.files import lock_file, sync_and_rename

BLOCK = 2**20  # bytes
ROWS_AT_ONCE = 8192  # written at once; of one row group in Parquet
KEYS = ("instruction", "input", "audio_id", "dataset", "task", "output")
KINDS = {".json": "list", ".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet"}
CODECS = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_encode = msgspec.json.Encoder().encode


def stream_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, in constant memory.

    Raises:
        RowError: it is malformed, cut off or missing.
    """
    path = Path(path)
    if not path.is_file():
        raise RowError(
            f"{path} is not there. Give a JSON list, JSON lines or Parquet file (also .gz, .zst)."
        )
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        yield from _parquet_rows(path)
        return
    with _open_to_read(path, magic) as file:
        first = _read(file, path)
        begin = len(BYTE_ORDER_MARK) if first.startswith(BYTE_ORDER_MARK) else 0
        begin += len(first[begin:]) - len(first[begin:].lstrip())
        is_list = first[begin : begin + 1] == b"["
        split = ListSplitter(path, begin + 1) if is_list else LineSplitter(path, begin)
        data = first[begin + is_list :]
        while True:
            block = _read(file, path)
            rows, used = split(data, at_end=not block)
            yield from rows
            if not block:
                return
            data = data[used:] + block


def _open_to_read(path: Path, magic: bytes) -> IO[bytes]:
    codec = next((codec for start, codec in MAGIC.items() if magic.startswith(start)), None)
    if not codec:
        return path.open("rb")
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec)


def _read(file: IO[bytes], path: Path) -> bytes:
    try:
        return file.read(BLOCK)
    except OSError as error:
        raise RowError(
            f"{path}: cannot be decompressed ({error}). Fetch or write it again."
        ) from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, use_threads=False):
                for row in batch.to_pylist():
                    yield {key: value for key, value in row.items() if value is not None}
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise RowError(f"{path}: not a whole Parquet file ({error}). Write it again.") from error


def encode_row(row: dict[str, Any]) -> bytes:
    """One line of JSON, without its end."""
    try:
        return _encode(row)
    except (
        UnicodeEncodeError
    ):  # Half of a surrogate pair is no UTF-8, but `\\ud83d` can be written and read.
        return json.dumps(row, separators=(",", ":")).encode()


def _ending(path: Path) -> tuple[str, str | None]:
    """Kind and codec of a name."""
    codec = CODECS.get(path.suffix)
    kind = KINDS.get(Path(path.stem).suffix if codec else path.suffix)
    if not kind or (kind == "parquet" and codec):
        raise ValueError(f"{path}: name it .json, .jsonl (each also with .gz or .zst) or .parquet.")
    return kind, codec


class RowWriter:
    """Writes rows; the file appears, whole, when the `with` block ends without an error. `count` is what it has.

    Args:
        path: its ending says the format.
        inputs: what is read meanwhile, and so may not be that path.

    Raises:
        ValueError: another name is needed; another run writes that file; the rows do not fit its format.
    """

    def __init__(self, path: str | Path, inputs: Iterable[str | Path] = ()):
        self.path = Path(path)
        self.unfinished = self.path.with_name(f"{self.path.name}.tmp")
        if {self.path.resolve(), self.unfinished.resolve()} & {
            Path(other).resolve() for other in inputs
        }:
            raise ValueError(
                f"{path} is read, or {self.unfinished.name} is; give the new rows another name."
            )
        self.kind, self.codec = _ending(self.path)
        self.count = 0
        self.lines: list[bytes] = []
        self.table: Any = None  # pyarrow's writer, once the columns are known

    def __enter__(self) -> "RowWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = lock_file(self.unfinished, self.path)
        if self.codec:
            import pyarrow

            self.file = pyarrow.CompressedOutputStream(str(self.unfinished), self.codec)
        else:
            self.file = self.unfinished.open("wb")
        if self.kind == "list":
            self.file.write(b"[")
        return self

    def write(self, row: dict[str, Any] | bytes) -> None:
        """Add a row, or the line that `encode_row` made of it."""
        self.lines.append(row if isinstance(row, bytes) else encode_row(row))
        self.count += 1
        if len(self.lines) == ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self.kind == "parquet":
            self._write_table([json.loads(line) for line in self.lines])
        elif self.lines and self.kind == "lines":
            self.file.write(b"\n".join(self.lines) + b"\n")
        elif self.lines:
            is_first = self.count == len(self.lines)
            self.file.write((b"\n" if is_first else b",\n") + b",\n".join(self.lines))
        self.lines = []

    def _write_table(self, rows: list[dict]) -> None:
        import pyarrow
        import pyarrow.parquet

        first = self.count - len(rows) + 1
        try:
            if self.table is None:
                schema = pyarrow.schema(_columns(rows))
                self.table = pyarrow.parquet.ParquetWriter(self.file, schema, compression="zstd")
            for number, row in enumerate(rows, start=first):
                if unknown := row.keys() - set(self.table.schema.names):
                    raise ValueError(
                        f"row {number} has {min(unknown)!r}, which the first rows lack"
                    )
            self.table.write_table(pyarrow.Table.from_pylist(rows, self.table.schema))
        except (pyarrow.ArrowException, UnicodeEncodeError, TypeError, ValueError) as error:
            reason = (
                f"{self.path}: rows {first} to {self.count} fit no table: {error}. Write .jsonl."
            )
            raise ValueError(reason) from error

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                if self.lines or self.table is None:
                    self._flush()
                if self.kind == "list":
                    self.file.write(b"\n]\n" if self.count else b"]\n")
                if self.table is not None:
                    self.table.close()
                self.file.close()
                sync_and_rename(self.unfinished, self.path)
                self.unfinished = None  # From now on another run's.
        finally:
            if self.table is not None:
                self.table.close()  # Or it would, when it is forgotten, write to a closed file.
            self.file.close()
            if self.unfinished:
                self.unfinished.unlink(missing_ok=True)
            self.lock.close()


def _columns(rows: list[dict]) -> list[tuple[str, Any]]:
    """Name and type of every column: text, unless these rows have something else. Their own order, then usual keys."""
    import pyarrow

    found = []
    for key in dict.fromkeys([key for row in rows for key in row] + list(KEYS)):
        values = [row[key] for row in rows if row.get(key) is not None]
        is_text = all(isinstance(value, str) for value in values)
        found.append((key, pyarrow.string() if is_text else pyarrow.array(values).type))
        if "struct<" in str(
            found[-1][1]
        ):  # Of these, pyarrow drops keys that later rows add, without an error.
            raise ValueError(f"{key!r} has keys of its own")
    return found
