"""Opens the model that is to be trained: precision, LoRA, and which parameters are frozen."""

from typing import Any

import torch

from ltu.checkpoints.open_checkpoint import open_model
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.training.arguments import ModelArguments, parse_list

DEFAULT_LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}


def open_to_train(args: ModelArguments, bf16: bool) -> LtuForConditionalGeneration:
    """Open the model of `--base_model`, and add LoRA and freeze parameters as the flags say.

    Raises:
        ValueError: a LoRA flag or the name of the prompt template contradicts the checkpoint.
    """
    llm_dtype = torch.bfloat16 if bf16 else torch.float32
    model = open_model(args.base_model, llm_dtype, args.llm, args.device_map)
    if args.attn_implementation:
        model.language_model.set_attn_implementation(args.attn_implementation)

    lora_flags = _lora_flags(args)
    stored_lora = model.config.lora
    is_without_lora = lora_flags.get("target_modules") == ["dummy"]
    if args.trainable_params != "proj" and not is_without_lora:
        if stored_lora is None:
            model.add_lora(**(DEFAULT_LORA | lora_flags))
        else:
            _check_lora_flags(args.base_model, stored_lora, lora_flags)

    template = model.config.prompt_template.get("name")
    if args.prompt_template_name not in (None, "", template):
        raise ValueError(
            f"{args.base_model} was made with the template {template!r}, not "
            f"{args.prompt_template_name!r}: leave the flag out."
        )

    model.set_trainable(args.trainable_params)
    if args.freeze_audio_tower:
        model.audio_tower.requires_grad_(False)
    return model


def _lora_flags(args: ModelArguments) -> dict[str, Any]:
    """Return the settings of LoRA that the flags give."""
    flags: dict[str, Any] = {
        "r": args.lora_r,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
    }
    if args.lora_target_modules is not None:
        flags["target_modules"] = parse_list(args.lora_target_modules)
    return {name: value for name, value in flags.items() if value is not None}


def _check_lora_flags(
    base_model: str, stored_lora: dict[str, Any], lora_flags: dict[str, Any]
) -> None:
    """Raise a ValueError if a flag differs from the LoRA of the checkpoint."""
    differences = {}
    for name, value in lora_flags.items():
        stored = stored_lora.get(name)
        if _sorted_if_list(value) != _sorted_if_list(stored):
            differences[name] = (value, stored)
    if differences:
        raise ValueError(
            f"{base_model} already has LoRA {stored_lora}; these flags differ: {differences}. "
            "Leave them out."
        )


def _sorted_if_list(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
