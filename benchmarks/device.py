"""Finds, names and waits for the device of a measurement."""

import argparse
import os
import platform

import torch

from ltu.models.device_check import check_device


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def parse_device(text: str) -> str:
    """Return the device that a flag names, if this machine has it.

    Raises:
        argparse.ArgumentTypeError: this machine does not have it.
    """
    try:
        check_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def device_name(device: str | torch.device) -> str:
    """Return the name of a GPU, or the architecture and the number of cores of this machine."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"


def synchronize(device: str | torch.device) -> None:
    """Wait for the work that was left to a GPU; do nothing on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
