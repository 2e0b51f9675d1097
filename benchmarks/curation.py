"""Time and memory of the verbs of `data/` on rows like OpenAQA's, and the generator of such rows.

    python -m benchmarks.curation                                   5,681,708 rows, 2.3 GB, about 12 GB of disk
    python -m benchmarks.curation --rows 200000 --output_path exp/benchmarks/curation.json
    python -m benchmarks.curation --generate_only closed.json open.json

Notable:
- shares of datasets and tasks are those published (classification, captions, temporal, open-ended;
  a task or dataset whose number was never published is a guess); words and clips are drawn at random, clips as often as
  a dataset has them;
- answers to closed-ended questions are labels or a caption, of open-ended ones 5 to 69 words, which makes the published
  2.3 GB; one in eight open-ended answers has one of the original filter's phrases;
- each verb is a process of its own: seconds and the largest resident memory are that process's.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from data.filter_unanswerable import PHRASES
from ltu.data.dataset_files import RowWriter

# Rows of OpenAQA: dataset, task, closed-ended rows in all 5,681,708; clips by dataset.
CLOSED = [
    ("as_strong_train", "cla_label", 101_791),
    ("as_strong_train", "cla_label_des", 101_791),
    ("as_strong_train", "temporal", 479_418),
    ("as_2m", "cla_label_des", 500_139),
    ("as_20k", "cla_label", 37_382),
    ("vggsound_train", "cla_label", 183_727),
    ("vggsound_train", "cla_label_des", 183_727),
    ("fsd50k_tr", "cla_label", 73_592),
    ("fsd50k_val", "cla_label", 8_340),
    ("audiocaps_train", "caption", 97_000),
    ("freesound_10s", "caption", 91_000),
    ("clotho_development", "caption", 48_000),
    ("soundbible", "caption", 11_987),
]
OPEN = [
    ("as_strong_train", "open-ended question", 901_000),
    ("as_20k", "open-ended question", 184_000),
    ("vggsound_train", "open-ended question", 907_000),
    ("fsd50k_tr", "open-ended question", 403_000),
    ("audiocaps_train", "open-ended question", 478_000),
    ("freesound_10s", "open-ended question", 791_000),
    ("clotho_development", "open-ended question", 89_000),
    ("soundbible", "open-ended question", 10_814),
]
PHRASINGS = 100  # of each closed-ended question
ROWS = sum(count for _, _, count in CLOSED + OPEN)
CLIPS = {
    "as_strong": 102_000,
    "as_2m": 500_139,
    "as_20k": 18_691,
    "vggsound": 184_000,
    "fsd50k": 41_000,
}
CLIPS |= {"audiocaps": 46_000, "freesound": 91_000, "clotho": 5_000, "soundbible": 1_200}
BARS = {"combine + shuffle + filter": 600, "stats": 180}  # seconds, at 5,681,708 rows on two cores
BAR_MB = 1536


def random_rows(kinds: list[tuple[str, str, int]], scale: float, seed: int) -> Iterator[dict]:
    """Rows of these datasets and tasks, `scale` of each number."""
    chance = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(9000)]
    labels = [
        " ".join(chance.choices(words, k=chance.randint(1, 3))).capitalize() for _ in range(527)
    ]

    def question() -> str:
        return " ".join(chance.choices(words, k=chance.randint(4, 17))).capitalize() + "?"

    for dataset, task, count in kinds:
        phrasings = [question() for _ in range(PHRASINGS)]
        clips = max(
            1, round(scale * next(n for name, n in CLIPS.items() if dataset.startswith(name)))
        )
        for _ in range(round(scale * count)):
            if task == "cla_label":
                output = f"Labels: {'; '.join(chance.choices(labels, k=chance.randint(1, 4)))}"
            elif task == "cla_label_des":
                parts = [
                    f"{' '.join(chance.choices(words, k=3))} -> {label}"
                    for label in chance.choices(labels, k=2)
                ]
                output = f"Labels: {'; '.join(parts)}"
            elif task == "caption":
                output = (
                    f"Audio caption: {' '.join(chance.choices(words, k=chance.randint(6, 15)))}."
                )
            elif task == "temporal":
                output = "; ".join(
                    f"{label}: [0.{chance.randint(0, 99)}s-9.5s]"
                    for label in chance.choices(labels, k=3)
                )
            else:
                output = " ".join(chance.choices(words, k=chance.randint(5, 69))).capitalize() + "."
                if chance.random() < 1 / 8:
                    output = f"{chance.choice(PHRASES)} {output}"
            yield {
                "instruction": question()
                if task == "open-ended question"
                else chance.choice(phrasings),
                "input": "",
                "audio_id": f"/data/{dataset}/audio/{chance.randrange(clips):011x}.flac",
                "dataset": dataset,
                "task": task,
                "output": output,
            }


def generate(paths: list[Path], rows: int, seed: int = 0) -> None:
    """Write the closed-ended and the open-ended rows, as the original's JSON."""
    for path, kinds, number in zip(paths, (CLOSED, OPEN), (0, 1), strict=True):
        with RowWriter(path) as output:
            for row in random_rows(kinds, rows / ROWS, seed + number):
                output.write(row)


def measure(command: list[str]) -> dict[str, float]:
    """Run `python -m ...`: wall-clock and processor seconds, and the peak of resident memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (
        (0, 1) if command[0] == "data.validate" else (0,)
    ):  # 1: it found something.
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.perf_counter() - start
    used = usage.ru_utime + usage.ru_stime
    return {
        "seconds": round(seconds, 1),
        "processor": round(used, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def commands(folder: Path) -> dict[str, list[str]]:
    """Every verb that reads the whole file, on the files of a folder."""
    closed, opened, mixed, shuffled, kept = (
        str(folder / f"{name}.json") for name in ("closed", "open", "mixed", "shuffled", "kept")
    )
    parts = ["--recipe", "openaqa_all", "--data_path", f"closed={closed}", f"open={opened}"]
    sample = ["--clips", "1000", "--output_path", str(folder / "sample.json")]
    return {
        "combine": ["data.combine", *parts, "--output_path", mixed],
        "shuffle": ["data.shuffle", "--data_path", mixed, "--output_path", shuffled],
        "filter": ["data.filter_unanswerable", "--data_path", shuffled, "--output_path", kept],
        "original_shuffle": [
            "data.shuffle",
            "--data_path",
            kept,
            "--output_path",
            mixed,
            "--original_shuffle",
        ],
        "stats": [
            "data.stats",
            "--data_path",
            shuffled,
            "--output_path",
            str(folder / "stats.json"),
        ],
        "sample": ["data.sample", "--data_path", shuffled, *sample],
        "validate": ["data.validate", "--data_path", shuffled, "--no_audio"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument(
        "--folder", type=Path, help="where the files are written (a temporary folder), and stay"
    )
    parser.add_argument("--generate_only", type=Path, nargs=2, metavar=("CLOSED", "OPEN"))
    parser.add_argument("--output_path", type=Path, help="the report as JSON")
    args = parser.parse_args(argv)
    if args.generate_only:
        generate(args.generate_only, args.rows)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        generate([folder / "closed.json", folder / "open.json"], args.rows)
        found = {}
        for verb, command in commands(folder).items():
            found[verb] = measure(command)
            print(f"{verb:17} {found[verb]}", flush=True)
        size = (folder / "shuffled.json").stat().st_size
    three = sum(found[verb]["seconds"] for verb in ("combine", "shuffle", "filter"))
    totals = {"combine + shuffle + filter": round(three, 1), "stats": found["stats"]["seconds"]}
    peak = max(verb["peak_mb"] for verb in found.values())
    reached = peak <= BAR_MB and all(
        totals[name] * ROWS / args.rows <= bar for name, bar in BARS.items()
    )
    report = {
        "rows": args.rows,
        "bytes": size,
        "verbs": found,
        "totals": totals,
        "bars": BARS,
        "bar_mb": BAR_MB,
    }
    if args.rows != ROWS:
        report["extrapolated"] = {
            name: round(seconds * ROWS / args.rows, 1) for name, seconds in totals.items()
        }
    print(json.dumps(report | {"reached": reached}, indent=1))
    if args.output_path:
        args.output_path.parent.mkdir(parents=True, exist_ok=True)
        args.output_path.write_text(
            json.dumps(report | {"reached": reached}, indent=1) + "\n", encoding="utf-8"
        )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
