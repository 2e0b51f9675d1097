"""Hashes files, writes them whole, locks them, and ends a command with one line of error."""

import hashlib
import io
import json
import os
import select
import signal
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

HASH_BLOCK = 2**22  # bytes
MAX_KNOWN_HASHES = 2**16  # Hashes of files that a process remembers: 30 MB.
MAX_JSON_BYTES = 2**26  # Of a JSON file that is read whole.
FILE_KINDS = {  # What a path is, if it is no regular file.
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
WORKER_ERROR = "in DataLoader worker process"  # In messages of torch.utils.data.


def sha256_of(*paths: str | Path) -> str:
    """Return the sha256 of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """What a file was, so that a change of its content is noticed.

    Attributes:
        size: in bytes.
        mtime_ns: time of its last change, in nanoseconds.
        sha256: hash of its content.
    """

    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> "FileRecord":
        """Record a regular file.

        Raises:
            OSError: the file cannot be read.
        """
        # The time is read first: if the file changes meanwhile, the record does not fit.
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, sha256_of(path))

    def fits(self, path: str | Path) -> bool:
        """Return whether a regular file still has the recorded content; False if it is unreadable.

        The file is only hashed if its time differs, as that of a copy does. So another content of
        the same size and time is not noticed.
        """
        try:
            status = os.stat(path)
            if status.st_size != self.size:
                return False
            if status.st_mtime_ns == self.mtime_ns:
                return True
            version = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            return _known_sha256(os.path.abspath(path), version) == self.sha256
        except OSError:
            return False


@lru_cache(MAX_KNOWN_HASHES)
def _known_sha256(path: str, version: tuple[int, ...]) -> str:
    """Return the hash of a file, which is computed once for each version of it."""
    return sha256_of(path)


def replace_file(
    path: Path, content: bytes | Iterable[bytes], shared: bool = False, is_synced: bool = False
) -> None:
    """Write a whole file, or none.

    Args:
        path: the file. Its folder is created.
        content: its bytes, or pieces of them.
        shared: several processes may write the file at once; the last one wins.
        is_synced: the content is on the disk before it gets its name, because the content that it
            replaces is lost then.

    Raises:
        OSError: it cannot be written.
        ValueError: the path is that of something else than a file.
    """
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    if shared:
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    if isinstance(content, bytes):
        content = [content]
    with unfinished.open("wb") as file:
        file.writelines(content)
        if is_synced:
            file.flush()
            os.fsync(file.fileno())
    os.replace(unfinished, path)


def check_output(path: Path) -> None:
    """Check that a path is free or that of a file, before a new file gets its name.

    Otherwise `--output_path /dev/null` would replace the device, if root gives it.

    Raises:
        ValueError: it is a device, a pipe, a folder or the like, or a link to one.
    """
    with suppress(FileNotFoundError):
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind != stat.S_IFREG:
            name = FILE_KINDS.get(kind, "something else")
            raise ValueError(f"{path} is {name}, which no file replaces. Choose another path.")


def check_regular_file(path: str | Path, max_bytes: int | None = None) -> None:
    """Check what a path is before it is opened: a pipe or a device may block, or never end.

    Args:
        path: a file, or a link to one.
        max_bytes: its largest possible size.

    Raises:
        OSError: there is no such file.
        ValueError: it is no regular file, or too large.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = FILE_KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ValueError(f"{path} is {kind}, not a file. Remove it, or copy the file again.")
    if max_bytes is not None and found.st_size > max_bytes:
        raise ValueError(
            f"{path} has {found.st_size:,} bytes; at most {max_bytes:,} are read. It is damaged, "
            "or another kind of file."
        )


def read_json_object(path: Path, unique_keys: bool = True) -> dict[str, Any]:
    """Return the object in a JSON file of at most `MAX_JSON_BYTES`.

    Args:
        path: the file.
        unique_keys: refuse an object that has a key twice.

    Raises:
        OSError: there is no such file.
        ValueError: it is no regular file, too large or damaged, or its content is no object.
    """
    check_regular_file(path, MAX_JSON_BYTES)
    try:
        hook = _unique_keys if unique_keys else None
        value = json.loads(path.read_bytes(), object_pairs_hook=hook)
    except RecursionError as error:
        raise ValueError(
            f"{path} is damaged (nested too deeply). Copy or write it again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or write it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is a {type(value).__name__}, not an object. Write it again.")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!a:.80} is there twice")
    return value


def write_json(value: Any, path: Path) -> None:
    """Write a value as JSON, whole or not at all.

    Bytes in file names that are not UTF-8 are escaped.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    replace_file(path, text.encode("utf-8", "backslashreplace"), is_synced=True)


def sync_files(paths: Iterable[Path]) -> None:
    """Return when the contents of files are on the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sync_and_rename(unfinished: Path, path: Path) -> None:
    """Give a file its name, once it is on the disk. Raises as `check_output`."""
    check_output(path)
    sync_files([unfinished])
    os.replace(unfinished, path)


def lock_file(path: Path, output: Path) -> IO[bytes]:
    """Open a file that only one process can have open; on a file system without locks, any can.

    Raises:
        ValueError: a running process has it open, and so writes the same output.
    """
    while True:
        file = path.open("ab")
        try:
            is_locked = lock_descriptor(file.fileno(), blocking=False)
        except OSError:  # The file system has no locks.
            return file
        if not is_locked:
            file.close()
            raise ValueError(f"Another run is writing {output}. Wait for it, or stop it.")
        # If its last owner has removed or renamed the file by now, open another one.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def missing_package(error: ImportError, extra: str) -> SystemExit:
    """Return what ends a command that cannot import a package of an extra.

    Args:
        error: that of the import.
        extra: the extra of pyproject.toml that has the package.
    """
    return SystemExit(f"error: {error}: pip install -e '.[{extra}]'")


def run_command(command: Callable[[], int | None], interrupted: str = "interrupted") -> None:
    """Run a command and exit with its status.

    An error that the user can fix (OSError, ValueError, or ImportError of an optional package) is
    one line, which a traceback would hide. So is Ctrl-C, with exit status 130. If the reader of the
    output ends first, as in `... | head -1`, the command ends without a word and with status 141,
    as if SIGPIPE had ended it.

    Letters that the encoding of stdout or stderr does not have are printed as backslash escapes.

    Args:
        command: returns the exit status; None is 0.
        interrupted: the line that is printed after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _status_of(command)
        if sys.stdout is not None:
            sys.stdout.flush()  # An error at the exit would be a traceback.
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        status = 128 + signal.SIGINT
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError) and _has_lost_reader():
            status = 128 + signal.SIGPIPE
        else:
            status = f"error: {_describe(error)}"
    _drop_unwritten_output()
    sys.exit(status)


def _status_of(command: Callable[[], int | None]) -> int | str | None:
    """Run a command and return its exit status, also if it exits by itself, as for --help."""
    try:
        return command()
    except SystemExit as exit_of_command:
        return exit_of_command.code


def _describe(error: Exception) -> str:
    """Return the message of an error, in one line."""
    message = str(error)
    if WORKER_ERROR in message:
        # A worker of a data loader puts its traceback in front of the message.
        message = message.rpartition(f"{type(error).__name__}: ")[2].strip()
    if isinstance(error, OSError):  # transformers breaks its lines.
        message = " ".join(message.split())
    return message


def _has_lost_reader() -> bool:
    """Return whether stdout or stderr is a pipe that nobody reads any more."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # Some are no file, or closed.
            poll.register(stream.fileno(), 0)  # 0: only errors, which are always reported.
    return bool(poll.poll(0))


def _drop_unwritten_output() -> None:
    """Drop what cannot be written to stdout, so that Python does not fail on it at the exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
