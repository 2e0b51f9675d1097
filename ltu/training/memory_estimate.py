"""Estimates the peak of memory of a training run from the config of a model, without its weights.

The model is built on the meta device, and one forward pass, backward pass and optimizer step run
with fake tensors: every operation of torch is dispatched, but none is computed and nothing is
allocated. A tracker adds the bytes of each tensor that an operation returns and subtracts them when
the tensor is freed. So the estimate follows the code of the language model and of the audio
encoder, whatever they are, and has no constants that were fitted.

These bytes add up to the peak:

- the frozen weights in their dtype, or quantized;
- the trained weights, their gradients, and two averages of AdamW, all in fp32;
- activations: what autograd saves for the backward pass. A frozen layer saves no input, because it
  needs no gradient of its weight, but the inputs of its nonlinear functions. Under autocast, the
  bf16 copies of fp32 weights are saved too;
- temporary tensors, for example the fp32 logits and their gradient, or in the optimizer step the
  square roots of AdamW.

Autograd cannot run on fake CUDA tensors without a GPU, so the fake tensors are those of the CPU.
`_cuda_operations` replaces the two functions that allocate differently on a GPU. Attention needs no
replacement: the kernels of both devices save query, key, value and output, and no score matrix.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from ltu.models.configuration_ltu import LtuConfig
from ltu.models.modeling_ltu import LtuForConditionalGeneration

CPU = torch.device("cpu")
ALLOCATION_BYTES = 512  # The allocator for CUDA rounds each tensor up to a multiple.
# Bytes of a weight that bitsandbytes quantized: 8 bits, or 4 bits and an fp32 scale for 64 weights.
QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
# The blocks of a model that FSDP gathers one after the other. It gathers the next block while one
# is in use.
GATHERED_BLOCKS = 2


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of a training run on one device, in bytes.

    Args:
        frozen_weights: weights and buffers that are not trained.
        trained_weights: weights that are trained.
        gradients: gradients of the trained weights.
        optimizer_state: the two averages of AdamW.
        activations: what the forward pass saves for the backward pass.
        temporary: further tensors at the peak of the forward and backward pass.
        step_temporary: tensors that exist during the optimizer step only.
        gathered: what FSDP gathers while a block is in use, on top of the sharded weights: the
            weights outside of all blocks, `GATHERED_BLOCKS` of the largest block, and their
            gradients.
    """

    frozen_weights: int
    trained_weights: int
    gradients: int
    optimizer_state: int
    activations: int
    temporary: int
    step_temporary: int
    gathered: int

    @property
    def persistent(self) -> int:
        """What exists during the whole run."""
        weights = self.frozen_weights + self.trained_weights
        return weights + self.gradients + self.optimizer_state

    @property
    def peak(self) -> int:
        """The larger one of the peaks of the passes and of the optimizer step."""
        in_passes = self.activations + self.temporary
        return self.persistent + max(in_passes, self.step_temporary)

    def sharded(self, num_gpus: int) -> "TrainingMemory":
        """Return the memory of each of several GPUs with FSDP.

        Weights, gradients and optimizer state are divided. Activations are not: each GPU has its
        own micro-batch.
        """
        return replace(
            self,
            frozen_weights=math.ceil(self.frozen_weights / num_gpus),
            trained_weights=math.ceil(self.trained_weights / num_gpus),
            gradients=math.ceil(self.gradients / num_gpus),
            optimizer_state=math.ceil(self.optimizer_state / num_gpus),
            temporary=self.temporary + self.gathered,
            step_temporary=math.ceil(self.step_temporary / num_gpus),
        )


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that exist, by the operations that return them.

    Attributes:
        now: bytes that exist.
        peak: the largest value of `now` since `peak` was set.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self._storages: weakref.WeakSet = weakref.WeakSet()

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage in self._storages:
            return
        self._storages.add(storage)
        size = _allocated_bytes(storage.nbytes())
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._subtract, size)

    def _subtract(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Transformers 5.17 compares a random number with a layer drop of 0 to skip a layer.
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return False
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result


def _allocated_bytes(size: int) -> int:
    return math.ceil(size / ALLOCATION_BYTES) * ALLOCATION_BYTES


@contextmanager
def _cuda_operations() -> Iterator[None]:
    """Replace functions whose CPU versions allocate other tensors than those of CUDA.

    CUDA's dropout saves a mask of one byte for each value, the CPU's a mask in the dtype of its
    input. Under autocast, CUDA's layer norm computes in fp32.
    """
    stock_dropout = F.dropout
    stock_layer_norm = F.layer_norm

    def dropout(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        return torch.native_dropout(input, p, training)[0]

    def layer_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            input = input.float()
        return stock_layer_norm(input, *args, **kwargs)

    F.dropout = dropout
    F.layer_norm = layer_norm
    try:
        yield
    finally:
        F.dropout = stock_dropout
        F.layer_norm = stock_layer_norm


class _QuantizedMatmul(torch.autograd.Function):
    """Allocates what a frozen linear layer of bitsandbytes allocates.

    In both passes the weight is dequantized, used and freed. The layers of 8 bits also save their
    input for the backward pass, although a frozen weight does not need it.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, in_features: int, out_features: int, saves: bool
    ) -> Tensor:
        ctx.shape = (out_features, in_features)
        ctx.save_for_backward(*([weight, input] if saves else [weight]))
        dequantized = input.new_empty(ctx.shape)
        return input.flatten(0, -2).mm(dequantized.T).unflatten(0, input.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        dequantized = gradient.new_empty(ctx.shape)
        product = gradient.flatten(0, -2).mm(dequantized).unflatten(0, gradient.shape[:-1])
        return product, None, None, None, None


class _QuantizedLinear(nn.Module):
    """Stands for a linear layer of bitsandbytes."""

    def __init__(self, linear: nn.Linear, quantization: str):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.dtype = linear.weight.dtype
        self.saves_input = quantization == "8bit"
        size = math.ceil(linear.weight.numel() * QUANTIZED_BYTES[quantization])
        data = torch.empty(size, dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(data, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return _QuantizedMatmul.apply(
            input.to(self.dtype),
            self.weight,
            self.in_features,
            self.out_features,
            self.saves_input,
        )


def build_on_meta(config: LtuConfig, llm_dtype: torch.dtype) -> LtuForConditionalGeneration:
    """Build the model of a config on the meta device, which stores no weights.

    Args:
        config: of a checkpoint.
        llm_dtype: of the frozen language model.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=llm_dtype)
        return AutoModelForCausalLM.from_config(config, language_model=language_model)


def enable_checkpointing(model: LtuForConditionalGeneration) -> None:
    """Let the backward pass compute activations again, as `--gradient_checkpointing` does."""
    # transformers 5.24 warns of the old name of this method, 5.17 lacks the new one.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        enable = model.gradient_checkpointing_enable
    enable()


def quantize(model: LtuForConditionalGeneration, quantization: str) -> None:
    """Replace the frozen linear layers of the language model, as bitsandbytes does.

    The layer that computes the logits is not quantized.

    Args:
        quantization: "8bit" or "4bit".
    """
    language_model = model.language_model
    output_layer = language_model.get_output_embeddings()
    for name, module in list(language_model.named_modules()):
        if isinstance(module, nn.Linear) and module is not output_layer and ".lora_" not in name:
            parent, _, child = name.rpartition(".")
            replacement = _QuantizedLinear(module, quantization)
            setattr(language_model.get_submodule(parent), child, replacement)


def _num_bytes(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _step_temporary_bytes(trained: list[nn.Parameter], cuda: bool) -> int:
    """Return the bytes of the temporary tensors of an optimizer step.

    On a GPU, AdamW computes the square roots of all second moments at once. On a CPU, it updates
    one tensor after the other: there are the square roots and their quotient.
    """
    if cuda:
        return _num_bytes(trained)
    return 2 * max((_num_bytes([parameter]) for parameter in trained), default=0)


def _gathered_bytes(model: LtuForConditionalGeneration) -> int:
    """Return the bytes of weights and gradients that FSDP gathers at once."""
    names = set()
    for part in (model.language_model, model.audio_tower):
        names |= set(part._no_split_modules or [])
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    in_blocks: set[nn.Parameter] = set()
    largest = 0
    for block in blocks:
        parameters = list(block.parameters())
        in_blocks.update(parameters)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        largest = max(largest, _num_bytes(parameters) + _num_bytes(trained))
    others = [parameter for parameter in model.parameters() if parameter not in in_blocks]
    trained_others = [parameter for parameter in others if parameter.requires_grad]
    return _num_bytes(others) + _num_bytes(trained_others) + GATHERED_BLOCKS * largest


def trace_training(
    model: LtuForConditionalGeneration,
    num_rows: int,
    text_tokens: int,
    accumulates: bool = True,
    bf16: bool = True,
    cuda: bool = True,
) -> TrainingMemory:
    """Return the memory that a training run of a model needs.

    Every example has a clip and fills the cutoff, and all of its text has a loss. So the estimate
    is that of the largest pass of a run.

    Args:
        model: a model on the meta device. What is trained, and gradient checkpointing, are set as
            in the run.
        num_rows: number of examples in one forward pass.
        text_tokens: number of text tokens of an example.
        accumulates: whether an optimizer step has more than one pass, so that gradients
            exist already when the next forward pass runs.
        bf16: whether autocast computes in bf16.
        cuda: whether to count what is allocated on a GPU, or on a CPU.

    Raises:
        ValueError: the model reads values of its tensors, so that it cannot run without weights.
    """
    model = copy.deepcopy(model)  # The trace gives it fake weights.
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _trace(model, num_rows, text_tokens, accumulates, bf16, cuda)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"The memory of this model cannot be estimated, because its code depends on the values "
            f"of its tensors ({error.func})."
        ) from error


def _trace(
    model: LtuForConditionalGeneration,
    num_rows: int,
    text_tokens: int,
    accumulates: bool,
    bf16: bool,
    cuda: bool,
) -> TrainingMemory:
    model.to_empty(device=CPU)
    model.train()
    tracker = StorageTracker()

    # The weights.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        tracker.add(parameter)
    trained_weights = tracker.now
    for tensor in [*model.parameters(), *model.buffers()]:
        tracker.add(tensor)
    frozen_weights = tracker.now - trained_weights

    # Gradients, if a pass before has left them. Otherwise the backward pass allocates them.
    if accumulates:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
            tracker.add(parameter.grad)
    existing = tracker.now

    # A forward pass and a backward pass.
    operations = _cuda_operations if cuda else nullcontext
    with operations(), tracker:
        loss = _forward(model, num_rows, text_tokens, bf16)
        activations = tracker.now - existing
        loss.backward()
    gradients = trained_weights
    in_passes = tracker.peak - frozen_weights - trained_weights - gradients
    return TrainingMemory(
        frozen_weights=frozen_weights,
        trained_weights=trained_weights,
        gradients=gradients,
        optimizer_state=2 * trained_weights,
        activations=activations,
        temporary=in_passes - activations,
        step_temporary=_step_temporary_bytes(trained, cuda),
        gathered=_gathered_bytes(model),
    )


def _forward(
    model: LtuForConditionalGeneration, num_rows: int, text_tokens: int, bf16: bool
) -> Tensor:
    """Return the loss of a pass, computed as the trainer does."""
    num_audio_tokens = model.config.num_audio_tokens
    length = num_audio_tokens + text_tokens
    features = torch.empty(num_rows, *model.config.audio_config.feature_shape)
    input_ids = torch.zeros(num_rows, length, dtype=torch.long)
    attention_mask = torch.ones(num_rows, length, dtype=torch.long)

    # Logits are computed from the position before the first text token on, if the language model
    # can leave the others out.
    kept = torch.arange(length)
    if "logits_to_keep" in signature(model.language_model.forward).parameters:
        kept = torch.arange(num_audio_tokens - 1, length)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        # `model.forward` counts the placeholders in input_ids, which have no values here. So insert
        # the audio embeddings first, by the same operations.
        token_embeds = model.get_input_embeddings()(input_ids)  # (batch, length, hidden)
        audio_embeds = model.get_audio_features(features).to(token_embeds)
        is_audio = input_ids == model.config.audio_token_id  # (batch, length)
        embeds = token_embeds.masked_scatter(is_audio[..., None], audio_embeds)
        del token_embeds, audio_embeds
        output = model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            labels=input_ids[:, kept],
            logits_to_keep=kept,
            use_cache=False,
        )
    return output.loss
