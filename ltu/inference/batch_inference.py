"""Answers the questions of dataset files in one process or several, and resumes stopped runs."""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ltu.inference.engine import LtuEngine
from ltu.inference.generation_flags import add_generation_flags, read_decoding_flags
from ltu.inference.predictions_file import Key, PredictionsFile
from ltu.inference.requests import Answer, Request
from ltu.inference.sampling import check_decoding

MAX_ERRORS_SHOWN = 20


@dataclass(frozen=True)
class BatchSettings:
    """How the questions of dataset files are answered.

    Args:
        batch_size: the number of questions that are answered at once.
        seed: of the random generator used for sampling.
        decoding: the settings of `generate`.
        mode: "joint", "audio_only" or "asr_only", see `ltu.inference.requests`.
        num_chunks: how many chunks of each clip are used; 0 for all.
        quantization: with which the engine is opened. Answers of one quantization are not used for
            another.
    """

    batch_size: int = 8
    seed: int = 42
    decoding: dict[str, Any] = field(default_factory=dict)
    mode: str = "joint"
    num_chunks: int = 1
    quantization: str | None = None

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> "BatchSettings":
        """Return the settings that the flags of `add_batch_flags` describe.

        Raises:
            ValueError: a setting of `generate` is impossible.
        """
        return cls(
            batch_size=flags.batch_size,
            seed=flags.seed,
            decoding=read_decoding_flags(flags),
            mode=flags.mode,
            num_chunks=flags.num_chunks,
            quantization=flags.quantization,
        )


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the engine, of generation and of `BatchSettings`."""
    parser.add_argument(
        "--batch_size", type=int, default=8, help="Number of questions that are answered at once."
    )
    add_generation_flags(parser)


def refuse_outputs(
    parser: argparse.ArgumentParser, inputs: Sequence[str | Path], outputs: Sequence[str | Path]
) -> None:
    """End the command, before hours of work, if an output is an input, given twice, or a folder."""
    input_paths = {Path(path).absolute() for path in inputs}
    output_paths = [Path(path).absolute() for path in outputs]
    if len({*output_paths, *input_paths}) < len(output_paths) + len(input_paths):
        parser.error("an --output_path is that of another file, or of the questions themselves")
    for path in output_paths:
        if path.is_dir():
            parser.error(f"--output_path {path} is a folder; name a file in it")


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


def make_requests(examples: list[dict], settings: BatchSettings) -> list[Request]:
    """Make a request of each example, as `ltu.data.check_examples` reads it."""
    requests = []
    for example in examples:
        request = Request(
            example["instruction"],
            example["audio"],
            example.get("input"),
            example.get("audio_id"),
            mode=settings.mode,
            num_chunks=settings.num_chunks,
        )
        requests.append(request)
    return requests


def make_keys(
    requests: list[Request], engine: LtuEngine, settings: BatchSettings, ranks: Ranks
) -> list[Key]:
    """Make a key for each request of everything that its answer depends on.

    Each rank hashes a part of the clips.
    """
    decisive = [
        engine.kind,
        engine.checkpoint,
        engine.language_model_sha256,
        engine.model.config.encoder_sha256,
        str(engine.model.get_input_embeddings().weight.dtype),
        settings.quantization,
        engine.processor.to_dict(),  # With the prompt template and the audio encoder's input.
        engine.processor.tokenizer.get_vocab(),
        engine.processor.front_end.settings,
        check_decoding(settings.decoding),
        settings.seed,
        *engine.backend,
    ]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()
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


def lock_all(outputs: list[PredictionsFile]) -> None:
    for output in outputs:
        output.lock()


def answer_files(
    files: dict[str | Path, list[dict]],
    open_engine: Callable[[], LtuEngine],
    settings: BatchSettings,
    max_bad: int = 0,
) -> bool:
    """Answer the questions of several dataset files, and write a predictions file of each.

    Args:
        files: path of the predictions file -> examples, as `ltu.data.check_examples` reads them.
        open_engine: opens the model, when all outputs are locked.
        max_bad: how many questions may have no answer.

    Returns:
        whether more than `max_bad` questions have no answer; then the partial files stay. On ranks
        other than 0, False.

    Raises:
        ValueError: another run writes one of the outputs.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(closing(Ranks()))
        outputs = []
        for path in files:
            outputs.append(stack.enter_context(closing(PredictionsFile(path, ranks.rank))))
        # Rank 0 locks first and finds out whether another run writes the files.
        if ranks.rank == 0:
            lock_all(outputs)
        ranks.gather()
        if ranks.rank > 0:
            lock_all(outputs)
        ranks.gather()
        engine = open_engine()
        answers = []
        for output, examples in zip(outputs, files.values(), strict=True):
            answers += write_predictions(output, examples, engine, settings, ranks)
        if ranks.rank > 0:
            return False
        num_failed = sum(not answer.answered for answer in answers)
        has_failed = num_failed > max_bad
        if len(outputs) > 1:
            print_summary("together", answers)
        if has_failed:
            print(
                "The partial files stay. Fix the clips and run it again; only questions without an "
                "answer are answered then.",
                file=sys.stderr,
            )
        for output in outputs:
            output.finish(keep_partial=has_failed)
    return has_failed


def write_predictions(
    file: PredictionsFile,
    examples: list[dict],
    engine: LtuEngine,
    settings: BatchSettings,
    ranks: Ranks,
) -> list[Answer]:
    """Answer the questions that have no answer yet, and write the whole predictions file.

    Returns:
        the answers of all examples on rank 0; nothing on other ranks.
    """
    requests = make_requests(examples, settings)
    keys = make_keys(requests, engine, settings, ranks)
    # Only rank 0 reads the partial file: it might have changed by the time that others read it.
    stored = set()
    if ranks.rank == 0:
        for key, answer in file.merge().items():
            if answer.answered:
                stored.add(key)
    stored = ranks.gather(stored)[0]
    todo = {}
    for key, request in zip(keys, requests, strict=True):
        if key not in stored:
            todo[key] = request
    start = time.perf_counter()
    _answer_own_part(file, todo, engine, settings, ranks)
    ranks.gather()
    if ranks.rank > 0:
        return []
    seconds = time.perf_counter() - start
    found = file.merge()
    answers = [found[key] for key in keys]
    predictions = []
    for example, answer in zip(examples, answers, strict=True):
        predictions.append(make_prediction(example, answer))
    file.write(predictions)
    print_summary(str(file.path), answers)
    num_new = sum(found[key].answered for key in todo)
    num_stored = sum(key in stored for key in keys)
    print(
        f"  {num_stored} from the partial file; generated {len(todo)}, "
        f"{num_new / seconds:.2f} questions/s"
    )
    failed = [answer for answer in answers if not answer.answered]
    for answer in failed[:MAX_ERRORS_SHOWN]:
        print(f"  {answer.error}", file=sys.stderr)
    return answers


def _answer_own_part(
    file: PredictionsFile,
    todo: dict[Key, Request],
    engine: LtuEngine,
    settings: BatchSettings,
    ranks: Ranks,
) -> None:
    """Answer this rank's part of the requests, and append the answers to its partial file.

    Requests about one clip go to one rank. Those without a clip are spread by their text.
    """
    clip_of_key = {}
    for key in todo:
        clip, question, *_ = key
        clip_of_key[key] = clip or question
    clips = list(dict.fromkeys(clip_of_key.values()))
    own_clips = set(clips[ranks.rank :: ranks.size])
    own_keys = [key for key in todo if clip_of_key[key] in own_clips]
    own_requests = [todo[key] for key in own_keys]
    answers = engine.run(own_requests, settings.batch_size, settings.seed, **settings.decoding)
    progress = tqdm(
        answers,
        "answering",
        len(own_keys),
        unit="question",
        disable=ranks.rank > 0 or not own_keys,
    )
    for index, answer in progress:
        file.append(own_keys[index], answer)


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
    with_warnings = [answer for answer in answers if answer.warnings]
    if with_warnings:
        first = " ".join(with_warnings[0].warnings)
        print(
            f"  answers with `warnings`: {len(with_warnings)}. The first: {first}", file=sys.stderr
        )
