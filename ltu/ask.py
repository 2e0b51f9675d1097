"""Ask one clip one question.

python -m ltu.ask CLIP "What can be inferred from the audio?" --model exp/quickstart/seed0/stage4_all_mix
python -m ltu.ask none "What is the capital of France?" --model DIR      without audio
"""

import argparse
import sys

from ltu.arguments import WHISPER_FLAGS
from ltu.pipeline_ltu import ORIGINAL_DECODING, LtuPipeline, Request

MODES = ("joint", "audio_only", "asr_only")


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
    whisper = parser.add_argument_group("LTU-AS only")
    whisper.add_argument("--mode", choices=MODES, default="joint", help="leave out the transcript, or the sound")
    whisper.add_argument("--whisper", help="another place of the Whisper that gives features: a name, or a .pt file")
    whisper.add_argument("--transcription_model", help="another Whisper for the transcript")
    whisper.add_argument("--feature_precision", help="fp16 or fp32, of Whisper's encoder (default: as trained)")
    whisper.add_argument("--feature_root", help="folder of ltu_as.extract_whisper_feature, or of the original's .npz")


def open_pipeline(args: argparse.Namespace) -> LtuPipeline:
    """The pipeline that the flags ask for."""
    pipeline = LtuPipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype, language_model=args.llm)
    pipeline.processor.use(**{name: getattr(args, name) for name in WHISPER_FLAGS})
    return pipeline


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
    parser.add_argument("--transcript", help="what is said in the clip; '' for nothing (LTU-AS transcribes by default)")
    add_decoding_flags(parser)
    args = parser.parse_args(argv)
    pipeline = open_pipeline(args)
    clip = None if args.clip == "none" else args.clip
    request = Request(args.question, clip, args.transcript, audio_id=clip, mode=args.mode)
    answer = pipeline([request], seed=args.seed, **decoding_of(args))[0]
    if answer.status != "ok":
        print(answer.error, file=sys.stderr)
        return 1
    print(answer.text)
    if request.audio is not None:
        if answer.transcript:
            print(f"(transcript: {answer.transcript})", file=sys.stderr)
        print(f"(heard {answer.seconds_heard:.2f} of {answer.seconds_total:.2f} seconds)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FileNotFoundError, ValueError) as error:  # The user's to mend; a traceback would hide the message.
        sys.exit(f"error: {error}")
