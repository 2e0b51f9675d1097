"""Runs folds of the toy experiment for the benchmarks, and reads how their clips were answered."""

import argparse
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.command_line import positive_int
from eval import toy

SCRIPT = Path("train_scripts/quickstart/toy_fold.sh")
# Responses of a held-out clip that every run has; see `read_responses`.
RESPONSES = ("category", "label", "loss")
FOLDS = (0, 1, 2, 3, 4)
# `benchmarks.toy_settings` compares settings on these folds.
TUNING_FOLDS = (0, 1)
# Of an audio encoder that is trained: a twentieth of LoRA's learning rate in `toy.args`.
ENCODER_RATE = "1e-4"


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


def read_responses(run: FoldRun, toy_set: toy.Toy) -> dict[str, list[float]]:
    """Return the responses of each held-out clip of a run, in the order of their names.

    Args:
        run: a finished run; the answers are those after its last stage.
        toy_set: the clips.

    Returns:
        "category" and "label": 1 if it is right, else 0; "loss": of the reference answer, nats per
        token. If questions were asked with a clip of another category too, "mismatched": 1 if the
        category is right nevertheless, else 0; "loss_gain": by how much the loss is lower with the
        right clip.

    Raises:
        EvaluationError: there are no such answers.
        ValueError: the answers are about the clips of another fold.
    """
    stages = toy.read_predictions(run.folder)
    stage = stages[max(stages)]
    fold = toy.fold_of(stage["right"], toy_set)
    if fold != run.fold:
        raise ValueError(f"{run.folder} has the clips of fold {fold}, not {run.fold}.")

    hits = toy.score(stage["right"], toy_set.reader)
    losses = np.array([entry["loss"] for entry in stage["loss_right"]])  # (clips,)
    responses: dict[str, Any] = {"category": hits.category, "label": hits.label, "loss": losses}
    if "wrong" in stage:
        responses["mismatched"] = toy.score(stage["wrong"], toy_set.reader).category
    if "loss_wrong" in stage:
        other_losses = np.array([entry["loss"] for entry in stage["loss_wrong"]])  # (clips,)
        responses["loss_gain"] = other_losses - losses
    order = np.argsort([Path(entry["audio_id"]).name for entry in stage["right"]])  # (clips,)
    return {name: np.array(values, float)[order].tolist() for name, values in responses.items()}


def last_stage(rows: list[toy.Row]) -> toy.Row:
    """Return the row of the last stage in a table."""
    stages = [row for row in rows if row.name.startswith("stage")]
    return max(stages, key=lambda row: row.name)


def add_flags(parser: argparse.ArgumentParser, folds: tuple[int, ...] = FOLDS) -> None:
    """Add --output_dir, --folds and --jobs.

    Args:
        parser: of the command.
        folds: the default of --folds.
    """
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="The folder of the runs and results.")
    default = " ".join(map(str, folds))
    add("--folds", type=int, nargs="+", default=folds, help=f"Numbers of the folds ({default}).")
    add(
        "--jobs",
        type=positive_int,
        default=2,
        help="The number of runs at the same time (%(default)s).",
    )


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. A fold that is given twice is an error."""
    args = parser.parse_args(argv)
    args.folds = list(args.folds)
    if len(set(args.folds)) != len(args.folds):
        parser.error(f"--folds {' '.join(map(str, args.folds))}: give each fold once")
    return args


def difference_cells(differences: dict[str, Any], responses: tuple[str, ...]) -> list[str]:
    """Return each difference, its interval in brackets, and in parentheses that on each fold.

    Args:
        differences: response -> "mean", "low", "high" and "folds".
        responses: the names of the responses.
    """
    cells = []
    for response in responses:
        mean = differences[response]
        folds = ", ".join(f"{value:+.2f}" for value in mean["folds"])
        interval = f"[{mean['low']:+.2f}, {mean['high']:+.2f}]"
        cells.append(f"{mean['mean']:+.2f} {interval} ({folds})")
    return cells
