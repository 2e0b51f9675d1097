"""Compiles the layers of a model one by one, in place, with `torch.compile`.

All layers of one kind share one compilation, so that it takes as long for 32 layers as for one. It
is dynamic in batch size and length. The names of parameters and the keys of `state_dict` stay,
because `nn.Module.compile` replaces only how a layer is called.

torch stores what it compiled in a folder of its own, by default `torchinductor_USER` in the folder
of temporary files (`TORCHINDUCTOR_CACHE_DIR` names another). So the next run, of the next stage
for example, compiles the same layers in seconds.

A compiled layer equals the layer but for the rounding, except that its dropout takes other random
numbers.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import GradientCheckpointingLayer

from ltu.training.arguments import ModelArguments, RunArguments
from ltu.training.forward_passes import Part, PassTrainer, count_labelled, merge, split_micro_batch

logger = logging.getLogger(__name__)

COMPILER = "inductor"  # The backend of torch.compile.

# `auto` compiles for at least so many examples: 300 optimizer steps of 256. At 7B on an H100,
# compilation takes 89 s, and an example then takes 4 ms less, so that 25,000 examples pay for it.
MIN_EXAMPLES = 76_800

# A layer is compiled again for a mask or none, one row or several, and an input with or without a
# gradient. torch counts the compilations of all layers of transformers together, because they share
# a function, and from its own limit of 8 on it calls layers without compilation.
RECOMPILE_LIMIT = 64


def find_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that are compiled.

    They are those that gradient checkpointing computes again: the decoder layers of a language
    model, the blocks of an audio encoder. YAMNet has none, since no two of its blocks are alike.
    """
    if isinstance(module, GradientCheckpointingLayer):
        return [module]
    layers = []
    for child in module.children():
        layers += find_layers(child)
    return layers


def chooses_compilation(
    model_args: ModelArguments, run: RunArguments, num_examples: int, device: torch.device
) -> bool:
    """Return whether `--compile_layers` asks for compiled layers.

    Args:
        model_args, run: the flags.
        num_examples: the number of examples of all steps.
        device: the device of the run.
    """
    if run.compile_layers != "auto":
        return run.compile_layers == "true"
    # With these, compiled layers are not tested, or everything is compiled already.
    other_flags = (
        run.torch_compile,
        run.fsdp,
        run.deepspeed,
        model_args.device_map,
        model_args.quantization,
    )
    return device.type == "cuda" and num_examples >= MIN_EXAMPLES and not any(other_flags)


def compile_layers(layers: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Let layers be compiled when they are first called.

    Args:
        layers: the modules, which are changed.
        backend: of `torch.compile`.

    Raises:
        RuntimeError: `torch.compile` does not support this platform.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, RECOMPILE_LIMIT)
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def undo_compilation(layers: Iterable[nn.Module]) -> None:
    """Let layers be called without compilation again."""
    for layer in layers:
        layer.compile(disable=True)


def find_failure(run_pass: Callable[[], None]) -> str | None:
    """Return why a forward and backward pass fails, in one line, or None if it does not.

    Raises:
        torch.OutOfMemoryError: the memory of the device does not suffice, which says nothing about
            the compiler.
    """
    try:
        run_pass()
    except torch.OutOfMemoryError:
        raise
    # Each compiler and torch itself have errors of their own; all of them are RuntimeErrors.
    except RuntimeError as error:
        return describe_failure(error)
    return None


def describe_failure(error: RuntimeError) -> str:
    """Return an error of the compiler in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first line may only say which part of the compiler has failed.
    if len(lines) > 1 and lines[0].endswith(":"):
        lines = [f"{lines[0]} {lines[1]}"]
    return lines[0] if lines else type(error).__name__


class CompilingTrainer(PassTrainer):
    """A Trainer that compiles layers before the first step, or warns and goes on without.

    Args:
        layers_to_compile: these layers.

    Attributes:
        has_compiled_layers: whether they are compiled.
    """

    def __init__(self, *args: Any, layers_to_compile: Sequence[nn.Module] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layers_to_compile = layers_to_compile
        self.has_compiled_layers = False

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Take a micro-batch as `PassTrainer` does; the first one compiles the layers.

        Raises:
            ValueError: a layer cannot be compiled for an input of another kind.
        """
        if self.layers_to_compile:
            self._compile_layers(inputs)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except TorchDynamoException as error:
            if not self.has_compiled_layers:  # With --torch_compile.
                raise
            raise ValueError(
                f"Step {self.state.global_step + 1}: a layer cannot be compiled "
                f"({describe_failure(error)}). Continue with --resume_from_checkpoint last "
                "--compile_layers False."
            ) from error

    def _compile_layers(self, inputs: dict[str, Tensor]) -> None:
        """Compile the layers on all ranks, or on none if that fails on one.

        A pass whose results are not used compiles them, so that training does not depend on how far
        one that fails has come.

        Args:
            inputs: a micro-batch.
        """
        layers = self.layers_to_compile
        self.layers_to_compile = ()
        device = self.args.device
        self.model.train()
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(gpus):
            failure = self._find_failure(layers, inputs)
        failures = [found for found in gather_object([failure]) if found is not None]
        self.has_compiled_layers = not failures
        if not failures:
            return
        undo_compilation(layers)
        if self.is_world_process_zero():
            logger.warning(
                "--compile_layers: the layers cannot be compiled, so training goes on without, "
                "more slowly. %s",
                failures[0],
            )

    def _find_failure(self, layers: Sequence[nn.Module], inputs: dict[str, Tensor]) -> str | None:
        """Compile layers; return why they fail on a micro-batch, or None if they do not.

        If memory is not enough for it, or `--rows_per_pass` is smaller, a part of it takes its
        place.

        Raises:
            torch.OutOfMemoryError: memory is not enough for one row.
        """
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        micro_batch = Part(inputs, 0, count_labelled(inputs["labels"]))
        num_rows = micro_batch.num_rows
        if self.rows_per_pass is not None:
            num_rows = min(num_rows, self.rows_per_pass)

        def run_pass() -> None:
            compile_layers(layers, COMPILER)
            part = split_micro_batch(micro_batch, num_rows, self.model.config.audio_token_id)[0]
            with self.compute_loss_context_manager():
                inputs = send_to_device(merge([part]), self.args.device)
                loss = self.compute_loss(self.model, inputs)
            # This leaves the gradients alone, and calls none of the hooks on them.
            torch.autograd.grad(loss, trained, allow_unused=True)

        while True:
            try:
                return find_failure(run_pass)
            except torch.OutOfMemoryError:
                if num_rows == 1:
                    raise
            num_rows //= 2

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the held-out examples, as the stock method does.

        Layers are not compiled again for this, which would take longer than it saves.
        """
        stance = "force_eager" if self.has_compiled_layers else "default"
        with torch.compiler.set_stance(stance):
            return super().evaluate(*args, **kwargs)
