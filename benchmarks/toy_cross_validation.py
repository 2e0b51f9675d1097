"""Runs all five folds of the toy experiment, or stage 4 alone, to measure the curriculum.

    python -m benchmarks.toy_cross_validation --output_dir exp/toy
    python -m benchmarks.toy_cross_validation --output_dir exp/toy --alone
    python -m benchmarks.toy_cross_validation --output_dir exp/as --kind ltu_as

The first command trains four stages on each of five folds. `--alone` takes as many steps, all of
them in stage 4. LTU-AS has three stages.

Each fold is `train_scripts/quickstart/toy_fold.sh`, as in the quickstart: the stage scripts with
`toy.args`. A finished fold is not run again, so the benchmark can be stopped and started again.

The folds of LTU-AS differ in their sounds. The held-out voices and sentences are the same in each
fold, so their fractions are means over runs, not pooled.

OUTPUT_DIR/results.json (results_alone.json) gets the table, pooled over the folds, and the seconds
of training. The command exits with 1 if a bound that was set before measuring is missed.
"""

import argparse
import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

from data.command_line import command_parser
from data.toy.build import DEFAULTS
from eval import toy, toy_speech
from ltu.files import run_command, write_json

STAGE4 = "stage4_all_mix"
SCRIPT = "train_scripts/quickstart/toy_fold.sh"


def run_fold(kind: str, fold: int, seed: int, folder: Path, alone: bool) -> None:
    """Train a fold and generate its answers.

    With `alone`, stage 4 starts from the initial checkpoint, with the number of examples, and so of
    steps, of all stages together.
    """
    environment = dict(os.environ)
    flags = []
    if alone:
        num_examples = list(DEFAULTS["ltu"].num_examples)
        num_examples[-1] = sum(num_examples)
        environment["NUM_EXAMPLES"] = ",".join(map(str, num_examples))
        environment["STAGES"] = STAGE4
        flags = ["--base_model", str(folder / "init"), *learning_rate()]
    command = ["bash", SCRIPT, kind, str(fold), str(seed), str(folder), *flags]
    subprocess.run(command, env=environment, check=True)


def learning_rate() -> list[str]:
    """Return the flag with the learning rate of the earlier stages.

    Stage 4 alone must learn what they otherwise do.
    """
    flags = shlex.split(
        Path("train_scripts/quickstart/toy.args").read_text(encoding="utf-8"), comments=True
    )
    position = flags.index("--learning_rate")
    return flags[position : position + 2]


def seconds_of_training(folder: Path) -> float:
    """Return the sum of the runtimes that the Trainer measured in the stages of a fold."""
    total = 0.0
    for path in folder.glob("stage*/trainer_state.json"):
        for entry in json.loads(path.read_text(encoding="utf-8"))["log_history"]:
            total += entry.get("train_runtime", 0.0)
    return total


def last_stage(rows: list[toy.Row]) -> toy.Row:
    """Return the row of the last stage in a table."""
    stages = [row for row in rows if row.name.startswith("stage")]
    return max(stages, key=lambda row: row.name)


def find_row(rows: list[toy.Row], start: str) -> toy.Row:
    """Return the row whose name begins so."""
    return next(row for row in rows if row.name.startswith(start))


def verdicts(rows: list[toy.Row]) -> dict[str, bool]:
    """Return the bounds that were set before measuring, and whether the last stage meets them."""
    last = last_stage(rows)
    right = last.right.fraction
    wrong = last.wrong.fraction
    label = last.label.fraction
    probe = find_row(rows, "linear probe").right.fraction
    package = find_row(rows, "source package alone").right.fraction
    return {
        f"category {right:.3f} >= 0.65": right >= 0.65,
        f"category {right:.3f} >= linear probe {probe:.3f} - 0.05": right >= probe - 0.05,
        f"category {right:.3f} >= source package {package:.3f} + 0.08": right >= package + 0.08,
        f"exact label {label:.3f} >= 0.55": label >= 0.55,
        f"category with another category's audio {wrong:.3f} <= 0.10": wrong <= 0.10,
    }


def verdicts_as(rows: list[toy.Row], speech: list[toy_speech.Row]) -> dict[str, bool]:
    """Return the bounds that were set for LTU-AS, and whether the last stage meets them."""
    category = last_stage(rows).right.fraction
    found = {f"category {category:.3f} >= 0.65": category >= 0.65}
    for row in speech:
        if "gender" in row.name.lower() and row.name.endswith(")"):
            found[f"{row.name} {row.mean:.3f} >= 0.80"] = row.mean >= 0.80
        if row.name == f"WER, {toy_speech.TRANSCRIPTS['speech_words_right']}":
            found[f"{row.name} {row.mean:.3f} <= 0.10"] = row.mean <= 0.10
    return found


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("exp/toy"), help="The folder of the folds."
    )
    parser.add_argument(
        "--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="Numbers of the folds to run."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the data and of the training.")
    parser.add_argument(
        "--kind", choices=("ltu", "ltu_as"), default="ltu", help="The model to train."
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="Train stage 4 alone, for as many steps as the four stages.",
    )
    args = parser.parse_args(argv)
    if args.alone and args.kind != "ltu":
        parser.error("--alone is for LTU only")
    return args


def main(argv: list[str] | None = None) -> int:
    """Train and score the folds.

    Returns:
        1 if a bound is missed, else 0.
    """
    args = parse_args(argv)
    name = "fold"
    path = args.output_dir / "results.json"
    if args.alone:
        name = "alone"
        path = args.output_dir / "results_alone.json"
    folders = []
    seconds = {}
    for fold in args.folds:
        folder = args.output_dir / f"{name}{fold}"
        run_fold(args.kind, fold, args.seed, folder, args.alone)
        folders.append(folder)
        seconds[folder.name] = round(seconds_of_training(folder), 1)
    if args.kind == "ltu_as":
        table = toy.evaluate(folders, audio_encoder=None)
        speech = toy_speech.evaluate([max(folder.glob("stage3*")) for folder in folders])
        speech = replace(speech, runs=[folder.name for folder in folders])
        found = verdicts_as(table.rows, speech.rows)
        result = table.to_json() | {"seconds_of_training": seconds, "speech": speech.to_json()}
        text = f"{toy.format_table(table)}\n\n{toy_speech.format_table(speech)}"
    else:
        table = toy.evaluate(folders, Path("pretrained_mdls/yamnet"))
        found = verdicts(table.rows)
        result = table.to_json() | {"seconds_of_training": seconds}
        text = toy.format_table(table)
    result["verdicts"] = found
    write_json(result, path)
    print(text)
    for bound, is_met in found.items():
        verdict = "met" if is_met else "MISSED"
        print(f"{verdict:6} {bound}")
    print(f"\nSeconds of training: {seconds}. The table as JSON: {path}")
    return int(not all(found.values()))


if __name__ == "__main__":
    run_command(main)
