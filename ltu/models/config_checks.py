"""Checks the values of configs before anything is built of them.

A config may come from anywhere. A wrong type or size in it would end in a traceback from inside a
library, or in a model that does not fit into memory or is never finished.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from transformers import PreTrainedConfig

# The largest possible values of integers in configs; the smallest is 1. The limits are several
# times those of the largest models there are.
LARGEST = {
    "num_hidden_layers": 2**10,
    "n_layer": 2**10,
    "num_layers": 2**10,
    "num_whisper_layers": 2**10,
    "encoder_layers": 2**10,
    "decoder_layers": 2**10,
    "hidden_size": 2**17,
    "n_embd": 2**17,
    "d_model": 2**17,
    "intermediate_size": 2**20,
    "n_inner": 2**20,
    "ffn_dim": 2**20,
    "encoder_ffn_dim": 2**20,
    "decoder_ffn_dim": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "n_head": 2**12,
    "encoder_attention_heads": 2**12,
    "decoder_attention_heads": 2**12,
    "num_time_heads": 2**12,
    "num_layer_heads": 2**12,
    "head_dim": 2**14,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**30,
    "n_positions": 2**30,
    "max_source_positions": 2**20,
    "num_audio_tokens": 2**16,
    "num_mel_bins": 2**12,
    "feature_size": 2**16,
    "n_fft": 2**16,
    "num_frames": 2**17,
    "patch_size": 2**12,
    "time_pooling": 2**12,
    "time_stride": 2**12,
    "num_classes": 2**20,
}
LARGEST_LAYER = LARGEST["num_hidden_layers"]
# Sizes that may be null or 0.
OPTIONAL_SIZES = (
    "vocab_size",  # Some audio encoders have none.
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "n_inner",
    "num_experts",
    "num_local_experts",
    "max_position_embeddings",
    "n_positions",
)
# Sizes that may be a list with one of each layer.
SIZES_OF_LAYERS = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
# Finite numbers above 0, and finite numbers.
POSITIVE = (
    "layer_norm_eps",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "projector_layer_norm_eps",
    "feature_divisor",
    "initializer_range",
    "rope_theta",
    # Of feature extractors.
    "std",
    "sampling_rate",
    "log_offset",
    "mel_max_hz",
)
FINITE = ("mean", "padding_value", "mel_min_hz")
LARGEST_RANK = 2**16
LONGEST = 800  # Characters of a message.
NUM_SHOWN = 80  # Characters of a wrong value that a message shows.

# What libraries raise if a value has a type or size that they did not expect.
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
)


class LoraSettings(BaseModel):
    """Arguments of peft's `LoraConfig`; peft checks those that are not named here."""

    model_config = ConfigDict(strict=True, extra="allow")

    r: int = Field(ge=1, le=LARGEST_RANK, description=f"a whole number from 1 to {LARGEST_RANK}")
    lora_alpha: float = Field(gt=0, lt=math.inf, description="a number above 0")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="from 0 to below 1")
    target_modules: Annotated[list[str], Field(min_length=1)] | str = Field(
        description="a list of names of layers"
    )


class PromptTemplateFields(BaseModel):
    """The strings of a prompt template."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str = Field("", description="a text")
    prompt_no_input: str = Field("", description="a text")
    prompt_input: str = Field("", description="a text")
    chat_template: str | None = Field(None, description="a text or null")


class ProcessorFields(BaseModel):
    """The fields of `LtuProcessor` that are no parts of it."""

    model_config = ConfigDict(strict=True)

    num_audio_tokens: int = Field(
        ge=1,
        le=LARGEST["num_audio_tokens"],
        description=f"a whole number from 1 to {LARGEST['num_audio_tokens']}",
    )
    audio_token_id: int | None = Field(
        None,
        ge=1,
        le=LARGEST["vocab_size"],
        description=f"a whole number from 1 to {LARGEST['vocab_size']}, or null",
    )
    prompt_template: PromptTemplateFields | None = Field(
        None, description="an object with name, prompt_no_input and prompt_input"
    )
    add_bos: bool | None = Field(None, description="true, false or null")


ModelName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]  # A folder or hub id.
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
A_SHA256 = "a sha256 of 64 hexadecimal digits, or null"
LORA = "an object with r, lora_alpha, lora_dropout and target_modules, or null"
TokenId = Annotated[int, Field(ge=-1, le=LARGEST["vocab_size"])]  # -1 is no token.
A_TOKEN = f"a whole number from -1 to {LARGEST['vocab_size']}, or null"


class LtuFields(BaseModel):
    """The fields of `LtuConfig` that belong to neither of its two configs."""

    model_config = ConfigDict(strict=True)

    language_model: ModelName | None = Field(
        None, description="the folder or hub id of a language model, or null"
    )
    language_model_sha256: Sha256 | None = Field(None, description=A_SHA256)
    bos_token_id: TokenId | None = Field(None, description=A_TOKEN)
    eos_token_id: TokenId | list[TokenId] | None = Field(
        None, description=f"{A_TOKEN}, or a list of such numbers"
    )
    pad_token_id: TokenId | None = Field(None, description=A_TOKEN)
    lora: LoraSettings | None = Field(None, description=LORA)
    encoder_lora: LoraSettings | None = Field(None, description=LORA)
    prompt_template: PromptTemplateFields | None = Field(
        None, description="an object with name, prompt_no_input and prompt_input"
    )


def check_fields(schema: type[BaseModel], values: dict[str, Any], subject: str) -> None:
    """Check values by a schema.

    Raises:
        ValueError: a value has a wrong type or size. The message begins with `subject`.
    """
    try:
        schema.model_validate(values)
    except ValidationError as error:
        details = error.errors()[0]
        # The path of the value. After a name of this schema or of a schema in it, pydantic adds
        # what it tried.
        name, *more = map(str, details["loc"])
        field = schema.model_fields[name]
        for inner in getattr(field.annotation, "__args__", ()):
            known = getattr(inner, "model_fields", {})
            if more and more[0] in known:
                name = f"{name}.{more[0]}"
                field = known[more[0]]
        found = "absent" if details["type"] == "missing" else show(details["input"])
        raise ValueError(f"{subject}: {name} is {found}; possible: {field.description}.") from error


def check_sizes(config: PreTrainedConfig) -> None:
    """Check the sizes in a config, of whichever model, by their names.

    Raises:
        ValueError: as of `check_numbers`, or the dtype is none of floats.
    """
    subject = f"The config of {config.model_type or type(config).__name__}"
    check_numbers(vars(config), subject)
    rope = getattr(config, "rope_parameters", None)
    # Some models have an object of these for each type of layer.
    for values in [rope, *rope.values()] if isinstance(rope, dict) else []:
        if isinstance(values, dict):
            check_numbers(values, f"{subject}, rope_parameters")
    dtype = getattr(config, "dtype", None)
    is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if dtype is not None and not is_float:
        raise ValueError(f"{subject}: dtype is {show(dtype)}; possible: a type of floats, or null.")


def check_numbers(values: dict[str, Any], subject: str) -> None:
    """Check those values that are sizes, or numbers above 0, by their names.

    Raises:
        ValueError: a size is not a whole number from 1 to its limit, or a number is not finite.
    """
    for name, largest in LARGEST.items():
        # Some models have no such attribute, or refuse to tell it.
        value = values.get(name, 1)
        is_absent = value is None or (type(value) is int and value == 0)
        if is_absent and name in OPTIONAL_SIZES:
            continue
        has_list = name in SIZES_OF_LAYERS and isinstance(value, list) and len(value) > 0
        for size in value if has_list else [value]:
            if type(size) is not int or not 1 <= size <= largest:
                raise ValueError(
                    f"{subject}: {name} is {show(value)}; possible: a whole number from 1 to "
                    f"{largest}."
                )
    for name, value in values.items():
        if name in POSITIVE and not is_positive(value):
            raise ValueError(f"{subject}: {name} is {show(value)}; possible: a number above 0.")
        if name in FINITE and not (type(value) in (int, float) and math.isfinite(value)):
            raise ValueError(f"{subject}: {name} is {show(value)}; possible: a finite number.")
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{subject}: {name} is NaN. Remove it from the config.")


def is_positive(value: object) -> bool:
    """Return whether a value is a finite number above 0."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def show(value: object) -> str:
    """Return a value for a message, on one line and cut if it is long."""
    text = ascii(value).replace("\n", " ")  # Arrays have line breaks.
    return text if len(text) <= NUM_SHOWN else f"{text[:NUM_SHOWN]}..."


@contextmanager
def refuse_malformed(subject: str) -> Iterator[None]:
    """Turn what a library raises about values that it did not expect into ValueError, on one line.

    Args:
        subject: begins the message: the file or folder with the values.
    """
    try:
        yield
    except ValueError as error:
        message = " ".join(str(error).split())
        if message == str(error) and len(message) <= LONGEST:
            raise
        raise ValueError(f"{message[:LONGEST]} ...") from error
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())[:LONGEST]
        raise ValueError(
            f"{subject} is malformed ({type(error).__name__}: {reason}). Copy or write it again."
        ) from error
