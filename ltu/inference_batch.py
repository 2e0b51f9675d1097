"""Answer the questions of dataset files.

    python -m ltu.inference_batch --model DIR --data_path Q.json --output_path P.json
    python -m ltu.inference_batch --model DIR --data_path Q1.json Q2.json \\
        --output_path P1.json P2.json
    torchrun --nproc_per_node 4 -m ltu.inference_batch ...      the same files, on four GPUs
    python -m ltu.inference_batch --model DIR --data_path Q.json --check_batch

The last one compares batched answers with those of single questions, and writes nothing.

Q.json has examples as for training; `output` is the reference and may be absent. P.json is a list
of `{"prompt", "pred", "ref", "audio_id", "status", "seconds_heard", ...}` in the order of the
questions.

A stopped run continues when it is started again (`ltu.inference.predictions_file`). Equal
questions about equal clips are answered once. The exit status is 1 if more than `--max_bad`
questions have no answer. Fix their clips and run it again: only these questions are answered
then.
"""

import argparse
import os
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from ltu.data.check_examples import read_rows
from ltu.files import run_command
from ltu.inference.batch_inference import Ranks, answer_file, make_requests, print_summary
from ltu.inference.batch_invariance import check_batch
from ltu.inference.generation_flags import add_generation_flags, open_engine, read_decoding_flags
from ltu.inference.predictions_file import AnswerFile


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data_path", required=True, nargs="+", help="questions: JSON list or JSON lines"
    )
    parser.add_argument(
        "--output_path", nargs="+", help="answers as JSON, one for each file of questions"
    )
    parser.add_argument(
        "--audio_root", help="folder of relative audio_ids (default: that of the data file)"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--max_bad", type=int, default=0, help="questions that may fail without a non-zero exit"
    )
    check_help = (
        "compare batched answers with single ones on the first N questions (16); nothing is written"
    )
    parser.add_argument(
        "--check_batch", type=int, nargs="?", const=16, metavar="N", help=check_help
    )
    add_generation_flags(parser)
    args = parser.parse_args(argv)
    outputs = [Path(path).absolute() for path in args.output_path or []]
    if len(args.data_path) != len(outputs) and not args.check_batch:
        parser.error(f"{len(args.data_path)} files of questions, but {len(outputs)} --output_path")
    inputs = [Path(path).absolute() for path in args.data_path]
    if len({*outputs, *inputs}) < len(outputs) + len(set(args.data_path)):
        parser.error("an --output_path is that of another file, or of the questions themselves")
    for path in outputs:  # Before hours of work, not after.
        if path.is_dir():
            parser.error(f"--output_path {path} is a folder; name a file in it")
    args.decoding = read_decoding_flags(args)
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and (
        args.device == "cuda" or (args.device is None and torch.cuda.is_available())
    ):
        args.device = f"cuda:{rank}"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    files = [read_rows(path, args.audio_root, need_output=False) for path in args.data_path]
    if args.check_batch:
        args.cache_mb = 0  # A clip that was encoded alone must be encoded in its batch too.
        rows = [row for part in files for row in part][: args.check_batch]
        return check_batch(open_engine(args), make_requests(rows, args), args.decoding)
    with ExitStack() as stack:
        ranks = stack.enter_context(closing(Ranks()))
        outputs = [
            stack.enter_context(closing(AnswerFile(path, ranks.rank))) for path in args.output_path
        ]
        # Rank 0 locks first and finds out whether another run writes the files.
        for is_own_turn in (ranks.rank == 0, ranks.rank > 0):
            if is_own_turn:
                for output in outputs:
                    output.lock()
            ranks.gather()
        engine = open_engine(args)
        found = [
            answer_file(*pair, engine, args, ranks) for pair in zip(outputs, files, strict=True)
        ]
        answers = [answer for part in found for answer in part]
        has_failed = sum(not answer.answered for answer in answers) > args.max_bad
        if ranks.rank == 0 and len(found) > 1:
            print_summary("together", answers)
        if has_failed:
            print(
                "The partial files stay. Fix the clips and run it again; only questions without an "
                "answer are answered then.",
                file=sys.stderr,
            )
        for output in outputs if ranks.rank == 0 else ():
            output.finish(keep_partial=has_failed)
    return int(has_failed)


if __name__ == "__main__":
    run_command(main)
