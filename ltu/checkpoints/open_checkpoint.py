"""A checkpoint folder of whichever kind -> its model, with the language model as the device can hold it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ltu.models.version_check import warn_about_untested_versions


def open_model(
    folder: str | Path,
    dtype: Any = "auto",
    language_model: str | None = None,
    device_map: Any = None,
    quantization: str | None = None,
    attention: str | None = None,
) -> Any:
    """The model of a checkpoint folder.

    Args:
        folder, dtype, language_model, device_map: as of `LtuForConditionalGeneration.from_pretrained`.
        quantization: "8bit" or "4bit" weights of the language model, by bitsandbytes.
        attention: "sdpa", "flash_attention_2" or "eager", of the language model.

    Raises:
        ValueError: a setting is impossible, or its package is not installed.
    """
    warn_about_untested_versions()
    given = {"device_map": device_map, "attn_implementation": attention}
    if language_model is not None:
        # Absolute, because a relative place in a config is meant from its folder.
        is_folder = Path(language_model).is_dir()
        given["language_model"] = (
            str(Path(language_model).resolve()) if is_folder else language_model
        )
    if quantization not in (None, "4bit", "8bit"):
        raise ValueError(f"quantization is '4bit' or '8bit', not {quantization!r}.")
    try:
        if quantization is not None:
            from transformers import BitsAndBytesConfig

            compute = torch.bfloat16 if dtype == "auto" else dtype
            bits = BitsAndBytesConfig(
                **{f"load_in_{quantization}": True}, bnb_4bit_compute_dtype=compute
            )
            given["quantization_config"] = bits
        given = {name: value for name, value in given.items() if value is not None}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)
    except ImportError as error:  # Among them: a package without metadata, and FlashAttention2.
        raise ValueError(
            f"{error} (4 and 8 bit need pip install -e '.[4bit]'; sdpa needs no package)"
        ) from error
