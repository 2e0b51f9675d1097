"""Speed of Whisper's features, ours beside the original's way: clip by clip, the whole stack averaged on the host.

    python -m benchmarks.whisper_features --whisper WHISPER.pt --output_path exp/benchmarks/whisper_features.json

Notable:
- the other side is the stock encoder on 1000 frames, gradients on as in the original, (layers + 1, 500, width) copied
  to the host and averaged there; "original_attention" also multiplies attention out, as Whisper did then;
- sides take turns in one process; the medians are compared, and the features must be equal;
- without `--whisper`, one of base size with random weights (`--size`): speed does not depend on them.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # Spinning threads would time the neighbours on a shared machine.

import numpy as np  # noqa: E402
import torch  # noqa: E402
from whisper.audio import log_mel_spectrogram, pad_or_trim  # noqa: E402
from whisper.model import ModelDimensions, Whisper, disable_sdpa  # noqa: E402

from ltu.data.audio import SAMPLING_RATE  # noqa: E402
from ltu_as import LtuAsFeatureExtractor  # noqa: E402

SIZES = {"tiny": (384, 6, 4), "base": (512, 8, 6), "large": (1280, 20, 32)}  # width, heads, layers
MIN_SPEEDUP = {"cpu": 2.0, "cuda": 4.0}
MAX_ERROR = {"fp32": 1e-4, "fp16": 0.1}


def random_whisper(size: str, folder: str) -> str:
    """Path of a Whisper with random weights in openai-whisper's format; its decoder is a stub."""
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
    """The original's way: features (layers, 25, width) of each clip."""
    model, _ = extractor.load_encoder()
    encoder = copy.copy(model.encoder)
    encoder._buffers = {
        "positional_embedding": model.encoder.positional_embedding[: extractor.num_frames // 2]
    }
    found = []
    for clip in clips:
        stack: list[torch.Tensor] = []
        hooks = [
            encoder.blocks[0].register_forward_pre_hook(
                lambda module, inputs, stack=stack: stack.append(*inputs)
            )
        ]
        for block in encoder.blocks:
            hooks.append(
                block.register_forward_hook(
                    lambda module, inputs, output, stack=stack: stack.append(output)
                )
            )
        mel = pad_or_trim(log_mel_spectrogram(clip, extractor.num_mel_bins), extractor.num_frames)
        encoder(mel[None].to(extractor.device, dtype))
        for hook in hooks:
            hook.remove()
        layers = (
            torch.stack(stack, -1)[0].detach().cpu().permute(2, 0, 1).numpy()[1:]
        )  # (layers, 500, width)
        shape = (len(layers), extractor.num_tokens, extractor.time_pooling, layers.shape[-1])
        found.append(layers.reshape(shape).mean(2, dtype=np.float32).astype(layers.dtype))
    return found


def seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--whisper", help="an openai-whisper .pt file or a name")
    parser.add_argument(
        "--size", choices=SIZES, default="base", help="of the random one without --whisper"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--feature_precision", choices=MAX_ERROR, help="default: fp32 on a CPU, fp16 on a GPU"
    )
    parser.add_argument("--clips", type=int, default=32, help="of 10 s")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_path")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    precision = args.feature_precision or ("fp16" if args.device.startswith("cuda") else "fp32")
    with tempfile.TemporaryDirectory() as folder:
        path = args.whisper or random_whisper(args.size, folder)
        extractor = LtuAsFeatureExtractor(None, None, path, None, precision)
        extractor.device = args.device
        model, _ = extractor.load_encoder()
    is_half = precision == "fp16" and extractor.device.type == "cuda"
    model.encoder.requires_grad_(
        not is_half
    )  # Half matrices beside full norms: gradients would only cost memory.
    noise = np.random.default_rng(0)
    clips = [
        noise.standard_normal(10 * SAMPLING_RATE).astype(np.float32) * 0.1
        for _ in range(args.clips)
    ]
    batches = [
        clips[start : start + args.batch_size] for start in range(0, len(clips), args.batch_size)
    ]
    dtype = torch.float16 if is_half else torch.float32

    def ours() -> torch.Tensor:
        return torch.cat([extractor(batch).input_features for batch in batches])

    def theirs() -> np.ndarray:
        return np.stack(one_by_one(extractor, clips, dtype))

    sides = {"ours": (ours, nullcontext), "one_by_one": (theirs, nullcontext)}
    sides["original_attention"] = theirs, disable_sdpa
    error = float(
        np.abs(ours().float().numpy() - theirs().astype(np.float32)).max()
    )  # Also the warm-up.
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, (run, context) in sides.items():
            with context():
                times[name].append(seconds(run))
    rates = {name: args.clips / statistics.median(found) for name, found in times.items()}
    speedups = {name: rates["ours"] / rates[name] for name in ("one_by_one", "original_attention")}
    needed = MIN_SPEEDUP["cuda" if is_half or args.device.startswith("cuda") else "cpu"]
    report = {"device": args.device, "threads": args.threads, "precision": precision}
    report |= {
        "shape": extractor.describe()["shape"],
        "clips": args.clips,
        "batch_size": args.batch_size,
    }
    report |= {
        "clips_per_second": rates,
        "speedup": speedups,
        "needed": needed,
        "largest_difference": error,
    }
    print(json.dumps(report, indent=1))
    print(f"numbers {'equal' if error <= MAX_ERROR[precision] else 'DIFFER'}; "
          f"{'reaches' if speedups['one_by_one'] >= needed else 'falls short of'} {needed} x")  # fmt: skip
    if args.output_path:
        Path(args.output_path).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output_path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
