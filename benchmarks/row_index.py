"""Indexing rows as many as OpenAQA's, and how soon a training that opens the index has made its first step.

    python -m benchmarks.row_index --base_model exp/init            5,681,708 rows about the toy clips, 5 GB of disk
    python -m benchmarks.row_index --base_model exp/init --rows 100000 --output_path exp/row_index.json

Notable:
- Rows have the texts of `benchmarks.curation`, and clips that are there: those of data/toy.
- Each command is a process of its own, and is timed from its start to its end: a training of one step includes imports,
  opening the model, the step and saving. Memory is the largest resident memory of any of its processes, with the pages
  of the index that it looked at. The same training on 1,000 rows says what of both is not the rows'.
"""

import argparse
import json
import sys
import tempfile
from itertools import chain, islice
from pathlib import Path

from benchmarks.curation import CLOSED, OPEN, ROWS, measure, random_rows
from ltu.data.dataset_files import RowWriter

CLIPS = Path(__file__).parent.parent / "data" / "toy" / "audio"
FEW = 1000
BARS = {"index": 900, "first step": 60, "memory above 1,000 rows": 2048}  # seconds, seconds, MB


def generate(path: Path, rows: int) -> None:
    """Rows in the order of their datasets, their clips the toy clips in turn."""
    clips = sorted(str(clip) for clip in CLIPS.rglob("*.flac"))
    made = chain(random_rows(CLOSED, rows / ROWS, 0), random_rows(OPEN, rows / ROWS, 1))
    with RowWriter(path) as output:
        for number, row in enumerate(islice(made, rows)):
            output.write(row | {"audio_id": clips[number % len(clips)]})


def train(base_model: str, data: Path, output: Path, ranks: int) -> list[str]:
    """One step on four clips a rank."""
    launch = ["torch.distributed.run", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    sizes = {"micro_batch_size": 4, "batch_size": 4 * ranks, "max_steps": 1, "num_workers": 2}
    settings = {
        "base_model": base_model,
        "data_path": data,
        "output_dir": output,
        "group_by_length": True,
    } | sizes
    return [
        *launch,
        "ltu.finetune",
        *(word for name, value in settings.items() for word in (f"--{name}", str(value))),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--base_model", required=True, help="checkpoint folder, of stage 1 or later"
    )
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2], help="processes of the trainings"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the files are written (a temporary folder), and stay"
    )
    parser.add_argument("--output_path", type=Path, help="the report as JSON")
    args = parser.parse_args(argv)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        many, few = folder / "many.json", folder / "few.json"
        for path, rows in ((many, args.rows), (few, FEW)):
            if not path.is_file():
                generate(path, rows)
            found[f"index {path.stem}"] = measure(
                ["ltu.data.examples", "index", str(path), "--base_model", args.base_model]
            )
            for ranks in args.ranks:
                command = train(args.base_model, path, folder / "run", ranks)
                found[f"one step of {path.stem}, ranks: {ranks}"] = measure(command)
        sizes = {"json": many.stat().st_size, "index": Path(f"{many}.arrow").stat().st_size}
    steps = [
        [found[f"one step of {name}, ranks: {ranks}"] for ranks in args.ranks]
        for name in ("many", "few")
    ]
    reached = {
        "index": found["index many"]["seconds"],
        "first step": max(step["seconds"] for step in steps[0]),
        "memory above 1,000 rows": max(
            own["peak_mb"] - few["peak_mb"] for own, few in zip(*steps, strict=True)
        ),
    }
    report = {
        "rows": args.rows,
        "bytes": sizes,
        "commands": found,
        "figures": reached,
        "bars": BARS,
    }
    report["reached"] = args.rows == ROWS and all(
        reached[name] <= bar for name, bar in BARS.items()
    )
    print(json.dumps(report, indent=1))
    if args.output_path:
        args.output_path.parent.mkdir(parents=True, exist_ok=True)
        args.output_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(not report["reached"])


if __name__ == "__main__":
    sys.exit(main())
