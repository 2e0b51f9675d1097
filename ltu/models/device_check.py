"""Checks whether a model can run as requested, before it is loaded.

PyTorch finds out only when it puts weights on a device or computes, and then the error is a
traceback after minutes of loading. `ValueError`s of these checks name what this machine has.
"""

import torch
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

# Names by which accelerate spreads the layers of a model over devices.
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = ("float32", "bfloat16", "float16")  # those that are named in messages


def check_device(device: str | torch.device) -> None:
    """Check that this machine has a device.

    Raises:
        ValueError: there is no such device, or PyTorch was built without it.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is not one that PyTorch knows. {_devices()}") from None
    if found.type == "cpu":
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or found.type != accelerator.type:
        raise ValueError(f"device {device!r}: PyTorch finds none here. {_devices()}")
    if found.index is not None and found.index >= torch.accelerator.device_count():
        raise ValueError(f"device {device!r}: there is none of this number. {_devices()}")


def _devices() -> str:
    """Say which devices this machine has."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "This machine has only cpu."
    last = torch.accelerator.device_count() - 1
    return f"This machine has cpu and {accelerator.type}:0 to {accelerator.type}:{last}."


def device_has_bf16() -> bool:
    """Return whether the default device multiplies in bf16: CUDA does from Ampere on."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not torch.backends.mps.is_available() and cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies in bf16, which takes AMX or AVX512-BF16.

    Others convert to fp32 and back, which makes bf16 several times slower than fp32.
    """
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        is_supported = getattr(torch.cpu, name, None)
        if is_supported is not None and is_supported():
            return True
    return False


def check_dtype(dtype: str | torch.dtype) -> None:
    """Check that weights can have a dtype; "auto" is that of the checkpoint.

    Raises:
        ValueError: it is no dtype, or none in which PyTorch computes.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    is_float = isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize >= 2
    if dtype != "auto" and not is_float:
        raise ValueError(f"dtype {dtype!r} is not auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")


def check_device_map(device_map: str | dict | None) -> None:
    """Check the name of a device map, or the device that it is.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(device_map, str) or device_map in SPREADS:
        return
    try:
        check_device(device_map)
    except ValueError as error:
        raise ValueError(f"device_map is {', '.join(SPREADS)}, or a device: {error}") from None


def check_attention(attention: str | None) -> None:
    """Check that transformers has an implementation of attention, and that it can run here.

    The name of a kernel on the hub has a slash; it is not checked.

    Raises:
        ValueError: there is no such implementation, or FlashAttention 2 cannot run.
    """
    if attention is None or "/" in attention:
        return
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError(
            "attention 'flash_attention_2' needs a GPU and the package flash-attn; sdpa needs no "
            "package."
        )
    names = sorted({"eager", *AttentionInterface().valid_keys()})
    if attention not in names:
        raise ValueError(f"attention {attention!r} is not one of {', '.join(names)}.")


def check_compile(device: str | torch.device) -> None:
    """Check that torch.compile works on a device, by compiling an addition.

    Raises:
        ValueError: it does not; usually there is no C++ compiler or no Triton.
    """
    try:
        torch.compile(_add_one)(torch.ones(2, device=device))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"torch.compile does not work here: {reason}") from None


def _add_one(numbers: torch.Tensor) -> torch.Tensor:
    return numbers + 1
