"""Runs folds of the toy experiment for the benchmarks, and reads how their clips were answered."""

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval import toy
from eval.scorer_interface import load_predictions

SCRIPT = Path("train_scripts/quickstart/toy_fold.sh")
RESPONSES = ("category", "label", "loss")


def variables() -> list[str]:
    """Return the variables of the environment that `toy_fold.sh` documents as its settings."""
    names = []
    for line in SCRIPT.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if line.startswith("#   ") and words[1].isupper():
            names.append(words[1])
    return names


@dataclass(frozen=True)
class FoldRun:
    """A fold to train.

    Attributes:
        kind: "ltu" or "ltu_as".
        fold: its number.
        folder: of the results.
        seed: of the data and of the training.
        settings: variables of `toy_fold.sh`. Those of the shell do not count.
        flags: of `finetune`, for all stages.
    """

    kind: str
    fold: int
    folder: Path
    seed: int = 0
    settings: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


def run_fold(run: FoldRun) -> None:
    """Train a fold on one thread and generate its answers; the output goes to FOLDER.log.

    Raises:
        OSError: the log cannot be written.
        ValueError: the fold failed.
    """
    environment = dict(os.environ)
    for name in variables():
        environment.pop(name, None)
    environment |= {"OMP_NUM_THREADS": "1"} | run.settings
    command = ["bash", str(SCRIPT), run.kind, str(run.fold), str(run.seed), str(run.folder)]
    log = run.folder.with_name(f"{run.folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{run.folder}: started, output in {log}", flush=True)
    with open(log, "a", encoding="utf-8") as file:
        finished = subprocess.run(
            [*command, *run.flags], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    if finished.returncode:
        raise ValueError(f"{run.folder} ended with exit status {finished.returncode}: see {log}")
    print(f"{run.folder}: finished", flush=True)


def run_folds(runs: list[FoldRun], jobs: int) -> None:
    """Run folds, `jobs` of them at the same time. After a failure no further one is started.

    Raises:
        OSError, ValueError: as `run_fold`.
    """
    has_failed = threading.Event()

    def run_unless_failed(run: FoldRun) -> None:
        if has_failed.is_set():
            return
        try:
            run_fold(run)
        except (OSError, ValueError):
            has_failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_unless_failed, runs))


def clip_name(entry: dict[str, Any]) -> str:
    """Return the file name of the clip that a question is about."""
    return Path(entry["audio_id"]).name


def read_responses(stage: Path, reader: toy.Reader) -> dict[str, list[float]]:
    """Return what is compared, for each held-out clip, in the order of their names.

    Args:
        stage: folder of a stage, with its answers.
        reader: reads the answers.

    Returns:
        "category" and "label": 1 if it is right, else 0; "loss": of the reference answer, nats per
        token.
    """
    answers = stage / "answers"
    predictions = load_predictions(answers / "right.json")
    entries = json.loads((answers / "loss_right.json").read_text(encoding="utf-8"))
    predictions.sort(key=clip_name)
    entries.sort(key=clip_name)
    hits = toy.score(predictions, reader)
    return {
        "category": [float(hit) for hit in hits.category],
        "label": [float(hit) for hit in hits.label],
        "loss": [entry["loss"] for entry in entries],
    }


def format_differences(responses: dict[str, dict]) -> list[str]:
    """Return a difference, its interval and the differences on each fold, for each response.

    Args:
        responses: "mean", "low", "high" and "folds" of each of `RESPONSES`.
    """
    cells = []
    for response in RESPONSES:
        mean = responses[response]
        folds = ", ".join(f"{value:+.2f}" for value in mean["folds"])
        interval = f"[{mean['low']:+.2f}, {mean['high']:+.2f}]"
        cells.append(f"{mean['mean']:+.2f} {interval} ({folds})")
    return cells
