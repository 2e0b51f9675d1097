"""Opens a checkpoint folder of any kind; the language model can be quantized to fit the device."""

import logging
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.models.version_check import warn_about_untested_versions

logger = logging.getLogger(__name__)

QUANTIZATIONS = ("4bit", "8bit")  # Bits of a weight of the language model, by bitsandbytes.


def open_model(
    folder: str | Path,
    dtype: torch.dtype | str = "auto",
    language_model: str | None = None,
    device_map: str | dict | None = None,
    quantization: str | None = None,
    attention: str | None = None,
) -> LtuForConditionalGeneration:
    """Return the model of a checkpoint folder.

    Args:
        folder, dtype, language_model, device_map: see
            `LtuForConditionalGeneration.from_pretrained`.
        quantization: "8bit" or "4bit": weights of the language model, by bitsandbytes.
        attention: "sdpa", "flash_attention_2" or "eager": attention of the language model.

    Raises:
        ValueError: a setting is impossible, or its package is not installed.
    """
    warn_about_untested_versions()
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantization is '4bit' or '8bit', not {quantization!r}.")
    settings = {"device_map": device_map, "attn_implementation": attention}
    if language_model is not None:
        # Make a folder absolute: a relative path in a config is relative to the checkpoint folder.
        if Path(language_model).is_dir():
            language_model = str(Path(language_model).resolve())
        settings["language_model"] = language_model
    try:
        if quantization is not None:
            from transformers import BitsAndBytesConfig

            settings["quantization_config"] = BitsAndBytesConfig(
                **{f"load_in_{quantization}": True},
                bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
                # The levels of 4 bits follow a normal distribution, as weights do (QLoRA).
                bnb_4bit_quant_type="nf4",
            )
        settings = {name: value for name, value in settings.items() if value is not None}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings)
    except ImportError as error:  # Also of a package without metadata, and of FlashAttention2.
        raise ValueError(
            f"{error} (4 and 8 bit need pip install -e '.[4bit]'; sdpa needs no package)"
        ) from error


def widen_to_float32(language_model: nn.Module) -> None:
    """Convert the bf16 and fp16 weights of a language model to fp32 if they fit into the memory.

    For a CPU that does not multiply in bf16. What it computes changes by rounding only.
    """
    halves = [
        weight
        for weight in language_model.parameters()
        if weight.dtype in (torch.bfloat16, torch.float16)
    ]
    if not halves:
        return
    num_bytes = 4 * sum(weight.numel() for weight in halves)
    available = psutil.virtual_memory().available
    if num_bytes > available:
        logger.warning(
            "The CPU does not multiply in %s, so the language model is slow. In float32 it would "
            "be faster, but takes %.1f GB, and %.1f GB of memory are free.",
            str(halves[0].dtype).removeprefix("torch."),
            num_bytes / 1e9,
            available / 1e9,
        )
        return
    language_model.float()
