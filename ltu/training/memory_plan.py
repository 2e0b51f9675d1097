"""Says whether a training run fits into the memory of a GPU, and which flags make it fit.

Only the config of the checkpoint is opened, no weights; see `ltu.training.memory_estimate`. A trace
takes seconds, so each setting is traced for one or two sizes of the pass. Activations grow
linearly with it, so the other sizes follow.
"""

import copy
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig

from ltu.models.configuration_ltu import LtuConfig
from ltu.models.locate_checkpoint import find_checkpoint
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.training.arguments import ModelArguments, RunArguments
from ltu.training.memory_estimate import (
    TrainingMemory,
    build_on_meta,
    enable_checkpointing,
    quantize,
    trace_training,
)
from ltu.training.model_setup import choose_llm_dtype, choose_trained

GIB = 2**30
# Memory of a GPU that no tensor can use. The CUDA context, with the workspaces of its libraries,
# takes about 0.6 GiB. Free parts between allocated tensors take some percent: on a GPU of 79.1 GiB,
# a run with 76.7 GiB of tensors was out of memory (benchmarks/gpu_speed_and_memory.py).
CONTEXT_BYTES = int(0.6 * GIB)
FRAGMENTATION = 0.03
# The number of rows that is traced if that of the run is smaller: the largest temporary tensors
# of a few examples are not those of many.
SMALLEST_TRACED_SIZE = 4
NUMBERS_OF_GPUS = (2, 4, 8)
FSDP_FLAGS = "--fsdp --fsdp_config train_scripts/configs/fsdp.json"  # It has checkpointing.


@dataclass(frozen=True)
class Setting:
    """What can be changed to need less memory.

    Args:
        gradient_checkpointing: whether activations are computed again instead of stored.
        quantization: of the frozen language model, "8bit", "4bit" or None.
        num_gpus: the number of GPUs over which FSDP shards the model.
    """

    gradient_checkpointing: bool
    quantization: str | None
    num_gpus: int = 1

    def flags(self, given: "Setting") -> list[str]:
        """Return the flags in which this setting differs from the given one."""
        if self.num_gpus != given.num_gpus:
            return [f"{FSDP_FLAGS} on {self.num_gpus} GPUs"]
        flags = []
        if self.gradient_checkpointing != given.gradient_checkpointing:
            flags.append(f"--gradient_checkpointing {self.gradient_checkpointing}")
        if self.quantization != given.quantization:
            flags.append(f"--quantization {self.quantization}")
        return flags


def build_model(args: ModelArguments, bf16: bool) -> LtuForConditionalGeneration:
    """Build the model that a run would train on the meta device, by the config of its checkpoint.

    Args:
        args: the flags.
        bf16: whether training computes in bf16.
    """
    config: LtuConfig = AutoConfig.from_pretrained(find_checkpoint(args.base_model))
    dtype = choose_llm_dtype(args, config, bf16)
    if dtype == "auto":
        dtype = config.text_config.dtype or torch.float32
    model = build_on_meta(config, dtype)
    # No attention but eager stores a matrix of scores, and sdpa runs without a GPU.
    is_eager = args.attn_implementation == "eager"
    model.language_model.set_attn_implementation("eager" if is_eager else "sdpa")
    choose_trained(model, args)
    return model


class MemoryPlanner:
    """Estimates the memory of a run, and of the same run with other settings.

    Args:
        model_args: the flags of the model.
        text_tokens: number of text tokens of the longest example.
        run: the flags of the run.
    """

    def __init__(self, model_args: ModelArguments, text_tokens: int, run: RunArguments):
        self.text_tokens = text_tokens
        self.batch_size = run.batch_size // run.world_size
        self.num_rows = run.micro_batch_size
        if run.rows_per_pass != "auto":
            self.num_rows = int(run.rows_per_pass)
        # --bf16 auto asks this machine, which may have no GPU.
        self.bf16 = run.bf16 or not run.is_bf16_chosen
        self.model = build_model(model_args, self.bf16)
        self.trains_llm = model_args.trainable_params == "full"
        # Releases of transformers have one or the other name.
        is_checkpointed = run.gradient_checkpointing or getattr(
            run, "activation_checkpointing", False
        )
        self.given = Setting(
            gradient_checkpointing=bool(is_checkpointed),
            quantization=model_args.quantization,
            num_gpus=run.world_size if run.fsdp else 1,
        )
        self._traced: dict[tuple[Setting, int, bool], TrainingMemory] = {}

    def estimate(self, setting: Setting, num_rows: int) -> TrainingMemory:
        """Return the memory of one GPU."""
        accumulates = self.batch_size > num_rows
        high = max(self.num_rows, SMALLEST_TRACED_SIZE)
        memory = self._trace(setting, high, accumulates)
        if num_rows != high:
            low_memory = self._trace(setting, 1, accumulates)
            fraction = (num_rows - 1) / (high - 1)
            memory = interpolate(low_memory, memory, fraction)
        return memory.sharded(setting.num_gpus) if setting.num_gpus > 1 else memory

    def _trace(self, setting: Setting, num_rows: int, accumulates: bool) -> TrainingMemory:
        """Return the memory of one GPU, before the model is sharded."""
        # A language model that is trained with FSDP is gathered in bf16, so that autocast makes no
        # copies. For the rest, a trace does not depend on the number of GPUs.
        gathers_bf16 = setting.num_gpus > 1 and self.trains_llm and self.bf16
        traced = replace(setting, num_gpus=2 if gathers_bf16 else 1)
        key = (traced, num_rows, accumulates)
        if key in self._traced:
            return self._traced[key]

        model = copy.deepcopy(self.model)
        if setting.gradient_checkpointing:
            enable_checkpointing(model)
        if setting.quantization is not None:
            quantize(model, setting.quantization)
        memory = trace_training(model, num_rows, self.text_tokens, accumulates, self.bf16)
        if gathers_bf16:
            model.language_model.to(torch.bfloat16)
            passes = trace_training(model, num_rows, self.text_tokens, accumulates, self.bf16)
            memory = replace(
                memory,
                activations=passes.activations,
                temporary=passes.temporary,
                gathered=passes.gathered,
            )
        self._traced[key] = memory
        return memory

    def largest_fit(self, setting: Setting, gpu_bytes: float, limit: int) -> int | None:
        """Return the largest number of rows that fits, or None.

        Args:
            setting: what else the run needs.
            gpu_bytes: memory of a GPU.
            limit: the largest size that is tried. Only divisors of the batch size are.
        """
        sizes = [size for size in range(limit, 0, -1) if self.batch_size % size == 0]
        for size in sizes:
            if needed_bytes(self.estimate(setting, size)) <= gpu_bytes:
                return size
        return None

    def alternatives(self) -> list[Setting]:
        """Return settings that need less memory, those that cost the least time first."""
        checkpointed = replace(self.given, gradient_checkpointing=True)
        settings = [self.given, checkpointed]
        if not self.trains_llm:
            settings.append(replace(checkpointed, quantization="8bit"))
            settings.append(replace(checkpointed, quantization="4bit"))
        for num_gpus in NUMBERS_OF_GPUS:
            settings.append(replace(checkpointed, quantization=None, num_gpus=num_gpus))
        return list(dict.fromkeys(settings))


def interpolate(low: TrainingMemory, high: TrainingMemory, fraction: float) -> TrainingMemory:
    """Return the memory between two sizes of the pass, or beyond them.

    Args:
        low, high: the memory of both.
        fraction: 0 for `low`, 1 for `high`.
    """
    activations = low.activations + fraction * (high.activations - low.activations)
    temporary = low.temporary + fraction * (high.temporary - low.temporary)
    return replace(high, activations=int(activations), temporary=int(temporary))


def needed_bytes(memory: TrainingMemory) -> int:
    """Return the size of a GPU on which a run fits."""
    return int(memory.peak * (1 + FRAGMENTATION)) + CONTEXT_BYTES


def describe_memory(planner: MemoryPlanner, gpu_memory: float) -> list[str]:
    """Say what a run needs and whether it fits, and if not, which flags make it fit.

    Args:
        planner: estimates the memory of the run.
        gpu_memory: memory of a GPU in GiB.

    Returns:
        The lines of a table, in GiB.
    """
    gpu_bytes = gpu_memory * GIB
    size = planner.num_rows
    given = planner.given
    memory = planner.estimate(given, size)
    needed = needed_bytes(memory)
    fits = needed <= gpu_bytes

    tokens = planner.model.config.num_audio_tokens + planner.text_tokens
    precision = "bf16" if planner.bf16 else "fp32"
    lines = [f"GiB on a GPU, computing in {precision}, {size} examples x {tokens} tokens at once:"]
    lines += [_line(part, name) for part, name in _parts(memory)]
    lines.append(_line(needed - memory.peak, "CUDA context, fragmentation"))
    verdict = "fits" if fits else "does not fit"
    lines.append(_line(needed, f"in all: {verdict} into {gpu_memory:.1f}"))
    if fits:
        largest = planner.largest_fit(given, gpu_bytes, planner.batch_size)
        lines.append(
            f"the largest pass that fits: --rows_per_pass {largest} (the default finds it)"
        )
        return lines

    lines.append("what fits, the fastest first:")
    found = False
    for setting in planner.alternatives():
        largest = planner.largest_fit(setting, gpu_bytes, size)
        if largest is None:
            continue
        found = True
        flags = setting.flags(given)
        if largest != size:
            flags.append(f"--rows_per_pass {largest}")
        lines.append(_line(needed_bytes(planner.estimate(setting, largest)), " ".join(flags)))
    if not found:
        lines.append(f"nothing, up to {NUMBERS_OF_GPUS[-1]} GPUs. Lower --cutoff_len")
    return lines


def _parts(memory: TrainingMemory) -> list[tuple[int, str]]:
    """Return the parts of the peak, with their names."""
    parts = [
        (memory.frozen_weights, "frozen weights"),
        (memory.trained_weights, "trained weights"),
        (memory.gradients, "gradients"),
        (memory.optimizer_state, "optimizer state (AdamW)"),
    ]
    if memory.activations + memory.temporary >= memory.step_temporary:
        parts.append((memory.activations, "activations"))
        parts.append((memory.temporary, "temporary tensors of the backward pass"))
    else:
        parts.append((memory.step_temporary, "temporary tensors of the optimizer step"))
    return parts


def _line(size: int, text: str) -> str:
    return f"{size / GIB:8.1f}  {text}"
