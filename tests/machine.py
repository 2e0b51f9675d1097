"""Helpers that keep tests independent of the machine's speed: quick processes, relative CPU time.

Importing any module of `ltu` imports the models, and with them transformers. That is 4 of the 6
seconds of CPU time that `python -m data.shuffle` takes to start, and no test of `data` or `eval`
needs it. In the processes that `start_python` starts, `ltu` is therefore a package without
contents of its own; its modules are the real ones.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds until a waiting test fails; far more than a busy machine needs
# Python imports a module of this name when it starts, and so do the processes that it starts.
SITECUSTOMIZE = f"""
import sys, types
package = types.ModuleType("ltu")
package.__path__ = [{str(ROOT / "ltu")!r}]
sys.modules["ltu"] = package
"""


def start_python(words: list[str], folder: Path, **settings) -> subprocess.Popen:
    """Run `python WORDS...` in the root of the repository, without the models.

    Args:
        words: the arguments of Python: ["-m", "data.shuffle", ...] or ["-c", script, ...].
        folder: a folder of the test's own; `without_models` is made in it.
        settings: as of `subprocess.Popen`.
    """
    site_folder = folder / "without_models"
    site_folder.mkdir(exist_ok=True)
    (site_folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    paths = [str(site_folder), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, **settings)


def run_python(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run as `start_python` does, and wait for the end; stdout and stderr are text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with start_python(words, folder, **pipes) as process:
        stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    """Wait for an event that sends no signal; a `process` that ends before it fails the test."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, f"it ended with {process.returncode}"
        time.sleep(0.005)


def check_growth(run: Callable[[int], None], count: int) -> None:
    """Assert that CPU time grows with a number and not with its square.

    For four times the number, a linear `run` takes 4 times as long and a quadratic one 16 times,
    on any machine. The limit is 8. Other processes can only slow a measurement down, so the larger
    one may be repeated.
    """
    few = _cpu_seconds(run, count)
    assert any(_cpu_seconds(run, 4 * count) < 8 * few for _ in range(4))


def _cpu_seconds(run: Callable[[int], None], count: int) -> float:
    start = time.process_time()
    run(count)
    return time.process_time() - start
