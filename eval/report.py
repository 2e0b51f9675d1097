"""Writes the scores of tasks and models as JSON, Markdown and PNG.

The same scores give the same bytes.
"""

import io
import json
import platform
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from eval.scorer_interface import Outcome
from eval.tasks import Task
from ltu.data.dataset_io import RowWriter
from ltu.files import replace_file, sha256_of

Result = dict[str, Any]
PACKAGES = "numpy scipy jiwer openai-whisper pycocoevalcap matplotlib torch transformers".split()
PREDICTIONS = ".predictions.json"  # follows the name of a task
MANY_CLASSES = 60  # from this number on, names in a confusion matrix are too small to read
TITLES = (
    "task",
    "model",
    "metric",
    "scoring",
    "on answered",
    "95 % interval",
    "on all",
    "asked",
    "answered",
    "failed",
    "papers",
)


def summarize(outcome: Outcome, task: Task, seed: int) -> Result:
    """Return all metrics on answered and on all items, and the interval of the main metric.

    It is the 95 % interval of a percentile bootstrap over the answered items.
    """
    failed = Counter(item["failed"] for item in outcome.items if item["failed"] is not None)
    answered = np.flatnonzero([item["failed"] is None for item in outcome.items])
    subsets = {"on_answered": answered, "on_all": np.arange(len(outcome.items))}
    found: Result = {}
    main_metric = {}
    for name, indices in subsets.items():
        found[name] = outcome.compute(indices) if len(indices) else {}
        main_metric[name] = found[name].get(task.metric, np.nan)
    samples = []
    if len(answered) > 1 and not np.isnan(main_metric["on_answered"]):
        samples = _bootstrap(outcome, answered, task.metric, seed)
    low, high = np.percentile(samples or [np.nan], (2.5, 97.5))
    found["figure"] = main_metric | {"low": low, "high": high}
    for name, metrics in found.items():
        found[name] = {key: _number_or_none(value) for key, value in metrics.items()}
    counts = {
        "asked": len(outcome.items),
        "answered": len(answered),
        "failed": dict(sorted(failed.items())),
    }
    main = {"metric": task.metric, "paper": dict(task.paper), "resamples": len(samples)}
    return counts | main | found | {"notes": list(outcome.notes)}


def _bootstrap(outcome: Outcome, answered: np.ndarray, metric: str, seed: int) -> list[float]:
    """Return the metric of each resample of the answered items, without nan."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(outcome.resamples):
        value = outcome.compute(rng.choice(answered, len(answered)))[metric]
        if not np.isnan(value):
            samples.append(value)
    return samples


def _number_or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def write_text(text: str, path: Path) -> None:
    """Write a text file as a whole, in UTF-8."""
    replace_file(path, text.encode("utf-8", "backslashreplace"), is_synced=True)


def write_json(value: Any, path: Path) -> None:
    """Write a JSON file as a whole."""
    write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", path)


def write_rows(rows: Iterable[dict], path: Path) -> None:
    """Write questions, predictions or items in the format of the file extension."""
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(row)


def file_record(path: Path) -> Result:
    """Return path and sha256 of a file."""
    return {"path": str(path), "sha256": sha256_of(path)}


def provenance_file(predictions: Path) -> Path:
    """Return the path of the provenance of predictions."""
    return predictions.with_name(predictions.name.removesuffix(PREDICTIONS) + ".provenance.json")


def read_provenance(predictions: Path) -> Result:
    """Return the provenance of exactly these predictions, {} if there is none."""
    path = provenance_file(predictions)
    if not (path.is_file() and predictions.is_file()):
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if found and found.pop("predictions", None) == sha256_of(predictions):
        return found
    return {}


def write_report(results: list[Result], common: Result, folder: Path) -> str:
    """Write report.json, report.md and report.png, and return the content of report.md."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        if next(iter(metadata.distributions(name=name)), None):
            versions[name] = metadata.version(name)
    write_json({**common, "versions": versions, "results": results}, folder / "report.json")
    text = table(results, common)
    write_text(text, folder / "report.md")
    plot(results, folder / "report.png")
    return text


def shown(value: float | None) -> str:
    """Return a value with four digits, a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def paper_text(paper: dict[str, float]) -> str:
    """Return the values of the papers as text, a dash if there are none."""
    return ", ".join(f"{name} {value:g}" for name, value in paper.items()) or "-"


def table(results: list[Result], common: Result) -> str:
    """Return the main metrics, one line per task and model, then what was left out and notes."""
    rows = [list(TITLES), ["---"] * len(TITLES)]
    notes = [f"- left out: {name}" for name in common["left_out"]]
    for result in results:
        metric = result["figure"]
        failed = ", ".join(f"{reason} {count}" for reason, count in result["failed"].items())
        rows.append(
            [
                result["task"],
                result["model"],
                result["metric"],
                result["scoring"],
                shown(metric["on_answered"]),
                f"{shown(metric['low'])} to {shown(metric['high'])}",
                shown(metric["on_all"]),
                str(result["asked"]),
                str(result["answered"]),
                failed or "0",
                paper_text(result["paper"]),
            ]
        )
        notes += [f"- {result['model']}, {result['task']}: {note}" for note in result["notes"]]
    lines = [f"# Evaluation, protocol {common['protocol']}", ""]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *notes, ""])


def plot(results: list[Result], path: Path) -> None:
    """Draw one panel for each task.

    It shows the main metric of each model on the answered items with its interval, and the values
    of the papers as lines.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(result["task"] for result in results))
    height = -(-len(tasks) // 4)
    columns = min(4, len(tasks))
    figure = Figure(figsize=(4 * columns, 4 * height), layout="constrained")
    for number, task in enumerate(tasks, start=1):
        panel = figure.add_subplot(height, columns, number)
        _plot_task(panel, task, [result for result in results if result["task"] == task])
    _save(figure, path)


def _plot_task(panel: Any, task: str, results: list[Result]) -> None:
    """Draw the results of one task."""
    for position, result in enumerate(results):
        metric = result["figure"]
        value = metric["on_answered"]
        panel.bar(position, value or 0, width=0.6, color=f"C{position % 10}")
        panel.text(
            position,
            0,
            "not computed" if value is None else shown(value),
            ha="center",
            va="bottom",
            bbox={"facecolor": "white", "pad": 1, "lw": 0},
        )
        if metric["low"] is not None:
            panel.vlines(position, metric["low"], metric["high"], color="black", linewidth=2)
    paper = results[0]["paper"]
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
        ylabel=results[0]["metric"],
        xlim=(-0.7, len(results) - 0.3),
        ylim=(0, None),
    )
    panel.set_xticks(range(len(results)), [result["model"] for result in results])


def plot_confusion(names: list[str], counts: np.ndarray, path: Path) -> None:
    """Draw (reference, predicted) counts as fractions of each reference class."""
    from matplotlib.figure import Figure

    side = 3 + 0.2 * min(len(names), MANY_CLASSES)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    panel = figure.subplots()
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = panel.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=panel, label="share of the true class")
    panel.set(xlabel="predicted", ylabel="true")
    if len(names) < MANY_CLASSES:
        panel.set_xticks(range(len(names)), names, rotation=90)
        panel.set_yticks(range(len(names)), names)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    # Leave out the version of matplotlib, so that equal scores give equal bytes.
    figure.savefig(content, dpi=100, format="png", metadata={"Software": None})
    replace_file(path, content.getvalue())
