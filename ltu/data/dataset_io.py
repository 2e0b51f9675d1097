"""Reads and writes dataset files, one example at a time.

The formats are a JSON list, JSON lines (`.jsonl`) and Parquet; JSON also compressed (`.gz`,
`.zst`). A reader goes by the first bytes of a file, a writer by its name. Readers also take folders
that the library `datasets` has saved, folders of Parquet files and data sets of the hub
(`ltu.data.dataset_source`), and other names of columns (`ltu.data.columns`).

`stream_examples` yields any objects; `typed_examples` also checks that each is an example: it has
at least one of the keys, and the values of the keys are texts or null.

The keys of an example and their order are preserved. Parquet has a column for each key, also one
with the clips themselves (`ltu.data.parquet_writer`). A key that only later examples have is an
error. An example with keys within a value cannot be stored in Parquet.

A file gets its name only when it is complete and on the disk.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from ltu.data.columns import ColumnFlags, ColumnMap
from ltu.data.dataset_parser import DatasetError, LineSplitter, ListSplitter
from ltu.data.dataset_source import DatasetSource, find_dataset
from ltu.data.table_reader import open_columns, table_examples
from ltu.files import check_output, lock_file, sha256_of, sync_and_rename

# JSON needs no pyarrow.
if TYPE_CHECKING:
    from ltu.data.parquet_writer import ClipContent, ParquetTable

BLOCK = 2**20  # bytes
EXAMPLES_AT_ONCE = 8192  # examples that are written at once; in Parquet, a row group
KEYS = ("instruction", "input", "audio_id", "dataset", "task", "output")
TEXT_TYPES = frozenset([str, type(None)])
AUDIO_HINT = 'Give the path of a clip, or "empty" for a question without audio.'
KINDS = {".json": "list", ".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet"}
CODECS = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_encode = msgspec.json.Encoder().encode


def stream_examples(
    path: str | Path | DatasetSource, columns: ColumnFlags | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the examples of a data set, in constant memory.

    Args:
        path: a file, a folder or a data set of the hub, see `ltu.data.dataset_source`; or what
            `find_dataset` has found.
        columns: its split, and the names of its columns.

    Raises:
        DatasetError: the data set is malformed, cut off or missing.
    """
    columns = columns or ColumnFlags()
    return stream_source(find_dataset(path, columns.split), columns)


def stream_source(source: DatasetSource, columns: ColumnFlags) -> Iterator[dict[str, Any]]:
    """Yield the examples of a data set, in constant memory; raises as `stream_examples`."""
    found = find_columns(source, columns)
    if found is not None:
        yield from table_examples(source, found)
        return
    if source.kind == "parquet":
        for file in source.files:
            yield from _parquet_examples(file)
        return
    for number, example in enumerate(_json_examples(source.files[0]), start=1):
        try:
            yield columns.rename_keys(example)
        except DatasetError as error:
            raise DatasetError(f"{source.name}, example {number}: {error}") from error


def find_columns(source: DatasetSource, columns: ColumnFlags) -> ColumnMap | None:
    """Find the columns of a table that are used.

    Returns:
        None for JSON, and for a Parquet file whose columns are the keys of examples.

    Raises:
        DatasetError: as `stream_examples`.
    """
    return None if source.kind == "json" else open_columns(source, columns)


def describe_columns(source: DatasetSource, columns: ColumnFlags) -> list[str]:
    """Return what the start of a run prints about columns; nothing if there is nothing to say.

    Raises:
        DatasetError: as `stream_examples`.
    """
    found = find_columns(source, columns)
    return columns.describe() if found is None else found.describe()


def hash_source(source: DatasetSource, columns: ColumnFlags) -> str:
    """Return a sha256 of a data set: of a file, its content.

    Of a table it covers the examples as they are used, and the sizes of its files, but not the
    content of its clips, which may be terabytes. The content of the clips of a JSON file is not
    covered either. Names of files and folders are not covered.

    Raises:
        DatasetError: as `stream_examples`.
    """
    found = find_columns(source, columns)
    if found is None:
        digest = sha256_of(*source.files)
        if not columns.renames:
            return digest
        return hashlib.sha256(_encode([digest, columns.to_json()])).hexdigest()
    hashed = hashlib.sha256()
    for file in source.files:
        hashed.update(b"%d," % file.stat().st_size)
    for example in stream_source(source, columns):
        # The file of a clip follows from its place among the examples; #COLUMN[ROW] remains.
        audio_id = example.get("audio_id")
        if found.has_clips and audio_id is not None:
            example = example | {"audio_id": f"#{audio_id.rpartition('#')[2]}"}
        hashed.update(encode_line(example) + b"\n")
    return hashed.hexdigest()


def _json_examples(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        magic = file.read(4)
    with _open_to_read(path, magic) as file:
        first = _read(file, path)
        # Skip the byte order mark and white space; then `[` begins a list.
        data = first.removeprefix(BYTE_ORDER_MARK).lstrip()
        is_list = data.startswith(b"[")
        data = data.removeprefix(b"[")
        offset = len(first) - len(data)
        split = ListSplitter(path, offset) if is_list else LineSplitter(path, offset)
        while True:
            block = _read(file, path)
            examples, used = split(data, at_end=not block)
            yield from examples
            if not block:
                return
            data = data[used:] + block


def typed_examples(
    path: str | Path | DatasetSource, columns: ColumnFlags | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the examples of a data set, in constant memory, after a check of their types.

    Arguments are those of `stream_examples`.

    Raises:
        DatasetError: as `stream_examples`; or an example has none of `KEYS`, or a wrong type.
    """
    for number, example in enumerate(stream_examples(path, columns), start=1):
        # One look at the types of all values passes nearly every example, and is fast.
        is_text = TEXT_TYPES.issuperset(map(type, example.values()))
        if not is_text or "instruction" not in example:
            reason = wrong_type(example)
            if reason is None and not any(key in example for key in KEYS):
                reason = f"none of the keys {', '.join(KEYS)}, only {str(list(example))[:300]}"
            if reason:
                name = path.name if isinstance(path, DatasetSource) else path
                raise DatasetError(
                    f"{name}, example {number}: {reason.rstrip('.')}. Fix or remove the example; "
                    "data.validate lists all that are wrong."
                )
        yield example


def wrong_type(example: dict[str, Any], names: Mapping[str, str] | None = None) -> str | None:
    """Return which of the `KEYS` of an example has a value that is neither text nor null, or None.

    Other keys may have any value.

    Args:
        example: the example.
        names: the columns that its values are of, by key, where they have other names.
    """
    names = names or {}
    for key in KEYS:
        value = example.get(key)
        if type(value) in TEXT_TYPES:
            continue
        label = label_key(key, names)
        if key == "audio_id":
            return f"{label} is a {type(value).__name__}. {AUDIO_HINT}"
        is_renamed = names.get(key, key) != key
        hint = ". Name a column of texts, or of labels (ClassLabel)" if is_renamed else ""
        return f"{label} is a {type(value).__name__}, not text{hint}"
    return None


def label_key(key: str, names: Mapping[str, str]) -> str:
    """Return a key for a message, with the column that its value is of if that has another name."""
    column = names.get(key, key)
    return repr(key) if column == key else f"{key!r}, from the column {column!r},"


def _open_to_read(path: Path, magic: bytes) -> IO[bytes]:
    for start, codec in MAGIC.items():
        if magic.startswith(start):
            import pyarrow

            return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec)
    return path.open("rb")


def _read(file: IO[bytes], path: Path) -> bytes:
    try:
        return file.read(BLOCK)
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be decompressed ({error}). Download or write it again."
        ) from error


def _parquet_examples(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(EXAMPLES_AT_ONCE, use_threads=False):
                for example in batch.to_pylist():
                    yield {key: value for key, value in example.items() if value is not None}
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:
        message = f"{path}: not a valid Parquet file ({error}). Write it again."
        raise DatasetError(message) from error


def encode_line(example: dict[str, Any]) -> bytes:
    """Return an example as one line of JSON, without the line end."""
    try:
        return _encode(example)
    except UnicodeEncodeError:
        # Half of a surrogate pair cannot be encoded as UTF-8, but an escape such as `\\ud83d` can.
        return json.dumps(example, separators=(",", ":")).encode()


def _format_of(path: Path) -> tuple[str, str | None]:
    """Return the kind of file and the codec that a name stands for."""
    codec = CODECS.get(path.suffix)
    name = path.stem if codec else path.name
    kind = KINDS.get(Path(name).suffix)
    if not kind or (kind == "parquet" and codec):
        raise ValueError(f"{path}: name it .json, .jsonl (each also with .gz or .zst) or .parquet.")
    return kind, codec


class ExampleWriter:
    """Writes examples. The file appears, complete, when the `with` block ends without an error.

    Args:
        path: the file; its suffixes decide the format.
        inputs: files that are read at the same time, and so must not be `path`.
        read_clip: returns the clip of an `audio_id`, which is then stored in the file; None for
            questions without audio. The file must be Parquet.

    Attributes:
        count: how many examples were written.

    Raises:
        ValueError: another name is needed, another run writes the same file, or the examples do not
            fit the format, or a clip cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        inputs: Iterable[str | Path] = (),
        read_clip: "Callable[[str | None], ClipContent | None] | None" = None,
    ):
        self.path = Path(path)
        self.unfinished = self.path.with_name(f"{self.path.name}.tmp")
        outputs = {self.path.resolve(), self.unfinished.resolve()}
        if any(Path(other).resolve() in outputs for other in inputs):
            raise ValueError(
                f"{path} or {self.unfinished.name} is an input. Give the output another name."
            )
        self.kind, self.codec = _format_of(self.path)
        if read_clip is not None and self.kind != "parquet":
            raise ValueError(f"{path}: only Parquet stores clips. Name the output .parquet.")
        self.read_clip = read_clip
        self.count = 0
        self.lines: list[bytes] = []
        self.table: ParquetTable | None = None

    def __enter__(self) -> "ExampleWriter":
        check_output(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = lock_file(self.unfinished, self.path)
        if self.codec:
            import pyarrow

            self.file = pyarrow.CompressedOutputStream(str(self.unfinished), self.codec)
        else:
            self.file = self.unfinished.open("wb")
        if self.kind == "list":
            self.file.write(b"[")
        if self.kind == "parquet":
            from ltu.data.parquet_writer import ParquetTable

            self.table = ParquetTable(self.file, KEYS, EXAMPLES_AT_ONCE, self.read_clip)
        return self

    def write(self, example: dict[str, Any] | bytes) -> None:
        """Add an example, or the line that `encode_line` made of it."""
        line = example if isinstance(example, bytes) else encode_line(example)
        self.count += 1
        if self.table is not None:
            with self._named_errors():
                self.table.add(json.loads(line))
            return
        self.lines.append(line)
        if len(self.lines) == EXAMPLES_AT_ONCE:
            self._flush()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Put the path in front of errors about the table."""
        try:
            yield
        except ValueError as error:
            hint = "" if self.read_clip is not None else ". Write .jsonl."
            raise ValueError(f"{self.path}: {error}{hint}") from error

    def _flush(self) -> None:
        if self.lines and self.kind == "lines":
            self.file.write(b"\n".join(self.lines) + b"\n")
        elif self.lines:
            if self.count > len(self.lines):
                self.file.write(b",")
            self.file.write(b"\n" + b",\n".join(self.lines))
        self.lines = []

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self.table is not None:
                self.table.close()
            self.file.close()
            if self.unfinished:
                self.unfinished.unlink(missing_ok=True)
            self.lock.close()

    def _finish(self) -> None:
        """Write what is left and give the file its name."""
        if self.table is not None:
            with self._named_errors():
                self.table.finish()
        self._flush()
        if self.kind == "list" and self.count:
            self.file.write(b"\n")
        if self.kind == "list":
            self.file.write(b"]\n")
        self.file.close()
        sync_and_rename(self.unfinished, self.path)
        self.unfinished = None  # The name may belong to another run from now on.
