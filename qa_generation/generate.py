"""Generates questions and answers about clips with a language model.

    python -m qa_generation.generate --source audioset_strong --input META.json \\
        --output QA.json --model gpt-4o-mini
    ... --base_url http://127.0.0.1:8000/v1    any OpenAI-compatible endpoint
    ... --local --model DIR_OR_ID              a Hugging Face model on this machine
    ... --dry_run                              print requests and tokens; with --price, dollars

META.json is a list (or JSON lines) of what `qa_generation/metadata_prompts.py` describes. The key
of the endpoint is read from $OPENAI_API_KEY. A dry run sends nothing.

A run can be stopped at any time, also with kill -9, and resumes when it is started again: replies
are stored in QA.json.replies.jsonl, and a stored reply is not paid again. After a first Ctrl-C,
requests in flight are completed.

QA.json depends only on META.json and the replies, not on the order of their arrival. Next to it
are the rejected texts and the reasons (.rejects.jsonl) and the provenance (.provenance.json).

A clip may occur more than once, with different facts: it gets no question and no answer twice. The
examples of other sources about the same clips count too if --previous_files names them, as for
joint_v2 with --previous_files JOINT_V1.json.

The exit status is 1 if generation stopped early or more than --max_bad clips have no reply. A run
without any reply writes no examples.
"""

import argparse
import asyncio
import hashlib
import json
import signal
import sys
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from ltu.files import run_command
from qa_generation.cost_estimate import CostEstimate
from qa_generation.filters import FILTERS
from qa_generation.generate_for_clip import Generator, Prompts, load_prompts
from qa_generation.llm import GenerationStopped, Llm, LlmSettings, ReplyStore
from qa_generation.metadata import Clips, read_metadata, read_pairs
from qa_generation.metadata_prompts import SOURCES, MetadataRow, Source
from qa_generation.output_files import (
    Counts,
    ExampleWriter,
    OutputPaths,
    Provenance,
    hash_file,
    write_whole,
)

MAX_SHOWN_ERRORS = 20  # metadata rows whose error is printed
INTERRUPTED = "stopped at once. Run it again to resume; no stored reply is paid twice."


# ---- replies -------------------------------------------------------------------------------------


def generate_replies(generator: Generator, llm: Llm, clips: Clips) -> None:
    """Generate and store the replies for all clips.

    The reason of an early stop is printed at once, because writing the examples may fail for the
    same reason.
    """
    warn_of_unused_replies(generator, llm, clips)
    try:
        asyncio.run(store_replies(generator, llm, clips))
    except GenerationStopped as error:
        print(
            f"stopped: {error}. Run it again to resume; no stored reply is paid twice.",
            file=sys.stderr,
        )


def warn_of_unused_replies(generator: Generator, llm: Llm, clips: Clips) -> None:
    """Print a note if there are stored replies, and none of them fits this run."""
    num_stored = len(llm.store.offsets)
    if not num_stored:
        return
    offline = Llm(llm.settings, llm.store, is_offline=True)
    has_any_reply = generator.has_any_reply(offline, clips)
    if not has_any_reply and not offline.counts["stored"]:
        print(
            f"note: none of the {num_stored} replies in {llm.store.path} fits the requests of "
            "this run: prompt, model, settings or metadata differ. All requests are sent.",
            file=sys.stderr,
        )


async def store_replies(generator: Generator, llm: Llm, clips: Clips) -> None:
    """Generate and store the replies for all clips, with a progress bar.

    Raises:
        GenerationStopped: Not all replies are there.
    """
    num_examples = 0
    num_rejects = 0
    stop_on_signals(llm)
    with tqdm(total=len(clips), unit="clip", desc="generating", file=sys.stderr) as bar:

        async def generate_clip(rows: list[MetadataRow]) -> None:
            nonlocal num_examples, num_rejects
            result = await generator.generate_clip(llm, rows)
            num_examples += len(result.examples)
            num_rejects += len(result.rejects)
            bar.set_postfix_str(describe_progress(llm, num_examples, num_rejects), refresh=False)
            bar.update()

        await llm.run(partial(generate_clip, rows) for rows in clips.values())


def stop_on_signals(llm: Llm) -> None:
    """Stop generation on a first SIGINT or SIGTERM. A second one ends the run at once."""
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        llm.stop(number.name)
        loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)


def describe_progress(llm: Llm, num_examples: int, num_rejects: int) -> str:
    """Return the text after the progress bar."""
    # Every other count of llm is a reason of a retry.
    num_without_retry = llm.counts["answered"] + llm.counts["stored"] + llm.counts["failed"]
    num_retries = llm.counts.total() - num_without_retry
    return (
        f"{llm.store.tokens} tokens, rejects {num_rejects} of {num_examples + num_rejects}, "
        f"retries {num_retries}, failed {llm.counts['failed']}"
    )


# ---- outputs -------------------------------------------------------------------------------------


def write_examples(paths: OutputPaths, generator: Generator, offline: Llm, clips: Clips) -> Counts:
    """Write the examples and the rejects, from the store alone.

    Args:
        offline: Has used no reply yet.
    """
    is_list = paths.examples.suffix == ".json"
    with write_whole(paths.examples) as examples_file, write_whole(paths.rejects) as rejects_file:
        writer = ExampleWriter(examples_file, rejects_file, is_list)

        async def write_clips() -> None:
            for audio_id, rows in clips.items():
                writer.write(audio_id, await generator.generate_clip(offline, rows))

        asyncio.run(write_clips())
        writer.end()
    counts = writer.counts
    counts.prompt_tokens = offline.used_prompt_tokens
    counts.completion_tokens = offline.used_completion_tokens
    return counts


def hash_prompts(prompts: Prompts) -> dict[str, str]:
    """Return the sha256 of each prompt."""
    hashes = {}
    for name, text in asdict(prompts).items():
        if text is not None:
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def print_errors(errors: list[str]) -> None:
    """Print the errors of metadata rows, at most MAX_SHOWN_ERRORS of them."""
    for line in errors[:MAX_SHOWN_ERRORS]:
        print(line, file=sys.stderr)
    if len(errors) > MAX_SHOWN_ERRORS:
        print(f"... and {len(errors) - MAX_SHOWN_ERRORS} more metadata rows", file=sys.stderr)


def print_estimate(
    replies: Path,
    generator: Generator,
    settings: LlmSettings,
    clips: Clips,
    price: list[float] | None,
) -> None:
    """Print what a run would send. No file is created."""
    if not replies.exists():
        CostEstimate(generator, settings, None).report(clips, price)
        return
    with ReplyStore(replies) as store:
        stored = Llm(settings, store, is_offline=True)
        CostEstimate(generator, settings, stored).report(clips, price)


def print_costs(llm: Llm) -> None:
    """Print the requests of this run and the tokens of all runs."""
    if llm.counts:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(llm.counts.items()))
        print(f"requests: {counts}")
    store = llm.store
    unanswered = f"{store.unanswered_tokens} reserved for tries without a reply"
    print(
        f"tokens: {store.tokens} spent, {unanswered}, which may be billed; "
        f"by all runs with {store.path}"
    )


# ---- command -------------------------------------------------------------------------------------


def adapt_source(name: str, count: int | None, min_words: int | None) -> Source:
    """Return a source with the count and min_words of the user."""
    source = SOURCES[name]
    if count is not None:
        source = replace(source, count=count)
    if min_words is not None:
        source = replace(source, min_words=min_words)
    return source


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; end the command if one of them makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = LlmSettings("")
    add = parser.add_argument
    add("--source", required=True, choices=SOURCES, help="The format of the metadata.")
    add("--input", required=True, type=Path, help="Metadata file: a JSON list or JSON lines.")
    add(
        "--output",
        required=True,
        type=Path,
        help="Dataset file to write: .json (a list) or .jsonl (JSON lines).",
    )
    add(
        "--model",
        required=True,
        nargs="+",
        help="Name of the model at the endpoint; of several, each clip uses one.",
    )
    add(
        "--local",
        action="store_true",
        help="--model is a folder or hub id of a Hugging Face model, which runs on this machine.",
    )
    add("--base_url", help="URL of the endpoint (default: $OPENAI_BASE_URL, or OpenAI's).")
    add(
        "--key_from",
        default=default.key_from,
        help="Environment variable with the key (default: %(default)s).",
    )
    add(
        "--temperature",
        type=float,
        default=default.temperature,
        help="Sampling temperature (default: %(default)s).",
    )
    add(
        "--max_tokens",
        type=int,
        help="Maximum length of a reply (default: 100 per question, at least 1024).",
    )
    add(
        "--extra",
        type=json.loads,
        default={},
        help='Further fields of a request as JSON, e.g. {"top_p": 0.9}.',
    )
    add(
        "--concurrency",
        type=int,
        default=default.concurrency,
        help="Number of requests at the same time; batch size with --local (default: %(default)s).",
    )
    add(
        "--tries",
        type=int,
        default=default.tries,
        help="Maximum number of tries of a request, before its clip is left out "
        "(default: %(default)s).",
    )
    add(
        "--timeout",
        type=float,
        default=default.timeout,
        help="Seconds for a try (default: %(default)s).",
    )
    add(
        "--token_budget",
        type=int,
        help="Tokens of prompts and replies that all runs with this file of replies may use.",
    )
    add(
        "--max_attempts",
        type=int,
        default=2,
        help="Maximum number of requests for a clip until a reply has a usable pair "
        "(default: %(default)s).",
    )
    add("--replies", type=Path, help="File of stored replies (default: next to the output).")
    add(
        "--prompt",
        type=Path,
        help="Text file instead of the source's prompt; $count and $format are filled in.",
    )
    add("--count", type=int, help="Number of questions per clip (default: the source's).")
    add("--min_words", type=int, help="Minimum length of an answer (default: the source's).")
    add(
        "--disable_filters",
        nargs="*",
        default=[],
        choices=FILTERS,
        help="Filters that drop nothing.",
    )
    add("--dataset", help="Dataset of metadata rows that name none (default: the source).")
    add(
        "--previous_files",
        nargs="+",
        type=Path,
        default=[],
        help="Dataset files whose questions and answers count as duplicates; JSON lines are "
        "streamed.",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="Seed of the models and of the questions for summaries that are sampled.",
    )
    add(
        "--max_bad",
        type=int,
        default=0,
        help="Exit with 0 if at most this many clips and metadata rows have no reply.",
    )
    add("--dry_run", action="store_true", help="Print requests and tokens, and send nothing.")
    add(
        "--price",
        nargs=2,
        type=float,
        metavar=("IN", "OUT"),
        help="Dollars per million tokens of prompts and of replies, for --dry_run.",
    )
    args = parser.parse_args(argv)
    positive = (args.concurrency, args.tries, args.max_attempts, args.count, args.max_tokens)
    is_too_small = any(value is not None and value < 1 for value in positive)
    if is_too_small or (args.min_words or 0) < 0:
        parser.error(
            "--concurrency, --tries, --max_attempts, --count and --max_tokens are 1 or more, "
            "--min_words 0 or more"
        )
    if not (args.timeout > 0 and isinstance(args.extra, dict)):
        parser.error("--timeout is more than 0 s; --extra is a JSON object")
    if args.local and len(args.model) > 1:
        parser.error("--local takes one --model")
    return args


def main(argv: list[str] | None = None) -> int:
    """Generate questions and answers, and write them with rejects and provenance."""
    args = parse_args(argv)
    paths = OutputPaths.next_to_examples(args.output, args.replies)
    inputs = [args.input, *args.previous_files]
    if args.prompt:
        inputs.append(args.prompt)
    paths.check(inputs)
    # Hash the files now: they may change while replies are generated.
    input_sha256 = hash_file(args.input)
    previous_files_sha256 = {str(path): hash_file(path) for path in args.previous_files}

    source = adapt_source(args.source, args.count, args.min_words)
    settings = LlmSettings(
        args.model[0],
        temperature=args.temperature,
        max_tokens=args.max_tokens or max(1024, 100 * source.count),
        extra=args.extra,
        is_local=args.local,
        base_url=args.base_url,
        key_from=args.key_from,
        concurrency=args.concurrency,
        tries=args.tries,
        timeout=args.timeout,
        token_budget=args.token_budget,
    )
    prompts = load_prompts(source, args.prompt)
    metadata = read_metadata(args.input, source, args.dataset or args.source)
    clips = metadata.clips
    generator = Generator(
        source=source,
        prompts=prompts,
        models=args.model,
        filters=tuple(name for name in FILTERS if name not in args.disable_filters),
        max_attempts=args.max_attempts,
        seed=args.seed,
        known_pairs=read_pairs(args.previous_files, clips),
    )
    print_errors(metadata.errors)
    if args.dry_run:
        print_estimate(paths.replies, generator, settings, clips, args.price)
        return 0

    paths.examples.parent.mkdir(parents=True, exist_ok=True)
    with ReplyStore(paths.replies) as store:
        llm = Llm(settings, store)
        generate_replies(generator, llm, clips)
        # Write nothing if there is metadata but no reply to any of it.
        has_no_metadata = not clips and not metadata.errors
        offline = Llm(settings, store, is_offline=True)
        is_written = has_no_metadata or generator.has_any_reply(offline, clips)
        if is_written:
            offline = Llm(settings, store, is_offline=True)
            counts = write_examples(paths, generator, offline, clips)
            counts.repeated_metadata_rows = metadata.num_repeats
            counts.invalid_metadata_rows = len(metadata.errors)
            packages = ("torch", "transformers") if args.local else ("openai",)
            provenance = Provenance(
                source=args.source,
                count=source.count,
                min_words=source.min_words,
                input=str(args.input),
                input_sha256=input_sha256,
                previous_files_sha256=previous_files_sha256,
                versions={name: version(name) for name in packages},
                llm=settings.record() | {"model": args.model},
                prompts_sha256=hash_prompts(prompts),
                seed=args.seed,
                filters=list(generator.filters),
                max_attempts=args.max_attempts,
                counts=counts,
            )
            provenance.write(paths.provenance)
            print(counts)
        else:
            print(
                f"no clip has a reply: {paths.examples} is as it was, "
                "its rejects and provenance too.",
                file=sys.stderr,
            )
    print_costs(llm)
    if llm.stopped or not is_written:
        return 1
    num_bad = counts.clips_without_reply + counts.invalid_metadata_rows
    return int(num_bad > args.max_bad)


if __name__ == "__main__":
    run_command(main, INTERRUPTED)
