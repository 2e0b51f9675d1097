"""Answers the questions of dataset files in one process or several, and resumes stopped runs."""

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

MAX_ERRORS_SHOWN = 20


class Ranks:
    """The processes of a torchrun, or this one alone."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:  # One rank may wait for another as long as a run lasts.
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))

    def gather(self, value: Any = None) -> list:
        """Return the values of all ranks, in each rank. A rank waits here for all others."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def close(self) -> None:
        if self.size > 1:
            torch.distributed.destroy_process_group()


def make_prediction(example: dict, answer: Answer) -> dict:
    """Make one entry of a predictions file."""
    fields = asdict(answer)
    for name in ("seconds_heard", "seconds_total"):
        fields[name] = round(fields[name], 3)
    prediction = {
        "prompt": example["instruction"],
        "pred": fields.pop("text"),
        "ref": example.get("output"),
        "audio_id": example.get("audio_id"),
    }
    return prediction | fields


def make_requests(examples: list[dict], args: argparse.Namespace) -> list[Request]:
    return [
        Request(
            example["instruction"],
            example["audio"],
            example.get("input"),
            example.get("audio_id"),
            mode=args.mode,
            num_chunks=args.num_chunks,
        )
        for example in examples
    ]


def make_keys(
    requests: list[Request], engine: LtuEngine, args: argparse.Namespace, ranks: Ranks
) -> list[Key]:
    """Make a key for each request of everything that its answer depends on.

    Each rank hashes a part of the clips.
    """
    settings = [
        engine.kind,
        engine.checkpoint,
        engine.model.config.language_model_sha256,
        str(engine.model.get_input_embeddings().weight.dtype),
        args.quantization,
        engine.processor.to_dict(),  # With the prompt template and the audio encoder's input.
        engine.processor.tokenizer.get_vocab(),
        engine.processor.front_end.settings,
        check_decoding(args.decoding),
        args.seed,
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    clips = {(request.audio, request.audio_id): request for request in requests if request.audio}
    own_clips = list(clips)[ranks.rank :: ranks.size]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(
            lambda clip: engine.clip_hash(clips[clip]) or f"unread: {clip}", own_clips
        )
        parts = ranks.gather(dict(zip(own_clips, hashes, strict=True)))
    hash_of_clip: dict[tuple, str | None] = {}
    for part in parts:
        hash_of_clip |= part
    keys = []
    for request in requests:
        clip = hash_of_clip.get((request.audio, request.audio_id))
        keys.append(
            (clip, request.question, request.transcript, request.mode, request.num_chunks, digest)
        )
    return keys


def answer_file(
    file: AnswerFile,
    examples: list[dict],
    engine: LtuEngine,
    args: argparse.Namespace,
    ranks: Ranks,
) -> list[Answer]:
    """Answer the questions that have no answer yet, and write the whole predictions file.

    Returns:
        the answers of all examples on rank 0; nothing on other ranks.
    """
    requests = make_requests(examples, args)
    keys = make_keys(requests, engine, args, ranks)
    # Only rank 0 reads the partial file: it might have changed by the time that others read it.
    answered = None
    if ranks.rank == 0:
        answered = {key for key, answer in file.merge().items() if answer.answered}
    answered = ranks.gather(answered)[0]
    todo = {
        key: request for key, request in zip(keys, requests, strict=True) if key not in answered
    }
    # Questions about one clip go to one rank. Those without a clip are spread by their text.
    clips = list(dict.fromkeys(key[0] or key[1] for key in todo))
    own_clips = set(clips[ranks.rank :: ranks.size])
    own_keys = [key for key in todo if (key[0] or key[1]) in own_clips]
    start = time.perf_counter()
    own_requests = [todo[key] for key in own_keys]
    answers_of_run = engine.run(own_requests, args.batch_size, args.seed, **args.decoding)
    progress = tqdm(
        answers_of_run,
        "answering",
        len(own_keys),
        unit="question",
        disable=ranks.rank > 0 or not own_keys,
    )
    for index, answer in progress:
        file.append(own_keys[index], answer)
    ranks.gather()
    if ranks.rank > 0:
        return []
    seconds = time.perf_counter() - start
    found = file.merge()
    answers = [found[key] for key in keys]
    file.write(
        [
            make_prediction(example, answer)
            for example, answer in zip(examples, answers, strict=True)
        ]
    )
    print_summary(str(file.path), answers)
    rate = sum(found[key].answered for key in todo) / seconds
    num_stored = sum(key in answered for key in keys)
    print(f"  {num_stored} from the partial file; generated {len(todo)}, {rate:.2f} questions/s")
    failed = [answer for answer in answers if not answer.answered]
    for answer in failed[:MAX_ERRORS_SHOWN]:
        print(f"  {answer.error}", file=sys.stderr)
    return answers


def print_summary(name: str, answers: list[Answer]) -> None:
    """Print the number of answers by status, and how much of their clips was used."""
    counts = Counter(answer.status for answer in answers).most_common()
    num_answered = sum(answer.answered for answer in answers)
    seconds_used = sum(answer.seconds_heard for answer in answers)
    seconds_total = sum(answer.seconds_total for answer in answers)
    print(f"{name}: {', '.join(f'{status} {count}' for status, count in counts)}")
    print(
        f"  answered {num_answered} of {len(answers)} questions; "
        f"used {seconds_used:.1f} of {seconds_total:.1f} s of audio"
    )
