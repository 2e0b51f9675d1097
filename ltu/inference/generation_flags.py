"""Defines the flags of the commands that generate, and opens the engine that they describe."""

import argparse

from ltu.inference.engine import LtuEngine
from ltu.inference.requests import MODES
from ltu.inference.sampling import ORIGINAL_DECODING, check_decoding
from ltu.models.processing_ltu import WHISPER_FLAGS

DECODING_FLAGS = (
    "max_new_tokens",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
)


def parse_num_chunks(text: str) -> int:
    """Convert "all" to 0, and other texts to a number of chunks from 1."""
    if text != "all" and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 nor 'all'")
    return 0 if text == "all" else int(text)


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="checkpoint folder, or hub id of one")
    parser.add_argument("--llm", help="another folder or hub id of the same language model")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the best of them")
    parser.add_argument(
        "--dtype", default="auto", help="of the language model: auto, float32, bfloat16, float16"
    )
    parser.add_argument(
        "--quantization",
        choices=("8bit", "4bit"),
        help="of the language model's weights (bitsandbytes)",
    )
    parser.add_argument("--device_map", help="auto: spread the language model over all GPUs")
    parser.add_argument("--attention", help="of the language model: sdpa, flash_attention_2, eager")
    parser.add_argument(
        "--compile", action="store_true", help="run the language model through torch.compile"
    )
    parser.add_argument(
        "--cache_mb", type=float, default=256, help="size of the cache of audio embeddings"
    )
    parser.add_argument(
        "--num_chunks",
        type=parse_num_chunks,
        default=1,
        help="chunks of a clip to use: a number, or all",
    )
    parser.add_argument("--max_new_tokens", type=int, help="by default 400")
    parser.add_argument("--num_beams", type=int, help="search with beams instead of greedily")
    parser.add_argument("--repetition_penalty", type=float, help="for tokens that occurred before")
    parser.add_argument(
        "--temperature", type=float, help="of sampling; by default answers are greedy"
    )
    parser.add_argument("--top_p", type=float, help="of sampling")
    parser.add_argument("--top_k", type=int, help="of sampling")
    parser.add_argument(
        "--original_decoding",
        action="store_true",
        help="sample as the papers did (temperature 0.1, top-p 0.95)",
    )
    parser.add_argument("--seed", type=int, default=42, help="of sampling")
    whisper = parser.add_argument_group("LTU-AS only")
    whisper.add_argument(
        "--mode", choices=MODES, default="joint", help="leave out the transcript, or the audio"
    )
    whisper.add_argument(
        "--whisper", help="another name or .pt file of the Whisper that computes features"
    )
    whisper.add_argument("--transcription_model", help="another Whisper for the transcript")
    whisper.add_argument(
        "--feature_precision", help="fp16 or fp32, of Whisper's encoder (default: as trained)"
    )
    whisper.add_argument(
        "--feature_root", help="folder of ltu_as.extract_whisper_feature, or of the original's .npz"
    )


def refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags; end the command if one is impossible for streamed answers about uploads."""
    if args.feature_root is not None:
        parser.error("--feature_root: an upload has no features in a folder")
    if args.num_beams not in (None, 1):
        parser.error("--num_beams: beams are known at the end only, and answers are streamed here")
    return args


def open_engine(args: argparse.Namespace) -> LtuEngine:
    """Open the engine that the flags describe."""
    settings = {
        name: getattr(args, name)
        for name in ("device", "dtype", "device_map", "attention", "compile")
    }
    settings |= {
        "language_model": args.llm,
        "quantization": args.quantization,
        "cache_mb": args.cache_mb,
    }
    engine = LtuEngine.from_pretrained(args.model, **settings)
    engine.processor.use(**{name: getattr(args, name) for name in WHISPER_FLAGS})
    return engine


def read_decoding_flags(args: argparse.Namespace) -> dict:
    """Return the settings of `generate` that the flags describe.

    Raises:
        ValueError: one of them is impossible.
    """
    decoding = dict(ORIGINAL_DECODING) if args.original_decoding else {}
    decoding |= {
        name: getattr(args, name) for name in DECODING_FLAGS if getattr(args, name) is not None
    }
    decoding |= {"do_sample": True} if args.temperature is not None else {}
    if not decoding.get("do_sample") and (args.top_p is not None or args.top_k is not None):
        raise ValueError(
            "--top_p and --top_k are of sampling: add --temperature, or --original_decoding."
        )
    check_decoding(decoding)
    return decoding
