"""Answers the questions of dataset files, by one process or by several, and goes on where a run was stopped."""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm

from ltu.inference.engine import LtuEngine
from ltu.inference.predictions_file import AnswerFile, Key
from ltu.inference.requests import Answer, Request
from ltu.inference.sampling import check_decoding


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
    entry = asdict(answer) | {
        name: round(getattr(answer, name), 3) for name in ("seconds_heard", "seconds_total")
    }
    entry = {
        "pred": entry.pop("text"),
        "ref": row.get("output"),
        "audio_id": row.get("audio_id"),
    } | entry
    return {"prompt": row["instruction"]} | entry


def make_requests(rows: list[dict], args: argparse.Namespace) -> list[Request]:
    given = {"mode": args.mode, "num_chunks": args.num_chunks}
    return [
        Request(r["instruction"], r["audio"], r.get("input"), r.get("audio_id"), **given)
        for r in rows
    ]


def make_keys(
    requests: list[Request], engine: LtuEngine, args: argparse.Namespace, ranks: Ranks
) -> list[Key]:
    """What each answer depends on. Each rank reads its share of the clips."""
    config, dtype = engine.model.config, engine.model.get_input_embeddings().weight.dtype
    settings = [
        engine.kind,
        engine.checkpoint,
        config.language_model_sha256,
        str(dtype),
        args.quantization,
    ]
    settings += [
        engine.processor.to_dict(),
        engine.processor.tokenizer.get_vocab(),
    ]  # Prompt and ear among them.
    settings += [engine.processor.audio_settings, check_decoding(args.decoding), args.seed]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    clips = {(request.audio, request.audio_id): request for request in requests if request.audio}
    mine = list(clips)[ranks.rank :: ranks.size]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda clip: engine.clip_hash(clips[clip]) or f"unread: {clip}", mine)
        parts = ranks.gather(dict(zip(mine, hashes, strict=True)))
    found = {clip: content for part in parts for clip, content in part.items()} | {
        (None, None): None
    }
    contents = [found.get((request.audio, request.audio_id)) for request in requests]
    return [
        (c, r.question, r.transcript, r.mode, r.num_chunks, digest)
        for c, r in zip(contents, requests, strict=True)
    ]


def answer_file(
    file: AnswerFile, rows: list[dict], engine: LtuEngine, args: argparse.Namespace, ranks: Ranks
) -> list[Answer]:
    """Ask what is not answered yet, and write the whole file. Returns the answers of all rows; on rank 0 only."""
    requests = make_requests(rows, args)
    keys = make_keys(requests, engine, args, ranks)
    # Read by rank 0 alone: by the time that others did, it might have added to it.
    kept = (
        {key for key, answer in file.merge().items() if answer.answered}
        if ranks.rank == 0
        else None
    )
    kept = ranks.gather(kept)[0]
    todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in kept}
    clips = list(
        dict.fromkeys(key[0] or key[1] for key in todo)
    )  # Questions without a clip are spread as if each had.
    own = set(clips[ranks.rank :: ranks.size])
    mine = [key for key in todo if (key[0] or key[1]) in own]
    start = time.perf_counter()
    answering = engine.run([todo[key] for key in mine], args.batch_size, args.seed, **args.decoding)
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
    print_summary(str(file.path), answers)
    rate = sum(found[key].answered for key in todo) / seconds
    print(
        f"  {sum(key in kept for key in keys)} from the partial file; asked {len(todo)}, {rate:.2f} questions/s"
    )
    for answer in [answer for answer in answers if not answer.answered][:20]:
        print(f"  {answer.error}", file=sys.stderr)
    return answers


def print_summary(name: str, answers: list[Answer]) -> None:
    """What became of the questions, and how much of their clips was heard."""
    counts = Counter(answer.status for answer in answers).most_common()
    answered = sum(answer.answered for answer in answers)
    heard, total = (
        sum(answer.seconds_heard for answer in answers),
        sum(answer.seconds_total for answer in answers),
    )
    print(f"{name}: {', '.join(f'{status} {count}' for status, count in counts)}")
    print(f"  answered {answered} of {len(answers)} questions; heard {heard:.1f} of {total:.1f} s")
