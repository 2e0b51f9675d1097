"""Measures the speed of Whisper's features, compared with the way of the original.

    python -m benchmarks.whisper_features --whisper WHISPER.pt --output_path exp/features.json

The original runs the stock encoder clip by clip on 1000 frames, with gradients on, copies
(layers + 1, 500, width) to the host and averages there. "original_attention" also computes
attention without SDPA, as Whisper did then.

The sides alternate in one process. Their medians are compared, and the features must be equal.
Without `--whisper`, the model has random weights and a given `--size`: speed does not depend on
weights.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# On a shared machine, spinning threads would also measure the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from whisper.audio import log_mel_spectrogram, pad_or_trim  # noqa: E402
from whisper.model import ModelDimensions, Whisper, disable_sdpa  # noqa: E402

from benchmarks.device import default_device, parse_device, synchronize  # noqa: E402
from benchmarks.report import print_report, write_report  # noqa: E402
from data.command_line import command_parser  # noqa: E402
from ltu.data.audio import SAMPLING_RATE  # noqa: E402
from ltu.files import run_command  # noqa: E402
from ltu_as import LtuAsFeatureExtractor  # noqa: E402

SIZES = {"tiny": (384, 6, 4), "base": (512, 8, 6), "large": (1280, 20, 32)}  # width, heads, layers
MIN_SPEEDUP = {"cpu": 2.0, "cuda": 4.0}
MAX_ERROR = {"fp32": 1e-4, "fp16": 0.1}


def random_whisper(size: str, folder: str) -> str:
    """Write a Whisper with random weights in openai-whisper's format, and return its path.

    Its decoder is a stub.
    """
    width, heads, layers = SIZES[size]
    dims = ModelDimensions(80, 1500, width, heads, layers, 51865, 8, 64, 1, 1)
    dims.n_text_state = width  # Cross-attention takes the encoder's width.
    torch.manual_seed(0)
    path = f"{folder}/{size}.pt"
    torch.save({"dims": vars(dims), "model_state_dict": Whisper(dims).state_dict()}, path)
    return path


def one_by_one(
    extractor: LtuAsFeatureExtractor, clips: list[np.ndarray], dtype: torch.dtype
) -> list[np.ndarray]:
    """Return the features (layers, 25, width) of each clip, in the way of the original."""
    model, _ = extractor.load_encoder()
    encoder = copy.copy(model.encoder)
    positions = model.encoder.positional_embedding[: extractor.num_frames // 2]
    encoder._buffers = {"positional_embedding": positions}

    # Record the input of the first block and the output of every block, for one clip at a time.
    recorded: list[torch.Tensor] = []

    def record_inputs(module: torch.nn.Module, inputs: tuple) -> None:
        recorded.extend(inputs)

    def record_output(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        recorded.append(output)

    features = []
    for clip in clips:
        recorded.clear()
        hooks = [encoder.blocks[0].register_forward_pre_hook(record_inputs)]
        for block in encoder.blocks:
            hooks.append(block.register_forward_hook(record_output))
        mel = pad_or_trim(log_mel_spectrogram(clip, extractor.num_mel_bins), extractor.num_frames)
        encoder(mel[None].to(extractor.device, dtype))
        for hook in hooks:
            hook.remove()
        stack = torch.stack(recorded, -1)[0].detach().cpu()  # (500, width, layers + 1)
        layers = stack.permute(2, 0, 1).numpy()[1:]  # (layers, 500, width)
        shape = (len(layers), extractor.num_tokens, extractor.time_pooling, layers.shape[-1])
        pooled = layers.reshape(shape).mean(2, dtype=np.float32)  # (layers, 25, width)
        features.append(pooled.astype(layers.dtype))
    return features


def measure_seconds(run: Callable[[], object], device: str) -> float:
    """Return how long a function takes, including the work that it leaves to a GPU."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument("--whisper", help="An openai-whisper .pt file, or the name of a model.")
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="base",
        help="Size of the random model that is used without --whisper.",
    )
    parser.add_argument(
        "--device", type=parse_device, default=default_device(), help="cpu, cuda, ..."
    )
    parser.add_argument(
        "--feature_precision",
        choices=MAX_ERROR,
        help="The default is fp32 on a CPU, fp16 on a GPU.",
    )
    parser.add_argument("--clips", type=int, default=32, help="Number of clips of 10 s.")
    parser.add_argument("--batch_size", type=int, default=16, help="Clips of a batch.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of torch.")
    parser.add_argument("--rounds", type=int, default=3, help="Measurements of each side.")
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    is_cuda = args.device.startswith("cuda")
    precision = args.feature_precision
    if precision is None:
        precision = "fp16" if is_cuda else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        path = args.whisper or random_whisper(args.size, folder)
        extractor = LtuAsFeatureExtractor(None, None, path, None, precision)
        extractor.device = args.device
        model, _ = extractor.load_encoder()
    is_half = precision == "fp16" and extractor.device.type == "cuda"
    # With fp16 matrices and fp32 norms, gradients would only cost memory.
    model.encoder.requires_grad_(not is_half)
    rng = np.random.default_rng(0)
    clips = []
    for _ in range(args.clips):
        clips.append(rng.standard_normal(10 * SAMPLING_RATE).astype(np.float32) * 0.1)
    dtype = torch.float16 if is_half else torch.float32

    def ours() -> torch.Tensor:
        features = []
        for start in range(0, len(clips), args.batch_size):
            batch = clips[start : start + args.batch_size]
            features.append(extractor(batch).input_features)
        return torch.cat(features)

    def theirs() -> np.ndarray:
        return np.stack(one_by_one(extractor, clips, dtype))

    # The comparison of the features is also the warm-up.
    difference = ours().float().numpy() - theirs().astype(np.float32)
    error = float(np.abs(difference).max())
    sides = {
        "ours": (ours, nullcontext),
        "one_by_one": (theirs, nullcontext),
        "original_attention": (theirs, disable_sdpa),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, (run, context) in sides.items():
            with context():
                times[name].append(measure_seconds(run, args.device))
    rates = {name: args.clips / statistics.median(values) for name, values in times.items()}
    speedups = {
        "one_by_one": rates["ours"] / rates["one_by_one"],
        "original_attention": rates["ours"] / rates["original_attention"],
    }
    needed = MIN_SPEEDUP[extractor.device.type]
    report = {
        "device": args.device,
        "threads": args.threads,
        "precision": precision,
        "shape": extractor.describe()["shape"],
        "clips": args.clips,
        "batch_size": args.batch_size,
        "clips_per_second": rates,
        "speedup": speedups,
        "needed": needed,
        "largest_difference": error,
    }
    print_report(report)
    is_equal = error <= MAX_ERROR[precision]
    is_fast = speedups["one_by_one"] >= needed
    equal = "equal" if is_equal else "DIFFER"
    verdict = "reaches" if is_fast else "falls short of"
    print(f"numbers {equal}; {verdict} {needed} x")
    write_report(report, args.output_path)
    return int(not (is_equal and is_fast))


if __name__ == "__main__":
    run_command(main)
