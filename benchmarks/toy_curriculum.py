"""Compares the four stages of LTU with stage 4 alone, for as many steps, on five folds.

    python -m benchmarks.toy_curriculum --output_dir exp/toy_curriculum

Both are trained twice, once with a frozen audio encoder and once with a trained one, as in the
paper: four runs on each fold, with the settings of the quickstart. Stage 4 alone starts from the
initial checkpoint, at the learning rates of the earlier stages, because it must learn what they
otherwise do. Its examples are those of stage 4, as many as all stages have together.

OUTPUT_DIR/results.json gets the fractions and losses of each of the four, pooled over the folds,
and their differences on the same clips. The 95 % interval of a difference is that of the mean over
clips. It does not contain the noise from training to training, so the difference on each fold is
given too. A finished run is not run again.
"""

import argparse
import shlex
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import toy_runs
from data.command_line import command_parser
from data.toy.build import DEFAULTS
from eval import toy
from ltu.files import run_command, write_json

STAGE4 = "stage4_all_mix"
# Of an audio encoder that is trained, a twentieth of that of LoRA.
ENCODER_RATE = "1e-4"
TOY_ARGS = Path("train_scripts/quickstart/toy.args")


class Training(NamedTuple):
    """A way to train: the stages, and what becomes of the audio encoder."""

    stages: str
    audio_encoder: str


TRAININGS = [
    Training(stages, audio_encoder)
    for stages, audio_encoder in product(
        ("four stages", "stage 4 alone"), ("frozen encoder", "trained encoder")
    )
]
# Each difference is the second training minus the first.
DIFFERENCES = [
    (TRAININGS[0], TRAININGS[2]),
    (TRAININGS[1], TRAININGS[3]),
    (TRAININGS[0], TRAININGS[1]),
    (TRAININGS[2], TRAININGS[3]),
]
Responses = dict[tuple[int, Training], dict[str, list[float]]]


def make_run(
    training: Training, fold: int, output_dir: Path, num_examples: list[int]
) -> toy_runs.FoldRun:
    """Return how a fold is trained.

    Args:
        training: one of `TRAININGS`.
        fold: number of the fold.
        output_dir: the folder of all runs.
        num_examples: of the four stages.
    """
    folder = output_dir / f"fold{fold}_{'_'.join(training).replace(' ', '_')}"
    settings = {"QUESTIONS": "few", "ENCODER_RATE": ""}
    flags: list[str] = []
    if training.audio_encoder == "trained encoder":
        settings["ENCODER_RATE"] = ENCODER_RATE
    if training.stages == "stage 4 alone":
        num_examples = [*num_examples[:-1], sum(num_examples)]
        settings["STAGES"] = STAGE4
        flags += ["--base_model", str(folder / "init"), *learning_rates()]
        if settings["ENCODER_RATE"]:
            flags += ["--encoder_learning_rate", ENCODER_RATE]
    settings["NUM_EXAMPLES"] = ",".join(map(str, num_examples))
    return toy_runs.FoldRun("ltu", fold, folder, settings=settings, flags=tuple(flags))


def learning_rates() -> list[str]:
    """Return the flags with the learning rates of the earlier stages."""
    flags = shlex.split(TOY_ARGS.read_text(encoding="utf-8"), comments=True)
    rates = []
    for name in ("--learning_rate", "--projector_learning_rate"):
        position = flags.index(name)
        rates += flags[position : position + 2]
    return rates


def summarize(responses: Responses, folds: list[int]) -> dict[str, Any]:
    """Return the means of each training, and the differences between them.

    Args:
        responses: (fold, training) -> what `toy_runs.read_responses` returns.
        folds: the folds.
    """

    def of_folds(training: Training, response: str) -> list[list[float]]:
        return [responses[fold, training][response] for fold in folds]

    rows = []
    for training in TRAININGS:
        row: dict[str, Any] = {
            "stages": training.stages,
            "audio_encoder": training.audio_encoder,
        }
        for response in toy_runs.RESPONSES:
            values = np.concatenate(of_folds(training, response)).tolist()
            if response == "loss":
                row[response] = asdict(toy.Mean.of(values))
            else:
                row[response] = asdict(toy.Rate.of([bool(value) for value in values]))
        rows.append(row)

    differences = []
    for first, second in DIFFERENCES:
        difference: dict[str, Any] = {"first": list(first), "second": list(second)}
        for response in toy_runs.RESPONSES:
            by_fold = []  # the clips' differences on each fold
            for before, after in zip(
                of_folds(first, response), of_folds(second, response), strict=True
            ):
                by_fold.append(np.subtract(after, before))
            mean = toy.Mean.of(np.concatenate(by_fold).tolist())
            fold_means = [float(values.mean()) for values in by_fold]
            difference[response] = asdict(mean) | {"folds": fold_means}
        differences.append(difference)
    return {"folds": folds, "rows": rows, "differences": differences}


def format_results(result: dict[str, Any]) -> str:
    """Return the two tables as Markdown.

    A difference has its interval in brackets, and the differences on each fold in parentheses.
    """
    lines = ["| stages | audio encoder | category | exact label | loss |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        cells = [row["stages"], row["audio_encoder"]]
        for response in toy_runs.RESPONSES:
            value = row[response]
            center = value["mean"] if response == "loss" else value["fraction"]
            cells.append(f"{center:.2f} [{value['low']:.2f}, {value['high']:.2f}]")
        lines.append(f"| {' | '.join(cells)} |")

    lines += ["", "| difference | category | exact label | loss |", "|---|---|---|---|"]
    for difference in result["differences"]:
        cells = [f"{', '.join(difference['second'])} instead of {', '.join(difference['first'])}"]
        cells += toy_runs.format_differences(difference)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument("--output_dir", type=Path, required=True, help="The folder of the runs.")
    parser.add_argument(
        "--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="Numbers of the folds."
    )
    parser.add_argument(
        "--num_examples",
        metavar="N,N,N,N",
        default=",".join(map(str, DEFAULTS["ltu"].num_examples)),
        help="Examples of the four stages; fewer are faster (%(default)s).",
    )
    parser.add_argument("--jobs", type=int, default=2, help="The number of runs at the same time.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train the runs, and write and print the tables."""
    args = parse_args(argv)
    num_examples = [int(number) for number in args.num_examples.split(",")]
    planned = {}
    for fold, training in product(args.folds, TRAININGS):
        planned[fold, training] = make_run(training, fold, args.output_dir, num_examples)
    toy_runs.run_folds(list(planned.values()), args.jobs)

    reader = toy.Toy.load().reader
    responses = {}
    for key, run in planned.items():
        responses[key] = toy_runs.read_responses(run.folder / STAGE4, reader)
    result = {"num_examples": num_examples} | summarize(responses, args.folds)
    path = args.output_dir / "results.json"
    write_json(result, path)
    print(f"{format_results(result)}\n\nThe tables as JSON: {path}")


if __name__ == "__main__":
    run_command(main)
