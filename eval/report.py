"""Writes the scores of tasks and models as JSON, Markdown and PNG.

The same scores give the same bytes.
"""

import io
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from eval.scorer_interface import Outcome
from eval.tasks import Task
from ltu.data.columns import ColumnFlags
from ltu.data.dataset_io import ExampleWriter, hash_source
from ltu.data.dataset_source import find_dataset
from ltu.files import missing_package, read_json_object, replace_file, sha256_of, write_json

try:
    from scipy import stats
except ImportError as error:
    raise missing_package(error, "eval") from error

PACKAGES = "numpy scipy jiwer openai-whisper pycocoevalcap matplotlib torch transformers".split()
PREDICTIONS = ".predictions.json"  # follows the name of a task
MANY_CLASSES = 60  # from this number on, names in a confusion matrix are too small to read
TITLES = [
    "task",
    "model",
    "metric",
    "scoring",
    "on answered",
    "95 % interval",
    "on all",
    "examples",
    "answered",
    "failed",
    "papers",
]


@dataclass(frozen=True)
class MetricValue:
    """The main metric of a task, None where it is not computed.

    Args:
        on_answered: Over the items with an answer.
        on_all: Over all items; those without an answer count as the worst answer (strict).
        low, high: The 95 % interval of `on_answered`.
    """

    on_answered: float | None
    on_all: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Summary:
    """The metrics of a task.

    Args:
        num_examples: Number of scored items: predictions, or clips for captions.
        answered: Number of items with an answer.
        failed: Reason -> number of items without an answer.
        metric: Name of the main metric.
        paper: Model -> the papers' value of the main metric.
        resamples: Number of bootstrap resamples behind the interval, 0 if there is none.
        on_answered, on_all: All metrics by name, None where one is not defined.
        value: The main metric.
        notes: Notes for the report.
    """

    num_examples: int
    answered: int
    failed: dict[str, int]
    metric: str
    paper: dict[str, float]
    resamples: int
    on_answered: dict[str, float | None]
    on_all: dict[str, float | None]
    value: MetricValue
    notes: list[str]


@dataclass(frozen=True)
class Result:
    """One line of the report: a task, a model, its metrics, and where they come from.

    Args:
        scoring: How answers were scored: a scoring function, embeddings or label log-likelihoods.
        num_predictions: Number of predictions, None if each is an example.
        origin: Prompt, weights, decoding and files, as far as they are known.
        embedder: Name of the embedder, None if there was none.
    """

    task: str
    model: str
    scoring: str
    summary: Summary
    num_predictions: int | None
    origin: dict[str, Any]
    embedder: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the entry of report.json."""
        entry = {"task": self.task, "model": self.model, "scoring": self.scoring}
        entry |= asdict(self.summary)
        if self.num_predictions is not None:
            entry["num_predictions"] = self.num_predictions
        return entry | self.origin | {"embedder": self.embedder}


def summarize(outcome: Outcome, task: Task, seed: int, notes: Iterable[str] = ()) -> Summary:
    """Return all metrics on answered and on all items, and the interval of the main metric.

    It is the 95 % interval of a percentile bootstrap over the answered items.

    Args:
        seed: Seed of the bootstrap.
        notes: Notes that follow those of the outcome.
    """
    failed: Counter = Counter()
    answered = []
    for index, item in enumerate(outcome.items):
        if item["failed"] is None:
            answered.append(index)
        else:
            failed[item["failed"]] += 1
    indices = np.array(answered, dtype=int)
    on_answered = outcome.compute(indices) if answered else {}
    on_all = outcome.on_all()
    resamples = 0
    low = high = np.nan
    if len(answered) > 1 and not np.isnan(on_answered.get(task.metric, np.nan)):
        resamples = outcome.resamples
        low, high = _bootstrap_interval(outcome, indices, task.metric, seed)
    value = MetricValue(
        on_answered=_number_or_none(on_answered.get(task.metric, np.nan)),
        on_all=_number_or_none(on_all.get(task.metric, np.nan)),
        low=_number_or_none(low),
        high=_number_or_none(high),
    )
    return Summary(
        num_examples=len(outcome.items),
        answered=len(answered),
        failed=dict(sorted(failed.items())),
        metric=task.metric,
        paper=dict(task.paper),
        resamples=resamples,
        on_answered=_numbers_or_none(on_answered),
        on_all=_numbers_or_none(on_all),
        value=value,
        notes=[*outcome.notes, *notes],
    )


def _bootstrap_interval(
    outcome: Outcome, indices: np.ndarray, metric: str, seed: int
) -> tuple[float, float]:
    """Return the 95 % interval of a metric of the items at these indices."""

    def compute(resample: np.ndarray) -> float:
        return outcome.compute(resample)[metric]

    found = stats.bootstrap(
        (indices,),
        compute,
        n_resamples=outcome.resamples,
        batch=1,  # Resamples in memory at once: one of 20,000 items is 160 kB.
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return found.confidence_interval


def _number_or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _numbers_or_none(metrics: Mapping[str, float]) -> dict[str, float | None]:
    found = {}
    for name, value in metrics.items():
        found[name] = _number_or_none(value)
    return found


def write_text(text: str, path: Path) -> None:
    """Write a text file as a whole, in UTF-8."""
    replace_file(path, text.encode("utf-8", "backslashreplace"), is_synced=True)


def write_records(records: Iterable[dict], path: Path) -> None:
    """Write questions, predictions or items in the format of the file extension."""
    with ExampleWriter(path) as writer:
        for record in records:
            writer.write(record)


def file_record(path: Path) -> dict[str, str]:
    """Return path and sha256 of a file."""
    return {"path": str(path), "sha256": sha256_of(path)}


def dataset_record(path: Path, columns: ColumnFlags) -> dict[str, str]:
    """Return path and sha256 of a data set, and its split if it has several."""
    record = {"path": str(path), "sha256": hash_source(find_dataset(path, columns.split), columns)}
    return record if columns.split is None else record | {"split": columns.split}


def provenance_file(predictions: Path) -> Path:
    """Return the path of the provenance of predictions."""
    return predictions.with_name(predictions.name.removesuffix(PREDICTIONS) + ".provenance.json")


def read_provenance(predictions: Path) -> dict[str, Any]:
    """Return the provenance of exactly these predictions, {} if there is none.

    Raises:
        ValueError: its file is damaged.
    """
    path = provenance_file(predictions)
    if not (path.is_file() and predictions.is_file()):
        return {}
    found = read_json_object(path)
    if found and found.pop("predictions", None) == sha256_of(predictions):
        return found
    return {}


def write_report(results: list[Result], common: dict[str, Any], folder: Path) -> str:
    """Write report.json, report.md and report.png, and return the content of report.md.

    Args:
        common: What is the same for all results: protocol, missing_answers (how they count), seed,
            left_out and more.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    entries = [result.to_json() for result in results]
    write_json({**common, "versions": versions, "results": entries}, folder / "report.json")
    text = table(results, common)
    write_text(text, folder / "report.md")
    plot(results, folder / "report.png")
    return text


def shown(value: float | None) -> str:
    """Return a value with four digits, a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def paper_text(paper: Mapping[str, float]) -> str:
    """Return the values of the papers as text, a dash if there are none."""
    values = [f"{name} {value:g}" for name, value in paper.items()]
    return ", ".join(values) or "-"


def table(results: list[Result], common: Mapping[str, Any]) -> str:
    """Return the main metrics, one line per task and model, then what was left out and notes.

    Args:
        common: As `write_report` takes it.
    """
    lines = [
        f"# Evaluation, protocol {common['protocol']}",
        "",
        _table_line(TITLES),
        _table_line(["---"] * len(TITLES)),
    ]
    for result in results:
        lines.append(_table_line(_table_cells(result)))
    lines.append("")
    lines.append(f"- {common['missing_answers']}")
    for name in common["left_out"]:
        lines.append(f"- left out: {name}")
    for result in results:
        for note in result.summary.notes:
            lines.append(f"- {result.model}, {result.task}: {note}")
    lines.append("")
    return "\n".join(lines)


def _table_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table_cells(result: Result) -> list[str]:
    """Return the cells of one line, in the order of TITLES."""
    summary = result.summary
    value = summary.value
    failed = [f"{reason} {count}" for reason, count in summary.failed.items()]
    return [
        result.task,
        result.model,
        summary.metric,
        result.scoring,
        shown(value.on_answered),
        f"{shown(value.low)} to {shown(value.high)}",
        shown(value.on_all),
        str(summary.num_examples),
        str(summary.answered),
        ", ".join(failed) or "0",
        paper_text(summary.paper),
    ]


def plot(results: list[Result], path: Path) -> None:
    """Draw one panel for each task.

    It shows the main metric of each model on the answered items with its interval, and the values
    of the papers as lines.
    """
    from matplotlib.figure import Figure

    by_task: dict[str, list[Result]] = {}
    for result in results:
        by_task.setdefault(result.task, []).append(result)
    columns = min(4, len(by_task))
    height = -(-len(by_task) // 4)
    figure = Figure(figsize=(4 * columns, 4 * height), layout="constrained")
    for number, (task, own_results) in enumerate(by_task.items(), start=1):
        panel = figure.add_subplot(height, columns, number)
        _plot_task(panel, task, own_results)
    _save(figure, path)


def _plot_task(panel: Any, task: str, results: list[Result]) -> None:
    """Draw the results of one task."""
    for position, result in enumerate(results):
        value = result.summary.value
        text = "not computed" if value.on_answered is None else shown(value.on_answered)
        panel.bar(position, value.on_answered or 0, width=0.6, color=f"C{position % 10}")
        panel.text(
            position,
            0,
            text,
            ha="center",
            va="bottom",
            bbox={"facecolor": "white", "pad": 1, "lw": 0},
        )
        if value.low is not None:
            panel.vlines(position, value.low, value.high, color="black", linewidth=2)
    paper = results[0].summary.paper
    styles = ("--", ":", "-.", (0, (6, 1)))
    for (name, value), style in zip(paper.items(), styles, strict=False):
        label = f"paper: {name} {value:g}"
        panel.axhline(value, color="black", linewidth=1, linestyle=style, label=label)
    if paper:
        panel.legend(
            fontsize="small",
            loc="upper center",
            bbox_to_anchor=(0.5, -0.12),
            ncols=2,
            frameon=False,
        )
    panel.set(
        title=task,
        ylabel=results[0].summary.metric,
        xlim=(-0.7, len(results) - 0.3),
        ylim=(0, None),
    )
    panel.set_xticks(range(len(results)), [result.model for result in results])


def plot_confusion(names: list[str], counts: np.ndarray, path: Path) -> None:
    """Draw (reference, predicted) counts as fractions of each reference class."""
    from matplotlib.figure import Figure

    side = 3 + 0.2 * min(len(names), MANY_CLASSES)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    panel = figure.subplots()
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = panel.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=panel, label="fraction of the reference class")
    panel.set(xlabel="predicted", ylabel="reference")
    if len(names) < MANY_CLASSES:
        panel.set_xticks(range(len(names)), names, rotation=90)
        panel.set_yticks(range(len(names)), names)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    # Leave out the version of matplotlib, so that equal scores give equal bytes.
    figure.savefig(content, dpi=100, format="png", metadata={"Software": None})
    replace_file(path, content.getvalue())
