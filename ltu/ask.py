"""Answers one question about one clip.

    python -m ltu.ask CLIP "What can be inferred from the audio?" --model DIR
    python -m ltu.ask none "What is the capital of France?" --model DIR      without audio

`quickstart.sh` writes such a checkpoint folder: exp/quickstart/seed0/stage4_all_mix.
"""

import argparse
import sys

from ltu.files import run_command
from ltu.inference.generation_flags import add_generation_flags, open_engine, read_decoding_flags
from ltu.inference.requests import Request


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("clip", help="An audio file, or 'none'.")
    parser.add_argument("question", help="The question about the clip.")
    parser.add_argument(
        "--transcript",
        help="The transcript of the clip; '' if nothing is said. By default, a model with "
        "transcripts transcribes the clip.",
    )
    add_generation_flags(parser)
    args = parser.parse_args(argv)
    decoding = read_decoding_flags(args)
    engine = open_engine(args)
    clip = None if args.clip == "none" else args.clip
    request = Request(
        args.question,
        clip,
        args.transcript,
        audio_id=clip,
        mode=args.mode,
        num_chunks=args.num_chunks,
    )
    answer = engine([request], seed=args.seed, **decoding)[0]
    if not answer.answered:
        print(answer.error, file=sys.stderr)
        return 1
    print(answer.text)
    if request.audio is not None:
        if answer.transcript:
            print(f"(transcript: {answer.transcript})", file=sys.stderr)
        print(
            f"(used {answer.seconds_heard:.2f} of {answer.seconds_total:.2f} seconds)",
            file=sys.stderr,
        )
        for warning in answer.warnings:
            print(f"(warning: {warning})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
