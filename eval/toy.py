"""Scores the toy test after each training stage, next to baselines without a language model.

    python -m eval.toy --folds exp/quickstart/seed0
    python -m eval.toy --folds exp/toy/fold0 exp/toy/fold1 exp/toy/fold2 exp/toy/fold3 exp/toy/fold4

The folder of a fold holds `stage1*/` to `stage4*/`. Each has the predictions `right.json`,
`wrong.json` and `none.json` (there or in a folder below) that `ltu.inference_batch` wrote for the
questions `heldout_*.json` of `data.toy.build`.

An answer counts only if, as a whole, it has the form that was trained. Its category is right if the
category field is right and the label field names no other category; "drums" inside a longer label
or a description is no category.

`wrong` and `none` are the same questions with a clip of another category and without audio, scored
against the same references: a right answer is a guess.

The intervals are 95 % Wilson intervals: each clip has one question, and is held out in one fold
only.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eval import toy_baselines

TOY = Path(__file__).parent.parent / "data" / "toy"
CONDITIONS = ("right", "wrong", "none")
# The answer formats of questions.json that name label and category.
CLASSIFICATION = ("cla_label_des", "cla_label")
Z = 1.959964  # standard normal quantile of a two-sided 95 % interval
# Columns of the table: key of a row -> title.
COLUMNS = {
    "right": "right audio",
    "wrong": "other category's",
    "none": "no audio",
    "label": "exact label",
    "in_form": "in form",
}


class PredictionError(ValueError):
    """Predictions cannot be scored. The message has the file, the reason and a hint."""


class Reader:
    """Parses label and category from an answer.

    Args:
        formats: Templates with `{label}`, `{category}` and maybe `{description}`.
        categories: The names of all categories.
    """

    def __init__(self, formats: list[str], categories: set[str]):
        self.patterns = [
            re.compile(answer_pattern(template), re.IGNORECASE) for template in formats
        ]
        self.categories = categories

    def read(self, answer: str) -> tuple[str, str] | None:
        """Return the normalized (label, category) of an answer.

        It is None if the answer has another form or names a second category.
        """
        for pattern in self.patterns:
            match = pattern.fullmatch(answer.strip())
            if match is None:
                continue
            label = normalise(match["label"])
            category = normalise(match["category"])
            pieces = {normalise(piece) for piece in re.split(r"[;,/]|\band\b", label)}
            named = pieces & self.categories
            if category in self.categories and named <= {category}:
                return label, category
            return None
        return None


def answer_pattern(template: str) -> str:
    """Return a regular expression for the answers of a template.

    A field has no full stop, colon, arrow or line break.
    """
    field = r"(?:(?!->)[^.:\n])+"
    pattern = ""
    for piece in re.split(r"(\{\w+\})", template.strip().rstrip(".")):
        if piece.startswith("{"):
            pattern += f"(?P<{piece[1:-1]}>{field})"
        else:
            pattern += re.escape(piece).replace(r"\ ", r"\s+")
    return pattern + r"\s*\.?"


def normalise(text: str) -> str:
    """Return a text in lower case, with single spaces and no punctuation at its ends."""
    return re.sub(r"\s+", " ", text).strip(" .;,\"'").lower()


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a fraction, (0, 1) if nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    fraction = right / count
    square = Z * Z / count
    spread = Z * (fraction * (1 - fraction) / count + square / count / 4) ** 0.5
    low = (fraction + square / 2 - spread) / (1 + square)
    high = (fraction + square / 2 + spread) / (1 + square)
    return max(0.0, low), min(1.0, high)


def rate(hits: list[bool]) -> dict[str, float]:
    """Return the number of right answers, the count, their fraction and its interval."""
    low, high = wilson(sum(hits), len(hits))
    fraction = sum(hits) / len(hits) if hits else 0.0
    return {"right": sum(hits), "count": len(hits), "share": fraction, "low": low, "high": high}


@dataclass
class Toy:
    """The clips by file name, the folds (held-out file names) and the reader of answers."""

    clips: dict[str, dict]
    folds: list[list[str]]
    reader: Reader

    @classmethod
    def load(cls, folder: Path = TOY) -> "Toy":
        """Load manifest, split and answer formats as committed."""
        lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        clips = {clip["file"]: clip for clip in map(json.loads, lines)}
        answers = json.loads((folder / "questions.json").read_text(encoding="utf-8"))["answers"]
        categories = {clip["category"] for clip in clips.values()}
        reader = Reader([answers[task] for task in CLASSIFICATION], categories)
        folds = json.loads((folder / "split.json").read_text(encoding="utf-8"))["folds"]
        return cls(clips, folds, reader)

    def training(self, fold: int) -> list[str]:
        """Return the files of the training clips of a fold."""
        return [file for file in self.clips if file not in self.folds[fold]]


def score(predictions: list[dict], reader: Reader) -> dict[str, list[bool]]:
    """Return for each prediction whether its category, its label and its form are right.

    Raises:
        PredictionError: A reference has no answer format of the data.
    """
    hits: dict[str, list[bool]] = {"category": [], "label": [], "in_form": []}
    for prediction in predictions:
        reference = reader.read(prediction["ref"])
        if reference is None:
            raise PredictionError(
                f"The reference {prediction['ref']!r} has no answer format of "
                "data/toy/questions.json. Build the data and generate the predictions again."
            )
        answer = reader.read(prediction["pred"] or "")
        hits["in_form"].append(answer is not None)
        hits["category"].append(answer is not None and answer[1] == reference[1])
        hits["label"].append(answer is not None and answer[0] == reference[0])
    return hits


def read_predictions(folder: Path) -> dict[str, dict[str, list[dict]]]:
    """Read the predictions of one fold: stage ("stage1", ...) -> condition -> predictions.

    Raises:
        PredictionError: There are no predictions, or those of a stage do not belong together.
    """
    stages: dict[str, dict[str, list[dict]]] = {}
    found = [*folder.glob("stage*/right.json"), *folder.glob("stage*/*/right.json")]
    for directory in sorted(path.parent for path in found):
        stage = directory.relative_to(folder).parts[0][: len("stage1")]
        if stage in stages:
            raise PredictionError(
                f"{folder} holds predictions of {stage} twice. Leave one right.json."
            )
        stages[stage] = {}
        for name in (*CONDITIONS, "show"):
            path = directory / f"{name}.json"
            if path.is_file():
                stages[stage][name] = json.loads(path.read_text("utf-8"))
        references = {name: [row["ref"] for row in rows] for name, rows in stages[stage].items()}
        for name in CONDITIONS:
            if references.get(name, references["right"]) != references["right"]:
                raise PredictionError(
                    f"{directory / f'{name}.json'} does not have the questions of right.json. "
                    "Generate both again."
                )
    if not stages:
        raise PredictionError(
            f"{folder} holds no stage*/right.json, nor one in a folder below that of a stage."
        )
    return stages


def fold_of(predictions: list[dict], toy: Toy) -> int:
    """Return the fold whose held-out clips have one prediction each.

    Raises:
        PredictionError: There is no such fold, or a reference differs from the manifest.
    """
    files = [Path(row["audio_id"]).name for row in predictions]
    found = [fold for fold, heldout in enumerate(toy.folds) if sorted(files) == sorted(heldout)]
    if not found:
        raise PredictionError(
            f"right.json has {len(files)} clips, which are not the held-out clips of any fold of "
            "data/toy/split.json. Build the data and generate the predictions again."
        )
    for file, row in zip(files, predictions, strict=True):
        if toy.reader.read(row["ref"]) != (toy.clips[file]["label"], toy.clips[file]["category"]):
            raise PredictionError(
                f"The reference {row['ref']!r} is not what the manifest says of {file}."
            )
    return found[0]


def stage_rows(folds: list[dict[str, dict[str, list[dict]]]], reader: Reader) -> list[dict]:
    """Return the rows of the table for the stages that every fold has, pooled over folds."""
    rows = []
    for stage in sorted(set.intersection(*(set(fold) for fold in folds))):
        row: dict = {"name": stage}
        for condition in CONDITIONS:
            if not all(condition in fold[stage] for fold in folds):
                continue
            predictions = []
            for fold in folds:
                predictions += fold[stage][condition]
            hits = score(predictions, reader)
            row[condition] = rate(hits["category"])
            if condition == "right":
                row |= {"label": rate(hits["label"]), "in_form": rate(hits["in_form"])}
        rows.append(row)
    return rows


def baseline_rows(toy: Toy, folds: list[int], audio_encoder: Path | None) -> list[dict]:
    """Return the rows of the table for the baselines on these folds.

    Without an audio encoder there is no linear probe.
    """
    methods: dict[str, Callable[..., list[str]]] = {
        "majority": toy_baselines.majority,
        "source package alone": toy_baselines.package,
    }
    if audio_encoder is not None:
        files = [TOY / "audio" / file for file in toy.clips]
        means = toy_baselines.audio_encoder_means(files, audio_encoder)
        methods["linear probe on the encoder"] = partial(toy_baselines.probe, means)
    rows = []
    for name, method in methods.items():
        row: dict = {"name": name}
        for key, column in (("category", "right"), ("label", "label")):
            hits = []
            for fold in folds:
                heldout = toy.folds[fold]
                guesses = method(toy.clips, toy.training(fold), heldout, key)
                for guess, file in zip(guesses, heldout, strict=True):
                    hits.append(guess == toy.clips[file][key])
            row[column] = rate(hits)
        rows.append(row)
    return rows


def format_table(rows: list[dict], clips: int, folds: list[int]) -> str:
    """Return the table as text."""
    width = max(len(row["name"]) for row in rows)
    fold_names = ", ".join(map(str, folds))
    lines = [
        f"{clips} held-out clips, fold {fold_names}; fractions with 95 % intervals.",
        "First three columns: the category is right. Last two, with the right audio: the exact",
        "label is right, and the answer has the form that was trained.",
        "",
        " " * width + "".join(f"  {title:<17}" for title in COLUMNS.values()),
    ]
    for row in rows:
        cells = []
        for key in COLUMNS:
            cell = "{share:.2f} [{low:.2f}, {high:.2f}]".format(**row[key]) if key in row else "-"
            cells.append(f"  {cell:<17}")
        lines.append(f"{row['name']:<{width}}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def format_show(predictions: list[dict]) -> str:
    """Return question, answer and reference of each prediction as text."""
    blocks = []
    for row in predictions:
        lines = [
            Path(row["audio_id"]).name,
            f"question:  {row['prompt']}",
            f"answer:    {row['pred']}",
            f"reference: {row['ref']}",
        ]
        blocks.append("\n  ".join(lines))
    return "\n\n".join(blocks)


def evaluate(folders: list[Path], audio_encoder: Path | None) -> dict:
    """Return clips, folds, rows of the table, and five predictions of the last stage to show.

    Args:
        folders: One for each fold.
        audio_encoder: Folder of the YAMNet for the linear probe; None leaves the probe out.

    Raises:
        PredictionError: The folders do not have the predictions of one fold each.
    """
    toy = Toy.load()
    stages = [read_predictions(folder) for folder in folders]
    found = [sorted({fold_of(stage["right"], toy) for stage in fold.values()}) for fold in stages]
    folds = [fold for numbers in found for fold in numbers]
    if len(folds) != len(folders) or len(set(folds)) != len(folds):
        raise PredictionError(
            f"The folders hold the folds {found}. "
            "Give one folder for each fold, and each fold once."
        )
    rows = stage_rows(stages, toy.reader) + baseline_rows(toy, folds, audio_encoder)
    last = stages[0][max(stages[0])]
    every_fifth = last["right"][:: max(1, len(last["right"]) // 5)]
    return {
        "clips": sum(len(toy.folds[fold]) for fold in folds),
        "folds": folds,
        "rows": rows,
        "show": last.get("show", every_fifth)[:5],
    }


def main(argv: list[str] | None = None) -> None:
    """Print the table and five answers, and write table.json."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--folds",
        nargs="+",
        type=Path,
        required=True,
        metavar="DIR",
        help="one folder for each fold",
    )
    add(
        "--audio_encoder",
        type=Path,
        default=Path("pretrained_mdls/yamnet"),
        help="folder of the YAMNet for the linear probe",
    )
    add("--no_probe", action="store_true", help="leave the linear probe out")
    add("--output_path", type=Path, help="JSON file (default: table.json in the first folder)")
    args = parser.parse_args(argv)
    try:
        result = evaluate(args.folds, None if args.no_probe else args.audio_encoder)
    except PredictionError as error:
        parser.exit(1, f"{error}\n")
    path = args.output_path or args.folds[0] / "table.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(format_table(result["rows"], result["clips"], result["folds"]))
    print(f"\nFive answers of the last stage\n\n{format_show(result['show'])}")
    print(f"\nThe table as JSON: {path}")


if __name__ == "__main__":
    main()
