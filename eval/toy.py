"""The toy test: what each stage taught, beside what needs no language model.

    python -m eval.toy --folds exp/quickstart/seed0
    python -m eval.toy --folds exp/toy/fold0 exp/toy/fold1 exp/toy/fold2 exp/toy/fold3 exp/toy/fold4

A fold's folder holds `stage1*/` to `stage4*/`, each with the predictions `right.json`, `wrong.json` and `none.json`
(there or in a folder below) that `ltu.inference_batch` wrote to the questions `heldout_*.json` of `data.toy.build`.

Notable:
- An answer counts only if it has, as a whole, the form that was taught. Its category is right if the category field is
  the right one and the label field names no other; "drums" inside a longer label or a description is no category.
- `wrong` and `none` are the same questions with a clip of another category and without audio, against the same
  references: what is right there was guessed.
- Intervals are Wilson's, 95 %: there is one question a clip, and a clip is held out in one fold only.
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
CLASSIFICATION = (
    "cla_label_des",
    "cla_label",
)  # the answer formats of questions.json that name label and category
Z = 1.959964  # standard normal quantile of a two-sided 95 % interval
COLUMNS = {  # of the table, by key of a row
    "right": "right audio",
    "wrong": "other category's",
    "none": "no audio",
    "label": "exact label",
    "in_form": "in form",
}


class PredictionError(ValueError):
    """Predictions that cannot be scored; the message has the file, the reason and the way out."""


class Reader:
    """Reads label and category off an answer.

    Args:
        formats: templates with `{label}`, `{category}` and maybe `{description}`.
        categories: every category's name.
    """

    def __init__(self, formats: list[str], categories: set[str]):
        self.patterns = [
            re.compile(answer_pattern(template), re.IGNORECASE) for template in formats
        ]
        self.categories = categories

    def read(self, answer: str) -> tuple[str, str] | None:
        """(label, category) of an answer, normalised; None if it has another form or names a second category."""
        for pattern in self.patterns:
            match = pattern.fullmatch(answer.strip())
            if match is None:
                continue
            label, category = normalise(match["label"]), normalise(match["category"])
            named = {
                normalise(piece) for piece in re.split(r"[;,/]|\band\b", label)
            } & self.categories
            return (
                (label, category) if category in self.categories and named <= {category} else None
            )
        return None


def answer_pattern(template: str) -> str:
    """A regular expression for the answers of a template; a field holds no full stop, colon, arrow or line break."""
    field = r"(?:(?!->)[^.:\n])+"
    made = ""
    for piece in re.split(r"(\{\w+\})", template.strip().rstrip(".")):
        made += (
            f"(?P<{piece[1:-1]}>{field})"
            if piece.startswith("{")
            else re.escape(piece).replace(r"\ ", r"\s+")
        )
    return made + r"\s*\.?"


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends."""
    return re.sub(r"\s+", " ", text).strip(" .;,\"'").lower()


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; (0, 1) if nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    share, square = right / count, Z * Z / count
    spread = Z * (share * (1 - share) / count + square / count / 4) ** 0.5
    low, high = ((share + square / 2 + side * spread) / (1 + square) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def rate(hits: list[bool]) -> dict[str, float]:
    """How many are right, of how many, the share and its interval."""
    low, high = wilson(sum(hits), len(hits))
    share = sum(hits) / len(hits) if hits else 0.0
    return {"right": sum(hits), "count": len(hits), "share": share, "low": low, "high": high}


@dataclass
class Toy:
    """The clips by file name, the folds (held-out file names) and the reader of answers."""

    clips: dict[str, dict]
    folds: list[list[str]]
    reader: Reader

    @classmethod
    def load(cls, folder: Path = TOY) -> "Toy":
        """Manifest, split and answer formats as committed."""
        lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        clips = {clip["file"]: clip for clip in map(json.loads, lines)}
        answers = json.loads((folder / "questions.json").read_text(encoding="utf-8"))["answers"]
        reader = Reader(
            [answers[task] for task in CLASSIFICATION],
            {clip["category"] for clip in clips.values()},
        )
        return cls(
            clips, json.loads((folder / "split.json").read_text(encoding="utf-8"))["folds"], reader
        )

    def training(self, fold: int) -> list[str]:
        """Files of a fold's training clips."""
        return [file for file in self.clips if file not in self.folds[fold]]


def score(predictions: list[dict], reader: Reader) -> dict[str, list[bool]]:
    """Per prediction: is the category right, is the label exact, has the answer the form that was taught?"""
    hits: dict[str, list[bool]] = {"category": [], "label": [], "in_form": []}
    for prediction in predictions:
        truth = reader.read(prediction["ref"])
        if truth is None:
            raise PredictionError(
                f"The reference {prediction['ref']!r} has no answer format of data/toy/questions.json. "
                "Build the data and answer anew."
            )
        answer = reader.read(prediction["pred"] or "")
        hits["in_form"].append(answer is not None)
        hits["category"].append(answer is not None and answer[1] == truth[1])
        hits["label"].append(answer is not None and answer[0] == truth[0])
    return hits


def read_predictions(folder: Path) -> dict[str, dict[str, list[dict]]]:
    """Stage ("stage1", ...) -> condition -> predictions of one fold's folder."""
    stages: dict[str, dict[str, list[dict]]] = {}
    found = [*folder.glob("stage*/right.json"), *folder.glob("stage*/*/right.json")]
    for place in sorted(path.parent for path in found):
        stage = place.relative_to(folder).parts[0][: len("stage1")]
        if stage in stages:
            raise PredictionError(
                f"{folder} holds predictions of {stage} twice. Leave one right.json."
            )
        paths = {name: place / f"{name}.json" for name in (*CONDITIONS, "show")}
        stages[stage] = {
            name: json.loads(path.read_text("utf-8"))
            for name, path in paths.items()
            if path.is_file()
        }
        references = {name: [row["ref"] for row in rows] for name, rows in stages[stage].items()}
        for name in CONDITIONS:
            if references.get(name, references["right"]) != references["right"]:
                raise PredictionError(
                    f"{paths[name]} does not ask the questions of right.json. Answer both anew."
                )
    if not stages:
        raise PredictionError(
            f"{folder} holds no stage*/right.json, nor one in a folder below a stage's."
        )
    return stages


def fold_of(predictions: list[dict], toy: Toy) -> int:
    """The fold whose held-out clips were asked about, each once, with references that agree with the manifest."""
    files = [Path(row["audio_id"]).name for row in predictions]
    found = [fold for fold, heldout in enumerate(toy.folds) if sorted(files) == sorted(heldout)]
    if not found:
        raise PredictionError(
            f"right.json asks about {len(files)} clips, which are not the held-out clips of any fold of "
            "data/toy/split.json. Build the data and answer anew."
        )
    for file, row in zip(files, predictions, strict=True):
        if toy.reader.read(row["ref"]) != (toy.clips[file]["label"], toy.clips[file]["category"]):
            raise PredictionError(
                f"The reference {row['ref']!r} is not what the manifest says of {file}."
            )
    return found[0]


def stage_rows(folds: list[dict[str, dict[str, list[dict]]]], reader: Reader) -> list[dict]:
    """Rows of the table: the stages that every fold has, pooled over folds."""
    rows = []
    for stage in sorted(set.intersection(*(set(fold) for fold in folds))):
        row: dict = {"name": stage}
        for condition in CONDITIONS:
            if all(condition in fold[stage] for fold in folds):
                hits = score(
                    [prediction for fold in folds for prediction in fold[stage][condition]], reader
                )
                row[condition] = rate(hits["category"])
                if condition == "right":
                    row |= {"label": rate(hits["label"]), "in_form": rate(hits["in_form"])}
        rows.append(row)
    return rows


def baseline_rows(toy: Toy, folds: list[int], audio_encoder: Path | None) -> list[dict]:
    """Rows of the table: what can be had on these folds without our model; no linear probe without an ear."""
    methods: dict[str, Callable[..., list[str]]] = {
        "majority": toy_baselines.majority,
        "source package alone": toy_baselines.package,
    }
    if audio_encoder is not None:
        means = toy_baselines.audio_encoder_means(
            [TOY / "audio" / file for file in toy.clips], audio_encoder
        )
        methods["linear probe on the ear"] = partial(toy_baselines.probe, means)
    rows = []
    for name, method in methods.items():
        row: dict = {"name": name}
        for key, column in (("category", "right"), ("label", "label")):
            hits = []
            for fold in folds:
                guesses = method(toy.clips, toy.training(fold), toy.folds[fold], key)
                hits += [
                    guess == toy.clips[file][key]
                    for guess, file in zip(guesses, toy.folds[fold], strict=True)
                ]
            row[column] = rate(hits)
        rows.append(row)
    return rows


def format_table(rows: list[dict], clips: int, folds: list[int]) -> str:
    """The table as text."""
    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{clips} held-out clips, fold {', '.join(map(str, folds))}; shares, 95 % intervals. First three columns: the",
        "category is right; then, with the right audio: the exact label is, and the answer has the form taught.",
        "",
        " " * width + "".join(f"  {title:<17}" for title in COLUMNS.values()),
    ]
    for row in rows:
        cells = ["-"] * len(COLUMNS)
        for place, key in enumerate(COLUMNS):
            if key in row:
                cells[place] = "{share:.2f} [{low:.2f}, {high:.2f}]".format(**row[key])
        lines.append(f"{row['name']:<{width}}" + "".join(f"  {cell:<17}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def format_show(predictions: list[dict]) -> str:
    """Question, answer and reference of each prediction."""
    blocks = []
    for row in predictions:
        texts = [
            f"question:  {row['prompt']}",
            f"answer:    {row['pred']}",
            f"reference: {row['ref']}",
        ]
        blocks.append("\n  ".join([Path(row["audio_id"]).name, *texts]))
    return "\n\n".join(blocks)


def evaluate(folders: list[Path], audio_encoder: Path | None) -> dict:
    """Everything that is printed: clips, folds, rows of the table, and five predictions of the last stage to show.

    Args:
        folders: one for each fold.
        ear: folder of the YAMNet for the linear probe, or None to leave the probe out.
    """
    toy = Toy.load()
    stages = [read_predictions(folder) for folder in folders]
    found = [sorted({fold_of(stage["right"], toy) for stage in fold.values()}) for fold in stages]
    folds = [fold for numbers in found for fold in numbers]
    if len(folds) != len(folders) or len(set(folds)) != len(folds):
        raise PredictionError(
            f"The folders hold the folds {found}. Give one folder for each fold, and each fold once."
        )
    rows = stage_rows(stages, toy.reader) + baseline_rows(toy, folds, audio_encoder)
    last = stages[0][max(stages[0])]
    shown = last.get("show", last["right"][:: max(1, len(last["right"]) // 5)])[:5]
    return {
        "clips": sum(len(toy.folds[fold]) for fold in folds),
        "folds": folds,
        "rows": rows,
        "show": shown,
    }


def main(argv: list[str] | None = None) -> None:
    """Print the table and five answers, and write table.json."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument(
        "--folds",
        nargs="+",
        type=Path,
        required=True,
        metavar="DIR",
        help="one folder for each fold",
    )
    parser.add_argument(
        "--audio_encoder",
        type=Path,
        default=Path("pretrained_mdls/yamnet"),
        help="YAMNet, for the linear probe",
    )
    parser.add_argument("--no_probe", action="store_true", help="leave the linear probe out")
    parser.add_argument(
        "--output_path", type=Path, default=None, help="default: table.json in the first folder"
    )
    args = parser.parse_args(argv)
    try:
        result = evaluate(args.folds, None if args.no_probe else args.audio_encoder)
    except PredictionError as error:
        parser.exit(1, f"{error}\n")
    path = args.output_path or args.folds[0] / "table.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(format_table(result["rows"], result["clips"], result["folds"]))
    print(
        f"\nFive answers of the last stage\n\n{format_show(result['show'])}\n\nThe table as JSON: {path}"
    )


if __name__ == "__main__":
    main()
