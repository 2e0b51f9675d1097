"""Measures time and memory of a training step, compared with a reference implementation.

    python -m benchmarks.train_step --output_path exp/train_step.json
    python -m benchmarks.train_step --kind ltu_as --output_path exp/train_step_ltu_as.json

LTU is compared with a bare SDPA stack. Both sides are a 12-layer ViT of width 768 on 512 patches,
all trainable, pooled to 32 audio embeddings, in front of 112 text tokens of a language model of
width 64; forward, backward and AdamW. bf16 is autocast with fp32 weights on both sides, as in
training.

LTU-AS is compared with the audio encoder of the original: TLTR of stock Whisper's blocks with
explicit attention, in front of the same bare language model. Our bf16 is compared with its fp32, as
the bounds were set.

The two sides alternate in one process after a warm-up step of each, and medians are compared. Peak
memory is measured first, each side in a process of its own with the same imports: resident memory
of the whole process on a CPU, allocated memory on a GPU.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

# On a shared machine, spinning threads would also measure the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402
from whisper.model import ResidualAttentionBlock, disable_sdpa  # noqa: E402

from benchmarks.device import default_device, parse_device, synchronize  # noqa: E402
from benchmarks.gpu_speed_and_memory import LORA  # noqa: E402
from benchmarks.report import write_report  # noqa: E402
from data.command_line import command_parser  # noqa: E402
from ltu import CavMaeConfig, LtuConfig  # noqa: E402
from ltu.files import run_command  # noqa: E402
from ltu_as import LtuAsConfig, TltrConfig  # noqa: E402

SIDES = ("bare", "ours")
# Bounds of ours / bare.
MAX_TIME = {
    "ltu": {"fp32": 1.12, "bf16": 1.25},
    "ltu_as": {"fp32": 0.8, "bf16": 0.4},
}
MAX_PEAK = {"ltu": 1.10, "ltu_as": 0.6}
LLM = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=4,
)


class BareBlock(nn.Module):
    """A pre-norm transformer block, as short as torch allows."""

    def __init__(self, width: int, heads: int, hidden: int, is_causal: bool):
        super().__init__()
        self.heads = heads
        self.is_causal = is_causal
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        attended = attended.transpose(1, 2).flatten(2)  # (batch, length, width)
        x = x + self.out(attended)
        return x + self.mlp(self.norm2(x))  # (batch, length, width)


class BareLlm(nn.Module):
    """A causal stack with nothing around it: no masks, no placeholder tokens, no adapters."""

    def __init__(self, audio_width: int):
        super().__init__()
        width = LLM["hidden_size"]
        self.project = nn.Linear(audio_width, width)
        self.embed = nn.Embedding(LLM["vocab_size"], width)
        blocks = []
        for _ in range(LLM["num_hidden_layers"]):
            block = BareBlock(width, LLM["num_attention_heads"], LLM["intermediate_size"], True)
            blocks.append(block)
        self.llm = nn.Sequential(*blocks)
        self.head = nn.Linear(width, LLM["vocab_size"], bias=False)

    def loss(self, encoded: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Return the loss on the text behind the output of an audio encoder."""
        embeds = [self.project(encoded), self.embed(text)]
        sequence = torch.cat(embeds, dim=1)  # (batch, audio tokens + text, 64)
        logits = self.head(self.llm(sequence))[:, encoded.shape[1] :]  # (batch, text, vocabulary)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), text[:, 1:].flatten())


class BareTltr(BareLlm):
    """TLTR as the original builds it.

    Two blocks of Whisper's with attention written out; the mean over layers is taken last.
    """

    def __init__(self, audio_encoder: TltrConfig):
        super().__init__(audio_encoder.hidden_size)
        width = audio_encoder.hidden_size
        self.time_tr = ResidualAttentionBlock(width, audio_encoder.num_time_heads)
        self.layer_tr = ResidualAttentionBlock(width, audio_encoder.num_layer_heads)

    def forward(self, text: torch.Tensor, input_features: torch.Tensor) -> torch.Tensor:
        batch, layers, steps, _ = input_features.shape
        with disable_sdpa():
            x = self.time_tr(input_features.flatten(0, 1))  # (batch * layers, 25, 1280)
            x = x.unflatten(0, (batch, layers)).transpose(1, 2)  # (batch, 25, layers, 1280)
            x = self.layer_tr(x.flatten(0, 1)).mean(1)  # (batch * 25, 1280)
            x = x.unflatten(0, (batch, steps))  # (batch, 25, 1280)
        return self.loss(x, text)


class BareStack(BareLlm):
    """A CAV-MAE of our sizes with nothing around it, also without the unused norms."""

    def __init__(self, audio_encoder: CavMaeConfig):
        super().__init__(audio_encoder.hidden_size)
        width = audio_encoder.hidden_size
        heads = audio_encoder.num_attention_heads
        hidden = audio_encoder.intermediate_size
        patch_size = audio_encoder.patch_size
        self.patches = nn.Conv2d(1, width, patch_size, patch_size)
        self.positions = nn.Parameter(torch.zeros(1, 512, width))
        blocks = []
        for _ in range(audio_encoder.num_hidden_layers):
            blocks.append(BareBlock(width, heads, hidden, False))
        self.audio_encoder = nn.Sequential(*blocks)
        self.audio_encoder_norm = nn.LayerNorm(width)

    def forward(self, text: torch.Tensor, input_features: torch.Tensor) -> torch.Tensor:
        x = self.patches(input_features.transpose(1, 2)[:, None])
        x = x.flatten(2).transpose(1, 2)  # (batch, 512, 768)
        x = self.audio_encoder_norm(self.audio_encoder(x + self.positions))
        x = x.unflatten(1, (8, 32, 2)).mean((1, 3))  # (batch, 32, 768)
        return self.loss(x, text)


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    Args:
        kind: "ltu" or "ltu_as".
        steps: Timed steps of each side.
        batch_size: Examples of a step.
        text_tokens: Text tokens of an example.
        num_layers: Layers of the audio encoder of LTU.
        dtypes: "fp32", "bf16".
        device: "cpu", "cuda", ...
        threads: Threads of torch.
    """

    kind: str
    steps: int
    batch_size: int
    text_tokens: int
    num_layers: int
    dtypes: list[str]
    device: str
    threads: int


def make_step(side: str, settings: Settings, dtype: str) -> Callable[[], None]:
    """Return a function that makes one optimizer step of `side`, "bare" or "ours"."""
    torch.manual_seed(0)
    device = torch.device(settings.device)
    batch_size = settings.batch_size
    text = torch.randint(3, LLM["vocab_size"], (batch_size, settings.text_tokens), device=device)
    if settings.kind == "ltu":
        config_class = LtuConfig
        bare_class = BareStack
        audio_encoder = CavMaeConfig(num_hidden_layers=settings.num_layers)
        shape = (audio_encoder.num_frames, audio_encoder.num_mel_bins)
    else:
        config_class = LtuAsConfig
        bare_class = BareTltr
        audio_encoder = TltrConfig()
        shape = (
            audio_encoder.num_whisper_layers,
            audio_encoder.num_audio_tokens,
            audio_encoder.hidden_size,
        )
    features = torch.randn(batch_size, *shape, device=device)
    if side == "bare":
        model = bare_class(audio_encoder).to(device).train()
        inputs = {"text": text, "input_features": features}
    else:
        config = config_class(audio_config=audio_encoder, text_config=LlamaConfig(**LLM), lora=LORA)
        model = AutoModelForCausalLM.from_config(config).to(device).train()
        model.set_trainable("all")
        audio = text.new_full((batch_size, config.num_audio_tokens), config.audio_token_id)
        input_ids = torch.cat([audio, text], dim=1)  # (batch, 32 + text)
        inputs = dict(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            input_features=features,
            labels=torch.cat([torch.full_like(audio, -100), text], dim=1),
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            output = model(**inputs)
        loss = output if side == "bare" else output.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)

    return step


def peak_bytes(device: str) -> int:
    """Return the peak of this process: allocated memory on a GPU, else resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource  # Unix only, like the measurement.

    unit = 1024
    if sys.platform == "darwin":
        unit = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_peak(side: str, settings: Settings, dtype: str) -> int:
    """Return the peak in bytes of two steps of `side`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--worker", side, "--dtypes", dtype]
    for name in ("kind", "batch_size", "text_tokens", "num_layers", "device", "threads"):
        command.append(f"--{name}={getattr(settings, name)}")
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(output.strip().splitlines()[-1])


def bare_dtype(kind: str, dtype: str) -> str:
    """Return the dtype in which the bare side computes."""
    if kind == "ltu_as":
        return "fp32"
    return dtype


def measure_peaks(settings: Settings, dtype: str) -> dict[str, int]:
    """Return the peak in bytes of each side."""
    return {
        "bare": measure_peak("bare", settings, bare_dtype(settings.kind, dtype)),
        "ours": measure_peak("ours", settings, dtype),
    }


def measure_seconds(settings: Settings, dtype: str) -> dict[str, list[float]]:
    """Return the seconds of every step; the sides alternate after one warm-up step of each."""
    steps = {
        "bare": make_step("bare", settings, bare_dtype(settings.kind, dtype)),
        "ours": make_step("ours", settings, dtype),
    }
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    for number in range(settings.steps + 1):
        for side, step in steps.items():
            start = time.perf_counter()
            step()
            if number:
                seconds[side].append(time.perf_counter() - start)
    return seconds


def compare(settings: Settings, dtype: str, peaks: dict[str, int]) -> dict:
    """Measure the time of both sides; compare it and the peaks with the bounds."""
    seconds = measure_seconds(settings, dtype)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    time_ratio = medians["ours"] / medians["bare"]
    peak_ratio = peaks["ours"] / peaks["bare"]
    is_fast = time_ratio <= MAX_TIME[settings.kind][dtype]
    is_small = peak_ratio <= MAX_PEAK[settings.kind]
    return {
        "dtype": dtype,
        "seconds": seconds,
        "median_seconds": medians,
        "peak_bytes": peaks,
        "time_ratio": time_ratio,
        "peak_ratio": peak_ratio,
        "within": is_fast and is_small,
    }


def print_table(settings: Settings, results: list[dict]) -> None:
    """Print the settings, and one line for each dtype."""
    size = f"batch {settings.batch_size} x {settings.text_tokens} text tokens"
    if settings.kind == "ltu":
        size += f", {settings.num_layers} layers"
    machine = f"{settings.device}, {settings.threads} threads, torch {torch.__version__}"
    print(f"\n{settings.kind}, {size}; {machine}")
    columns = f"{'bare':>9}{'ours':>9}{'ratio':>8}{'bound':>7}"
    print(f"{'':6}{columns}   {columns}")
    for result in results:
        dtype = result["dtype"]
        seconds = result["median_seconds"]
        peaks = result["peak_bytes"]
        verdict = "ok" if result["within"] else "OVER"
        print(
            f"{dtype:6}{seconds['bare']:8.2f}s{seconds['ours']:8.2f}s"
            f"{result['time_ratio']:8.3f}{MAX_TIME[settings.kind][dtype]:7.2f}   "
            f"{peaks['bare'] / 2**30:7.2f}Gi{peaks['ours'] / 2**30:7.2f}Gi"
            f"{result['peak_ratio']:8.3f}{MAX_PEAK[settings.kind]:7.2f}   {verdict}"
        )


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument("--kind", choices=list(MAX_TIME), default="ltu", help="LTU or LTU-AS.")
    parser.add_argument("--steps", type=int, default=5, help="Timed steps of each side.")
    parser.add_argument("--batch_size", type=int, default=8, help="Examples of a step.")
    parser.add_argument("--text_tokens", type=int, default=112, help="Text tokens of an example.")
    parser.add_argument(
        "--num_layers",
        type=int,
        default=12,
        help="Layers of the audio encoder; fewer for a quick test.",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=list(MAX_TIME["ltu"]),
        default=list(MAX_TIME["ltu"]),
        help="Dtypes to measure.",
    )
    parser.add_argument(
        "--device", type=parse_device, default=default_device(), help="cpu, cuda, ..."
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="Threads of torch."
    )
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    parser.add_argument(
        "--worker", choices=SIDES, help="Print the peak of one side in bytes, and nothing else."
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    settings = Settings(
        kind=args.kind,
        steps=args.steps,
        batch_size=args.batch_size,
        text_tokens=args.text_tokens,
        num_layers=args.num_layers,
        dtypes=args.dtypes,
        device=args.device,
        threads=args.threads,
    )
    torch.set_num_threads(settings.threads)
    if args.worker:
        step = make_step(args.worker, settings, settings.dtypes[0])
        step()
        step()
        print(peak_bytes(settings.device))
        return 0
    # Measure all memory first: on Linux the peak of a child starts at the resident memory of its
    # parent, which must still be small.
    peaks = {dtype: measure_peaks(settings, dtype) for dtype in settings.dtypes}
    results = [compare(settings, dtype, peaks[dtype]) for dtype in settings.dtypes]
    print_table(settings, results)
    write_report({"settings": asdict(settings), "results": results}, args.output_path)
    is_within = all(result["within"] for result in results)
    return int(not is_within)


if __name__ == "__main__":
    run_command(main)
