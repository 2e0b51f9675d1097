"""Questions per second: 16 at a time, beside one by one with and without the encodings that are kept.

    python -m benchmarks.ask --output_path benchmarks/results/ask.json
    python -m benchmarks.ask --device cuda --dtype bfloat16 --clips 32 --output_path benchmarks/results/ask_gpu.json

Notable:
- random weights (speed does not depend on them): a Llama of 512 x 8 layers with 32,000 tokens; for LTU the
  paper's CAV-MAE, for LTU-AS a Whisper and a TLTR of its width, transcripts given;
- five questions on each clip of 10 s, read from a wav file, 50 new tokens each, neither more nor fewer;
- "encoding every time" is one question a batch and nothing kept between questions, which is what the original does;
- the ways take turns in one process after a warm-up each; medians are compared; in fp32 all answers must be equal.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # Spinning threads would time the neighbours on a shared machine.

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from benchmarks.whisper_features import SIZES, random_whisper  # noqa: E402
from ltu import CavMaeConfig, LtuConfig, LtuProcessor  # noqa: E402
from ltu.data.audio import SAMPLING_RATE  # noqa: E402
from ltu.inference.engine import LtuEngine  # noqa: E402
from ltu.inference.requests import Request  # noqa: E402
from ltu_as import LtuAsConfig, LtuAsProcessor, TltrConfig  # noqa: E402

LLM = dict(
    vocab_size=32_000,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=8,
    num_attention_heads=8,
)
TOKENIZER = Path(__file__).parent.parent / "tests" / "golden" / "tokenizer"
NEW_TOKENS = 50
QUESTIONS = (
    "What can be inferred from the audio?",
    "Which sound events are there, and in which order do they occur?",
    "Is anyone speaking?",
    "Describe the place in which this was recorded, and say what makes you think so.",
    "How loud is it, compared with a busy street?",
)
WAYS = {
    "encoding every time": (1, 0),
    "one by one": (1, 256),
    "batch 16": (16, 256),
}  # batch size, cache in MB
NEEDED = {"cpu": 4.0, "cuda": 10.0}  # batch 16 / encoding every time
ORIGINAL = {
    "ltu": 1.47,
    "ltu_as": 0.79,
}  # s a question, one by one at these sizes on two cores; measured by running it


def make_parts(
    kind: str, args: argparse.Namespace, folder: str
) -> tuple[torch.nn.Module, LtuProcessor]:
    """Model and processor of a engine."""
    torch.manual_seed(0)
    text_config = LlamaConfig(**LLM, dtype=args.dtype)
    if kind == "ltu":
        config: LtuConfig = LtuConfig(audio_config=CavMaeConfig(), text_config=text_config)
        processor: LtuProcessor = LtuProcessor.from_config(config, TOKENIZER)
    else:
        width, _, layers = SIZES[args.whisper_size]
        audio_encoder = TltrConfig(hidden_size=width, num_whisper_layers=layers)
        config = LtuAsConfig(audio_config=audio_encoder, text_config=text_config)
        whisper = {
            "whisper_model": random_whisper(args.whisper_size, folder),
            "transcription_model": None,
        }
        processor = LtuAsProcessor.from_config(
            config, TOKENIZER, **whisper, feature_precision="fp32"
        )
        processor.feature_extractor.device = args.device
    return AutoModelForCausalLM.from_config(config).to(args.device), processor


def write_clips(folder: str, count: int) -> list[str]:
    """Noise of 10 s, as files."""
    noise = np.random.default_rng(0)
    paths = [f"{folder}/{number}.wav" for number in range(count)]
    for path in paths:
        soundfile.write(path, noise.normal(0, 0.1, 10 * SAMPLING_RATE), SAMPLING_RATE)
    return paths


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Questions per second of each way, and how many answers are those of the first way."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    texts = {}
    with tempfile.TemporaryDirectory() as folder:
        parts = make_parts(kind, args, folder)
        requests = [
            Request(text, clip, "")
            for clip in write_clips(folder, args.clips)
            for text in QUESTIONS
        ]
        for turn in range(args.rounds + 1):
            for way, (batch_size, cache_mb) in WAYS.items():
                asked = requests if turn else requests[: 2 * batch_size]
                engine = LtuEngine(*parts, cache_mb)
                start = time.perf_counter()
                answers = engine(
                    asked, batch_size, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
                )
                if turn:
                    times[way].append(time.perf_counter() - start)
                if {(answer.answered, answer.new_tokens) for answer in answers} != {
                    (True, NEW_TOKENS)
                }:
                    raise AssertionError(f"not every answer has {NEW_TOKENS} tokens: {answers[0]}")
                texts[way] = [answer.text for answer in answers]
    rates = {way: len(requests) / statistics.median(found) for way, found in times.items()}
    first = next(iter(WAYS))
    report = {"questions": len(requests), "seconds": times, "questions_per_second": rates}
    report["ratio"] = {way: rate / rates[first] for way, rate in rates.items()}
    report["equal_answers"] = {
        way: sum(map(str.__eq__, own, texts[first])) for way, own in texts.items()
    }
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", nargs="+", choices=list(ORIGINAL), default=list(ORIGINAL))
    parser.add_argument(
        "--clips", type=int, default=16, help="with five questions each: full batches"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--whisper_size", choices=SIZES, default="base", help="of LTU-AS's ear")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the language model"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output_path", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    is_cuda = args.device.startswith("cuda")
    machine = (
        torch.cuda.get_device_name(args.device)
        if is_cuda
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    settings = {
        name: value for name, value in vars(args).items() if name not in ("kind", "output_path")
    }
    report: dict[str, Any] = {
        "machine": machine,
        "torch": torch.__version__,
        **settings,
        "new_tokens": NEW_TOKENS,
    }
    needed, is_enough = NEEDED["cuda" if is_cuda else "cpu"], True
    print(f"{machine}, {args.threads} threads, torch {torch.__version__}, {args.dtype}")
    print(
        f"{'':8}{'':22}{'questions/s':>12}{'s each':>9}{'ratio':>8}{'equal':>8}   the original: s each"
    )
    for kind in args.kind:
        report[kind] = found = measure(kind, args)
        for way, rate in found["questions_per_second"].items():
            equal = f"{found['equal_answers'][way]}/{found['questions']}"
            print(
                f"{kind:8}{way:22}{rate:12.2f}{1 / rate:9.3f}{found['ratio'][way]:8.2f}{equal:>8}   {ORIGINAL[kind]}"
            )
            is_enough &= (
                args.dtype != "float32" or found["equal_answers"][way] == found["questions"]
            )
        is_enough &= found["ratio"]["batch 16"] >= needed
    print(f"{'reaches' if is_enough else 'falls short of'} {needed} x, with equal answers in fp32")
    if args.output_path:
        args.output_path.parent.mkdir(parents=True, exist_ok=True)
        args.output_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(not is_enough)


if __name__ == "__main__":
    sys.exit(main())
