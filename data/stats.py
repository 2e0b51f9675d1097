"""Counts a dataset file by dataset, task and length, and plots the counts.

    python -m data.stats --data_path A.json --output_path stats.json [--plot stats.png]

Lengths are in words, separated by spaces. Quantiles are exact. Different clips, questions and
answers are counted with temporary files next to the output, 48 bytes for each example.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from data.audio_ids import NO_AUDIO
from data.combine import CLOSED_ENDED
from data.command_line import command_parser
from data.duplicate_detection import DuplicateDetector
from data.provenance import write_json
from data.temporary_files import temporary_folder
from ltu.data.dataset_io import KEYS, stream_rows
from ltu.files import run_command

TEXTS = ("instruction", "input", "output")
# Key of an example whose different values are counted -> name of the count.
DISTINCT = {"audio_id": "clips", "instruction": "questions", "output": "answers"}
QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "longest": 1.0}
MAX_BARS = 20  # Datasets or tasks in a plot.


def summarize(lengths: Counter[int]) -> dict[str, float]:
    """Return number, sum, mean and quantiles of counted lengths."""
    count = lengths.total()
    total = sum(length * number for length, number in lengths.items())
    summary: dict[str, float] = {
        "texts": count,
        "words": total,
        "mean": round(total / max(1, count), 2),
    }
    cumulated = 0
    wanted = dict(QUANTILES)
    for length, number in sorted(lengths.items()):
        cumulated += number
        reached = [name for name, fraction in wanted.items() if cumulated >= fraction * count]
        for name in reached:
            summary[name] = length
            del wanted[name]
    return summary


def count_rows(path: Path, folder: str) -> dict[str, Any]:
    """Return the report on a dataset file.

    Args:
        path: the dataset file.
        folder: takes the temporary files.
    """
    num_examples = 0
    num_without_audio = 0
    num_closed_ended = 0
    key_sets: Counter[tuple[str, ...]] = Counter()
    by_dataset_and_task: Counter[tuple[str, str]] = Counter()
    lengths: dict[str, Counter[int]] = {key: Counter() for key in TEXTS}
    answer_lengths: dict[str, Counter[int]] = defaultdict(Counter)  # By task.
    values = {key: DuplicateDetector(folder, key) for key in DISTINCT}
    for row in stream_rows(path):
        num_examples += 1
        num_without_audio += row.get("audio_id") in NO_AUDIO
        num_closed_ended += str(row.get("instruction")).startswith(CLOSED_ENDED)
        key_sets[tuple(row)] += 1
        task = str(row.get("task"))
        by_dataset_and_task[str(row.get("dataset")), task] += 1
        for key in TEXTS:
            text = row.get(key)
            if not text:
                continue
            num_words = str(text).count(" ") + 1
            lengths[key][num_words] += 1
            if key == "output":
                answer_lengths[task][num_words] += 1
        for key in DISTINCT:
            value = row.get(key)
            if value not in NO_AUDIO:
                values[key].add(value)

    by_dataset: Counter[str] = Counter()
    by_task: Counter[str] = Counter()
    for (dataset, task), number in by_dataset_and_task.items():
        by_dataset[dataset] += number
        by_task[task] += number
    num_lacking = {}
    for key in KEYS:
        num_lacking[key] = sum(n for key_set, n in key_sets.items() if key not in key_set)
    report: dict[str, Any] = {"rows": num_examples}
    report |= {name: values[key].count() for key, name in DISTINCT.items()}
    report |= {
        "rows_without_audio": num_without_audio,
        "marked_closed_ended": num_closed_ended,
        "rows_lacking": num_lacking,
        "dataset": dict(by_dataset.most_common()),
        "task": dict(by_task.most_common()),
        "dataset_task": {
            f"{dataset} / {task}": number
            for (dataset, task), number in sorted(by_dataset_and_task.items())
        },
        "lengths": {key: summarize(counts) for key, counts in lengths.items()},
        "answer_lengths": {
            task: summarize(counts) for task, counts in sorted(answer_lengths.items())
        },
        "answer_histogram": {
            str(length): number for length, number in sorted(lengths["output"].items())
        },
    }
    return report


def plot(report: dict[str, Any], path: Path) -> None:
    """Plot examples by dataset and by task, and answers by length, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, kind in zip(panels[:2], ("dataset", "task"), strict=True):
        largest = list(report[kind].items())[:MAX_BARS]
        names = [name for name, _ in largest]
        numbers = [number for _, number in largest]
        panel.barh(names, numbers)
        panel.invert_yaxis()
        title = f"{len(report[kind])} {kind}s"
        if len(report[kind]) > MAX_BARS:
            title += ", the largest"
        panel.set(xlabel="examples", title=title)

    end = report["lengths"]["output"].get("p99", 1)
    histogram = {int(length): number for length, number in report["answer_histogram"].items()}
    shown = {length: number for length, number in histogram.items() if length <= end}
    panels[2].bar(list(shown), list(shown.values()), width=1)
    panels[2].set(
        xlabel="words (99 % of the answers)", ylabel="examples", title="answers by length"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__, "The report to write, as JSON.")
    parser.add_argument("--plot", type=Path, help="A PNG file for the plots.")
    args = parser.parse_args(argv)
    with temporary_folder(args.output_path, "stats") as folder:
        report = count_rows(args.data_path, folder)
    write_json(report, args.output_path)
    print(f"{'examples':10}{report['rows']:>12,}")
    for name in DISTINCT.values():
        print(f"{name:10}{report[name]:>12,}")
    for kind in ("dataset", "task"):
        for name, number in report[kind].items():
            print(f"  {kind} {name}: {number:,}")
    for key, lengths in report["lengths"].items():
        print(f"  words of {key}: {lengths}")
    if args.plot:
        plot(report, args.plot)
    return 0


if __name__ == "__main__":
    run_command(main)
