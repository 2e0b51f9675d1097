"""Measures training and generation at the papers' size on one GPU: memory, speed, hours per stage.

    python -m benchmarks.gpu_speed_and_memory \\
        --output_path benchmarks/results/gpu_speed_and_memory_h100.json
    python -m benchmarks.gpu_speed_and_memory --size tiny --device cpu

The second command is a quick test of the program itself.

The models are complete, with random weights (speed and memory do not depend on them) and random
inputs. Every example has a clip and fills the text cutoff, so real examples, which are shorter,
cost less.

The language model is frozen in bf16 and the trained weights are fp32, under autocast, as in
`ltu.finetune`. A batch of 256 is 256 / micro-batch forward and backward passes and one AdamW step;
both are timed. Loading and decoding of clips are not.

The hours are derived, not measured: the number of examples of the papers' stages and the measured
rate of one GPU. Generation: five questions on each of 16 clips (one by one: of two clips), 64 new
tokens each, one by one and 16 at a time.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.device import default_device, device_name, parse_device, synchronize
from benchmarks.report import write_report
from data.command_line import command_parser
from ltu import CavMaeConfig, LtuConfig, LtuForConditionalGeneration
from ltu.files import run_command
from ltu.training.compiled_layers import compile_layers, find_layers, undo_compilation

LLMS = {
    "tiny": dict(hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4),
    "7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
    "13b": dict(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
BATCH = 256
QUESTIONS_PER_CLIP = 5
PROMPT_TOKENS = 40
NEW_TOKENS = 64


@dataclass(frozen=True)
class Stage:
    """A stage as in its script; docs/benchmarks.md#costs-at-7b has its costs."""

    script: str
    trainable_params: str  # "proj" or "all"
    cutoff: int  # text tokens
    examples: int  # times epochs


STAGES = {
    "ltu": [
        Stage("stage1_proj_cla", "proj", 108, 2 * 1_190_489),
        Stage("stage2_all_cla", "all", 108, 2 * 1_190_489),
        Stage("stage3_all_close", "all", 108, 1_917_894),
        Stage("stage4_all_mix", "all", 108, 5_681_708),
    ],
    "ltu_as": [
        Stage("stage1_proj_cla", "proj", 108, 2 * 2_072_481),
        Stage("stage2_all_cla", "all", 108, 2 * 2_072_481),
        Stage("stage3_all_mix_v2", "all", 160, 2 * 9_397_025),
    ],
}


def make_model(
    kind: str,
    size: str,
    trainable_params: str,
    device: torch.device,
    audio_config: CavMaeConfig | None = None,
) -> torch.nn.Module:
    """Return a model with random weights, in the dtypes of `ltu.finetune`.

    The language model is bf16, the rest fp32. There is LoRA if `trainable_params` is "all".

    Args:
        kind: "ltu" or "ltu_as".
        size: of LLMS.
        trainable_params: "proj" or "all".
        device: of all weights.
        audio_config: the audio encoder of an LTU; by default that of the paper.
    """
    torch.manual_seed(0)
    lora = None if trainable_params == "proj" else LORA
    text_config = LlamaConfig(**LLMS[size], dtype=torch.bfloat16)
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(text_config, dtype=torch.bfloat16)
        if kind == "ltu":
            audio_config = audio_config or CavMaeConfig()
            config = LtuConfig(audio_config=audio_config, text_config=text_config, lora=lora)
            model = LtuForConditionalGeneration(config, llm)
        else:
            # LTU-AS imports Whisper, which not every machine with a GPU has.
            from ltu_as import LtuAsConfig, LtuAsForConditionalGeneration, TltrConfig

            config = LtuAsConfig(audio_config=TltrConfig(), text_config=text_config, lora=lora)
            model = LtuAsForConditionalGeneration(config, llm)
    trained_dtypes = set()
    for name, parameter in model.named_parameters():
        if ".lora_" in name or not name.startswith("language_model."):
            trained_dtypes.add(parameter.dtype)
    assert trained_dtypes == {torch.float32}, trained_dtypes
    model.set_attn_implementation("sdpa")  # As in a model that is loaded.
    return model


def make_inputs(model: torch.nn.Module, batch: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """Return a batch of random clips, each with `text_tokens` of text, with loss on all text."""
    config = model.config
    device = model.get_input_embeddings().weight.device
    audio_encoder = config.audio_config
    if hasattr(audio_encoder, "num_whisper_layers"):
        shape = (
            audio_encoder.num_whisper_layers,
            audio_encoder.num_audio_tokens,
            audio_encoder.hidden_size,
        )
    else:
        shape = (audio_encoder.num_frames, audio_encoder.num_mel_bins)
    text = torch.randint(3, config.text_config.vocab_size, (batch, text_tokens), device=device)
    audio = text.new_full((batch, config.num_audio_tokens), config.audio_token_id)
    input_ids = torch.cat([audio, text], 1)  # (batch, audio tokens + text tokens)
    labels = torch.cat([torch.full_like(audio, -100), text], 1)
    return dict(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        input_features=torch.randn(batch, *shape, device=device),
        labels=labels,
    )


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Return the peak of allocated memory since `reset_peak`, or None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class TrainingCost:
    """Costs of training.

    Attributes:
        first_seconds: of the first micro-batch, which compiles layers that are to be compiled.
        micro_batch_seconds, step_seconds: medians of a micro-batch and of an optimizer step.
        peak_gib: the peak of memory.
    """

    first_seconds: float
    micro_batch_seconds: float
    step_seconds: float
    peak_gib: float | None


def train(
    model: torch.nn.Module,
    trainable_params: str,
    micro_batch: int,
    text_tokens: int,
    checkpointing: bool,
    num_micro_batches: int,
) -> TrainingCost:
    """Measure forward and backward passes of a micro-batch, and optimizer steps.

    Args:
        model: the model.
        trainable_params: what is trained, "proj" or "all".
        micro_batch: examples of a forward pass.
        text_tokens: text tokens of an example.
        checkpointing: whether activations are recomputed instead of stored.
        num_micro_batches: how many micro-batches are timed.
    """
    device = model.get_input_embeddings().weight.device
    model.train()
    model.set_trainable(trainable_params)
    if checkpointing:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
    inputs = make_inputs(model, micro_batch, text_tokens)
    # Compute logits only where a text token is predicted.
    length = inputs["input_ids"].shape[1]
    keep = torch.arange(model.config.num_audio_tokens - 1, length, device=device)
    inputs["labels"] = inputs["labels"][:, keep]
    inputs["logits_to_keep"] = keep
    inputs["use_cache"] = False
    reset_peak(device)
    times: dict[str, list[float]] = {"micro_batch": [], "step": []}

    def timed(name: str, run: Callable[[], None]) -> None:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times[name].append(time.perf_counter() - start)

    def forward_backward() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    # The first micro-batch and the first step are warm-ups: kernels are chosen, and AdamW allocates
    # its state.
    for _ in range(2):
        for _ in range(num_micro_batches // 2 + 1):
            timed("micro_batch", forward_backward)
        timed("step", step)
    return TrainingCost(
        first_seconds=times["micro_batch"][0],
        micro_batch_seconds=statistics.median(times["micro_batch"][1:]),
        step_seconds=times["step"][-1],
        peak_gib=peak_gib(device),
    )


def measure_training(
    model: torch.nn.Module,
    kind: str,
    size: str,
    trainable_params: str,
    micro_batches: list[int],
    num_micro_batches: int,
) -> list[dict]:
    """Measure every cutoff and micro-batch size, with and without gradient checkpointing.

    Args:
        model: the model.
        kind: "ltu" or "ltu_as".
        size: of LLMS.
        trainable_params: what is trained, "proj" or "all".
        micro_batches: numbers of examples of a forward pass.
        num_micro_batches: how many micro-batches are timed for each setting.
    """
    device = model.get_input_embeddings().weight.device
    measurements = []
    stages = [stage for stage in STAGES[kind] if stage.trainable_params == trainable_params]
    cutoffs = sorted({stage.cutoff for stage in stages})
    settings = itertools.product(cutoffs, micro_batches, (False, True))
    for cutoff, micro_batch, checkpointing in settings:
        measurement = dict(
            kind=kind,
            llm=size,
            trainable_params=trainable_params,
            text_tokens=cutoff,
            micro_batch=micro_batch,
            gradient_checkpointing=checkpointing,
        )
        try:
            cost = train(
                model, trainable_params, micro_batch, cutoff, checkpointing, num_micro_batches
            )
        except torch.OutOfMemoryError:
            measurement["out_of_memory"] = True
        else:
            seconds = cost.micro_batch_seconds * BATCH / micro_batch + cost.step_seconds
            samples_per_second = BATCH / seconds
            hours = {}
            for stage in stages:
                if stage.cutoff == cutoff:
                    hours[stage.script] = stage.examples / samples_per_second / 3600
            measurement |= asdict(cost)
            measurement["samples_per_second"] = samples_per_second
            measurement["derived_hours"] = hours
        model.zero_grad(set_to_none=True)
        free_memory(device)
        print(json.dumps(measurement), flush=True)
        measurements.append(measurement)
    return measurements


def measure_generation(model: torch.nn.Module, batch: int, clips: int) -> dict:
    """Measure questions per second, with QUESTIONS_PER_CLIP questions on each clip.

    A clip is encoded once for all its questions in a batch; with batches of one question, it is
    encoded for every question.
    """
    device = model.get_input_embeddings().weight.device
    model.eval()
    model.gradient_checkpointing_disable()
    inputs = make_inputs(model, 1, PROMPT_TOKENS)
    features = inputs["input_features"]

    def run(count: int) -> None:
        for start in range(0, count, batch):
            number = min(batch, count - start)
            # The clip of each question, counted from the first clip of this batch.
            questions = torch.arange(start, start + number, device=device)
            clip_of_question = questions // QUESTIONS_PER_CLIP
            audio_index = clip_of_question - clip_of_question[0]  # (number,)
            num_clips = int(audio_index[-1]) + 1
            model.generate(
                input_ids=inputs["input_ids"].expand(number, -1),
                attention_mask=inputs["attention_mask"].expand(number, -1),
                input_features=features.expand(num_clips, *features.shape[1:]),
                audio_index=audio_index,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )

    run(batch)  # Warm-up.
    reset_peak(device)
    synchronize(device)
    count = clips * QUESTIONS_PER_CLIP
    start = time.perf_counter()
    run(count)
    synchronize(device)
    seconds = time.perf_counter() - start
    return dict(
        batch=batch,
        questions=count,
        new_tokens=NEW_TOKENS,
        questions_per_second=count / seconds,
        peak_gib=peak_gib(device),
    )


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--size",
        nargs="+",
        choices=list(LLMS),
        default=["7b"],
        help="Size of the language model.",
    )
    parser.add_argument(
        "--kind",
        nargs="+",
        choices=list(STAGES),
        default=list(STAGES),
        help="LTU, LTU-AS, or both.",
    )
    parser.add_argument(
        "--micro_batches",
        nargs="*",
        type=int,
        default=[1, 2, 4, 8],
        help="Numbers of examples of a forward pass; none to measure generation only.",
    )
    parser.add_argument(
        "--num_micro_batches",
        type=int,
        default=6,
        help="Number of micro-batches that are timed for each setting.",
    )
    parser.add_argument(
        "--device", type=parse_device, default=default_device(), help="cpu, cuda, ..."
    )
    parser.add_argument(
        "--trainable_params",
        nargs="+",
        choices=("proj", "all"),
        default=["proj", "all"],
        help="What is trained. Generation is measured with all.",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="Compile the layers for training, as --compile_layers of ltu.finetune does.",
    )
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    return args


def main() -> None:
    args = parse_args()
    report = {
        "device": device_name(args.device),
        "torch": torch.__version__,
        "batch": BATCH,
        "compiled_layers": args.compile,
        "training": [],
        "generation": [],
    }
    models = itertools.product(args.size, args.kind, args.trainable_params)
    for size, kind, trainable_params in models:
        model = make_model(kind, size, trainable_params, args.device)
        layers = find_layers(model) if args.compile else []
        compile_layers(layers)
        report["training"] += measure_training(
            model, kind, size, trainable_params, args.micro_batches, args.num_micro_batches
        )
        undo_compilation(layers)
        if trainable_params == "all":
            for batch, clips in ((1, 2), (16, 16)):
                measurement = dict(kind=kind, llm=size) | measure_generation(model, batch, clips)
                print(json.dumps(measurement), flush=True)
                report["generation"].append(measurement)
        del model
        free_memory(args.device)
        # Write after each model: a run that is cut off leaves its measurements.
        write_report(report, args.output_path)


if __name__ == "__main__":
    run_command(main)
