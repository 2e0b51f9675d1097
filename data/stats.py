"""Count a file of rows: by dataset, task and length, with a picture.

    python -m data.stats --data_path A.json --output_path stats.json [--plot stats.png]

Notable:
- Lengths are words: what stands between spaces. Quantiles are exact.
- Different clips, questions and answers are counted by way of files beside the output, 48 bytes a row.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from data.audio_ids import NO_AUDIO
from data.combine import CLOSED_ENDED
from data.command_line import command_parser
from data.duplicate_detection import Distinct
from data.provenance import write_json
from data.temporary_files import scratch_folder
from ltu.data.dataset_files import KEYS, stream_rows
from ltu.files import run_command

TEXTS = ("instruction", "input", "output")
DISTINCT = ("audio_id", "instruction", "output")


def summarize(lengths: Counter[int]) -> dict[str, float]:
    """Number, sum, mean and quantiles of counted lengths."""
    count, total = lengths.total(), sum(length * n for length, n in lengths.items())
    found: dict[str, float] = {
        "texts": count,
        "words": total,
        "mean": round(total / max(1, count), 2),
    }
    seen, wanted = 0, {"median": 0.5, "p95": 0.95, "p99": 0.99, "longest": 1.0}
    for length, n in sorted(lengths.items()):
        seen += n
        for name in [name for name, share in wanted.items() if seen >= share * count]:
            found[name] = length
            del wanted[name]
    return found


def count_rows(path: Path, folder: str) -> dict[str, Any]:
    """The report on a file. Temporary files go into the folder."""
    lengths = {key: Counter() for key in TEXTS}
    by_task: dict[str, Counter[int]] = defaultdict(Counter)
    kinds: Counter[tuple[str, str]] = Counter()
    marked, keys, rows = 0, Counter(), 0
    distinct = {key: Distinct(folder, key) for key in DISTINCT}
    for row in stream_rows(path):
        rows += 1
        keys[tuple(row)] += 1
        task = str(row.get("task"))
        kinds[str(row.get("dataset")), task] += 1
        for key in TEXTS:
            if text := row.get(key):
                words = str(text).count(" ") + 1
                lengths[key][words] += 1
                if key == "output":
                    by_task[task][words] += 1
        marked += str(row.get("instruction")).startswith(CLOSED_ENDED)
        for key in DISTINCT:
            value = row.get(key)
            if value not in NO_AUDIO:
                distinct[key].add(value)
        if row.get("audio_id") in NO_AUDIO:
            keys["no audio"] += 1
    silent = keys.pop("no audio", 0)
    dataset, task = Counter(), Counter()
    for (name, kind), number in kinds.items():
        dataset[name] += number
        task[kind] += number
    found = {
        "rows": rows,
        "clips": distinct["audio_id"].count(),
        "questions": distinct["instruction"].count(),
    }
    found |= {
        "answers": distinct["output"].count(),
        "rows_without_audio": silent,
        "marked_closed_ended": marked,
    }
    found["rows_lacking"] = {
        key: sum(n for names, n in keys.items() if key not in names) for key in KEYS
    }
    found |= {"dataset": dict(dataset.most_common()), "task": dict(task.most_common())}
    found["dataset_task"] = {
        f"{name} / {kind}": number for (name, kind), number in sorted(kinds.items())
    }
    found["lengths"] = {key: summarize(counts) for key, counts in lengths.items()}
    found["answer_lengths"] = {kind: summarize(counts) for kind, counts in sorted(by_task.items())}
    found["answer_histogram"] = {str(length): n for length, n in sorted(lengths["output"].items())}
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Rows by dataset and by task, answers by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, kind in zip(panels[:2], ("dataset", "task"), strict=True):
        shown = list(found[kind].items())[:20]
        panel.barh([name for name, _ in shown], [number for _, number in shown])
        panel.invert_yaxis()
        panel.set(
            xlabel="rows",
            title=f"{len(found[kind])} {kind}s"
            + (", the largest" if len(found[kind]) > 20 else ""),
        )
    lengths = {int(length): number for length, number in found["answer_histogram"].items()}
    end = found["lengths"]["output"].get("p99", 1)
    panels[2].bar(
        [n for n in lengths if n <= end],
        [number for n, number in lengths.items() if n <= end],
        width=1,
    )
    panels[2].set(xlabel="words (99 % of the answers)", ylabel="rows", title="answers by length")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__, "the report, as JSON")
    parser.add_argument("--plot", type=Path, help="a PNG")
    args = parser.parse_args(argv)
    with scratch_folder(args.output_path, "stats") as folder:
        found = count_rows(args.data_path, folder)
    write_json(found, args.output_path)
    for kind in ("rows", "clips", "questions", "answers"):
        print(f"{kind:10}{found[kind]:>12,}")
    for kind in ("dataset", "task"):
        for name, number in found[kind].items():
            print(f"  {kind} {name}: {number:,}")
    for key, lengths in found["lengths"].items():
        print(f"  words of {key}: {lengths}")
    if args.plot:
        plot(found, args.plot)
    return 0


if __name__ == "__main__":
    run_command(main)
