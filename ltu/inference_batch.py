"""Answer files of questions.

    python -m ltu.inference_batch --model DIR --data_path Q.json --output_path P.json
    python -m ltu.inference_batch --model DIR --data_path Q1.json Q2.json --output_path P1.json P2.json
    torchrun --nproc_per_node 4 -m ltu.inference_batch ...        the same files, on four GPUs
    python -m ltu.inference_batch --model DIR --data_path Q.json --check_batch        batched answers = single ones?

Q.json has the rows of training; `output` is the reference and may be absent. P.json is a list of
`{"prompt", "pred", "ref", "audio_id", "status", "seconds_heard", ...}` in the order of the questions.

Stop it at any time and run it again: it goes on (`ltu.answer_file`). Equal questions on equal clips are asked once.
Exits with 1 when more than `--max_bad` questions have no answer. Mend their clips and run it again: they alone are
asked.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ltu.answer_file import AnswerFile, Key
from ltu.ask import add_decoding_flags, decoding_of, open_pipeline
from ltu.check_batch import check_batch
from ltu.decoding import check_decoding
from ltu.pipeline_ltu import LtuPipeline
from ltu.qa_dataset import read_rows
from ltu.request import Answer, Request


class Ranks:
    """The processes of a torchrun, or this one alone."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:  # One rank may wait for another as long as a run lasts.
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))

    def gather(self, value: Any = None) -> list:
        """The value of every rank, in each of them. Nobody goes on before all are here."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def close(self) -> None:
        if self.size > 1:
            torch.distributed.destroy_process_group()


def prediction(row: dict, answer: Answer) -> dict:
    """One entry of P.json."""
    entry = asdict(answer) | {name: round(getattr(answer, name), 3) for name in ("seconds_heard", "seconds_total")}
    entry = {"pred": entry.pop("text"), "ref": row.get("output"), "audio_id": row.get("audio_id")} | entry
    return {"prompt": row["instruction"]} | entry


def requests_of(rows: list[dict], args: argparse.Namespace) -> list[Request]:
    given = {"mode": args.mode, "windows": args.windows}
    return [Request(r["instruction"], r["audio"], r.get("input"), r.get("audio_id"), **given) for r in rows]


def keys_of(requests: list[Request], pipeline: LtuPipeline, args: argparse.Namespace, ranks: Ranks) -> list[Key]:
    """What each answer depends on. Each rank reads its share of the clips."""
    config, dtype = pipeline.model.config, pipeline.model.get_input_embeddings().weight.dtype
    settings = [pipeline.kind, pipeline.checkpoint, config.language_model_sha256, str(dtype), args.load_in]
    settings += [pipeline.processor.to_dict(), pipeline.processor.tokenizer.get_vocab()]  # Prompt and ear among them.
    settings += [pipeline.processor.hears_with, check_decoding(args.decoding), args.seed]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    clips = {(request.audio, request.audio_id): request for request in requests if request.audio}
    mine = list(clips)[ranks.rank :: ranks.size]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda clip: pipeline.clip_hash(clips[clip]) or f"unread: {clip}", mine)
        parts = ranks.gather(dict(zip(mine, hashes, strict=True)))
    found = {clip: content for part in parts for clip, content in part.items()} | {(None, None): None}
    contents = [found.get((request.audio, request.audio_id)) for request in requests]
    return [(c, r.question, r.transcript, r.mode, r.windows, digest) for c, r in zip(contents, requests, strict=True)]


def ask_file(
    file: AnswerFile, rows: list[dict], pipeline: LtuPipeline, args: argparse.Namespace, ranks: Ranks
) -> list[Answer]:
    """Ask what is not answered yet, and write the whole file. Returns the answers of all rows; on rank 0 only."""
    requests = requests_of(rows, args)
    keys = keys_of(requests, pipeline, args, ranks)
    # Read by rank 0 alone: by the time that others did, it might have added to it.
    kept = {key for key, answer in file.merge().items() if answer.answered} if ranks.rank == 0 else None
    kept = ranks.gather(kept)[0]
    todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in kept}
    clips = list(dict.fromkeys(key[0] or key[1] for key in todo))  # Questions without a clip are spread as if each had.
    own = set(clips[ranks.rank :: ranks.size])
    mine = [key for key in todo if (key[0] or key[1]) in own]
    start = time.perf_counter()
    answering = pipeline.run([todo[key] for key in mine], args.batch_size, args.seed, **args.decoding)
    is_quiet = ranks.rank > 0 or not mine
    for index, answer in tqdm(answering, "answering", len(mine), unit="question", disable=is_quiet):
        file.append(mine[index], answer)
    ranks.gather()
    if ranks.rank > 0:
        return []
    seconds = time.perf_counter() - start
    found = file.merge()
    answers = [found[key] for key in keys]
    file.write([prediction(row, answer) for row, answer in zip(rows, answers, strict=True)])
    print_ledger(str(file.path), answers)
    rate = sum(found[key].answered for key in todo) / seconds
    print(f"  {sum(key in kept for key in keys)} from the partial file; asked {len(todo)}, {rate:.2f} questions/s")
    for answer in [answer for answer in answers if not answer.answered][:20]:
        print(f"  {answer.error}", file=sys.stderr)
    return answers


def print_ledger(name: str, answers: list[Answer]) -> None:
    """What became of the questions, and how much of their clips was heard."""
    counts = Counter(answer.status for answer in answers).most_common()
    answered = sum(answer.answered for answer in answers)
    heard, total = sum(answer.seconds_heard for answer in answers), sum(answer.seconds_total for answer in answers)
    print(f"{name}: {', '.join(f'{status} {count}' for status, count in counts)}")
    print(f"  answered {answered} of {len(answers)} questions; heard {heard:.1f} of {total:.1f} s")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_path", required=True, nargs="+", help="questions: JSON list or JSON lines")
    parser.add_argument("--output_path", nargs="+", help="answers as JSON, one for each file of questions")
    parser.add_argument("--audio_root", help="folder of relative audio_ids (default: that of the data file)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_bad", type=int, default=0, help="questions that may fail without a non-zero exit")
    check_help = "compare batched answers with single ones on the first N questions (16); nothing is written"
    parser.add_argument("--check_batch", type=int, nargs="?", const=16, metavar="N", help=check_help)
    add_decoding_flags(parser)
    args = parser.parse_args(argv)
    outputs = [Path(path).absolute() for path in args.output_path or []]
    if len(args.data_path) != len(outputs) and not args.check_batch:
        parser.error(f"{len(args.data_path)} files of questions, but {len(outputs)} --output_path")
    if len({*outputs, *(Path(path).absolute() for path in args.data_path)}) < len(outputs) + len(set(args.data_path)):
        parser.error("an --output_path is that of another file, or of the questions themselves")
    for path in outputs:  # Before hours of work, not after.
        if path.is_dir():
            parser.error(f"--output_path {path} is a folder; name a file in it")
    args.decoding = decoding_of(args)
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and (args.device == "cuda" or (args.device is None and torch.cuda.is_available())):
        args.device = f"cuda:{rank}"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    files = [read_rows(path, args.audio_root, need_output=False) for path in args.data_path]
    if args.check_batch:
        args.cache_mb = 0  # A clip that was encoded alone must be encoded in its batch too.
        rows = [row for part in files for row in part][: args.check_batch]
        return check_batch(open_pipeline(args), requests_of(rows, args), args.decoding)
    with ExitStack() as stack:
        ranks = stack.enter_context(closing(Ranks()))
        outputs = [stack.enter_context(closing(AnswerFile(path, ranks.rank))) for path in args.output_path]
        for is_my_turn in (ranks.rank == 0, ranks.rank > 0):  # Rank 0 finds out whether another run is there.
            for output in outputs if is_my_turn else ():
                output.lock()
            ranks.gather()
        pipeline = open_pipeline(args)
        found = [ask_file(*pair, pipeline, args, ranks) for pair in zip(outputs, files, strict=True)]
        answers = [answer for part in found for answer in part]
        has_failed = sum(not answer.answered for answer in answers) > args.max_bad
        if ranks.rank == 0 and len(found) > 1:
            print_ledger("together", answers)
        if has_failed:
            print("The partial files are kept: mend the clips and run it again, they alone are asked.", file=sys.stderr)
        for output in outputs if ranks.rank == 0 else ():
            output.finish(keep_partial=has_failed)
    return int(has_failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FileNotFoundError, ValueError) as error:  # The user's to mend; a traceback would hide the message.
        sys.exit(f"error: {error}")
