"""Answers the questions of dataset files.

    python -m ltu.inference_batch --model DIR --data_path Q.json --output_path P.json
    python -m ltu.inference_batch --model DIR --data_path Q1.json Q2.json \\
        --output_path P1.json P2.json
    torchrun --nproc_per_node 4 -m ltu.inference_batch ...      the same files, on four GPUs
    python -m ltu.inference_batch --model DIR --data_path Q.json --check_batch

The last one compares batched answers with those of single questions, and writes nothing.

Q.json has examples as for training; `output` is the reference and may be absent or empty. P.json
is a list of `{"prompt", "pred", "ref", "audio_id", "status", "seconds_heard", ...}` in the order of
the questions.

A stopped run continues when it is started again (`ltu.inference.predictions_file`). Equal
questions about equal clips are answered once. The exit status is 1 if more than `--max_bad`
questions have no answer. Fix their clips and run it again: only these questions are answered then.
"""

import argparse
import os
from functools import partial
from itertools import chain

import torch

from ltu.data.check_examples import add_ignored_keys, parse_ignored_keys, read_examples
from ltu.data.columns import add_column_flags, read_column_flags
from ltu.data.dataset_io import describe_columns
from ltu.data.dataset_source import find_dataset
from ltu.files import run_command
from ltu.inference.batch_inference import (
    BatchSettings,
    add_batch_flags,
    answer_files,
    make_requests,
    refuse_outputs,
)
from ltu.inference.batch_invariance import check_batch
from ltu.inference.generation_flags import open_engine


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data_path",
        required=True,
        nargs="+",
        help="Data sets with the questions: JSON list, JSON lines (also .gz, .zst), Parquet, a "
        "folder of datasets' save_to_disk, or a data set of the hub (owner/name).",
    )
    parser.add_argument(
        "--output_path",
        nargs="+",
        help="Predictions files to write (JSON), one for each file of questions.",
    )
    parser.add_argument(
        "--audio_root",
        help="Folder to which audio_ids are relative. The default is that of the dataset file.",
    )
    parser.add_argument(
        "--max_bad",
        type=int,
        default=0,
        help="Number of questions that may fail before the exit status is 1.",
    )
    check_help = (
        "Compare batched answers with single ones on the first N questions (16), and write nothing."
    )
    parser.add_argument(
        "--check_batch", type=int, nargs="?", const=16, metavar="N", help=check_help
    )
    add_ignored_keys(parser)
    add_column_flags(parser)
    add_batch_flags(parser)
    args = parser.parse_args(argv)
    if args.check_batch is not None and args.check_batch < 2:
        parser.error(f"--check_batch {args.check_batch}: it compares 2 questions or more")
    if args.check_batch and args.engine == "vllm":
        parser.error("--check_batch is for the model in this process; leave --engine vllm out")
    if args.check_batch and args.output_path:
        parser.error("--check_batch writes nothing; leave --output_path out")
    num_outputs = len(args.output_path or [])
    if len(args.data_path) != num_outputs and not args.check_batch:
        parser.error(f"{len(args.data_path)} files of questions, but {num_outputs} --output_path")
    refuse_outputs(parser, args.data_path, args.output_path or [])
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and (
        args.device == "cuda" or (args.device is None and torch.cuda.is_available())
    ):
        args.device = f"cuda:{rank}"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings = BatchSettings.from_flags(args)
    ignored_keys = parse_ignored_keys(args.ignored_keys)
    columns = read_column_flags(args)
    files = []
    for path in args.data_path:
        source = find_dataset(path, columns.split)
        for line in describe_columns(source, columns):
            print(f"{path}: {line}")
        files.append(read_examples(source, args.audio_root, False, ignored_keys, columns))
    if args.check_batch:
        args.cache_mb = 0  # A clip that was encoded alone must be encoded in its batch too.
        examples = list(chain.from_iterable(files))
        requests = make_requests(examples[: args.check_batch], settings)
        return check_batch(open_engine(args), requests, settings.decoding)
    outputs = dict(zip(args.output_path, files, strict=True))
    has_failed = answer_files(outputs, partial(open_engine, args), settings, args.max_bad)
    return int(has_failed)


if __name__ == "__main__":
    run_command(main)
