"""Scores of tasks and models in full: JSON, Markdown, PNG. The same scores give the same bytes."""

import json
import platform
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from eval.outcome import Outcome
from eval.tasks import Task
from ltu.download import replace_file
from ltu.row_files import RowWriter

Result = dict[str, Any]
PACKAGES = ("numpy", "scipy", "jiwer", "pycocoevalcap", "matplotlib", "torch", "transformers")
MANY_CLASSES = 60  # from here on names in a confusion matrix could not be read


def summarize(outcome: Outcome, task: Task, seed: int) -> Result:
    """Figures on answered and on all, and what became of the items. `figure` is the main one, with its
    percentile bootstrap interval (95 %) over what was answered; nan is None."""
    failed = Counter(item["failed"] for item in outcome.items if item["failed"] is not None)
    answered = np.array([place for place, item in enumerate(outcome.items) if item["failed"] is None], dtype=int)
    sets = {"on_answered": answered, "on_all": np.arange(len(outcome.items))}
    found: Result = {name: outcome.compute(own) if len(own) else {} for name, own in sets.items()}
    figure = {name: figures.get(task.metric, np.nan) for name, figures in found.items()}
    rng, samples = np.random.default_rng(seed), []
    if len(answered) > 1 and not np.isnan(figure["on_answered"]):
        draws = (rng.choice(answered, len(answered)) for _ in range(outcome.resamples))
        samples = [value for draw in draws if not np.isnan(value := outcome.compute(draw)[task.metric])]
    low, high = np.percentile(samples, (2.5, 97.5)) if samples else (np.nan, np.nan)
    figure |= {"low": low, "high": high}
    figure = {name: _plain(value) for name, value in figure.items()}
    found = {name: {key: _plain(value) for key, value in figures.items()} for name, figures in found.items()}
    counts = {"scored": len(outcome.items), "answered": len(answered), "failed": dict(sorted(failed.items()))}
    main = {"metric": task.metric, "figure": figure, "paper": dict(task.paper), "resamples": len(samples)}
    return counts | main | found | {"notes": list(outcome.notes)}


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def versions() -> dict[str, str]:
    """Of what scores are computed with."""
    there = {name: metadata.version(name) for name in PACKAGES if next(iter(metadata.distributions(name=name)), None)}
    return {"python": platform.python_version()} | there


def write_text(text: str, path: Path) -> None:
    replace_file(path, text.encode("utf-8", "backslashreplace"), is_synced=True)


def write_json(value: Any, path: Path) -> None:
    write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", path)


def write_rows(rows: Iterable[dict], path: Path) -> None:
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(row)


def write_report(results: list[Result], common: Result, folder: Path) -> None:
    """report.json, report.md and report.png of a set of tasks and models."""
    common = {**common, "versions": versions()}
    write_json(common | {"results": results}, folder / "report.json")
    write_text(f"{table(results, common['protocol'])}\n{details(results, common)}", folder / "report.md")
    plot(results, folder / "report.png")


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def paper_text(paper: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in paper.items()) or "-"


def table(results: list[Result], protocol: str) -> str:
    """Main figures, one line a task and model."""
    lines = [f"# Evaluation, protocol {protocol}", ""]
    lines += ["| task | model | metric | on answered | 95 % interval | on all | asked | answered | failed | papers |"]
    lines += ["|" + "---|" * 10]
    for result in results:
        own, failed = result["figure"], ", ".join(f"{reason} {n}" for reason, n in result["failed"].items())
        cells = [result["task"], result["model"], result["metric"], shown(own["on_answered"])]
        cells += [f"{shown(own['low'])} to {shown(own['high'])}", shown(own["on_all"]), str(result["asked"])]
        cells += [str(result["answered"]), failed or "0", paper_text(result["paper"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def details(results: list[Result], common: Result) -> str:
    """All else that decides the figures."""
    blocks = [("All", common)] + [(f"{result['task']}, {result['model']}", result) for result in results]
    lines = []
    for title, block in blocks:
        lines += [f"## {title}", ""]
        lines += [f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in block.items()]
        lines.append("")
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """A panel a task: the models' main figures on what was answered, their intervals, the papers' as lines."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(result["task"] for result in results))
    columns = min(4, len(tasks))
    height = -(-len(tasks) // columns)
    figure = Figure(figsize=(4 * columns, 4 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).ravel()
    for panel in panels[len(tasks) :]:
        panel.axis("off")
    for task, panel in zip(tasks, panels, strict=False):
        own = [result for result in results if result["task"] == task]
        values = [result["figure"]["on_answered"] for result in own]
        for place, (result, value) in enumerate(zip(own, values, strict=True)):
            panel.bar(place, value or 0, width=0.6, color=f"C{place % 10}")
            label = "not computed" if value is None else shown(value)
            panel.text(place, 0, label, ha="center", va="bottom", bbox={"facecolor": "white", "pad": 1, "lw": 0})
            if result["figure"]["low"] is not None:
                panel.vlines(place, result["figure"]["low"], result["figure"]["high"], color="black", linewidth=2)
        for place, (name, value) in enumerate(own[0]["paper"].items()):
            style = ("--", ":", "-.", (0, (6, 1)))[place % 4]
            panel.axhline(value, color="black", linewidth=1, linestyle=style, label=f"paper: {name} {value:g}")
        if own[0]["paper"]:
            panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
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
    figure.colorbar(panel.imshow(shares, cmap="Blues", vmin=0, vmax=1), ax=panel, label="share of the true class")
    panel.set(xlabel="predicted", ylabel="true")
    if len(names) < MANY_CLASSES:
        panel.set_xticks(range(len(names)), names, rotation=90)
        panel.set_yticks(range(len(names)), names)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Without the version of matplotlib, which is in the report."""
    unfinished = path.with_name(f"{path.name}.tmp")
    figure.savefig(unfinished, dpi=100, format="png", metadata={"Software": None})
    unfinished.replace(path)
