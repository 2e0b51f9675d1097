"""Times generation with dynamic and static caches, and the check of untested versions, at 7B.

    python -m benchmarks.static_cache --output_path benchmarks/results/static_cache_h100.json
    python -m benchmarks.static_cache --merge_lora --output_path ...     the same without LoRA
    python -m benchmarks.static_cache --size tiny --device cpu

The model has random weights (speed does not depend on them), a language model in bf16, and LoRA.
All questions of a batch are the same and about the same clip, as on the gradio page, so the clip
is encoded once.
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import default_device, device_name, parse_device, synchronize
from benchmarks.gpu_speed_and_memory import LLMS, make_inputs, make_model, peak_gib
from benchmarks.report import print_report, write_report
from data.command_line import command_parser
from ltu.files import run_command
from ltu.models.version_check import compare_cached_logits

PROMPT_TOKENS = 40  # text tokens of the prompt


def time_generate(model: torch.nn.Module, batch: int, num_tokens: int, **settings: Any) -> dict:
    """Time `generate` on a batch.

    The first of three calls compiles and chooses kernels; of the others, the faster one counts.

    Args:
        model: a model of LTU.
        batch: the number of questions.
        num_tokens: new tokens of each answer.
        settings: further arguments of `generate`.
    """
    device = model.get_input_embeddings().weight.device
    inputs = make_inputs(model, 1, PROMPT_TOKENS)
    seconds = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        model.generate(
            input_ids=inputs["input_ids"].expand(batch, -1),
            attention_mask=inputs["attention_mask"].expand(batch, -1),
            input_features=inputs["input_features"],
            audio_index=torch.zeros(batch, dtype=torch.long, device=device),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **settings,
        )
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    best = min(seconds[1:])
    return {
        "cache": settings.get("cache_implementation", "dynamic"),
        "batch": batch,
        "new_tokens": num_tokens,
        "first_seconds": round(seconds[0], 2),
        "seconds": round(best, 3),
        "questions_per_second": round(batch / best, 2),
    }


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--size", choices=list(LLMS), default="7b", help="Size of the language model."
    )
    parser.add_argument(
        "--dynamic",
        nargs="*",
        type=int,
        default=[1, 16, 64],
        help="Batch sizes with a dynamic cache.",
    )
    parser.add_argument(
        "--static",
        nargs="*",
        type=int,
        default=[1, 16, 64],
        help="Batch sizes with a static cache.",
    )
    parser.add_argument(
        "--merge_lora", action="store_true", help="Merge LoRA into the language model."
    )
    parser.add_argument("--num_tokens", type=int, default=64, help="New tokens of each answer.")
    parser.add_argument(
        "--device", type=parse_device, default=default_device(), help="cpu, cuda, ..."
    )
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    return args


def main() -> None:
    args = parse_args()
    model = make_model("ltu", args.size, "all", args.device).eval()
    if args.merge_lora:
        model.merge_lora()
    report: dict[str, Any] = {"device": device_name(args.device), "size": args.size}
    report["merged_lora"] = args.merge_lora
    for package in ("torch", "transformers", "peft"):
        report[package] = version(package)
    for name in ("first", "second"):
        synchronize(args.device)
        start = time.perf_counter()
        difference = compare_cached_logits(model)
        report[f"{name}_check"] = {
            "seconds": round(time.perf_counter() - start, 2),
            "difference": difference,
        }
    measurements = []
    for batch in args.dynamic:
        measurements.append(time_generate(model, batch, args.num_tokens))
    for batch in args.static:
        result = time_generate(model, batch, args.num_tokens, cache_implementation="static")
        measurements.append(result)
    report["measurements"] = measurements
    peak = peak_gib(args.device)
    if peak is not None:
        report["peak_gib"] = round(peak, 1)
    print_report(report)
    write_report(report, args.output_path)


if __name__ == "__main__":
    run_command(main)
