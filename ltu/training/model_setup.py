"""Opens the model that is to be trained: precision, LoRA, and which parameters are frozen."""

from typing import Any

import torch

from ltu.checkpoints.open_checkpoint import open_model
from ltu.training.arguments import ModelArguments, parse_list

DEFAULT_LORA = {"r": 8, "alpha": 16, "dropout": 0.05}


def device_has_bf16() -> bool:
    """Whether the device multiplies in bf16: CUDA from Ampere on, or a CPU with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (
        getattr(torch.cpu, name, None)
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return not torch.backends.mps.is_available() and any(
        check is not None and check() for check in checks
    )


def open_to_train(args: ModelArguments, bf16: bool) -> Any:
    """The model of `--base_model`, with LoRA if the plan trains one, frozen as the plan says."""
    llm_dtype = torch.bfloat16 if bf16 else torch.float32
    model = open_model(args.base_model, llm_dtype, args.llm, args.device_map)
    if args.attn_implementation:
        model.language_model.set_attn_implementation(args.attn_implementation)
    asked = {"r": args.lora_r, "alpha": args.lora_alpha, "dropout": args.lora_dropout}
    asked["target_modules"] = (
        parse_list(args.lora_target_modules) if args.lora_target_modules is not None else None
    )
    asked = {key: value for key, value in asked.items() if value is not None}
    no_lora = asked.get("target_modules") == ["dummy"] or args.trainable_params == "proj"
    has = model.config.lora
    if has is None and not no_lora:
        model.add_lora(**(DEFAULT_LORA | asked))
    elif has is not None and not no_lora:
        differs = {
            key: (value, has[key])
            for key, value in asked.items()
            if sorted_if_list(value) != sorted_if_list(has[key])
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
