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

If a stage also has `open.json`, the answers to `heldout_open.json`, a second table is about them
(`eval.toy_open`). If it has `loss_right.json`, `loss_wrong.json` and `loss_none.json` of
`eval.answer_loss`, a third one has the losses of the reference answers, which also say something
about a stage that answers in no trained form yet.

The intervals are 95 % Wilson intervals: each clip has one question, and is held out in one fold
only.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval import toy_baselines, toy_open
from eval.scorer_interface import (
    Context,
    EvaluationError,
    Outcome,
    failure,
    load_predictions,
    start_items,
)
from eval.tasks import Task
from ltu.files import missing_package, run_command, write_json

try:
    from scipy import stats
except ImportError as error:
    raise missing_package(error, "eval") from error

TOY = Path(__file__).parent.parent / "data" / "toy"
CONDITIONS = ("right", "wrong", "none")
LOSSES = tuple(f"loss_{condition}" for condition in CONDITIONS)
# The answer formats of questions.json that name label and category.
CLASSIFICATION = ("cla_label_des", "cla_label")
# Columns of the table: field of a row -> title.
COLUMNS = {
    "right": "matched audio",
    "wrong": "mismatched audio",
    "none": "no audio",
    "label": "exact label",
    "well_formed": "well-formed",
}
OPEN_COLUMNS = {
    "sentences": "sentences",
    "own_label": "own label",
    "open_right": "right",
    "distinct": "distinct",
    "top_five": "top five",
}
LOSS_COLUMNS = {
    "loss_right": "matched audio",
    "loss_wrong": "mismatched audio",
    "loss_none": "no audio",
    "loss_gain": "mismatched - matched",
}
COLUMN_WIDTH = 19

Predictions = list[dict]
Stages = dict[str, dict[str, Predictions]]  # stage ("stage1", ...) -> condition -> predictions


class Reader:
    """Parses label and category from an answer.

    Args:
        formats: Templates with `{label}`, `{category}` and maybe `{description}`.
        categories: The names of all categories.
    """

    def __init__(self, formats: list[str], categories: set[str]):
        self.patterns = []
        for template in formats:
            self.patterns.append(re.compile(answer_pattern(template), re.IGNORECASE))
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
            pieces = re.split(r"[;,/]|\band\b", label)
            other_categories = self.categories - {category}
            names_another = any(normalise(piece) in other_categories for piece in pieces)
            if category in self.categories and not names_another:
                return label, category
            return None
        return None


def answer_pattern(template: str) -> str:
    """Return a regular expression for the answers of a template.

    A field has no full stop, colon, arrow or line break.
    """
    field_pattern = r"(?:(?!->)[^.:\n])+"
    pattern = ""
    for piece in re.split(r"(\{\w+\})", template.strip().rstrip(".")):
        if piece.startswith("{"):
            pattern += f"(?P<{piece[1:-1]}>{field_pattern})"
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
    low, high = stats.binomtest(right, count).proportion_ci(method="wilson")
    return float(low), float(high)


@dataclass(frozen=True)
class Rate:
    """A fraction and its 95 % interval.

    Args:
        right: Number of right answers.
        count: Number of answers.
        fraction: `right` / `count`.
        low, high: The interval of `fraction`.
    """

    right: int
    count: int
    fraction: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: list[bool]) -> "Rate":
        """Return the rate of answers that are right; its fraction is 0 if there are none."""
        right = sum(hits)
        count = len(hits)
        low, high = wilson(right, count)
        return cls(right, count, right / max(count, 1), low, high)

    @property
    def value(self) -> float:
        return self.fraction

    def __str__(self) -> str:
        return f"{self.fraction:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Mean:
    """A mean and its 95 % interval, of a normal distribution."""

    count: int
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Mean":
        """Return the mean of independent values; the interval of a single one is infinite."""
        mean = float(np.mean(values))
        margin = float("inf")
        if len(values) > 1:
            margin = float(1.96 * np.std(values, ddof=1) / len(values) ** 0.5)
        return cls(len(values), mean, mean - margin, mean + margin)

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Fraction:
    """A fraction that describes a set of answers, and so has no interval."""

    part: int
    count: int
    fraction: float

    @classmethod
    def of(cls, part: int, count: int) -> "Fraction":
        return cls(part, count, part / count)

    def __str__(self) -> str:
        return f"{self.fraction:.2f}"


@dataclass
class Hits:
    """Whether category, label and form of each answer are right."""

    category: list[bool] = field(default_factory=list)
    label: list[bool] = field(default_factory=list)
    well_formed: list[bool] = field(default_factory=list)


@dataclass
class Row:
    """A row of the table: a stage or a baseline.

    Args:
        name: The stage or the baseline.
        right: Right categories with the clip.
        label: Right labels with the clip.
        well_formed: Answers of the trained form with the clip.
        wrong: Right categories with a clip of another category.
        none: Right categories without audio.
        sentences, own_label, open_right, distinct, top_five: Of the answers to open-ended
            questions, see `eval.toy_open`.
        loss_right, loss_wrong, loss_none: Losses of the reference answers, nats per token.
        loss_gain: By how much the loss is lower with the clip than with one of another category,
            from clip to clip.
    """

    name: str
    right: Rate | None = None
    label: Rate | None = None
    well_formed: Rate | None = None
    wrong: Rate | None = None
    none: Rate | None = None
    sentences: Rate | None = None
    own_label: Rate | None = None
    open_right: Rate | None = None
    distinct: Fraction | None = None
    top_five: Fraction | None = None
    loss_right: Mean | None = None
    loss_wrong: Mean | None = None
    loss_none: Mean | None = None
    loss_gain: Mean | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row without the columns that it lacks."""
        found = {}
        for name, value in asdict(self).items():
            if value is not None:
                found[name] = value
        return found


@dataclass
class Table:
    """The result of an evaluation.

    Args:
        clips: Number of held-out clips.
        folds: Their folds.
        rows: Stages, then baselines.
        show: Some predictions of the last stage.
    """

    clips: int
    folds: list[int]
    rows: list[Row]
    show: Predictions

    def to_json(self) -> dict[str, Any]:
        """Return the content of table.json."""
        rows = [row.to_json() for row in self.rows]
        return {"clips": self.clips, "folds": self.folds, "rows": rows, "show": self.show}


@dataclass
class Toy:
    """The clips by file name, the folds (held-out file names) and the readers of answers."""

    clips: dict[str, dict]
    folds: list[list[str]]
    reader: Reader
    mentions: toy_open.Mentions
    closed_prefixes: list[str]

    @classmethod
    def load(cls, folder: Path = TOY) -> "Toy":
        """Load manifest, split and answer formats as committed."""
        clips = {}
        categories = set()
        for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
            clip = json.loads(line)
            clips[clip["file"]] = clip
            categories.add(clip["category"])
        answers = json.loads((folder / "questions.json").read_text(encoding="utf-8"))["answers"]
        formats = [answers[task] for task in CLASSIFICATION]
        folds = json.loads((folder / "split.json").read_text(encoding="utf-8"))["folds"]
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))["labels"]
        category_of_phrase = {}
        for clip in clips.values():
            category_of_phrase[labels[clip["label"]]["phrase"]] = clip["category"]
        return cls(
            clips,
            folds,
            Reader(formats, categories),
            toy_open.Mentions(category_of_phrase),
            toy_open.closed_prefixes(answers),
        )

    def training(self, fold: int) -> list[str]:
        """Return the files of the training clips of a fold."""
        return [file for file in self.clips if file not in self.folds[fold]]


def read_answer(prediction: dict, reader: Reader) -> tuple[str, str] | None:
    """Return (label, category) of an answer, None if it failed or has another form."""
    if failure(prediction, "strict") is not None:
        return None
    return reader.read(prediction["pred"])


def score(predictions: Predictions, reader: Reader) -> Hits:
    """Return whether category, label and form of each prediction are right.

    Raises:
        EvaluationError: A reference has no answer format of the data.
    """
    hits = Hits()
    for prediction in predictions:
        reference = reader.read(prediction["ref"] or "")
        if reference is None:
            raise EvaluationError(
                f"The reference {prediction['ref']!r} has no answer format of "
                "data/toy/questions.json. Build the data and generate the predictions again."
            )
        reference_label, reference_category = reference
        # Without the trained form an answer has neither label nor category.
        label, category = read_answer(prediction, reader) or (None, None)
        hits.well_formed.append(label is not None)
        hits.category.append(category == reference_category)
        hits.label.append(label == reference_label)
    return hits


def toy_category(predictions: list[dict], task: Task, context: Context) -> Outcome:
    """Score category, label and form of answers to the toy set as eval.toy does.

    Both protocols are the same.
    """
    items = start_items(predictions, context)
    reader = Toy.load().reader
    answered = []
    for index, item in enumerate(items):
        if reader.read(item["ref"]) is None:
            reason = f"the reference {item['ref']!r} has no form of data/toy/questions.json."
            raise context.error(index, reason)
        answer = item["pred"] if item["failed"] is None else None
        answered.append({"ref": item["ref"], "pred": answer})
    hits = score(answered, reader)
    for item, is_right in zip(items, hits.category, strict=True):
        item["right"] = is_right
    accuracy = np.array(hits.category, dtype=float)
    exact_label = np.array(hits.label, dtype=float)
    well_formed = np.array(hits.well_formed, dtype=float)

    def compute(indices: np.ndarray) -> dict[str, float]:
        return {
            "accuracy": float(accuracy[indices].mean()),
            "exact_label": float(exact_label[indices].mean()),
            "well_formed": float(well_formed[indices].mean()),
        }

    return Outcome(items, compute)


def read_predictions(folder: Path) -> Stages:
    """Read the predictions of one fold.

    Raises:
        EvaluationError: There are no predictions, or those of a stage do not belong together.
    """
    stages: Stages = {}
    found = [*folder.glob("stage*/right.json"), *folder.glob("stage*/*/right.json")]
    for directory in sorted(path.parent for path in found):
        stage = directory.relative_to(folder).parts[0][: len("stage1")]
        if stage in stages:
            raise EvaluationError(
                f"{folder} holds predictions of {stage} twice. Leave one right.json."
            )
        stages[stage] = read_stage(directory)
    if not stages:
        raise EvaluationError(
            f"{folder} holds no stage*/right.json, nor one in a folder below that of a stage."
        )
    return stages


def read_stage(folder: Path) -> dict[str, Predictions]:
    """Read the predictions of one stage, by condition, and the losses.

    "show" are predictions to be shown, "open" those for open-ended questions.

    Raises:
        EvaluationError: The conditions do not have the same questions.
    """
    stage = {}
    for name in (*CONDITIONS, "show", "open"):
        path = folder / f"{name}.json"
        if path.is_file():
            stage[name] = load_predictions(path)
    for name in LOSSES:
        path = folder / f"{name}.json"
        if path.is_file():
            stage[name] = json.loads(path.read_text(encoding="utf-8"))
    references = _references(stage["right"])
    for name in (*CONDITIONS, *LOSSES):
        if name in stage and _references(stage[name]) != references:
            raise EvaluationError(
                f"{folder / f'{name}.json'} does not have the questions of right.json. "
                "Generate both again."
            )
    return stage


def _references(predictions: Predictions) -> list[str]:
    return [prediction["ref"] for prediction in predictions]


def fold_of(predictions: Predictions, toy: Toy) -> int:
    """Return the fold whose held-out clips have one prediction each.

    Raises:
        EvaluationError: There is no such fold, or a reference differs from the manifest.
    """
    files = [Path(prediction["audio_id"] or "").name for prediction in predictions]
    found = None
    for fold, heldout in enumerate(toy.folds):
        if sorted(files) == sorted(heldout):
            found = fold
    if found is None:
        raise EvaluationError(
            f"right.json has {len(files)} clips, which are not the held-out clips of any fold of "
            "data/toy/split.json. Build the data and generate the predictions again."
        )
    for file, prediction in zip(files, predictions, strict=True):
        clip = toy.clips[file]
        if toy.reader.read(prediction["ref"] or "") != (clip["label"], clip["category"]):
            raise EvaluationError(
                f"The reference {prediction['ref']!r} is not what the manifest says of {file}."
            )
    return found


def stage_rows(folds: list[Stages], toy: Toy) -> list[Row]:
    """Return the rows of the table for the stages that every fold has, pooled over folds.

    Raises:
        EvaluationError: No stage is in every fold.
    """
    common = set(folds[0])
    for fold in folds:
        common &= set(fold)
    if not common:
        found = [sorted(fold) for fold in folds]
        raise EvaluationError(
            f"No stage has predictions in every folder; they have {found}. "
            "Generate those that are missing."
        )
    rows = []
    for stage in sorted(common):
        own_stages = [fold[stage] for fold in folds]
        right = pooled_hits(own_stages, "right", toy.reader)
        row = Row(
            name=stage,
            right=Rate.of(right.category),
            label=Rate.of(right.label),
            well_formed=Rate.of(right.well_formed),
        )
        wrong = pooled_hits(own_stages, "wrong", toy.reader)
        if wrong is not None:
            row.wrong = Rate.of(wrong.category)
        none = pooled_hits(own_stages, "none", toy.reader)
        if none is not None:
            row.none = Rate.of(none.category)
        if all("open" in own_stage for own_stage in own_stages):
            add_open(row, own_stages, toy)
        if all(name in own_stage for own_stage in own_stages for name in LOSSES):
            add_losses(row, own_stages)
        rows.append(row)
    return rows


def add_open(row: Row, stages: list[dict[str, Predictions]], toy: Toy) -> None:
    """Add the scores of open-ended answers, pooled over folds, to the row of a stage.

    Raises:
        EvaluationError: The answers of a fold are about other clips than its labels.
    """
    counts = toy_open.OpenCounts([], [], [], [])
    for stage in stages:
        own_categories = []
        right_categories = []
        for prediction in stage["right"]:
            _, own_category = read_answer(prediction, toy.reader) or (None, None)
            own_categories.append(own_category)
            right_categories.append(toy.clips[Path(prediction["audio_id"]).name]["category"])
        found = toy_open.count(
            stage["open"],
            stage["right"],
            own_categories,
            right_categories,
            toy.mentions,
            toy.closed_prefixes,
        )
        counts.extend(found)
    num_answers = len(counts.texts)
    row.sentences = Rate.of(counts.sentences)
    row.own_label = Rate.of(counts.own_label)
    row.open_right = Rate.of(counts.right)
    row.distinct = Fraction.of(counts.num_distinct, num_answers)
    row.top_five = Fraction.of(counts.num_in_top, num_answers)


def add_losses(row: Row, stages: list[dict[str, Predictions]]) -> None:
    """Add the losses of the reference answers, pooled over folds, to the row of a stage."""
    losses: dict[str, list[float]] = {name: [] for name in LOSSES}
    for stage in stages:
        for name in LOSSES:
            losses[name] += [entry["loss"] for entry in stage[name]]
    row.loss_right = Mean.of(losses["loss_right"])
    row.loss_wrong = Mean.of(losses["loss_wrong"])
    row.loss_none = Mean.of(losses["loss_none"])
    gains = np.subtract(losses["loss_wrong"], losses["loss_right"])
    row.loss_gain = Mean.of(gains.tolist())


def pooled_hits(
    stages: list[dict[str, Predictions]], condition: str, reader: Reader
) -> Hits | None:
    """Score the predictions of a stage in all folds, None if one of the folds has none."""
    predictions = []
    for stage in stages:
        if condition not in stage:
            return None
        predictions += stage[condition]
    return score(predictions, reader)


def baseline_rows(toy: Toy, folds: list[int], audio_encoder: Path | None) -> list[Row]:
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
        category = baseline_rate(toy, folds, method, "category")
        label = baseline_rate(toy, folds, method, "label")
        rows.append(Row(name, right=category, label=label))
    return rows


def baseline_rate(toy: Toy, folds: list[int], method: Callable[..., list[str]], key: str) -> Rate:
    """Return how often a baseline is right on the held-out clips of these folds.

    Args:
        key: "label" or "category".
    """
    hits = []
    for fold in folds:
        heldout = toy.folds[fold]
        guesses = method(toy.clips, toy.training(fold), heldout, key)
        for guess, file in zip(guesses, heldout, strict=True):
            hits.append(guess == toy.clips[file][key])
    return Rate.of(hits)


def format_table(table: Table) -> str:
    """Return the tables of closed-ended questions, open-ended questions and losses as text."""
    fold_names = ", ".join(map(str, table.folds))
    lines = [
        f"{table.clips} held-out clips, fold {fold_names}; fractions with 95 % intervals.",
        "First three columns: the category is right, with the clip, with one of another category",
        "(mismatched) and without audio. Last two, with the clip: the exact label is right, and",
        "the answer has the form that was trained.",
        "",
        *format_columns(table.rows, COLUMNS),
    ]
    with_open = [row for row in table.rows if row.sentences is not None]
    if with_open:
        lines += [
            "",
            "Open-ended questions, one about each clip: the answer is a sentence, not labels; it",
            "names the category of the model's own label; it names the right category; different",
            "answers; answers that are one of the five most frequent.",
            "",
            *format_columns(with_open, OPEN_COLUMNS),
        ]
    with_losses = [row for row in table.rows if row.loss_gain is not None]
    if with_losses:
        lines += [
            "",
            "Loss of the reference answers, nats per token, means with 95 % intervals. The last",
            "column is above 0 if the model takes something from the audio.",
            "",
            *format_columns(with_losses, LOSS_COLUMNS),
        ]
    return "\n".join(lines)


def format_columns(rows: list[Row], columns: dict[str, str]) -> list[str]:
    """Return the lines of a table.

    Args:
        rows: its rows.
        columns: field of a row -> title.
    """
    width = max(len(row.name) for row in rows)
    lines = [format_row("", width, list(columns.values()))]
    for row in rows:
        cells = [str(getattr(row, name) or "-") for name in columns]
        lines.append(format_row(row.name, width, cells))
    return lines


def format_row(name: str, width: int, cells: list[str]) -> str:
    """Return a line of a table: the name, padded to a width, and the cells."""
    line = f"{name:<{width}}"
    for cell in cells:
        line += f"  {cell:<{COLUMN_WIDTH}}"
    return line.rstrip()


def format_show(predictions: Predictions) -> str:
    """Return question, answer and reference of each prediction as text."""
    blocks = []
    for prediction in predictions:
        lines = [
            Path(prediction["audio_id"] or "").name,
            f"question:  {prediction['prompt']}",
            f"answer:    {prediction['pred']}",
            f"reference: {prediction['ref']}",
        ]
        blocks.append("\n  ".join(lines))
    return "\n\n".join(blocks)


def evaluate(folders: list[Path], audio_encoder: Path | None) -> Table:
    """Return the table, with five predictions of the last stage to show.

    Args:
        folders: One for each fold.
        audio_encoder: For the linear probe, as in `toy_baselines.audio_encoder_means`; None leaves
            it out.

    Raises:
        EvaluationError: The folders do not have the predictions of one fold each.
    """
    toy = Toy.load()
    stages = [read_predictions(folder) for folder in folders]
    folds = find_folds(stages, toy)
    rows = stage_rows(stages, toy) + baseline_rows(toy, folds, audio_encoder)
    last = stages[0][max(stages[0])]
    every_fifth = last["right"][:: max(1, len(last["right"]) // 5)]
    return Table(
        clips=sum(len(toy.folds[fold]) for fold in folds),
        folds=folds,
        rows=rows,
        show=last.get("show", every_fifth)[:5],
    )


def check_audio_is_used(table: Table) -> None:
    """Raise an error if the last stage does not use the audio.

    Raises:
        EvaluationError: The interval of `loss_gain` is not above zero, or there are no losses.
    """
    last = [row for row in table.rows if row.name.startswith("stage")][-1]
    if last.loss_gain is None:
        raise EvaluationError(
            f"{last.name} has no losses of the reference answers: run eval.answer_loss first."
        )
    if not last.loss_gain.low > 0:
        raise EvaluationError(
            "The model uses nothing of the audio: the loss of the reference answers is not lower "
            f"with the clip than with one of another category ({last.loss_gain} nats per token). "
            "Look whether the loss of a stage jumped and stayed high, and train with another seed."
        )


def find_folds(folders: list[Stages], toy: Toy) -> list[int]:
    """Return the fold of each folder.

    Raises:
        EvaluationError: A folder has predictions of several folds, or two have the same fold.
    """
    found = []  # folds of each folder
    for stages in folders:
        own_folds = {fold_of(stage["right"], toy) for stage in stages.values()}
        found.append(sorted(own_folds))
    folds = []
    for own_folds in found:
        folds += own_folds
    if len(folds) != len(folders) or len(set(folds)) != len(folds):
        raise EvaluationError(
            f"The folders hold the folds {found}. "
            "Give one folder for each fold, and each fold once."
        )
    return folds


def add_folds(parser: argparse.ArgumentParser) -> None:
    """Add --folds."""
    parser.add_argument(
        "--folds",
        nargs="+",
        type=Path,
        required=True,
        metavar="DIR",
        help="One folder for each fold.",
    )


def main(argv: list[str] | None = None) -> None:
    """Print the table and five answers, and write table.json."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    add_folds(parser)
    add = parser.add_argument
    add(
        "--audio_encoder",
        type=Path,
        default=Path("pretrained_mdls/yamnet"),
        help="The folder of the YAMNet, or the .pt file of the Whisper, for the linear probe.",
    )
    add("--no_probe", action="store_true", help="Leave the linear probe out.")
    add(
        "--require_audio",
        action="store_true",
        help="Fail if the last stage uses nothing of the audio: the loss of the reference answers "
        "is not lower with the clip than with one of another category.",
    )
    add(
        "--output_path",
        type=Path,
        help="The JSON file to write (default: table.json in the first folder).",
    )
    args = parser.parse_args(argv)
    audio_encoder = None if args.no_probe else args.audio_encoder
    table = evaluate(args.folds, audio_encoder)
    path = args.output_path or args.folds[0] / "table.json"
    write_json(table.to_json(), path)
    print(format_table(table))
    print(f"\nFive answers of the last stage\n\n{format_show(table.show)}")
    print(f"\nThe table as JSON: {path}")
    if args.require_audio:
        check_audio_is_used(table)


if __name__ == "__main__":
    run_command(main)
