"""A checkpoint folder of whichever kind -> its model, with the language model as the device can hold it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import ltu  # noqa: F401  registers the classes that the Auto classes look up
from ltu.arguments import ModelArguments, parse_list
from ltu.version_check import warn_about_untested_versions

DEFAULT_LORA = {"r": 8, "alpha": 16, "dropout": 0.05}


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
        given["language_model"] = str(Path(language_model).resolve()) if is_folder else language_model
    if quantization not in (None, "4bit", "8bit"):
        raise ValueError(f"quantization is '4bit' or '8bit', not {quantization!r}.")
    try:
        if quantization is not None:
            from transformers import BitsAndBytesConfig

            compute = torch.bfloat16 if dtype == "auto" else dtype
            bits = BitsAndBytesConfig(**{f"load_in_{quantization}": True}, bnb_4bit_compute_dtype=compute)
            given["quantization_config"] = bits
        given = {name: value for name, value in given.items() if value is not None}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)
    except ImportError as error:  # Among them: a package without metadata, and FlashAttention2.
        raise ValueError(f"{error} (4 and 8 bit need pip install -e '.[4bit]'; sdpa needs no package)") from error


def device_has_bf16() -> bool:
    """Whether the device multiplies in bf16: CUDA from Ampere on, or a CPU with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return not torch.backends.mps.is_available() and any(check is not None and check() for check in checks)


def open_to_train(args: ModelArguments, bf16: bool) -> Any:
    """The model of `--base_model`, with LoRA if the plan trains one, frozen as the plan says."""
    llm_dtype = torch.bfloat16 if bf16 else torch.float32
    model = open_model(args.base_model, llm_dtype, args.llm, args.device_map)
    if args.attn_implementation:
        model.language_model.set_attn_implementation(args.attn_implementation)
    asked = {"r": args.lora_r, "alpha": args.lora_alpha, "dropout": args.lora_dropout}
    asked["target_modules"] = parse_list(args.lora_target_modules) if args.lora_target_modules is not None else None
    asked = {key: value for key, value in asked.items() if value is not None}
    no_lora = asked.get("target_modules") == ["dummy"] or args.trainable_params == "proj"
    has = model.config.lora
    if has is None and not no_lora:
        model.add_lora(**(DEFAULT_LORA | asked))
    elif has is not None and not no_lora:
        differs = {
            key: (value, has[key]) for key, value in asked.items() if sorted_if_list(value) != sorted_if_list(has[key])
        }
        if differs:
            raise ValueError(
                f"{args.base_model} already has LoRA {has}; these flags differ: {differs}. Leave them out."
            )
    template = model.config.prompt_template.get("name")
    if args.prompt_template_name not in (None, "", template):
        given = args.prompt_template_name
        raise ValueError(
            f"{args.base_model} was made with the template {template!r}, not {given!r}: leave the flag out."
        )
    model.set_trainable(args.trainable_params)
    if args.freeze_audio_tower:
        model.audio_tower.requires_grad_(False)
    return model


def sorted_if_list(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
