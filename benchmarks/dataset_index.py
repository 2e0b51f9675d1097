"""Measures indexing of as many examples as OpenAQA has, and the start of a training on the index.

    python -m benchmarks.dataset_index --base_model exp/init     5,681,708 examples, 5 GB of disk
    python -m benchmarks.dataset_index --base_model exp/init --num_examples 100000 \\
        --output_path exp/index.json

The examples have the texts of `benchmarks.curation` and the clips of data/toy.

Each command is a process of its own, timed from its start to its end: a training of one step
includes imports, loading the model, the step and saving. Memory is the largest resident memory of
any process of the command, which includes the pages of the index that it read. The same training on
1,000 examples shows how much of time and memory does not depend on the number of examples.
"""

import argparse
import tempfile
from itertools import chain, cycle, islice
from pathlib import Path

from benchmarks.curation import CLOSED, NUM_EXAMPLES, OPEN, random_examples
from benchmarks.measure_command import measure_command
from benchmarks.report import print_report, write_report
from data.command_line import command_parser
from ltu.data.dataset_io import ExampleWriter
from ltu.files import run_command

CLIPS = Path(__file__).parent.parent / "data" / "toy" / "audio"
FEW = 1000
BARS = {"index": 900, "first step": 60, "memory above 1,000 examples": 2048}  # seconds, seconds, MB


def write_examples(path: Path, num_examples: int) -> None:
    """Write examples in the order of their datasets, which use the toy clips in turn."""
    clips = sorted(CLIPS.rglob("*.flac"))
    fraction = num_examples / NUM_EXAMPLES
    examples = chain(random_examples(CLOSED, fraction, 0), random_examples(OPEN, fraction, 1))
    with ExampleWriter(path) as output:
        for clip, example in zip(cycle(clips), islice(examples, num_examples), strict=False):
            output.write(example | {"audio_id": str(clip)})


def training_command(base_model: str, data: Path, output: Path, ranks: int) -> list[str]:
    """Return the command of a training of one step, with four clips on each rank."""
    command = []
    if ranks > 1:
        command = ["torch.distributed.run", "--nproc_per_node", str(ranks), "-m"]
    settings = {
        "base_model": base_model,
        "data_path": data,
        "output_dir": output,
        "group_by_length": True,
        "micro_batch_size": 4,
        "batch_size": 4 * ranks,
        "max_steps": 1,
        "num_workers": 2,
    }
    command.append("ltu.finetune")
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    return command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--base_model", required=True, help="A checkpoint folder, of stage 1 or later."
    )
    parser.add_argument(
        "--num_examples", type=int, default=NUM_EXAMPLES, help="Number of examples."
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1, 2],
        help="Numbers of processes; each makes a training.",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="The folder of the files, which stay there. By default it is temporary.",
    )
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        many = folder / "many.json"
        few = folder / "few.json"
        for path, num_examples in ((many, args.num_examples), (few, FEW)):
            write_examples(path, num_examples)
            command = ["ltu.index_dataset", str(path), "--base_model", args.base_model]
            results[f"index {path.stem}"] = measure_command(command)
            for ranks in args.ranks:
                command = training_command(args.base_model, path, folder / "run", ranks)
                results[f"one step of {path.stem}, ranks: {ranks}"] = measure_command(command)
        sizes = {"json": many.stat().st_size, "index": Path(f"{many}.arrow").stat().st_size}
    step_seconds = []
    extra_memory = []
    for ranks in args.ranks:
        step_of_many = results[f"one step of many, ranks: {ranks}"]
        step_of_few = results[f"one step of few, ranks: {ranks}"]
        step_seconds.append(step_of_many["seconds"])
        extra_memory.append(step_of_many["peak_mb"] - step_of_few["peak_mb"])
    reached = {
        "index": results["index many"]["seconds"],
        "first step": max(step_seconds),
        "memory above 1,000 examples": max(extra_memory),
    }
    is_within = all(reached[name] <= bar for name, bar in BARS.items())
    report = {
        "examples": args.num_examples,
        "bytes": sizes,
        "commands": results,
        "values": reached,
        "bars": BARS,
        "reached": args.num_examples == NUM_EXAMPLES and is_within,
    }
    print_report(report)
    write_report(report, args.output_path)
    return int(not report["reached"])


if __name__ == "__main__":
    run_command(main)
