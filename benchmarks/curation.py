"""Measures time and memory of the commands of `data/` on generated examples like those of OpenAQA.

    python -m benchmarks.curation                  5,681,708 examples, 2.3 GB, about 12 GB of disk
    python -m benchmarks.curation --num_examples 200000 --output_path exp/benchmarks/curation.json
    python -m benchmarks.curation --generate_only closed.json open.json

The fractions of datasets and tasks are the published ones (classification, captions, temporal,
open-ended); a number that was never published is a guess. Words and clips are sampled, with as many
clips as a dataset has.

Answers to closed-ended questions are labels or a caption. Those to open-ended questions have 5 to
69 words, which makes the published 2.3 GB; one in eight contains one of the phrases of the original
filter.

Each command is a process of its own: seconds and the largest resident memory are of that process.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure_command import measure_command
from benchmarks.report import print_report, write_report
from data.command_line import command_parser
from data.filter_unanswerable import PHRASES
from ltu.data.dataset_io import ExampleWriter
from ltu.files import run_command

# Dataset, task and number of examples of OpenAQA's 5,681,708: closed-ended questions.
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
# The same for open-ended questions.
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
NUM_EXAMPLES = sum(count for _, _, count in CLOSED + OPEN)
# Number of clips, by the beginning of a dataset's name.
CLIPS = {
    "as_strong": 102_000,
    "as_2m": 500_139,
    "as_20k": 18_691,
    "vggsound": 184_000,
    "fsd50k": 41_000,
    "audiocaps": 46_000,
    "freesound": 91_000,
    "clotho": 5_000,
    "soundbible": 1_200,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# At 5,681,708 examples.
BARS = {
    "combine + shuffle + filter": 600,
    "stats": 180,
}  # seconds, on two cores
BAR_MB = 1536


class TextSampler:
    """Samples words, labels, questions and answers."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.words = [self._word() for _ in range(9000)]
        self.labels = [self.text(1, 3).capitalize() for _ in range(527)]

    def _word(self) -> str:
        return "".join(self.random.choices(LETTERS, k=self.random.randint(2, 9)))

    def text(self, low: int, high: int) -> str:
        """Return `low` to `high` words."""
        count = self.random.randint(low, high)
        return " ".join(self.random.choices(self.words, k=count))

    def question(self) -> str:
        return self.text(4, 17).capitalize() + "?"

    def answer(self, task: str) -> str:
        if task == "cla_label":
            labels = self.random.choices(self.labels, k=self.random.randint(1, 4))
            return f"Labels: {'; '.join(labels)}"
        if task == "cla_label_des":
            parts = []
            for label in self.random.choices(self.labels, k=2):
                description = " ".join(self.random.choices(self.words, k=3))
                parts.append(f"{description} -> {label}")
            return f"Labels: {'; '.join(parts)}"
        if task == "caption":
            return f"Audio caption: {self.text(6, 15)}."
        if task == "temporal":
            parts = []
            for label in self.random.choices(self.labels, k=3):
                parts.append(f"{label}: [0.{self.random.randint(0, 99)}s-9.5s]")
            return "; ".join(parts)
        answer = self.text(5, 69).capitalize() + "."
        if self.random.random() < 1 / 8:
            answer = f"{self.random.choice(PHRASES)} {answer}"
        return answer


def random_examples(kinds: list[tuple[str, str, int]], scale: float, seed: int) -> Iterator[dict]:
    """Yield random examples.

    Args:
        kinds: dataset, task and number of examples.
        scale: factor of every number of examples and clips.
        seed: of the random generator.
    """
    sampler = TextSampler(seed)
    for dataset, task, count in kinds:
        phrasings = [sampler.question() for _ in range(PHRASINGS)]
        dataset_clips = next(n for name, n in CLIPS.items() if dataset.startswith(name))
        num_clips = max(1, round(scale * dataset_clips))
        is_open = task == "open-ended question"
        for _ in range(round(scale * count)):
            output = sampler.answer(task)
            question = sampler.question() if is_open else sampler.random.choice(phrasings)
            clip = sampler.random.randrange(num_clips)
            yield {
                "instruction": question,
                "input": "",
                "audio_id": f"/data/{dataset}/audio/{clip:011x}.flac",
                "dataset": dataset,
                "task": task,
                "output": output,
            }


def generate(paths: list[Path], num_examples: int, seed: int = 0) -> None:
    """Write a file of closed-ended and one of open-ended examples, `num_examples` in total."""
    for number, (path, kinds) in enumerate(zip(paths, (CLOSED, OPEN), strict=True)):
        with ExampleWriter(path) as output:
            for example in random_examples(kinds, num_examples / NUM_EXAMPLES, seed + number):
                output.write(example)


def commands(folder: Path) -> dict[str, list[str]]:
    """Return every command that reads a whole file, for the files of a folder."""
    closed = str(folder / "closed.json")
    opened = str(folder / "open.json")
    mixed = str(folder / "mixed.json")
    shuffled = str(folder / "shuffled.json")
    filtered = str(folder / "filtered.json")

    def command(name: str, data_path: str, *flags: str) -> list[str]:
        return [f"data.{name}", "--data_path", data_path, *flags]

    return {
        "combine": [
            "data.combine",
            *("--recipe", "openaqa_all"),
            *("--data_path", f"closed={closed}", f"open={opened}"),
            *("--output_path", mixed),
        ],
        "shuffle": command("shuffle", mixed, "--output_path", shuffled),
        "filter": command("filter_unanswerable", shuffled, "--output_path", filtered),
        "original_shuffle": command(
            "shuffle", filtered, "--output_path", mixed, "--original_shuffle"
        ),
        "stats": command("stats", shuffled, "--output_path", str(folder / "stats.json")),
        "sample": command(
            "sample",
            shuffled,
            *("--clips", "1000"),
            *("--output_path", str(folder / "sample.json")),
        ),
        "validate": command("validate", shuffled, "--no_audio"),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--num_examples", type=int, default=NUM_EXAMPLES, help="Number of examples."
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="The folder of the files, which stay there. By default it is temporary.",
    )
    parser.add_argument(
        "--generate_only",
        type=Path,
        nargs=2,
        metavar=("CLOSED", "OPEN"),
        help="Only write the closed-ended and the open-ended examples.",
    )
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.generate_only:
        generate(args.generate_only, args.num_examples)
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        generate([folder / "closed.json", folder / "open.json"], args.num_examples)
        for name, command in commands(folder).items():
            results[name] = measure_command(command)
            print(f"{name:17} {results[name]}", flush=True)
        size = (folder / "shuffled.json").stat().st_size
    preparation = sum(results[name]["seconds"] for name in ("combine", "shuffle", "filter"))
    totals = {
        "combine + shuffle + filter": round(preparation, 1),
        "stats": results["stats"]["seconds"],
    }
    factor = NUM_EXAMPLES / args.num_examples
    extrapolated = {name: round(seconds * factor, 1) for name, seconds in totals.items()}
    peak = max(result["peak_mb"] for result in results.values())
    is_fast = all(extrapolated[name] <= bar for name, bar in BARS.items())
    reached = peak <= BAR_MB and is_fast
    report = {
        "num_examples": args.num_examples,
        "bytes": size,
        "commands": results,
        "totals": totals,
        "bars": BARS,
        "bar_mb": BAR_MB,
    }
    if args.num_examples != NUM_EXAMPLES:
        report["extrapolated"] = extrapolated
    report["reached"] = reached
    print_report(report)
    write_report(report, args.output_path)
    return int(not reached)


if __name__ == "__main__":
    run_command(main)
