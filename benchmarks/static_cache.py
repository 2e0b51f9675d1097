"""Times generation with dynamic and static caches, and the check of untested versions, at 7B.

    python -m benchmarks.static_cache --output_path benchmarks/results/generate_h100.json
    python -m benchmarks.static_cache --size tiny --device cpu

The model has random weights (speed does not depend on them), a language model in bf16, and LoRA.
All rows of a batch have the same question and the same clip, as on the gradio page, so the clip is
encoded once.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_speed_and_memory import LLMS, make_inputs, make_model, synchronize
from ltu.models.version_check import compare_cached_logits

PROMPT_TOKENS = 40  # text tokens of the prompt


def time_generate(model: torch.nn.Module, batch: int, num_tokens: int, **settings: Any) -> dict:
    """Time `generate` on a batch.

    The first of three calls compiles and chooses kernels; of the others, the faster one counts.

    Args:
        model: a model of LTU.
        batch: rows of the batch.
        num_tokens: new tokens of each answer.
        settings: further arguments of `generate`.
    """
    device = model.get_input_embeddings().weight.device
    inputs = make_inputs(model, 1, PROMPT_TOKENS)
    rows = {name: inputs[name].expand(batch, -1) for name in ("input_ids", "attention_mask")}
    rows["audio_index"] = torch.zeros(batch, dtype=torch.long, device=device)
    seconds = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        model.generate(
            **rows,
            input_features=inputs["input_features"],
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(LLMS), default="7b")
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
        default=[16, 64],
        help="Batch sizes with a static cache.",
    )
    parser.add_argument("--num_tokens", type=int, default=64, help="New tokens of each answer.")
    parser.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    args = parser.parse_args()

    model = make_model("ltu", args.size, "all", args.device).eval()
    is_gpu = args.device.type == "cuda"
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(args.device) if is_gpu else "cpu",
        "size": args.size,
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
    for name in ("first", "second"):
        synchronize(args.device)
        start = time.perf_counter()
        difference = compare_cached_logits(model)
        results[f"{name}_check"] = {
            "seconds": round(time.perf_counter() - start, 2),
            "difference": difference,
        }
    results["rows"] = [time_generate(model, batch, args.num_tokens) for batch in args.dynamic]
    for batch in args.static:
        results["rows"].append(
            time_generate(model, batch, args.num_tokens, cache_implementation="static")
        )
    if is_gpu:
        results["peak_gib"] = round(torch.cuda.max_memory_allocated(args.device) / 2**30, 1)
    text = json.dumps(results, indent=1)
    print(text)
    if args.output_path:
        args.output_path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
