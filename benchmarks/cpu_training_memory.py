"""Measures the peak of memory of training steps on a CPU, for two small models.

    python -m benchmarks.cpu_training_memory \\
        --output_path benchmarks/results/cpu_training_memory.json

torch's profiler records every allocation of the CPU allocator, from the first weight on; their sum
has the peak. `tests/test_memory_estimate.py` compares it with the estimate of `--plan`, which makes
no allocation.

The steps are those of benchmarks/gpu_speed_and_memory.py: full audio encoders, random weights and
inputs, a frozen language model in bf16 under autocast.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device import device_name
from benchmarks.gpu_speed_and_memory import LLMS, make_model, train
from benchmarks.report import print_report, write_report
from data.command_line import command_parser
from ltu.files import run_command

LLMS["160m"] = dict(
    hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
)


@dataclass(frozen=True)
class Preset:
    """A training run."""

    kind: str  # "ltu" or "ltu_as"
    llm: str  # of LLMS
    trainable_params: str
    text_tokens: int
    micro_batch: int
    gradient_checkpointing: bool


PRESETS = (
    Preset("ltu", "160m", "all", 108, 4, gradient_checkpointing=False),
    Preset("ltu_as", "160m", "all", 108, 8, gradient_checkpointing=True),
)


def peak_of_allocations(profiler: profile) -> int:
    """Return the peak of the bytes that the CPU allocator has given out."""
    changes = []
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
    allocated = 0
    peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak


def measure(preset: Preset) -> int:
    """Return the peak in bytes of two optimizer steps of two micro-batches each."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = make_model(preset.kind, preset.llm, preset.trainable_params, torch.device("cpu"))
        train(
            model,
            preset.trainable_params,
            preset.micro_batch,
            preset.text_tokens,
            preset.gradient_checkpointing,
            num_micro_batches=2,
        )
    return peak_of_allocations(profiler)


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    training = []
    for preset in PRESETS:
        training.append(asdict(preset) | {"peak_gib": round(measure(preset) / 2**30, 4)})
    report = {"device": device_name("cpu"), "torch": torch.__version__, "training": training}
    print_report(report)
    write_report(report, args.output_path)


if __name__ == "__main__":
    run_command(main)
