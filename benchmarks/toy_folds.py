"""All five folds of the toy experiment, and what the curriculum is worth: four stages against stage 4 alone.

    python -m benchmarks.toy_folds --output_dir exp/toy                     five folds, four stages each
    python -m benchmarks.toy_folds --output_dir exp/toy --alone             the same number of steps, all of stage 4
    python -m benchmarks.toy_folds --output_dir exp/as --kind ltu_as        LTU-AS: five folds, three stages each

Notable:
- Each fold is `train_scripts/toy_fold.sh` (`toy_fold_as.sh`), which is also what the quickstart runs: the stage scripts
  with `tiny.args`.
- LTU-AS: the folds differ in their sounds. The voices and sentences held out are the same in each, so their shares are
  means over runs, not pools.
- What is finished is not done again, so the benchmark can be stopped and goes on.
- Writes OUTPUT_DIR/results.json (results_alone.json): the table, pooled over the folds, and seconds of training.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

from data.toy.build import ROWS
from eval import toy, toy_speech

STAGE4 = "stage4_all_mix"
SCRIPTS = {"ltu": "toy_fold.sh", "ltu_as": "toy_fold_as.sh"}


def run_fold(kind: str, fold: int, seed: int, folder: Path, alone: bool) -> None:
    """Train and ask one fold; `alone` gives stage 4 the start, and the rows, so the steps, of all stages together."""
    environment, flags = dict(os.environ), []
    if alone:
        *before, last = (int(number) for number in ROWS.split(","))
        environment |= {"ROWS": ",".join(map(str, [*before, sum(before) + last])), "STAGES": STAGE4}
        flags = ["--base_model", str(folder / "init"), *learning_rate()]
    command = ["bash", f"train_scripts/{SCRIPTS[kind]}", str(fold), str(seed), str(folder), *flags]
    subprocess.run(command, env=environment, check=True)


def learning_rate() -> list[str]:
    """The rate of the stages before: alone, stage 4 has their work to do."""
    words = Path("train_scripts/tiny.args").read_text().split()
    place = words.index("--learning_rate")
    return words[place : place + 2]


def seconds_of_training(folder: Path) -> float:
    """Sum over the stages of a fold of what the Trainer measured."""
    histories = [
        json.loads(path.read_text())["log_history"]
        for path in folder.glob("stage*/trainer_state.json")
    ]
    return sum(entry.get("train_runtime", 0.0) for history in histories for entry in history)


def verdicts(rows: list[dict]) -> dict[str, bool]:
    """What was promised before measuring, and whether the last stage keeps it."""
    named = {row["name"]: row for row in rows}
    last = named[max(name for name in named if name.startswith("stage"))]
    share = {key: last[key]["share"] for key in ("right", "wrong", "label")}
    probe, package = (
        named[name]["right"]["share"]
        for name in ("linear probe on the ear", "source package alone")
    )
    return {
        f"category {share['right']:.3f} >= 0.65": share["right"] >= 0.65,
        f"category {share['right']:.3f} >= linear probe {probe:.3f} - 0.05": share["right"]
        >= probe - 0.05,
        f"category {share['right']:.3f} >= source package {package:.3f} + 0.08": share["right"]
        >= package + 0.08,
        f"exact label {share['label']:.3f} >= 0.55": share["label"] >= 0.55,
        f"category with another category's audio {share['wrong']:.3f} <= 0.10": share["wrong"]
        <= 0.10,
    }


def verdicts_as(rows: list[dict], speech: list[dict]) -> dict[str, bool]:
    """What was promised of LTU-AS before measuring, and whether the last stage keeps it."""
    category = max(
        (row for row in rows if row["name"].startswith("stage")), key=lambda row: row["name"]
    )["right"]["share"]
    found = {f"category {category:.3f} >= 0.65": category >= 0.65}
    for row in speech:
        if "gender" in row["name"].lower() and row["name"].endswith(")"):
            found[f"{row['name']} {row['mean']:.3f} >= 0.80"] = row["mean"] >= 0.80
        if row["name"] == f"WER, {toy_speech.WORDS['speech_words_right']}":
            found[f"{row['name']} {row['mean']:.3f} <= 0.10"] = row["mean"] <= 0.10
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("exp/toy"))
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(SCRIPTS), default="ltu")
    parser.add_argument(
        "--alone", action="store_true", help="stage 4 alone, for as many steps as the four stages"
    )
    args = parser.parse_args(argv)
    if args.alone and args.kind != "ltu":
        parser.error("--alone is of LTU")
    name = "alone" if args.alone else "fold"
    folders = [args.output_dir / f"{name}{fold}" for fold in args.folds]
    for fold, folder in zip(args.folds, folders, strict=True):
        run_fold(args.kind, fold, args.seed, folder, args.alone)
    result = toy.evaluate(folders, Path("pretrained_mdls/yamnet") if args.kind == "ltu" else None)
    result["seconds_of_training"] = {
        folder.name: round(seconds_of_training(folder), 1) for folder in folders
    }
    if args.kind == "ltu_as":
        result["speech"] = toy_speech.evaluate([max(folder.glob("stage3*")) for folder in folders])
        result["speech"]["runs"] = [folder.name for folder in folders]
        result["verdicts"] = verdicts_as(result["rows"], result["speech"]["rows"])
    else:
        result["verdicts"] = verdicts(result["rows"])
    path = args.output_dir / ("results_alone.json" if args.alone else "results.json")
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(toy.format_table(result["rows"], result["clips"], result["folds"]))
    if args.kind == "ltu_as":
        print(f"\n{toy_speech.format_table(result['speech'])}")
    for promise, kept in result["verdicts"].items():
        print(f"{'kept  ' if kept else 'BROKEN'} {promise}")
    print(f"\nSeconds of training: {result['seconds_of_training']}. The table as JSON: {path}")


if __name__ == "__main__":
    main()
