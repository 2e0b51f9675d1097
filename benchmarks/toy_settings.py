"""Compares the settings of the toy experiment in a designed experiment, on two of its folds.

    python -m benchmarks.toy_settings --kind ltu --output_dir exp/settings_ltu
    python -m benchmarks.toy_settings --kind ltu_as --output_dir exp/settings_ltu_as

Seven settings have two levels each. Sixteen combinations of them are trained on each fold, a
fractional factorial design of 2^(7-3) runs: every setting has each of its levels in eight of them,
and every pair of settings has each combination of levels in four. So all runs take part in every
comparison, where one setting at a time would leave most of them out. The second eight runs have
the opposite levels of the first eight, so that the effect of a setting is not mixed with the
interaction of two others.

`--num_runs 8` has the first eight only, in half of the time: then each effect is mixed with the
interactions of three pairs of other settings.

The runs have the first two stages, classification, and `--folds` 0 and 1. What is chosen by them is
reported on the other folds, by `benchmarks.toy_cross_validation`.

OUTPUT_DIR/results.json gets the fractions and losses of the runs, and the effect of each setting:
for each held-out clip, the mean over the runs with the second level minus the mean over those with
the first. Its 95 % interval is that of the mean over clips. It does not contain the noise from
training to training, so the effect on each fold is given too. A finished run is not run again.
"""

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import toy_runs
from data.command_line import command_parser
from eval import toy
from ltu.files import run_command, write_json

STAGE = "stage2_all_cla"
# The level of each setting in each run. In the first eight runs, three columns are a full factorial
# design, and the others are their products.
BASE = np.array([[number >> 2 & 1, number >> 1 & 1, number & 1] for number in range(8)])
A, B, C = BASE.T
HALF = np.stack([A, B, C, A ^ B ^ 1, A ^ C ^ 1, B ^ C ^ 1, A ^ B ^ C], 1)
DESIGN = np.concatenate([HALF, 1 - HALF])  # (runs, settings)
QUERY_VALUE = "[q_proj,v_proj]"
ALL_LINEAR = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"


@dataclass(frozen=True)
class Level:
    """A level of a setting.

    Attributes:
        name: for the tables.
        settings: variables of `toy_fold.sh`, and RATE (of LoRA) and PROJECTOR_RATIO (to that rate).
    """

    name: str
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """A setting and its two levels, of which the first one is that of the papers or the simpler."""

    name: str
    levels: tuple[Level, Level]


COMMON = [
    Setting(
        "layers with LoRA",
        (
            Level("query, value", {"LORA_TARGETS": QUERY_VALUE}),
            Level("all linear", {"LORA_TARGETS": ALL_LINEAR}),
        ),
    ),
    Setting(
        "learning rate of the projection",
        (
            Level("as of LoRA", {"PROJECTOR_RATIO": "1"}),
            Level("four times", {"PROJECTOR_RATIO": "4"}),
        ),
    ),
    Setting(
        "learning rate of LoRA",
        (Level("1e-3", {"RATE": "1e-3"}), Level("2e-3", {"RATE": "2e-3"})),
    ),
    Setting("rank of LoRA", (Level("8", {"LORA_RANK": "8"}), Level("32", {"LORA_RANK": "32"}))),
    Setting(
        "audio encoder",
        (
            Level("frozen", {"ENCODER_RATE": ""}),
            Level("trained", {"ENCODER_RATE": toy_runs.ENCODER_RATE}),
        ),
    ),
]
SETTINGS = {
    "ltu": [
        *COMMON,
        Setting(
            "audio tokens",
            (Level("32", {"AUDIO_TOKENS": "32"}), Level("8", {"AUDIO_TOKENS": "8"})),
        ),
        Setting(
            "answers with a description",
            (
                Level("a quarter"),
                Level("none", {"BUILD_FLAGS": "--no_descriptions"}),
            ),
        ),
    ],
    "ltu_as": [
        *COMMON,
        Setting(
            "short clips",
            (
                Level("then silence", {"SHORT_CLIPS": "pad"}),
                Level("repeated", {"SHORT_CLIPS": "loop"}),
            ),
        ),
        Setting(
            "transcript of sounds",
            (
                Level("Whisper's"),
                Level("empty", {"BUILD_FLAGS": "--no_sound_transcripts"}),
            ),
        ),
    ],
}


def levels_of(kind: str, number: int) -> list[Level]:
    """Return the level of each setting in a run."""
    return [setting.levels[DESIGN[number, column]] for column, setting in enumerate(SETTINGS[kind])]


def make_run(
    kind: str, fold: int, number: int, output_dir: Path, num_examples: str | None
) -> toy_runs.FoldRun:
    """Return a row of the design on a fold.

    Args:
        kind: "ltu" or "ltu_as".
        fold: number of the fold.
        number: of the row.
        output_dir: the folder of all runs.
        num_examples: of the stages, separated by commas; None for the default.
    """
    settings = {"QUESTIONS": "few", "STAGES": f"stage1_proj_cla {STAGE}"}
    for level in levels_of(kind, number):
        settings |= level.settings
    rate = float(settings.pop("RATE"))
    ratio = float(settings.pop("PROJECTOR_RATIO"))
    flags = ("--learning_rate", f"{rate:g}", "--projector_learning_rate", f"{ratio * rate:g}")
    if num_examples:
        settings["NUM_EXAMPLES"] = num_examples
    if kind == "ltu_as":
        # Runs of a fold whose clips are prepared in the same way share their features.
        features = output_dir / f"features_fold{fold}_{settings['SHORT_CLIPS']}"
        settings["FEATURES"] = str(features)
    folder = output_dir / f"fold{fold}_run{number}"
    return toy_runs.FoldRun(kind, fold, folder, settings=settings, flags=flags)


def find_effects(
    kind: str,
    responses: dict[tuple[int, int], dict[str, list[float]]],
    folds: list[int],
    num_runs: int = len(DESIGN),
) -> list[dict[str, Any]]:
    """Return the effect of each setting on each response: second level minus first.

    Args:
        kind: "ltu" or "ltu_as".
        responses: (fold, number of the run) -> what `toy_runs.read_responses` returns.
        folds: the folds.
        num_runs: the number of rows of the design that were run on each fold.
    """
    effects = []
    for column, setting in enumerate(SETTINGS[kind]):
        effect: dict[str, Any] = {
            "setting": setting.name,
            "levels": [level.name for level in setting.levels],
        }
        for response in toy_runs.RESPONSES:
            differences: list[float] = []
            by_fold: list[float] = []
            for fold in folds:
                values = np.array([responses[fold, run][response] for run in range(num_runs)])
                is_second = DESIGN[:num_runs, column] == 1
                # (clips,): each clip's mean over one half of the runs, minus that over the other.
                differences += (values[is_second].mean(0) - values[~is_second].mean(0)).tolist()
                by_fold.append(float(np.mean(differences[-values.shape[1] :])))
            effect[response] = asdict(toy.Mean.of(differences)) | {"folds": by_fold}
        effects.append(effect)
    return effects


def format_results(kind: str, runs: list[dict], effects: list[dict]) -> str:
    """Return the table of the runs and that of the effects as Markdown.

    An effect has its interval in brackets, and the effects on each fold in parentheses.
    """
    names = [setting.name for setting in SETTINGS[kind]]
    lines = [
        f"| {' | '.join(names)} | category | exact label | loss |",
        "|" + "---|" * (len(names) + 3),
    ]
    for run in runs:
        cells = [*run["levels"]]
        cells += [f"{run['category']:.2f}", f"{run['label']:.2f}", f"{run['loss']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| second level instead of the first | category | exact label | loss |"]
    lines.append("|---|---|---|---|")
    for effect in effects:
        first, second = effect["levels"]
        cells = [f"{effect['setting']}: {second} instead of {first}"]
        cells += toy_runs.difference_cells(effect, toy_runs.RESPONSES)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--kind", choices=("ltu", "ltu_as"), default="ltu", help="The model to train."
    )
    parser.add_argument(
        "--num_examples",
        metavar="N,N,...",
        help="Examples of all stages, as of data.toy.build; fewer are faster.",
    )
    parser.add_argument(
        "--num_runs",
        type=int,
        choices=(len(HALF), len(DESIGN)),
        default=len(DESIGN),
        help="The number of rows of the design to run on each fold.",
    )
    toy_runs.add_flags(parser, toy_runs.TUNING_FOLDS)
    return toy_runs.parse_flags(parser, argv)


def main(argv: list[str] | None = None) -> None:
    """Train the runs, and write and print the tables."""
    args = parse_args(argv)
    planned = {}  # (fold, row of the design) -> run
    for number in range(args.num_runs):
        for fold in args.folds:
            planned[fold, number] = make_run(
                args.kind, fold, number, args.output_dir, args.num_examples
            )
    toy_runs.run_folds(list(planned.values()), args.jobs)

    toy_set = toy.Toy.load()
    responses = {}
    for key, run in planned.items():
        responses[key] = toy_runs.read_responses(run, toy_set)
    runs = []
    for number in range(args.num_runs):
        row: dict[str, Any] = {"levels": [level.name for level in levels_of(args.kind, number)]}
        for response in toy_runs.RESPONSES:
            values = [responses[fold, number][response] for fold in args.folds]
            row[response] = float(np.mean(np.concatenate(values)))
        runs.append(row)
    effects = find_effects(args.kind, responses, args.folds, args.num_runs)
    result = {
        "kind": args.kind,
        "folds": args.folds,
        "num_examples": args.num_examples,
        "settings": [setting.name for setting in SETTINGS[args.kind]],
        "runs": runs,
        "effects": effects,
    }
    path = args.output_dir / "results.json"
    write_json(result, path)
    print(f"{format_results(args.kind, runs, effects)}\n\nThe tables as JSON: {path}")


if __name__ == "__main__":
    run_command(main)
