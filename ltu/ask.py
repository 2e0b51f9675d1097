"""Ask one clip one question.

python -m ltu.ask CLIP "What can be inferred from the audio?" --model exp/quickstart/seed0/stage4_all_mix
python -m ltu.ask none "What is the capital of France?" --model DIR      without audio
"""

import argparse
import sys

from ltu.pipeline_ltu import ORIGINAL_DECODING, LtuPipeline, Request
from ltu.qa_dataset import RowError


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="checkpoint folder, or hub id of one")
    parser.add_argument("--llm", help="another place of the folder's language model")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the best of them")
    parser.add_argument("--dtype", default="auto", help="of the language model: auto, float32, bfloat16, float16")
    parser.add_argument("--max_new_tokens", type=int, help="by default 400")
    parser.add_argument(
        "--original_decoding", action="store_true", help="sample as the papers did (temperature 0.1, top-p 0.95)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of sampling")


def decoding_of(args: argparse.Namespace) -> dict:
    """Settings of `generate` that the flags ask for."""
    decoding = dict(ORIGINAL_DECODING) if args.original_decoding else {}
    return decoding | ({"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("clip", help="an audio file, or 'none'")
    parser.add_argument("question")
    parser.add_argument("--transcript", help="what is said in the clip")
    add_decoding_flags(parser)
    args = parser.parse_args(argv)
    pipeline = LtuPipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype, language_model=args.llm)
    request = Request(args.question, None if args.clip == "none" else args.clip, args.transcript)
    answer = pipeline([request], seed=args.seed, **decoding_of(args))[0]
    if answer.status != "ok":
        print(answer.error, file=sys.stderr)
        return 1
    print(answer.text)
    if request.audio is not None:
        print(f"(heard {answer.seconds_heard:.2f} of {answer.seconds_total:.2f} seconds)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FileNotFoundError, RowError) as error:  # The user's to mend; a traceback would hide the message.
        sys.exit(f"error: {error}")
