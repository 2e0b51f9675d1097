"""Measures questions per second: in batches of 16, one by one, and one by one without a cache.

    python -m benchmarks.questions_per_second --output_path benchmarks/results/ask.json
    python -m benchmarks.questions_per_second --device cuda --dtype bfloat16 --clips 32 \\
        --output_path benchmarks/results/ask_gpu.json

The weights are random (speed does not depend on them): a Llama of 512 x 8 layers with 32,000
tokens; for LTU the paper's CAV-MAE; for LTU-AS a Whisper and a TLTR of its width, with transcripts
given. There are five questions on each clip of 10 s, which is read from a wav file, and each answer
has exactly 50 new tokens.

"encoding every time" means batches of one question and no cache of audio embeddings, as in the
original. The ways alternate in one process after a warm-up of each. Medians are compared, and in
fp32 all answers must be equal.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# On a shared machine, spinning threads would also measure the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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


@dataclass(frozen=True)
class Way:
    """A way to answer all questions."""

    batch_size: int
    cache_mb: int


WAYS = {
    "encoding every time": Way(1, 0),
    "one by one": Way(1, 256),
    "batch 16": Way(16, 256),
}
REFERENCE_WAY = "encoding every time"
NEEDED = {"cpu": 4.0, "cuda": 10.0}  # batch 16 / encoding every time
# Seconds per question of the original, one by one at these sizes on two cores; measured by running
# the original.
ORIGINAL = {"ltu": 1.47, "ltu_as": 0.79}


def make_parts(
    kind: str, args: argparse.Namespace, folder: str
) -> tuple[torch.nn.Module, LtuProcessor]:
    """Return the model and the processor of an engine."""
    torch.manual_seed(0)
    text_config = LlamaConfig(**LLM, dtype=args.dtype)
    if kind == "ltu":
        config: LtuConfig = LtuConfig(audio_config=CavMaeConfig(), text_config=text_config)
        processor: LtuProcessor = LtuProcessor.from_config(config, TOKENIZER)
    else:
        width, _, layers = SIZES[args.whisper_size]
        audio_encoder = TltrConfig(hidden_size=width, num_whisper_layers=layers)
        config = LtuAsConfig(audio_config=audio_encoder, text_config=text_config)
        processor = LtuAsProcessor.from_config(
            config,
            TOKENIZER,
            whisper_model=random_whisper(args.whisper_size, folder),
            transcription_model=None,
            feature_precision="fp32",
        )
        processor.feature_extractor.device = args.device
    return AutoModelForCausalLM.from_config(config).to(args.device), processor


def write_clips(folder: str, count: int) -> list[str]:
    """Write clips of noise of 10 s each, and return their paths."""
    noise = np.random.default_rng(0)
    paths = [f"{folder}/{number}.wav" for number in range(count)]
    for path in paths:
        soundfile.write(path, noise.normal(0, 0.1, 10 * SAMPLING_RATE), SAMPLING_RATE)
    return paths


def generate_answers(engine: LtuEngine, requests: list[Request], batch_size: int) -> list[str]:
    """Return the text of every answer. Raises AssertionError if an answer has another length."""
    answers = engine(requests, batch_size, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    for answer in answers:
        if not answer.answered or answer.new_tokens != NEW_TOKENS:
            raise AssertionError(f"not every answer has {NEW_TOKENS} tokens: {answer}")
    return [answer.text for answer in answers]


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the questions per second of each way, and how many answers equal the reference."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    texts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, processor = make_parts(kind, args, folder)
        requests = []
        for clip in write_clips(folder, args.clips):
            requests += [Request(question, clip, "") for question in QUESTIONS]
        for round_number in range(args.rounds + 1):
            is_warm_up = round_number == 0
            for name, way in WAYS.items():
                used = requests[: 2 * way.batch_size] if is_warm_up else requests
                engine = LtuEngine(model, processor, way.cache_mb)
                start = time.perf_counter()
                texts[name] = generate_answers(engine, used, way.batch_size)
                if not is_warm_up:
                    times[name].append(time.perf_counter() - start)
    rates = {name: len(requests) / statistics.median(seconds) for name, seconds in times.items()}
    equal_answers = {}
    for name, own_texts in texts.items():
        pairs = zip(own_texts, texts[REFERENCE_WAY], strict=True)
        equal_answers[name] = sum(own == reference for own, reference in pairs)
    return {
        "questions": len(requests),
        "seconds": times,
        "questions_per_second": rates,
        "ratio": {name: rate / rates[REFERENCE_WAY] for name, rate in rates.items()},
        "equal_answers": equal_answers,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", nargs="+", choices=list(ORIGINAL), default=list(ORIGINAL))
    parser.add_argument(
        "--clips",
        type=int,
        default=16,
        help="Number of clips. Each has five questions, so that batches are full.",
    )
    parser.add_argument("--rounds", type=int, default=2, help="Measurements of each way.")
    parser.add_argument(
        "--whisper_size",
        choices=SIZES,
        default="base",
        help="Size of the Whisper of LTU-AS.",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="Dtype of the language model.",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    is_cuda = args.device.startswith("cuda")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if is_cuda:
        machine = torch.cuda.get_device_name(args.device)
    report: dict[str, Any] = {"machine": machine, "torch": torch.__version__}
    for name, value in vars(args).items():
        if name not in ("kind", "output_path"):
            report[name] = value
    report["new_tokens"] = NEW_TOKENS
    needed = NEEDED["cuda" if is_cuda else "cpu"]
    is_enough = True
    print(f"{machine}, {args.threads} threads, torch {torch.__version__}, {args.dtype}")
    print(
        f"{'':8}{'':22}{'questions/s':>12}{'s each':>9}{'ratio':>8}{'equal':>8}   "
        "the original: s each"
    )
    for kind in args.kind:
        result = measure(kind, args)
        report[kind] = result
        for name, rate in result["questions_per_second"].items():
            num_equal = result["equal_answers"][name]
            equal = f"{num_equal}/{result['questions']}"
            print(
                f"{kind:8}{name:22}{rate:12.2f}{1 / rate:9.3f}{result['ratio'][name]:8.2f}"
                f"{equal:>8}   {ORIGINAL[kind]}"
            )
            if args.dtype == "float32" and num_equal != result["questions"]:
                is_enough = False
        if result["ratio"]["batch 16"] < needed:
            is_enough = False
    print(f"{'reaches' if is_enough else 'falls short of'} {needed} x, with equal answers in fp32")
    if args.output_path:
        args.output_path.parent.mkdir(parents=True, exist_ok=True)
        args.output_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(not is_enough)


if __name__ == "__main__":
    sys.exit(main())
