"""Creates a temporary folder next to an output, for data that does not fit into memory.

The folder that a killed run leaves behind is cleared by the next run with the same output.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ltu.files import lock_file


@contextmanager
def temporary_folder(output: Path, command: str) -> Iterator[str]:
    """Create the empty folder .COMMAND_OUTPUT next to an output and remove it at the end.

    The folder is named after the output, and its lock ends with the process that holds it: after
    kill -9 the next run clears what was left.

    Raises:
        ValueError: a running process has the folder, and so writes the same output.
    """
    folder = output.with_name(f".{command}_{output.name}")
    with _lock(folder / "lock", output) as lock:
        try:
            _clear(folder, lock.name)
            yield str(folder)
        finally:
            _clear(folder, lock.name)
            os.unlink(lock.name)
            with suppress(OSError):  # The next run may have files in it already.
                folder.rmdir()


def _clear(folder: Path, lock: str) -> None:
    """Remove all files of a folder but its lock."""
    paths = [entry.path for entry in os.scandir(folder)]
    for path in paths:
        if path != lock:
            os.unlink(path)


def _lock(path: Path, output: Path) -> IO[bytes]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # Its last owner removes the folder at this moment.
            return lock_file(path, output)
