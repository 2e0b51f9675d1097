"""Time and memory of a training step: LTU's beside a bare SDPA stack, LTU-AS's beside the original's ear.

    python -m benchmarks.train_step --output_path exp/benchmarks/train_step.json
    python -m benchmarks.train_step --kind ltu_as --output_path exp/benchmarks/train_step_ltu_as.json

Notable:
- LTU, both sides: a 12-layer ViT of width 768 on 512 patches, all trainable, pooled to 32 vectors, in front of 112 text
  tokens of a language model of width 64; forward, backward and AdamW;
- LTU-AS, the other side: TLTR of stock Whisper's blocks with explicit attention, which is what the original is made of,
  in front of the same bare language model; our bf16 is held against its fp32, as the bar was set;
- the two run alternately in one process, after a warm-up step each, and medians are compared;
- peak memory is measured first, each side in a process of its own with the same imports (resident memory of the whole
  process on a CPU, allocated memory on a GPU);
- bf16 is autocast with fp32 weights on both sides, as in training.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # Spinning threads would time the neighbours on a shared machine.

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402
from whisper.model import ResidualAttentionBlock, disable_sdpa  # noqa: E402

from ltu import CavMaeConfig, LtuConfig  # noqa: E402
from ltu_as import LtuAsConfig, TltrConfig  # noqa: E402

SIDES = ("bare", "ours")
MAX_TIME = {
    "ltu": {"fp32": 1.12, "bf16": 1.25},
    "ltu_as": {"fp32": 0.8, "bf16": 0.4},
}  # ours / bare
MAX_PEAK = {"ltu": 1.10, "ltu_as": 0.6}  # ours / bare
LLM = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=4,
)
LORA = {"r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}


class BareBlock(nn.Module):
    """A pre-norm transformer block, as short as torch allows."""

    def __init__(self, width: int, heads: int, hidden: int, is_causal: bool):
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=self.is_causal
        )  # (batch, heads, length, width / heads)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # (batch, length, width)


class BareLlm(nn.Module):
    """A causal stack with nothing around it: no masks, no placeholders, no adapters."""

    def __init__(self, audio_width: int):
        super().__init__()
        self.project = nn.Linear(audio_width, LLM["hidden_size"])
        self.embed = nn.Embedding(LLM["vocab_size"], LLM["hidden_size"])
        shape = (LLM["hidden_size"], LLM["num_attention_heads"], LLM["intermediate_size"])
        self.llm = nn.Sequential(
            *(BareBlock(*shape, True) for _ in range(LLM["num_hidden_layers"]))
        )
        self.head = nn.Linear(LLM["hidden_size"], LLM["vocab_size"], bias=False)

    def loss(self, heard: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        sequence = torch.cat(
            [self.project(heard), self.embed(text)], dim=1
        )  # (batch, audio tokens + text, 64)
        logits = self.head(self.llm(sequence))[:, heard.shape[1] :]  # (batch, text, vocabulary)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), text[:, 1:].flatten())


class BareTltr(BareLlm):
    """TLTR as the original builds it: two blocks of Whisper's, attention written out, the mean over layers last."""

    def __init__(self, audio_encoder: TltrConfig):
        super().__init__(audio_encoder.hidden_size)
        self.time_tr = ResidualAttentionBlock(
            audio_encoder.hidden_size, audio_encoder.num_time_heads
        )
        self.layer_tr = ResidualAttentionBlock(
            audio_encoder.hidden_size, audio_encoder.num_layer_heads
        )

    def forward(self, text: torch.Tensor, input_features: torch.Tensor) -> torch.Tensor:
        batch, layers, steps, _ = input_features.shape
        with disable_sdpa():
            x = (
                self.time_tr(input_features.flatten(0, 1))
                .unflatten(0, (batch, layers))
                .transpose(1, 2)
            )
            x = (
                self.layer_tr(x.flatten(0, 1)).mean(1).unflatten(0, (batch, steps))
            )  # (batch, 25, 1280)
        return self.loss(x, text)


class BareStack(BareLlm):
    """The same sizes as ours with nothing around them: no unused norms either."""

    def __init__(self, audio_encoder: CavMaeConfig):
        super().__init__(audio_encoder.hidden_size)
        width, heads, hidden = (
            audio_encoder.hidden_size,
            audio_encoder.num_attention_heads,
            audio_encoder.intermediate_size,
        )
        self.patches = nn.Conv2d(1, width, audio_encoder.patch_size, audio_encoder.patch_size)
        self.positions = nn.Parameter(torch.zeros(1, 512, width))
        self.audio_encoder = nn.Sequential(
            *(
                BareBlock(width, heads, hidden, False)
                for _ in range(audio_encoder.num_hidden_layers)
            )
        )
        self.ear_norm = nn.LayerNorm(width)

    def forward(self, text: torch.Tensor, input_features: torch.Tensor) -> torch.Tensor:
        x = (
            self.patches(input_features.transpose(1, 2)[:, None]).flatten(2).transpose(1, 2)
        )  # (batch, 512, 768)
        x = self.ear_norm(self.audio_encoder(x + self.positions))
        return self.loss(x.unflatten(1, (8, 32, 2)).mean((1, 3)), text)


def make_step(side: str, args: argparse.Namespace, dtype: str) -> Callable[[], None]:
    """A function that does one optimizer step of `side`, "bare" or "ours"."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    text = torch.randint(3, LLM["vocab_size"], (args.batch_size, args.text_tokens), device=device)
    if args.kind == "ltu":
        config_class, bare, audio_encoder = (
            LtuConfig,
            BareStack,
            CavMaeConfig(num_hidden_layers=args.num_layers),
        )
        shape = (audio_encoder.num_frames, audio_encoder.num_mel_bins)
    else:
        config_class, bare, audio_encoder = LtuAsConfig, BareTltr, TltrConfig()
        shape = (
            audio_encoder.num_whisper_layers,
            audio_encoder.num_audio_tokens,
            audio_encoder.hidden_size,
        )
    features = torch.randn(args.batch_size, *shape, device=device)
    if side == "bare":
        model = bare(audio_encoder).to(device).train()
        inputs = {"text": text, "input_features": features}
    else:
        config = config_class(audio_config=audio_encoder, text_config=LlamaConfig(**LLM), lora=LORA)
        model = AutoModelForCausalLM.from_config(config).to(device).train()
        model.set_trainable("all")
        audio = text.new_full((args.batch_size, config.num_audio_tokens), config.audio_token_id)
        ids = torch.cat([audio, text], dim=1)  # (batch, 32 + text)
        labels = torch.cat([torch.full_like(audio, -100), text], dim=1)
        inputs = dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=features,
            labels=labels,
        )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0
    )

    def precision() -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")

    def step() -> None:
        with precision():
            out = model(**inputs)
        (out if side == "bare" else out.loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def peak_bytes(device: str) -> int:
    """Peak of this process: allocated on a GPU, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource  # Unix only, like the measurement.

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(side: str, args: argparse.Namespace, dtype: str) -> int:
    """Bytes that two steps of `side` need at most, in a fresh process."""
    options = [
        f"--{name}={getattr(args, name)}"
        for name in ("kind", "batch_size", "text_tokens", "num_layers", "device", "threads")
    ]
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_step",
        "--worker",
        side,
        "--dtypes",
        dtype,
        *options,
    ]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(answer.strip().splitlines()[-1])


def reference_of(args: argparse.Namespace, dtype: str) -> str:
    """What the bare side computes in."""
    return "fp32" if args.kind == "ltu_as" else dtype


def alternate(args: argparse.Namespace, dtype: str) -> dict[str, list[float]]:
    """Seconds of every step, bare and ours by turns, after one warm-up step each."""
    steps = {
        "bare": make_step("bare", args, reference_of(args, dtype)),
        "ours": make_step("ours", args, dtype),
    }
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(args.steps + 1):
        for side, step in steps.items():
            start = time.perf_counter()
            step()
            if number:
                seconds[side].append(time.perf_counter() - start)
    return seconds


def compare(args: argparse.Namespace, dtype: str, peaks: dict[str, int]) -> dict:
    seconds = alternate(args, dtype)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    result = {"dtype": dtype, "seconds": seconds, "median_seconds": medians, "peak_bytes": peaks}
    result["time_ratio"] = medians["ours"] / medians["bare"]
    result["peak_ratio"] = peaks["ours"] / peaks["bare"]
    result["within"] = (
        result["time_ratio"] <= MAX_TIME[args.kind][dtype]
        and result["peak_ratio"] <= MAX_PEAK[args.kind]
    )
    return result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kind", choices=list(MAX_TIME), default="ltu")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--text_tokens", type=int, default=112)
    parser.add_argument(
        "--num_layers", type=int, default=12, help="layers of the ear; fewer for a quick look"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(MAX_TIME["ltu"]), default=list(MAX_TIME["ltu"])
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output_path", type=Path, help="write the figures there as JSON")
    parser.add_argument(
        "--worker", choices=SIDES, help="print the peak of one side in bytes, and nothing else"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        step = make_step(args.worker, args, args.dtypes[0])
        step()
        step()
        print(peak_bytes(args.device))
        return 0
    # Memory first, for all: on Linux a child's peak starts at what its parent had resident, which must still be small.
    peaks = {
        dtype: {
            "bare": peak_of("bare", args, reference_of(args, dtype)),
            "ours": peak_of("ours", args, dtype),
        }
        for dtype in args.dtypes
    }
    results = [compare(args, dtype, peaks[dtype]) for dtype in args.dtypes]
    depth = f", {args.num_layers} layers" if args.kind == "ltu" else ""
    size = f"{args.kind}, batch {args.batch_size} x {args.text_tokens} text tokens{depth}"
    print(f"\n{args.device}, {args.threads} threads, {size}, torch {torch.__version__}")
    print(
        f"{'':6}{'bare':>9}{'ours':>9}{'ratio':>8}{'bound':>7}   {'bare':>9}{'ours':>9}{'ratio':>8}{'bound':>7}"
    )
    for r in results:
        (bare, ours), (low, high) = (
            r["median_seconds"].values(),
            (peak / 2**30 for peak in r["peak_bytes"].values()),
        )
        time_bound, peak_bound, verdict = (
            MAX_TIME[args.kind],
            MAX_PEAK[args.kind],
            "ok" if r["within"] else "OVER",
        )
        print(
            f"{r['dtype']:6}{bare:8.2f}s{ours:8.2f}s{r['time_ratio']:8.3f}{time_bound[r['dtype']]:7.2f}   "
            f"{low:7.2f}Gi{high:7.2f}Gi{r['peak_ratio']:8.3f}{peak_bound:7.2f}   {verdict}"
        )
    if args.output_path:
        args.output_path.parent.mkdir(parents=True, exist_ok=True)
        settings = {
            name: value
            for name, value in vars(args).items()
            if name not in ("output_path", "worker")
        }
        args.output_path.write_text(
            json.dumps({"settings": settings, "results": results}, indent=1) + "\n"
        )
        print(f"written to {args.output_path}")
    return 0 if all(r["within"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
