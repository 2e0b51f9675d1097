"""Runs folds of the toy experiment for the benchmarks, several at the same time."""

import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

SCRIPT = Path("train_scripts/quickstart/toy_fold.sh")
T = TypeVar("T")


def variables() -> list[str]:
    """Return the variables of the environment that `toy_fold.sh` documents as its settings."""
    names = []
    for line in SCRIPT.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if line.startswith("#   ") and words[1].isupper():
            names.append(words[1])
    return names


def run_fold(
    kind: str,
    fold: int,
    seed: int,
    folder: Path,
    settings: dict[str, str],
    flags: Sequence[str] = (),
) -> None:
    """Train a fold on one thread and generate its answers; the output goes to FOLDER.log.

    Args:
        kind: "ltu" or "ltu_as".
        fold: its number.
        seed: of the data and of the training.
        folder: of the results.
        settings: variables of `toy_fold.sh`. Those of the shell do not count.
        flags: of `finetune`, for all stages.

    Raises:
        ValueError: it failed.
    """
    environment = dict(os.environ)
    for name in variables():
        environment.pop(name, None)
    environment |= {"OMP_NUM_THREADS": "1"} | settings
    command = ["bash", str(SCRIPT), kind, str(fold), str(seed), str(folder), *flags]
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{folder}: started, output in {log}", flush=True)
    with open(log, "a", encoding="utf-8") as file:
        finished = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if finished.returncode:
        raise ValueError(f"{folder} ended with exit status {finished.returncode}: see {log}")
    print(f"{folder}: finished", flush=True)


def run_all(run: Callable[[T], None], runs: list[T], jobs: int) -> None:
    """Call a function for each run, for `jobs` of them at the same time.

    After a failure no further run is started.

    Raises:
        ValueError: a run failed.
    """
    has_failed = threading.Event()

    def run_unless_failed(one: T) -> None:
        if has_failed.is_set():
            return
        try:
            run(one)
        except BaseException:
            has_failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_unless_failed, runs))
