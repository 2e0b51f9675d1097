"""Finds weights that are not finite, which a run that diverged leaves behind."""

from collections.abc import Mapping

import torch
from torch import Tensor

NUM_NAMES = 3  # Names of tensors that a message lists.


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value of a tensor is NaN or infinite.

    Tensors on the meta device, integers (among them quantized weights) and 8-bit floats are not
    read; for them the answer is True.
    """
    is_wide_float = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    if tensor.is_meta or tensor.numel() == 0 or not is_wide_float:
        return True
    # The extremes are NaN if any value is. Unlike isfinite, they need no memory for a mask.
    extremes = torch.stack(torch.aminmax(tensor))
    return bool(extremes.isfinite().all())


def check_finite(state: Mapping[str, Tensor], subject: str) -> None:
    """Check that all weights are finite.

    Args:
        state: the tensors by key.
        subject: begins the message: the file or folder, and what does not happen to it.

    Raises:
        ValueError: a value is NaN or infinite. The message counts and names the tensors.
    """
    bad = [key for key, tensor in state.items() if not is_finite(tensor)]
    if bad:
        names = ", ".join(bad[:NUM_NAMES])
        if len(bad) > NUM_NAMES:
            names += ", ..."
        raise ValueError(
            f"{subject}: {len(bad)} of {len(state)} tensors have NaN or infinite values ({names}). "
            "Training has diverged, or the file is damaged. Train again from an earlier "
            "checkpoint, with a lower --learning_rate, or get the file again."
        )
