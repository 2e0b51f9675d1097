"""A folder beside an output, for what does not fit into memory, that no killed run leaves behind for good."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ltu.files import lock_file


@contextmanager
def scratch_folder(output: Path, verb: str) -> Iterator[str]:
    """.VERB_OUTPUT, empty, beside an output; removed at the end.

    The folder is named after the output and its lock ends with the process that holds it: after kill -9 the next run
    clears what was left.

    Raises:
        ValueError: a running process has it, and so writes the same output.
    """
    folder = output.with_name(f".{verb}_{output.name}")
    with _lock(folder / "lock", output) as lock:
        try:
            _clear(folder, lock.name)
            yield str(folder)
        finally:
            _clear(folder, lock.name)
            os.unlink(lock.name)
            with suppress(OSError):  # The next run may be in it already.
                folder.rmdir()


def _clear(folder: Path, kept: str) -> None:
    for path in [entry.path for entry in os.scandir(folder)]:
        if path != kept:
            os.unlink(path)


def _lock(path: Path, output: Path) -> IO[bytes]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # Its last owner removes the folder at this moment.
            return lock_file(path, output)
