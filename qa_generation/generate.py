"""Questions and answers about clips, written by a language model from what is known of them.

    python -m qa_generation.generate --source audioset_strong --input META.json --output ROWS.json --model gpt-4o-mini
    ... --base_url http://127.0.0.1:8000/v1    any OpenAI-compatible endpoint; its key is in $OPENAI_API_KEY
    ... --local --model DIR_OR_ID              a Hugging Face model on this machine
    ... --dry_run                              nothing is asked: requests, tokens and, with --price, dollars

META.json is a list (or JSON lines) of what `qa_generation/sources.py` describes. Stop the run at any time, also with
kill -9, and start it again: replies are kept in ROWS.json.replies.jsonl, and what is there is not paid again. After a
first Ctrl-C requests on their way are waited for. ROWS.json depends on META.json and the replies only, not on the order
in which they came; beside it lie what was dropped and why (.rejects.jsonl) and how it was made (.provenance.json).
A clip may come more than once, with different facts: it gets no question and no answer twice. Other sources' rows about
the same clips count too where they are named, as for joint_v2 with --against JOINT_V1.json.
Exits with 1 when asking stopped early or more than --max_bad clips could not be asked. A run that was answered nothing
writes no rows.
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
from qa_generation.generator import Estimate, Generator
from qa_generation.llm import Llm, LlmSettings, ReplyStore, StopAsking
from qa_generation.metadata import Clips, read_metadata, read_pairs
from qa_generation.sources import SOURCES, Row


@contextmanager
def written(path: Path) -> Iterator[IO]:
    """A file that is there whole when the block ends, and not at all if it fails."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)  # On a full disk it would be in the way.
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


async def ask_all(generator: Generator, llm: Llm, clips: Clips) -> None:
    """Bring all replies into the store, with a line of progress. StopAsking: not all are there."""
    counts: Counter = Counter()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):

        def stop(number: int = number) -> None:
            llm.stop(signal.Signals(number).name)
            loop.remove_signal_handler(number)  # A second one ends the run at once.

        loop.add_signal_handler(number, stop)
    with tqdm(total=len(clips), unit="clip", desc="asking", file=sys.stderr) as bar:

        async def job(rows: list[Row]) -> None:
            made, rejects, _ = await generator.ask_clip(llm, rows)
            counts.update(rows=len(made), rejects=len(rejects))
            tries = (
                sum(llm.counts.values())
                - llm.counts["asked"]
                - llm.counts["kept"]
                - llm.counts["failed"]
            )
            rejects = f"{counts['rejects']} of {counts['rows'] + counts['rejects']}"
            words = f"{llm.store.tokens} tokens, rejects {rejects}, tried again {tries}, failed {llm.counts['failed']}"
            bar.set_postfix_str(words, refresh=False)
            bar.update()

        await llm.run((lambda rows=rows: job(rows)) for rows in clips.values())


def write_rows(output: Path, generator: Generator, llm: Llm, clips: Clips) -> Counter:
    """ROWS.json and its rejects, from the store alone. Returns counts; "clips not answered", in part or at all, is
    among them, and the tokens of the replies that were read."""
    counts: Counter = Counter(clips=len(clips))
    offline = Llm(llm.settings, llm.store, is_offline=True)

    async def write(file: IO, rejects_file: IO) -> None:
        for audio_id, rows in clips.items():
            made, rejects, failed = await generator.ask_clip(offline, rows)
            counts["clips not answered"] += failed > 0
            for entry in made:
                file.write(between if counts["rows"] else start)
                json.dump(entry, file, ensure_ascii=False)
                counts["rows"] += 1
            counts["clips without a row"] += not made and not failed
            for reject in rejects:
                counts[f"dropped: {reject.reason}"] += 1
                line = {"audio_id": audio_id, "reason": reject.reason, "text": reject.text}
                rejects_file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.write(end if counts["rows"] else start + end.lstrip("\n"))

    start, between, end = ("", "\n", "\n") if output.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n")
    with written(output) as file, written(Path(f"{output}.rejects.jsonl")) as rejects_file:
        asyncio.run(write(file, rejects_file))
    counts.update(offline.used)
    return counts


def digest(path: Path) -> str:
    """sha256 of a file of any size."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def recipe(
    args: argparse.Namespace, generator: Generator, settings: LlmSettings, counts: Counter
) -> dict[str, Any]:
    """How ROWS.json was made; the same for the same rows, however often the run was broken off."""
    prompts = {
        name: hashlib.sha256(text.encode()).hexdigest() for name, text in generator.prompts.items()
    }
    made = {
        "source": args.source,
        "count": generator.source.count,
        "min_words": generator.source.min_words,
    }
    made |= {"input": str(args.input), "input_sha256": args.digests[args.input]}
    made |= {"against_sha256": {str(path): args.digests[path] for path in args.against}}
    made |= {
        "versions": {
            name: version(name)
            for name in (("torch", "transformers") if args.local else ("openai",))
        }
    }
    made |= {
        "llm": settings.record() | {"model": args.model},
        "prompts_sha256": prompts,
        "seed": args.seed,
    }
    return made | {
        "filters": list(generator.drops),
        "asks": generator.asks,
        "counts": dict(sorted(counts.items())),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    own = LlmSettings("")
    add("--source", required=True, choices=SOURCES)
    add("--input", required=True, type=Path, help="metadata")
    add("--output", required=True, type=Path, help="rows: .json, a list, or .jsonl, JSON lines")
    add("--model", required=True, nargs="+", help="several take turns by clip")
    add(
        "--local", action="store_true", help="--model is a folder or hub id of a Hugging Face model"
    )
    add("--base_url", help="else $OPENAI_BASE_URL, else OpenAI's")
    add("--key_from", default=own.key_from, help="environment variable with the key")
    add("--temperature", type=float, default=own.temperature)
    add("--max_tokens", type=int, help="longest reply; else 100 a question, at least 1024")
    add(
        "--extra",
        type=json.loads,
        default={},
        help='further fields of a request as JSON, e.g. {"top_p": 0.9}',
    )
    add("--concurrency", type=int, default=own.concurrency, help="requests at once")
    add("--tries", type=int, default=own.tries, help="of a request, before its clip is left out")
    add("--timeout", type=float, default=own.timeout, help="seconds for a try")
    add("--token_budget", type=int, help="prompts and replies of all runs with these replies")
    add(
        "--asks", type=int, default=2, help="times to ask until a reply has a pair that can be used"
    )
    add("--replies", type=Path, help="file that keeps replies; else beside the output")
    add(
        "--prompt",
        type=Path,
        help="text file instead of the source's prompt; $count and $format are filled in",
    )
    add("--count", type=int, help="questions to ask for, else the source's")
    add("--min_words", type=int, help="of an answer, else the source's")
    add("--keep", nargs="*", default=[], choices=FILTERS, help="filters to leave out")
    add("--dataset", help="of the rows that name none; else the source")
    add(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        help="rows whose pairs come no more; streamed if JSON lines",
    )
    add("--seed", type=int, default=0, help="of what is drawn: models, questions of summaries")
    add(
        "--max_bad",
        type=int,
        default=0,
        help="clips and rows of metadata that may go without being asked",
    )
    add("--dry_run", action="store_true")
    add("--price", nargs=2, type=float, metavar=("IN", "OUT"), help="dollars for a million tokens")
    args = parser.parse_args(argv)
    one_or_more = (args.concurrency, args.tries, args.asks, args.count, args.max_tokens)
    if min(1 if value is None else value for value in one_or_more) < 1 or (args.min_words or 0) < 0:
        parser.error(
            "--concurrency, --tries, --asks, --count and --max_tokens are 1 or more, --min_words 0 or more"
        )
    if not (args.timeout > 0 and isinstance(args.extra, dict)):
        parser.error("--timeout is more than 0 s; --extra is a JSON object")
    if args.local and len(args.model) > 1:
        parser.error("--local takes one --model")
    return args


def check_paths(args: argparse.Namespace) -> None:
    """Fill in --replies, and see that what is written can be and is nothing that is read, before anything is paid.

    Raises:
        ValueError, OSError: says which file.
    """
    if args.output.suffix not in (".json", ".jsonl"):
        raise ValueError(
            f"--output {args.output}: rows are written as .json (a list) or .jsonl (JSON lines)."
        )
    args.replies = args.replies or Path(f"{args.output}.replies.jsonl")
    made = [
        args.output,
        args.replies,
        *(Path(f"{args.output}.{end}") for end in ("rejects.jsonl", "recipe.json")),
    ]
    read = {path.resolve() for path in (args.input, args.prompt, *args.against) if path}
    if len({path.resolve() for path in made} | read) < len(made) + len(read):
        names = ", ".join(str(path) for path in made)
        raise ValueError(f"Each of these is written and must be a file of its own: {names}")
    if folders := [str(path) for path in made if path.is_dir()]:
        raise ValueError(f"{folders[0]} is a folder; a file is needed.")
    args.digests = {path: digest(path) for path in (args.input, *args.against)}


def make_generator(args: argparse.Namespace) -> tuple[Generator, LlmSettings]:
    given = {"count": args.count, "min_words": args.min_words}
    source = replace(
        SOURCES[args.source], **{name: value for name, value in given.items() if value is not None}
    )
    drops = tuple(name for name in FILTERS if name not in args.keep)
    named = (
        "temperature",
        "extra",
        "base_url",
        "key_from",
        "concurrency",
        "tries",
        "timeout",
        "token_budget",
    )
    settings = LlmSettings(
        args.model[0],
        max_tokens=args.max_tokens or max(1024, 100 * source.count),
        is_local=args.local,
        **{name: getattr(args, name) for name in named},
    )
    return Generator(source, args.model, args.prompt, drops, args.asks, args.seed), settings


def ask(generator: Generator, llm: Llm, clips: Clips) -> None:
    """Ask all. Why that stopped early is said at once: writing rows may fail for the same reason."""
    offline = Llm(llm.settings, llm.store, is_offline=True)
    kept = len(llm.store.places)
    if kept and not generator.is_answered(offline, clips) and not offline.counts["kept"]:
        what = f"none of the {kept} replies in {llm.store.path} is to what this run asks"
        print(
            f"note: {what}: prompt, model, settings or metadata are others. All is asked anew.",
            file=sys.stderr,
        )
    try:
        asyncio.run(ask_all(generator, llm, clips))
    except StopAsking as error:
        print(
            f"stopped: {error}. Run it again to go on; no reply that was kept is paid twice.",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_paths(args)
    generator, settings = make_generator(args)
    clips, bad, repeats = read_metadata(args.input, generator.source, args.dataset or args.source)
    generator.earlier = read_pairs(args.against, clips)
    for line in bad[:20] + [f"... and {len(bad) - 20} more rows"] * (len(bad) > 20):
        print(line, file=sys.stderr)
    if args.dry_run:  # No file is made.
        with ReplyStore(args.replies) if args.replies.exists() else nullcontext() as store:
            Estimate(generator, settings, store and Llm(settings, store, is_offline=True)).report(
                clips, args.price
            )
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with ReplyStore(args.replies) as store:
        llm = Llm(settings, store)
        ask(generator, llm, clips)
        if is_done := not (clips or bad) or generator.is_answered(
            Llm(settings, store, is_offline=True), clips
        ):
            counts = write_rows(args.output, generator, llm, clips)
            counts.update(
                {
                    "metadata rows that repeat one": repeats,
                    "metadata rows that cannot be asked": len(bad),
                }
            )
            with written(Path(f"{args.output}.provenance.json")) as file:
                file.write(json.dumps(recipe(args, generator, settings, counts), indent=1) + "\n")
            print("; ".join(f"{name} {count}" for name, count in counts.items()))
        else:
            print(
                f"no clip was answered: {args.output} is as it was, its rejects and recipe too.",
                file=sys.stderr,
            )
    if llm.counts:
        print(
            "requests: "
            + ", ".join(f"{name} {count}" for name, count in sorted(llm.counts.items()))
        )
    lost = f"{store.lost} reserved for tries without a reply, which may be billed"
    print(f"tokens: {store.tokens} spent, {lost}; by all runs with {args.replies}")
    return int(
        bool(llm.stopped) or not is_done or counts["clips not answered"] + len(bad) > args.max_bad
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (
        OSError,
        ValueError,
    ) as error:  # The user's to mend; a traceback would hide the message.
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(
            "stopped at once. Run it again to go on; what is kept is not asked again.",
            file=sys.stderr,
        )
        sys.exit(130)
