"""Scores of tasks and models in full: JSON, Markdown, PNG. The same scores give the same bytes."""

import io
import json
import platform
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from eval.score_result import Outcome
from eval.tasks import Task
from ltu.data.dataset_files import RowWriter
from ltu.files import replace_file, sha256_of

Result = dict[str, Any]
PACKAGES = "numpy scipy jiwer openai-whisper pycocoevalcap matplotlib torch transformers".split()
PREDICTIONS = ".predictions.json"  # behind a task's name
MANY_CLASSES = 60  # from here on names in a confusion matrix could not be read


def summarize(outcome: Outcome, task: Task, seed: int) -> Result:
    """Figures on answered and on all; the main one's 95 % interval (percentile bootstrap) over what was answered."""
    failed = Counter(item["failed"] for item in outcome.items if item["failed"] is not None)
    answered = np.flatnonzero([item["failed"] is None for item in outcome.items])
    sets = {"on_answered": answered, "on_all": np.arange(len(outcome.items))}
    found: Result = {name: outcome.compute(own) if len(own) else {} for name, own in sets.items()}
    figure = {name: figures.get(task.metric, np.nan) for name, figures in found.items()}
    rng, samples = np.random.default_rng(seed), []
    if len(answered) > 1 and not np.isnan(figure["on_answered"]):
        draws = (rng.choice(answered, len(answered)) for _ in range(outcome.resamples))
        samples = [
            value for draw in draws if not np.isnan(value := outcome.compute(draw)[task.metric])
        ]
    found["figure"] = figure | dict(
        zip(("low", "high"), np.percentile(samples or [np.nan], (2.5, 97.5)), strict=True)
    )
    for name, figures in found.items():
        found[name] = {
            key: None if np.isnan(value) else float(value) for key, value in figures.items()
        }
    counts = {
        "asked": len(outcome.items),
        "answered": len(answered),
        "failed": dict(sorted(failed.items())),
    }
    main = {"metric": task.metric, "paper": dict(task.paper), "resamples": len(samples)}
    return counts | main | found | {"notes": list(outcome.notes)}


def write_text(text: str, path: Path) -> None:
    replace_file(path, text.encode("utf-8", "backslashreplace"), is_synced=True)


def write_json(value: Any, path: Path) -> None:
    write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", path)


def write_rows(rows: Iterable[dict], path: Path) -> None:
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(row)


def file_record(path: Path) -> Result:
    return {"path": str(path), "sha256": sha256_of(path)}


def provenance_file(predictions: Path) -> Path:
    return predictions.with_name(predictions.name.removesuffix(PREDICTIONS) + ".provenance.json")


def read_provenance(predictions: Path) -> Result:
    """What decided just these predictions; {} if nothing says so."""
    made = provenance_file(predictions)
    found = (
        json.loads(made.read_text(encoding="utf-8"))
        if made.is_file() and predictions.is_file()
        else {}
    )
    return found if found and found.pop("predictions", None) == sha256_of(predictions) else {}


def write_report(results: list[Result], common: Result, folder: Path) -> str:
    """report.json, report.md and report.png of a set of tasks and models. Returns the second."""
    there = {
        name: metadata.version(name)
        for name in PACKAGES
        if next(iter(metadata.distributions(name=name)), None)
    }
    versions = {"python": platform.python_version()} | there
    write_json({**common, "versions": versions, "results": results}, folder / "report.json")
    write_text(text := table(results, common), folder / "report.md")
    plot(results, folder / "report.png")
    return text


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def paper_text(paper: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in paper.items()) or "-"


def table(results: list[Result], common: Result) -> str:
    """Main figures, one line a task and model; then what was left out, and notes."""
    titles = "task|model|metric|scoring|on answered|95 % interval|on all|asked|answered|failed|papers".split(
        "|"
    )
    rows, notes = (
        [titles, ["---"] * len(titles)],
        [f"- left out: {name}" for name in common["left_out"]],
    )
    for result in results:
        own, failed = (
            result["figure"],
            ", ".join(f"{reason} {n}" for reason, n in result["failed"].items()),
        )
        cells = [
            result["task"],
            result["model"],
            result["metric"],
            result["scoring"],
            shown(own["on_answered"]),
        ]
        cells += [
            f"{shown(own['low'])} to {shown(own['high'])}",
            shown(own["on_all"]),
            str(result["asked"]),
        ]
        rows.append([*cells, str(result["answered"]), failed or "0", paper_text(result["paper"])])
        notes += [f"- {result['model']}, {result['task']}: {note}" for note in result["notes"]]
    lines = [
        f"# Evaluation, protocol {common['protocol']}",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join([*lines, "", *notes, ""])


def plot(results: list[Result], path: Path) -> None:
    """A panel a task: the models' main figures on what was answered, their intervals, the papers' as lines."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(result["task"] for result in results))
    height, columns = -(-len(tasks) // 4), min(4, len(tasks))
    figure = Figure(figsize=(4 * columns, 4 * height), layout="constrained")
    for number, task in enumerate(tasks, start=1):
        panel, own = (
            figure.add_subplot(height, columns, number),
            [one for one in results if one["task"] == task],
        )
        for place, result in enumerate(own):
            found = result["figure"]
            panel.bar(place, found["on_answered"] or 0, width=0.6, color=f"C{place % 10}")
            label = "not computed" if found["on_answered"] is None else shown(found["on_answered"])
            panel.text(
                place,
                0,
                label,
                ha="center",
                va="bottom",
                bbox={"facecolor": "white", "pad": 1, "lw": 0},
            )
            if found["low"] is not None:
                panel.vlines(place, found["low"], found["high"], color="black", linewidth=2)
        for (name, value), style in zip(
            own[0]["paper"].items(), ("--", ":", "-.", (0, (6, 1))), strict=False
        ):
            panel.axhline(
                value, color="black", linewidth=1, linestyle=style, label=f"paper: {name} {value:g}"
            )
        if own[0]["paper"]:
            panel.legend(
                fontsize="small",
                loc="upper center",
                bbox_to_anchor=(0.5, -0.12),
                ncols=2,
                frameon=False,
            )
        panel.set(title=task, ylabel=own[0]["metric"], xlim=(-0.7, len(own) - 0.3), ylim=(0, None))
        panel.set_xticks(range(len(own)), [result["model"] for result in own])
    _save(figure, path)


def plot_confusion(names: list[str], counts: np.ndarray, path: Path) -> None:
    """(true, predicted) counts as shares of each true class."""
    from matplotlib.figure import Figure

    side = 3 + 0.2 * min(len(names), MANY_CLASSES)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    panel = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure.colorbar(
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1),
        ax=panel,
        label="share of the true class",
    )
    panel.set(xlabel="predicted", ylabel="true")
    if len(names) < MANY_CLASSES:
        panel.set_xticks(range(len(names)), names, rotation=90)
        panel.set_yticks(range(len(names)), names)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(
        content, dpi=100, format="png", metadata={"Software": None}
    )  # matplotlib's version is elsewhere.
    replace_file(path, content.getvalue())
