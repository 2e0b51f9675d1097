"""Reads the arguments that processors of transformers take, and refuses those without effect here.

A prompt of this model has one form: `[audio][padding][text]`, in rows of torch tensors, padded to
the longest. An argument that asks for this form is accepted, one that asks for another form is
refused with the reason. No argument is ignored.
"""

import base64
import re
import time
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

import numpy as np
import torch

from ltu.data.audio import AudioError, AudioSource
from ltu.models.config_checks import show

# Arguments that hold further arguments, as in `ProcessingKwargs` of transformers.
GROUPS = ("text_kwargs", "audio_kwargs", "common_kwargs")
WEB_URL = re.compile("https?://", re.IGNORECASE)
DATA_URL = re.compile("data:[^,]*;base64,", re.IGNORECASE)
FETCH_SECONDS = 10.0  # without a byte from the server
MAX_FETCH_SECONDS = 600.0  # of a whole file
MAX_FETCHED = 2**30  # bytes
READ_SIZE = 2**20  # bytes


@dataclass(frozen=True)
class StockArgument:
    """An argument of which only some values have a meaning here.

    Args:
        accepted: these values.
        reason: why no others.
    """

    accepted: tuple[bool | str | None, ...]
    reason: str


LAYOUT = "a row is [audio][padding][text]"
LENGTH = "a cut prompt would lose the question or the beginning of the answer; leave examples out"
TEMPLATE = "the model was trained with the prompt template of its checkpoint"
MODALITY = "the model takes audio and text"
STOCK_ARGUMENTS = {
    "add_special_tokens": StockArgument((True, None), "the model was trained with <s> or without"),
    "chat_template": StockArgument((None,), TEMPLATE),
    "documents": StockArgument((None,), TEMPLATE),
    "images": StockArgument((None,), MODALITY),
    "images_kwargs": StockArgument((None,), MODALITY),
    "load_audio_backend": StockArgument(("auto", None), "clips are decoded by libsndfile"),
    "load_audio_from_video": StockArgument((False, None), MODALITY),
    "max_length": StockArgument((None,), LENGTH),
    "pad_to_multiple_of": StockArgument((None,), "rows are padded to the longest"),
    "padding_side": StockArgument(("left", None), LAYOUT),
    "return_attention_mask": StockArgument((True, None), "the model needs it to find padding"),
    "return_tensors": StockArgument(("pt",), "the result is torch tensors"),
    "sanitize_control_tokens": StockArgument(
        (True, None), "a control token that a user types is always tokenized as text"
    ),
    "tools": StockArgument((None,), TEMPLATE),
    "truncation": StockArgument((False, None, "do_not_truncate"), LENGTH),
    "videos": StockArgument((None,), MODALITY),
    "videos_kwargs": StockArgument((None,), MODALITY),
}
PADDINGS: dict[bool | str | None, bool] = {
    None: True,
    True: True,
    "longest": True,
    False: False,
    "do_not_pad": False,
}


@dataclass
class ProcessingArguments:
    """Arguments of the processor that have an effect.

    Attributes:
        padding: whether rows may have padding.
        sampling_rate: of clips that are given as arrays, in Hz; None for 16 kHz.
        output_labels: whether to return labels of all text tokens.
    """

    padding: bool = True
    sampling_rate: int | None = None
    output_labels: bool = False


def read_processing_arguments(arguments: dict[str, Any]) -> ProcessingArguments:
    """Read the arguments of a processor's call.

    Args:
        arguments: by name; those of `GROUPS` hold further ones.

    Raises:
        ValueError: an argument is not known, is given twice, or has no meaning here.
    """
    flat: dict[str, Any] = {}
    groups = [arguments.get(name) or {} for name in GROUPS]
    others = {name: value for name, value in arguments.items() if name not in GROUPS}
    for group in (others, *groups):
        for name, value in group.items():
            if name in flat and flat[name] != value:
                raise ValueError(f"{name} is given as {show(flat[name])} and as {show(value)}.")
            flat[name] = value

    padding = flat.pop("padding", None)
    if not isinstance(padding, bool | str | None) or padding not in PADDINGS:
        raise ValueError(f"padding is {show(padding)}, but rows are padded to the longest or not.")
    read = ProcessingArguments(
        PADDINGS[padding], flat.pop("sampling_rate", None), bool(flat.pop("output_labels", False))
    )
    if not isinstance(read.sampling_rate, int | None):
        raise ValueError(
            f"sampling_rate is {show(read.sampling_rate)}, but must be a whole number of Hz."
        )
    for name, value in flat.items():
        check_stock_argument(name, value)
    return read


def check_stock_argument(name: str, value: Any) -> None:
    """Check that an argument asks for nothing that is not done here.

    Raises:
        ValueError: it does, or it is not known; the message has the reason.
    """
    known = STOCK_ARGUMENTS.get(name)
    if known is None:
        raise ValueError(f"The processor has no argument {name} ({show(value)}).")
    is_plain = isinstance(value, bool | str | None)
    if not (is_plain and value in known.accepted) and not (value == {} and None in known.accepted):
        shown = " or ".join(map(repr, known.accepted))
        raise ValueError(f"{name} is {show(value)}, but only {shown} is possible: {known.reason}.")


def resolve_clip(source: Any, sampling_rate: int | None = None) -> AudioSource:
    """Return a clip as `ltu.data.audio.decode_audio` takes it.

    Args:
        source: a path, the bytes of a file, an array, a tensor, an http(s) URL, which is fetched,
            or a `data:` URL in base64.
        sampling_rate: of an array or a tensor, in Hz.

    Raises:
        AudioError: a URL cannot be fetched, or holds no base64.
    """
    if isinstance(source, torch.Tensor):
        source = source.numpy(force=True)
    if isinstance(source, np.ndarray) and sampling_rate is not None:
        return source, sampling_rate
    if not isinstance(source, str):
        return source
    if WEB_URL.match(source):
        return fetch_clip(source)
    data_url = DATA_URL.match(source)
    if data_url:
        return decode_base64(source[data_url.end() :])
    return source


def fetch_clip(url: str) -> bytes:
    """Fetch the file of a clip by http(s).

    Raises:
        AudioError: the server cannot be reached, is too slow, has no such file, or one of
            `MAX_FETCHED`, or the connection broke.
    """
    data = bytearray()
    deadline = time.monotonic() + MAX_FETCH_SECONDS
    try:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as reply:
            while part := reply.read1(READ_SIZE):
                data += part
                if len(data) >= MAX_FETCHED:
                    raise AudioError(url, "too_long", f"the file has {MAX_FETCHED:,} bytes or more")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{len(data):,} bytes in {MAX_FETCH_SECONDS:.0f} seconds")
            # Of the length that the server has announced, what did not arrive.
            if reply.length:
                raise OSError(f"the connection broke after {len(data):,} bytes")
    except AudioError:
        raise
    except (OSError, ValueError, HTTPException) as error:
        raise AudioError(url, "unreachable", f"cannot be fetched ({error})") from error
    return bytes(data)


def decode_base64(text: str) -> bytes:
    """Return the bytes of a clip in base64.

    Raises:
        AudioError: the text is no base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise AudioError("<base64>", "unreadable", f"is no base64 ({error})") from error
