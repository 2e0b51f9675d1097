"""Defines the flags of the commands that generate, and opens the engine that they describe."""

import argparse

from ltu.inference.engine import LtuEngine
from ltu.inference.requests import MODES
from ltu.inference.sampling import ORIGINAL_DECODING, check_decoding
from ltu.inference.static_cache import CHOICES
from ltu.inference.vllm_client import parse_url
from ltu.inference.vllm_engine import VllmEngine, check_vllm_decoding
from ltu.models.audio_front_end import (
    add_front_end_flags,
    find_dataset_flags,
    read_front_end_flags,
)

DECODING_FLAGS = (
    "max_new_tokens",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
)


# Settings of the language model in this process, with their defaults; a server of it has its own.
LOCAL_FLAGS = {
    "device_map": None,
    "quantization": None,
    "attention": None,
    "compile": False,
    "static_cache": "auto",
    "merge_lora": "auto",
}


def parse_urls(text: str) -> list[str]:
    """Split addresses at commas."""
    return [url.strip() for url in text.split(",") if url.strip()]


def parse_num_chunks(text: str) -> int:
    """Convert "all" to 0, and other texts to a number of chunks from 1."""
    if text != "all" and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 nor 'all'")
    return 0 if text == "all" else int(text)


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="The checkpoint folder, or its hub id.")
    parser.add_argument(
        "--llm", help="Another folder or hub id of the same language model as the checkpoint's."
    )
    parser.add_argument(
        "--device", help="Device to use: cuda, mps or cpu. The default is the first one available."
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="Dtype of the language model: float32, bfloat16, float16 or auto. auto is that of its "
        "files, but float32 on a CPU that does not multiply in bf16, if it fits into the memory.",
    )
    parser.add_argument(
        "--quantization",
        choices=("8bit", "4bit"),
        help="Quantization of the language model's weights, by bitsandbytes.",
    )
    parser.add_argument(
        "--device_map", help="auto: spread the layers of the language model over all GPUs."
    )
    parser.add_argument(
        "--attention",
        help="Attention of the language model: sdpa, flash_attention_2 or eager.",
    )
    parser.add_argument(
        "--compile", action="store_true", help="Compile the language model with torch.compile."
    )
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="What generates: this process, or vLLM servers of the merged language model.",
    )
    parser.add_argument(
        "--engine_url",
        action="extend",
        type=parse_urls,
        metavar="URL",
        help="With --engine vllm: address of a server, http://HOST:8000/v1. Several, in flags of "
        "their own or with commas between them, take turns.",
    )
    parser.add_argument(
        "--static_cache",
        choices=CHOICES,
        default="auto",
        help="Compile decoding as CUDA graphs over a cache of fixed length. auto: on CUDA, where "
        "there are enough questions to earn the compile time.",
    )
    parser.add_argument(
        "--merge_lora",
        choices=CHOICES,
        default="auto",
        help="Add LoRA to the weights of the language model, in memory. auto: if they are fp32.",
    )
    parser.add_argument(
        "--cache_mb",
        type=float,
        default=256,
        help="Maximum size of the cache of audio embeddings, in MB.",
    )
    parser.add_argument(
        "--num_chunks",
        type=parse_num_chunks,
        default=1,
        help="Number of chunks of a clip that are encoded, or 'all'.",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="joint",
        help="Input of the language model: audio and transcript, or only one of them.",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, help="Maximum number of generated tokens (400)."
    )
    parser.add_argument(
        "--num_beams", type=int, help="Number of beams of beam search. The default is greedy."
    )
    parser.add_argument(
        "--repetition_penalty",
        type=float,
        help="Penalty on tokens that occurred before; 1 is none.",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="Temperature of sampling. Without it, decoding is greedy.",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        help="Sample from the most probable tokens that reach this probability together.",
    )
    parser.add_argument("--top_k", type=int, help="Sample from this many most probable tokens.")
    parser.add_argument(
        "--original_decoding",
        action="store_true",
        help="Sample as the papers did (temperature 0.1, top-p 0.95).",
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="Seed of the random generator used for sampling."
    )
    add_front_end_flags(parser)


def refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags; end the command if one is impossible for streamed answers about uploads."""
    for flag in find_dataset_flags(args):
        parser.error(f"{flag}: an upload has no features in a folder")
    if args.num_beams not in (None, 1):
        parser.error("--num_beams: beams are known at the end only, and answers are streamed here")
    try:
        read_decoding_flags(args)  # Before the model is opened, which takes minutes.
    except ValueError as error:
        parser.error(str(error))
    return args


def open_engine(args: argparse.Namespace) -> LtuEngine:
    """Open the engine that the flags describe.

    Raises:
        ValueError: flags contradict each other.
    """
    settings = {name: getattr(args, name) for name in ("device", "dtype", "cache_mb")}
    settings["language_model"] = args.llm
    check_engine_flags(args)
    if args.engine == "vllm":
        engine = VllmEngine.from_pretrained(args.model, args.engine_url, **settings)
    else:
        settings |= {name: getattr(args, name) for name in LOCAL_FLAGS}
        engine = LtuEngine.from_pretrained(args.model, **settings)
    engine.processor.front_end.configure(**read_front_end_flags(args))
    return engine


def check_engine_flags(args: argparse.Namespace) -> None:
    """Check that the flags fit what generates.

    Raises:
        ValueError: they do not.
    """
    if args.engine != "vllm":
        if args.engine_url:
            raise ValueError("--engine_url has no effect without --engine vllm.")
        return
    if not args.engine_url:
        raise ValueError("--engine vllm needs --engine_url, such as http://HOST:8000/v1")
    for url in args.engine_url:
        parse_url(url)
    given = []
    for name, default in LOCAL_FLAGS.items():
        if getattr(args, name) != default:
            given.append(f"--{name}")
    if given:
        raise ValueError(
            f"{' and '.join(given)}: with --engine vllm the server has the language model. Give "
            "vLLM its own flags."
        )
    check_vllm_decoding(check_decoding(read_decoding_flags(args)))


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
            "--top_p and --top_k have no effect without sampling: add --temperature, or "
            "--original_decoding."
        )
    check_decoding(decoding)
    return decoding
