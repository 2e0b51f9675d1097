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

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import GradientCheckpointingLayer

from ltu.training.arguments import ModelArguments, RunArguments

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
        torch.OutOfMemoryError: the memory of the device does not suffice. Without compilation, the
            pass would need more.
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
