"""Counts a dataset file by dataset, task and length, and plots the counts.

    python -m data.stats --data_path A.json --output_path stats.json [--plot stats.png]

Lengths are in words, separated by spaces. Quantiles are exact. Different clips, questions and
answers are counted with temporary files next to the output, 48 bytes for each example.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from data.combine import CLOSED_ENDED
from data.command_line import command_parser, source_of
from data.duplicate_detection import DuplicateDetector
from data.temporary_files import temporary_folder
from ltu.data.check_examples import NO_AUDIO
from ltu.data.columns import ColumnFlags, read_column_flags
from ltu.data.dataset_io import KEYS, typed_examples
from ltu.data.dataset_source import DatasetSource
from ltu.files import run_command, write_json

TEXTS = ("instruction", "input", "output")
# Key of an example whose different values are counted -> name of the count.
DISTINCT = {"audio_id": "clips", "instruction": "questions", "output": "answers"}
QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "longest": 1.0}
MAX_BARS = 20  # Datasets or tasks in a plot.


def summarize(counts: Counter[int]) -> dict[str, float]:
    """Return number, sum, mean and quantiles of counted lengths (length -> number of texts)."""
    lengths = sorted(counts)
    num_texts = counts.total()
    num_words = sum(length * counts[length] for length in lengths)
    summary: dict[str, float] = {
        "texts": num_texts,
        "words": num_words,
        "mean": round(num_words / max(1, num_texts), 2),
    }
    if not lengths:
        return summary
    # A quantile is the first length up to which this fraction of the texts is.
    cumulated = list(accumulate(counts[length] for length in lengths))
    for name, fraction in QUANTILES.items():
        summary[name] = lengths[bisect_left(cumulated, fraction * num_texts)]
    return summary


@dataclass
class ExampleCounts:
    """Counts of the examples of a dataset file.

    Attributes:
        num_examples: number of examples.
        num_without_audio: number of examples without audio.
        num_closed_ended: number of questions with the prefix of closed-ended ones.
        key_sets: keys of an example -> number of examples.
        groups: (dataset, task) -> number of examples.
        lengths: key of a text -> words -> number of texts.
        answer_lengths: task -> words -> number of answers.
    """

    num_examples: int = 0
    num_without_audio: int = 0
    num_closed_ended: int = 0
    key_sets: Counter[tuple[str, ...]] = field(default_factory=Counter)
    groups: Counter[tuple[str, str]] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    answer_lengths: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, example: dict[str, Any]) -> None:
        """Count an example."""
        task = str(example.get("task"))
        self.num_examples += 1
        self.num_without_audio += example.get("audio_id") in NO_AUDIO
        self.num_closed_ended += str(example.get("instruction")).startswith(CLOSED_ENDED)
        self.key_sets[tuple(example)] += 1
        self.groups[str(example.get("dataset")), task] += 1
        for key in TEXTS:
            text = example.get(key)
            if not text:
                continue
            num_words = str(text).count(" ") + 1
            self.lengths[key][num_words] += 1
            if key == "output":
                self.answer_lengths[task][num_words] += 1

    def num_lacking(self, key: str) -> int:
        """Return the number of examples that lack a key."""
        return sum(number for keys, number in self.key_sets.items() if key not in keys)


def count_examples(source: DatasetSource, folder: str, columns: ColumnFlags) -> dict[str, Any]:
    """Return the report on a dataset.

    Args:
        source: the dataset.
        folder: for the temporary files.
        columns: of the dataset.
    """
    counts = ExampleCounts()
    values = {key: DuplicateDetector(folder, key) for key in DISTINCT}
    for example in typed_examples(source, columns):
        counts.add(example)
        for key in DISTINCT:
            value = example.get(key)
            if value not in NO_AUDIO:
                values[key].add(value)

    # Count by dataset and by task, from the counts by both.
    by_dataset: Counter[str] = Counter()
    by_task: Counter[str] = Counter()
    by_group = {}
    for (dataset, task), number in sorted(counts.groups.items()):
        by_group[f"{dataset} / {task}"] = number
    for (dataset, task), number in counts.groups.items():
        by_dataset[dataset] += number
        by_task[task] += number
    report: dict[str, Any] = {"num_examples": counts.num_examples}
    for key, name in DISTINCT.items():
        report[name] = values[key].count()
    report |= {
        "without_audio": counts.num_without_audio,
        "marked_closed_ended": counts.num_closed_ended,
        "missing_keys": {key: counts.num_lacking(key) for key in KEYS},
        "dataset": dict(by_dataset.most_common()),
        "task": dict(by_task.most_common()),
        "dataset_task": by_group,
        "lengths": {key: summarize(counts.lengths[key]) for key in TEXTS},
        "answer_lengths": {},
        "answer_histogram": {},
    }
    for task in sorted(counts.answer_lengths):
        report["answer_lengths"][task] = summarize(counts.answer_lengths[task])
    for length, number in sorted(counts.lengths["output"].items()):
        report["answer_histogram"][str(length)] = number
    return report


def plot(report: dict[str, Any], path: Path) -> None:
    """Plot examples by dataset and by task, and answers by length, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, 3)
    # Examples of the largest datasets, and of the largest tasks.
    for panel, kind in zip(panels[:2], ("dataset", "task"), strict=True):
        names = list(report[kind])[:MAX_BARS]
        numbers = list(report[kind].values())[:MAX_BARS]
        panel.barh(names, numbers)
        panel.invert_yaxis()
        title = f"{len(report[kind])} {kind}s"
        if len(report[kind]) > MAX_BARS:
            title += ", the largest"
        panel.set(xlabel="examples", title=title)

    # Answers by length, without the longest percent.
    end = report["lengths"]["output"].get("p99", 1)
    lengths = []
    numbers = []
    for length, number in report["answer_histogram"].items():
        if int(length) <= end:
            lengths.append(int(length))
            numbers.append(number)
    panels[2].bar(lengths, numbers, width=1)
    panels[2].set(
        xlabel="words (99 % of the answers)", ylabel="examples", title="answers by length"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__, output_path="The report to write, as JSON.")
    parser.add_argument("--plot", type=Path, help="A PNG file for the plots.")
    args = parser.parse_args(argv)
    with temporary_folder(args.output_path, "stats") as folder:
        report = count_examples(source_of(args), folder, read_column_flags(args))
    write_json(report, args.output_path)
    print(f"{'examples':10}{report['num_examples']:>12,}")
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
