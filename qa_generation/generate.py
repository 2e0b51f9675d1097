"""Generates questions and answers about clips with a language model.

    python -m qa_generation.generate --source audioset_strong --input META.json \\
        --output ROWS.json --model gpt-4o-mini
    ... --base_url http://127.0.0.1:8000/v1    any OpenAI-compatible endpoint
    ... --local --model DIR_OR_ID              a Hugging Face model on this machine
    ... --dry_run                              print requests and tokens; with --price, dollars

META.json is a list (or JSON lines) of what `qa_generation/metadata_prompts.py` describes. The key
of the endpoint is read from $OPENAI_API_KEY. A dry run sends nothing.

A run can be stopped at any time, also with kill -9, and resumes when it is started again: replies
are stored in ROWS.json.replies.jsonl, and a stored reply is not paid again. After a first Ctrl-C,
requests in flight are completed.

ROWS.json depends only on META.json and the replies, not on the order of their arrival. Next to it
are the rejected texts and the reasons (.rejects.jsonl) and the provenance (.provenance.json).

A clip may occur more than once, with different facts: it gets no question and no answer twice. The
examples of other sources about the same clips count too if --against names them, as for joint_v2
with --against JOINT_V1.json.

The exit status is 1 if generation stopped early or more than --max_bad clips have no reply. A run
without any reply writes no examples.
"""

import argparse
import asyncio
import hashlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from qa_generation.filters import FILTERS
from qa_generation.generate_for_clip import Estimate, Generator
from qa_generation.llm import GenerationStopped, Llm, LlmSettings, ReplyStore
from qa_generation.metadata import Clips, read_metadata, read_pairs
from qa_generation.metadata_prompts import SOURCES, Row
from qa_generation.qa_json import Reject

SHOWN_ERRORS = 20  # metadata rows whose error is printed


@contextmanager
def write_whole(path: Path) -> Iterator[IO]:
    """Open a file that appears as a whole when the block ends, and not at all if it fails."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)  # On a full disk it would only take space.
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


async def store_replies(generator: Generator, llm: Llm, clips: Clips) -> None:
    """Generate and store the replies for all clips, with a progress bar.

    Raises:
        GenerationStopped: Not all replies are there.
    """
    counts: Counter = Counter()
    _stop_on_signals(llm)
    with tqdm(total=len(clips), unit="clip", desc="generating", file=sys.stderr) as bar:

        async def job(rows: list[Row]) -> None:
            examples, rejects, _ = await generator.generate_clip(llm, rows)
            counts.update(rows=len(examples), rejects=len(rejects))
            bar.set_postfix_str(_progress(counts, llm), refresh=False)
            bar.update()

        await llm.run((lambda rows=rows: job(rows)) for rows in clips.values())


def _stop_on_signals(llm: Llm) -> None:
    """Stop generation on a first SIGINT or SIGTERM. A second one ends the run at once."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):

        def stop(number: int = number) -> None:
            llm.stop(signal.Signals(number).name)
            loop.remove_signal_handler(number)

        loop.add_signal_handler(number, stop)


def _progress(counts: Counter, llm: Llm) -> str:
    """Return the text after the progress bar."""
    total = counts["rows"] + counts["rejects"]
    # Every other count of llm is a reason of a retry.
    no_retries = llm.counts["answered"] + llm.counts["stored"] + llm.counts["failed"]
    retries = sum(llm.counts.values()) - no_retries
    return (
        f"{llm.store.tokens} tokens, rejects {counts['rejects']} of {total}, "
        f"retries {retries}, failed {llm.counts['failed']}"
    )


def write_rows(output: Path, generator: Generator, llm: Llm, clips: Clips) -> Counter:
    """Write the examples and the rejects, from the store alone.

    Returns:
        Counts. Among them are "clips not answered", in part or at all, and the tokens of the
        replies that were used.
    """
    counts: Counter = Counter(clips=len(clips))
    offline = Llm(llm.settings, llm.store, is_offline=True)
    is_list = output.suffix == ".json"

    async def write_clips(file: IO, rejects_file: IO) -> None:
        file.write("[\n" if is_list else "")
        for audio_id, rows in clips.items():
            examples, rejects, failed = await generator.generate_clip(offline, rows)
            counts["clips not answered"] += failed > 0
            _write_examples(file, examples, is_list, counts)
            counts["clips without a row"] += not examples and not failed
            _write_rejects(rejects_file, audio_id, rejects, counts)
        file.write("\n" if counts["rows"] else "")
        file.write("]\n" if is_list else "")

    rejects_path = Path(f"{output}.rejects.jsonl")
    with write_whole(output) as file, write_whole(rejects_path) as rejects_file:
        asyncio.run(write_clips(file, rejects_file))
    counts.update(offline.used)
    return counts


def _write_examples(file: IO, examples: list[Row], is_list: bool, counts: Counter) -> None:
    """Append examples to an open JSON list or to JSON lines, and count them."""
    separator = ",\n" if is_list else "\n"
    for example in examples:
        if counts["rows"]:
            file.write(separator)
        json.dump(example, file, ensure_ascii=False)
        counts["rows"] += 1


def _write_rejects(file: IO, audio_id: str, rejects: list[Reject], counts: Counter) -> None:
    """Append what was dropped of a clip as JSON lines, and count the reasons."""
    for reject in rejects:
        counts[f"dropped: {reject.reason}"] += 1
        line = {"audio_id": audio_id, "reason": reject.reason, "text": reject.text}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def digest(path: Path) -> str:
    """Return the sha256 of a file of any size."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def provenance(
    args: argparse.Namespace, generator: Generator, settings: LlmSettings, counts: Counter
) -> dict[str, Any]:
    """Return how the examples were made.

    It is the same for the same examples, however often the run was interrupted.
    """
    prompts = {}
    for name, text in generator.prompts.items():
        prompts[name] = hashlib.sha256(text.encode()).hexdigest()
    packages = ("torch", "transformers") if args.local else ("openai",)
    return {
        "source": args.source,
        "count": generator.source.count,
        "min_words": generator.source.min_words,
        "input": str(args.input),
        "input_sha256": args.digests[args.input],
        "against_sha256": {str(path): args.digests[path] for path in args.against},
        "versions": {name: version(name) for name in packages},
        "llm": settings.record() | {"model": args.model},
        "prompts_sha256": prompts,
        "seed": args.seed,
        "filters": list(generator.drops),
        "max_attempts": generator.max_attempts,
        "counts": dict(sorted(counts.items())),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; end the command if one of them makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    own = LlmSettings("")
    add("--source", required=True, choices=SOURCES, help="format of the metadata")
    add("--input", required=True, type=Path, help="metadata file: a JSON list or JSON lines")
    add(
        "--output",
        required=True,
        type=Path,
        help="dataset file to write: .json (a list) or .jsonl (JSON lines)",
    )
    add("--model", required=True, nargs="+", help="model; of several, each clip uses one")
    add(
        "--local", action="store_true", help="--model is a folder or hub id of a Hugging Face model"
    )
    add("--base_url", help="URL of the endpoint (default: $OPENAI_BASE_URL, or OpenAI's)")
    add("--key_from", default=own.key_from, help="environment variable with the key")
    add("--temperature", type=float, default=own.temperature, help="sampling temperature")
    add(
        "--max_tokens",
        type=int,
        help="maximum length of a reply (default: 100 per question, at least 1024)",
    )
    add(
        "--extra",
        type=json.loads,
        default={},
        help='further fields of a request as JSON, e.g. {"top_p": 0.9}',
    )
    add(
        "--concurrency",
        type=int,
        default=own.concurrency,
        help="number of requests at the same time",
    )
    add(
        "--tries",
        type=int,
        default=own.tries,
        help="tries of a request before its clip is left out",
    )
    add("--timeout", type=float, default=own.timeout, help="seconds for a try")
    add(
        "--token_budget",
        type=int,
        help="tokens of prompts and replies that all runs with this file of replies may use",
    )
    add(
        "--max_attempts",
        type=int,
        default=2,
        help="maximum number of requests for a clip until a reply has a usable pair",
    )
    add("--replies", type=Path, help="file of stored replies (default: next to the output)")
    add(
        "--prompt",
        type=Path,
        help="text file instead of the source's prompt; $count and $format are filled in",
    )
    add("--count", type=int, help="questions per clip (default: the source's)")
    add("--min_words", type=int, help="minimum length of an answer (default: the source's)")
    add("--keep", nargs="*", default=[], choices=FILTERS, help="filters to disable")
    add("--dataset", help="dataset of examples that name none (default: the source)")
    add(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        help="dataset files whose pairs count as duplicates; streamed if JSON lines",
    )
    add("--seed", type=int, default=0, help="seed of sampled models and questions of summaries")
    add(
        "--max_bad",
        type=int,
        default=0,
        help="clips and metadata rows that may stay without a reply at an exit status of 0",
    )
    add("--dry_run", action="store_true", help="print requests and tokens, and send nothing")
    add("--price", nargs=2, type=float, metavar=("IN", "OUT"), help="dollars per million tokens")
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


def check_paths(args: argparse.Namespace) -> None:
    """Set the default of --replies and check all paths, before anything is paid.

    Every output must be writable and differ from every input and every other output.

    Raises:
        ValueError, OSError: A path is wrong; the message names it.
    """
    if args.output.suffix not in (".json", ".jsonl"):
        raise ValueError(
            f"--output {args.output}: the output is .json (a list) or .jsonl (JSON lines)."
        )
    args.replies = args.replies or Path(f"{args.output}.replies.jsonl")
    outputs = [
        args.output,
        args.replies,
        Path(f"{args.output}.rejects.jsonl"),
        Path(f"{args.output}.provenance.json"),
    ]
    inputs = {path.resolve() for path in (args.input, args.prompt, *args.against) if path}
    distinct = {path.resolve() for path in outputs} | inputs
    if len(distinct) < len(outputs) + len(inputs):
        names = ", ".join(str(path) for path in outputs)
        raise ValueError(f"Each of these is written and must be a file of its own: {names}")
    folders = [str(path) for path in outputs if path.is_dir()]
    if folders:
        raise ValueError(f"{folders[0]} is a folder; a file is needed.")
    args.digests = {path: digest(path) for path in (args.input, *args.against)}


def make_generator(args: argparse.Namespace) -> tuple[Generator, LlmSettings]:
    """Return the generator and the settings of the language model that the flags describe."""
    source = SOURCES[args.source]
    if args.count is not None:
        source = replace(source, count=args.count)
    if args.min_words is not None:
        source = replace(source, min_words=args.min_words)
    settings = LlmSettings(
        args.model[0],
        max_tokens=args.max_tokens or max(1024, 100 * source.count),
        is_local=args.local,
        temperature=args.temperature,
        extra=args.extra,
        base_url=args.base_url,
        key_from=args.key_from,
        concurrency=args.concurrency,
        tries=args.tries,
        timeout=args.timeout,
        token_budget=args.token_budget,
    )
    drops = tuple(name for name in FILTERS if name not in args.keep)
    generator = Generator(source, args.model, args.prompt, drops, args.max_attempts, args.seed)
    return generator, settings


def generate(generator: Generator, llm: Llm, clips: Clips) -> None:
    """Generate the replies for all clips.

    The reason of an early stop is printed at once, because writing the examples may fail for the
    same reason.
    """
    offline = Llm(llm.settings, llm.store, is_offline=True)
    stored = len(llm.store.offsets)
    if stored:
        has_any = generator.has_any_reply(offline, clips)
        if not has_any and not offline.counts["stored"]:
            print(
                f"note: none of the {stored} replies in {llm.store.path} fits the requests of "
                "this run: prompt, model, settings or metadata differ. All requests are sent.",
                file=sys.stderr,
            )
    try:
        asyncio.run(store_replies(generator, llm, clips))
    except GenerationStopped as error:
        print(
            f"stopped: {error}. Run it again to resume; no stored reply is paid twice.",
            file=sys.stderr,
        )


def print_errors(errors: list[str]) -> None:
    """Print the errors of metadata rows, at most SHOWN_ERRORS of them."""
    for line in errors[:SHOWN_ERRORS]:
        print(line, file=sys.stderr)
    if len(errors) > SHOWN_ERRORS:
        print(f"... and {len(errors) - SHOWN_ERRORS} more rows", file=sys.stderr)


def print_estimate(
    args: argparse.Namespace, generator: Generator, settings: LlmSettings, clips: Clips
) -> None:
    """Print what a run would send. No file is created."""
    with ReplyStore(args.replies) if args.replies.exists() else nullcontext() as store:
        stored = Llm(settings, store, is_offline=True) if store else None
        Estimate(generator, settings, stored).report(clips, args.price)


def print_costs(llm: Llm) -> None:
    """Print the requests of this run and the tokens of all runs."""
    if llm.counts:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(llm.counts.items()))
        print(f"requests: {counts}")
    store = llm.store
    lost = f"{store.lost} reserved for tries without a reply, which may be billed"
    print(f"tokens: {store.tokens} spent, {lost}; by all runs with {store.path}")


def main(argv: list[str] | None = None) -> int:
    """Generate questions and answers, and write them with rejects and provenance."""
    args = parse_args(argv)
    check_paths(args)
    generator, settings = make_generator(args)
    clips, bad, repeats = read_metadata(args.input, generator.source, args.dataset or args.source)
    generator.earlier = read_pairs(args.against, clips)
    print_errors(bad)
    if args.dry_run:
        print_estimate(args, generator, settings, clips)
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with ReplyStore(args.replies) as store:
        llm = Llm(settings, store)
        generate(generator, llm, clips)
        # Write nothing if there is metadata but no reply to any of it.
        is_empty = not clips and not bad
        offline = Llm(settings, store, is_offline=True)
        is_written = is_empty or generator.has_any_reply(offline, clips)
        if is_written:
            counts = write_rows(args.output, generator, llm, clips)
            counts["metadata rows that repeat one"] += repeats
            counts["metadata rows that cannot be asked"] += len(bad)
            with write_whole(Path(f"{args.output}.provenance.json")) as file:
                found = provenance(args, generator, settings, counts)
                file.write(json.dumps(found, indent=1) + "\n")
            print("; ".join(f"{name} {count}" for name, count in counts.items()))
        else:
            print(
                f"no clip was answered: {args.output} is as it was, "
                "its rejects and provenance too.",
                file=sys.stderr,
            )
    print_costs(llm)
    if llm.stopped or not is_written:
        return 1
    return int(counts["clips not answered"] + len(bad) > args.max_bad)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        # It is a mistake of the user, and a traceback would hide the message.
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(
            "stopped at once. Run it again to resume; no stored reply is paid twice.",
            file=sys.stderr,
        )
        sys.exit(130)
