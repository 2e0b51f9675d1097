"""Compares the four stages of LTU with stage 4 alone, for as many steps, on five folds.

    python -m benchmarks.toy_curriculum --output_dir exp/toy_curriculum

Both are trained with a frozen audio encoder, as in the quickstart, and with a trained one, as in
the paper: four runs on each fold, otherwise with the settings of the quickstart. Stage 4 alone
starts from the initial checkpoint. Its examples are those of stage 4, as many as all stages have
together. Its learning rates are those of the earlier stages, because none of these has trained the
projection and LoRA before. It has one warm-up and one decay, and trains the audio encoder in all
of its steps, where the four stages do not in stage 1.

The paper's reason for the curriculum is that a model which is asked open-ended questions at once
answers them from language alone. So the tables also say what the model answers with a clip of
another category and without audio.

OUTPUT_DIR/results.json gets the tables of `eval.toy` for the four trainings, pooled over the folds,
and their differences on the same clips. The 95 % interval of a difference is that of the mean over
clips. It does not contain the noise from training to training, so the difference on each fold is
given too. A finished run is not run again.
"""

import argparse
import shlex
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import toy_runs
from data.command_line import command_parser
from data.toy.build import DEFAULTS
from eval import toy
from ltu.files import run_command, write_json

STAGE4 = "stage4_all_mix"
TOY_ARGS = Path("train_scripts/quickstart/toy.args")
RESPONSES = (*toy_runs.RESPONSES, "mismatched", "loss_gain")


@dataclass(frozen=True)
class Training:
    """A way to train.

    Attributes:
        is_alone: stage 4 alone is trained, not the four stages.
        has_trained_encoder: the audio encoder is trained too.
    """

    is_alone: bool
    has_trained_encoder: bool

    @property
    def name(self) -> str:
        stages = "stage 4 alone" if self.is_alone else "four stages"
        encoder = "trained" if self.has_trained_encoder else "frozen"
        return f"{stages}, {encoder} encoder"


TRAININGS = [Training(*flags) for flags in product((False, True), repeat=2)]
# Each difference is the second training minus the first.
DIFFERENCES = [
    (Training(False, False), Training(True, False)),
    (Training(False, True), Training(True, True)),
    (Training(False, False), Training(False, True)),
    (Training(True, False), Training(True, True)),
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
    folder = output_dir / f"fold{fold}_{training.name.replace(',', '').replace(' ', '_')}"
    settings = {"QUESTIONS": "last", "ENCODER_RATE": ""}
    flags: list[str] = []
    if training.has_trained_encoder:
        settings["ENCODER_RATE"] = toy_runs.ENCODER_RATE
    if training.is_alone:
        num_examples = [*num_examples[:-1], sum(num_examples)]
        settings["STAGES"] = STAGE4
        flags += ["--base_model", str(folder / "init")]
        for name in ("--learning_rate", "--projector_learning_rate"):
            flags += [name, toy_flag(name)]
        if training.has_trained_encoder:
            flags += ["--encoder_learning_rate", toy_runs.ENCODER_RATE]
    settings["NUM_EXAMPLES"] = ",".join(map(str, num_examples))
    return toy_runs.FoldRun("ltu", fold, folder, settings=settings, flags=tuple(flags))


def toy_flag(name: str) -> str:
    """Return the value of a flag in `toy.args`."""
    flags = shlex.split(TOY_ARGS.read_text(encoding="utf-8"), comments=True)
    return flags[flags.index(name) + 1]


def find_differences(responses: Responses, folds: list[int]) -> list[dict[str, Any]]:
    """Return the differences between the trainings, second minus first.

    Args:
        responses: (fold, training) -> what `toy_runs.read_responses` returns.
        folds: the folds.
    """
    found = []
    for first, second in DIFFERENCES:
        difference: dict[str, Any] = {"first": first.name, "second": second.name}
        for response in RESPONSES:
            by_fold = []  # (clips,) the differences of the clips of each fold
            for fold in folds:
                before = responses[fold, first][response]
                after = responses[fold, second][response]
                by_fold.append(np.subtract(after, before))
            mean = toy.Mean.of(np.concatenate(by_fold).tolist())
            fold_means = [float(values.mean()) for values in by_fold]
            difference[response] = asdict(mean) | {"folds": fold_means}
        found.append(difference)
    return found


def format_differences(differences: list[dict[str, Any]]) -> str:
    """Return the differences as a table in Markdown."""
    lines = [
        "| difference | category | exact label | loss | category, mismatched audio | loss, "
        "mismatched - matched audio |",
        "|" + "---|" * (1 + len(RESPONSES)),
    ]
    for difference in differences:
        cells = [f"{difference['second']}, minus {difference['first']}"]
        cells += toy_runs.difference_cells(difference, RESPONSES)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; `num_examples` becomes a list."""
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--num_examples",
        metavar="N,N,N,N",
        default=",".join(map(str, DEFAULTS["ltu"].num_examples)),
        help="Examples of the four stages; fewer are faster (%(default)s).",
    )
    toy_runs.add_flags(parser)
    args = toy_runs.parse_flags(parser, argv)
    batch_size = int(toy_flag("--batch_size"))
    text = args.num_examples
    args.num_examples = [int(number) for number in text.split(",") if number.isdecimal()]
    is_divisible = all(number and number % batch_size == 0 for number in args.num_examples)
    # Otherwise, stage 4 alone would take another number of steps.
    if len(args.num_examples) != len(text.split(",")) or len(args.num_examples) != 4:
        parser.error(f"--num_examples {text}: give four numbers")
    if not is_divisible:
        parser.error(f"--num_examples {text}: give multiples of the batch size {batch_size}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Train the runs, and write and print the tables."""
    args = parse_args(argv)
    planned = {}  # (fold, training) -> run
    for fold, training in product(args.folds, TRAININGS):
        planned[fold, training] = make_run(training, fold, args.output_dir, args.num_examples)
    toy_runs.run_folds(list(planned.values()), args.jobs)

    toy_set = toy.Toy.load()
    rows = []
    for training in TRAININGS:
        folders = [planned[fold, training].folder for fold in args.folds]
        table = toy.evaluate(folders, audio_encoder=None)
        rows.append(replace(toy_runs.last_stage(table.rows), name=training.name))
    table = replace(table, rows=rows, show=[])
    responses = {key: toy_runs.read_responses(run, toy_set) for key, run in planned.items()}
    differences = find_differences(responses, args.folds)
    result = table.to_json() | {"num_examples": args.num_examples, "differences": differences}
    path = args.output_dir / "results.json"
    write_json(result, path)
    print(f"{toy.format_table(table)}\n\n{format_differences(differences)}")
    print(f"\nThe tables as JSON: {path}")


if __name__ == "__main__":
    run_command(main)
