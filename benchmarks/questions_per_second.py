"""Measures questions per second: in batches of 16, one by one, and one by one without a cache.

    python -m benchmarks.questions_per_second \\
        --output_path benchmarks/results/questions_per_second_cpu.json
    python -m benchmarks.questions_per_second --device cuda --dtype bfloat16 --clips 32 \\
        --output_path benchmarks/results/questions_per_second_gpu.json

The weights are random (speed does not depend on them): a Llama of 512 x 8 layers with 32,000
tokens; for LTU the paper's CAV-MAE; for LTU-AS a Whisper and a TLTR of its width, with transcripts
given. There are five questions on each clip of 10 s, which is read from a wav file, and each answer
has exactly 50 new tokens.

"encoding every time" means batches of one question and no cache of audio embeddings, as in the
original. The ways alternate in one process after a warm-up of each. Medians are compared, and in
fp32 all answers must be equal.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# On a shared machine, spinning threads would also measure the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from benchmarks.device import default_device, device_name, parse_device  # noqa: E402
from benchmarks.report import write_report  # noqa: E402
from benchmarks.whisper_features import SIZES, random_whisper  # noqa: E402
from data.command_line import command_parser  # noqa: E402
from ltu import CavMaeConfig, LtuConfig, LtuProcessor  # noqa: E402
from ltu.data.audio import SAMPLING_RATE  # noqa: E402
from ltu.files import run_command  # noqa: E402
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
    static_cache: str = "off"


WAYS = {
    "encoding every time": Way(1, 0),
    "one by one": Way(1, 256),
    "batch 16": Way(16, 256),
}
# With --static_cache. The first batch, which compiles, belongs to the warm-up.
STATIC_WAYS = {
    "one by one, static": Way(1, 256, "on"),
    "batch 16, static": Way(16, 256, "on"),
}
REFERENCE_WAY = "encoding every time"
NEEDED = {"cpu": 4.0, "cuda": 10.0}  # batch 16 / encoding every time
# Seconds per question of the original, one by one at these sizes on two cores; measured by running
# the original.
ORIGINAL = {"ltu": 1.47, "ltu_as": 0.79}


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    Args:
        clips: Number of clips.
        rounds: Measurements of each way.
        whisper_size: Size of the Whisper of LTU-AS.
        dtype: Dtype of the language model.
        device: "cpu", "cuda", ...
        threads: Threads of torch.
        static_cache: Measure static caches too, next to dynamic ones.
        lora: Put LoRA on the language model, and measure it as "separate" or "merged".
    """

    clips: int
    rounds: int
    whisper_size: str
    dtype: str
    device: str
    threads: int
    static_cache: bool
    lora: str | None

    @property
    def ways(self) -> dict[str, Way]:
        """The ways that are measured."""
        return WAYS | STATIC_WAYS if self.static_cache else WAYS


def make_model(kind: str, settings: Settings, folder: str) -> tuple[torch.nn.Module, LtuProcessor]:
    """Return a model with random weights, and its processor."""
    torch.manual_seed(0)
    text_config = LlamaConfig(**LLM, dtype=settings.dtype)
    if kind == "ltu":
        config: LtuConfig = LtuConfig(audio_config=CavMaeConfig(), text_config=text_config)
        processor: LtuProcessor = LtuProcessor.from_config(config, TOKENIZER)
    else:
        width, _, layers = SIZES[settings.whisper_size]
        audio_encoder = TltrConfig(hidden_size=width, num_whisper_layers=layers)
        config = LtuAsConfig(audio_config=audio_encoder, text_config=text_config)
        processor = LtuAsProcessor.from_config(
            config,
            TOKENIZER,
            whisper_model=random_whisper(settings.whisper_size, folder),
            transcription_model=None,
            feature_precision="fp32",
        )
        processor.feature_extractor.device = settings.device
    model = AutoModelForCausalLM.from_config(config).to(settings.device)
    if settings.lora is not None:
        model.add_lora(r=8, lora_alpha=16, lora_dropout=0.0)
        model.to(settings.device)
    if settings.lora == "merged":
        model.merge_lora()
    return model, processor


def write_clips(folder: str, count: int) -> list[str]:
    """Write clips of noise of 10 s each, and return their paths."""
    noise = np.random.default_rng(0)
    paths = []
    for number in range(count):
        path = f"{folder}/{number}.wav"
        soundfile.write(path, noise.normal(0, 0.1, 10 * SAMPLING_RATE), SAMPLING_RATE)
        paths.append(path)
    return paths


def generate_answers(engine: LtuEngine, requests: list[Request], batch_size: int) -> list[str]:
    """Return the text of every answer.

    Raises:
        AssertionError: an answer has another length.
    """
    texts = []
    for answer in engine(
        requests, batch_size, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
    ):
        if not answer.answered or answer.new_tokens != NEW_TOKENS:
            raise AssertionError(f"not every answer has {NEW_TOKENS} tokens: {answer}")
        texts.append(answer.text)
    return texts


def measure(kind: str, settings: Settings) -> dict[str, Any]:
    """Return the questions per second of each way, and how many answers equal the reference."""
    ways = settings.ways
    times: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, processor = make_model(kind, settings, folder)
        requests = []
        for clip in write_clips(folder, settings.clips):
            for question in QUESTIONS:
                requests.append(Request(question, clip, ""))
        for way in ways.values():  # Warm-up.
            engine = LtuEngine(model, processor, way.cache_mb, static_cache=way.static_cache)
            generate_answers(engine, requests[: 2 * way.batch_size], way.batch_size)
        for _ in range(settings.rounds):
            for name, way in ways.items():
                engine = LtuEngine(model, processor, way.cache_mb, static_cache=way.static_cache)
                start = time.perf_counter()
                texts[name] = generate_answers(engine, requests, way.batch_size)
                times[name].append(time.perf_counter() - start)
    rates = {name: len(requests) / statistics.median(seconds) for name, seconds in times.items()}
    references = np.array(texts[REFERENCE_WAY])
    equal_answers = {}
    for name, own_texts in texts.items():
        equal_answers[name] = int((np.array(own_texts) == references).sum())
    return {
        "questions": len(requests),
        "seconds": times,
        "questions_per_second": rates,
        "ratio": {name: rate / rates[REFERENCE_WAY] for name, rate in rates.items()},
        "equal_answers": equal_answers,
    }


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--kind",
        nargs="+",
        choices=list(ORIGINAL),
        default=list(ORIGINAL),
        help="LTU, LTU-AS, or both.",
    )
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
    parser.add_argument(
        "--device", type=parse_device, default=default_device(), help="cpu, cuda, ..."
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="Threads of torch."
    )
    parser.add_argument(
        "--static_cache", action="store_true", help="Measure static caches next to dynamic ones."
    )
    parser.add_argument(
        "--lora",
        choices=("separate", "merged"),
        help="Put LoRA on the language model, and merge it or not. The default is none.",
    )
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    settings = Settings(
        clips=args.clips,
        rounds=args.rounds,
        whisper_size=args.whisper_size,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        static_cache=args.static_cache,
        lora=args.lora,
    )
    torch.set_num_threads(settings.threads)
    machine = device_name(settings.device)
    report: dict[str, Any] = {"machine": machine, "torch": torch.__version__}
    report |= asdict(settings)
    report["new_tokens"] = NEW_TOKENS
    needed = NEEDED[torch.device(settings.device).type]
    is_enough = True
    print(f"{machine}, {args.threads} threads, torch {torch.__version__}, {args.dtype}")
    print(
        f"{'':8}{'':22}{'questions/s':>12}{'s each':>9}{'ratio':>8}{'equal':>8}   "
        "the original: s each"
    )
    for kind in args.kind:
        result = measure(kind, settings)
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
    verdict = "reaches" if is_enough else "falls short of"
    print(f"{verdict} {needed} x, with equal answers in fp32")
    write_report(report, args.output_path)
    return int(not is_enough)


if __name__ == "__main__":
    run_command(main)
