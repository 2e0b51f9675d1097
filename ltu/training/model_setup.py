"""Opens the model that is to be trained: precision, LoRA, and which parameters are frozen."""

import logging
import os
from typing import Any

import torch
from transformers import AutoConfig
from transformers.integrations import apply_liger_kernel

from ltu.checkpoints.open_checkpoint import open_model
from ltu.models.configuration_ltu import LtuConfig
from ltu.models.device_check import check_attention, check_device_map
from ltu.models.locate_checkpoint import find_checkpoint
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.training.arguments import ModelArguments, parse_list

logger = logging.getLogger(__name__)

DEFAULT_LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}


def open_to_train(
    args: ModelArguments, bf16: bool, text_only: bool = False
) -> LtuForConditionalGeneration:
    """Open the model of `--base_model`, and add LoRA and freeze parameters as the flags say.

    With `--trainable_params full`, LoRA of the checkpoint is merged into the language model first.

    Args:
        args: the flags.
        bf16: whether training computes in bf16.
        text_only: whether no example has audio.

    Raises:
        ValueError: flags contradict each other, a LoRA flag or the name of the prompt template
            contradicts the checkpoint, or nothing that is used would be trained.
    """
    contradiction = args.find_contradiction()
    if contradiction is not None:
        raise ValueError(contradiction)
    check_device_map(args.device_map)
    check_attention(args.attn_implementation)
    folder = find_checkpoint(args.base_model)
    config = AutoConfig.from_pretrained(folder)
    model = open_model(
        folder,
        choose_llm_dtype(args, config, bf16),
        args.llm,
        choose_device_map(args),
        args.quantization,
    )
    if args.attn_implementation:
        model.language_model.set_attn_implementation(args.attn_implementation)
    choose_trained(model, args)
    if text_only and not any(p.requires_grad for p in model.language_model.parameters()):
        raise ValueError(
            "--text_only trains nothing here: audio encoder and projector are not used without "
            "audio, and the language model is frozen and has no LoRA. Use --trainable_params all "
            "with --lora_target_modules, or full."
        )
    return model


def choose_trained(model: LtuForConditionalGeneration, args: ModelArguments) -> None:
    """Add or merge LoRA, and freeze parameters, as the flags say.

    Raises:
        ValueError: a LoRA flag or the name of the prompt template contradicts the checkpoint.
    """
    lora_flags = _lora_flags(args)
    stored_lora = model.config.lora
    stored_encoder_lora = model.config.encoder_lora
    is_without_lora = lora_flags.get("target_modules") == ["dummy"]
    if args.trainable_params == "full":
        for part, lora in (("language model", stored_lora), ("audio encoder", stored_encoder_lora)):
            if lora is not None:
                logger.warning(
                    "The LoRA of %s (r %s) is merged into the %s, all of which is trained.",
                    args.base_model,
                    lora["r"],
                    part,
                )
        model.merge_lora()
    elif args.trainable_params != "proj" and not is_without_lora:
        if stored_lora is None:
            model.add_lora(**(DEFAULT_LORA | lora_flags))
        else:
            _check_lora_flags(args.base_model, stored_lora, lora_flags)
    if args.encoder_lora_target_modules is not None:
        encoder_flags = lora_flags | {
            "target_modules": parse_list(args.encoder_lora_target_modules)
        }
        if stored_encoder_lora is None:
            model.add_encoder_lora(**(DEFAULT_LORA | encoder_flags))
        else:
            _check_lora_flags(args.base_model, stored_encoder_lora, encoder_flags)

    template = model.config.prompt_template.get("name")
    if args.prompt_template_name not in (None, "", template):
        raise ValueError(
            f"{args.base_model} was made with the template {template!r}, not "
            f"{args.prompt_template_name!r}: leave the flag out."
        )

    model.set_trainable(args.trainable_params, args.freeze_audio_tower)


def choose_llm_dtype(args: ModelArguments, config: LtuConfig, bf16: bool) -> torch.dtype | str:
    """Return the dtype of the language model in memory; "auto" is that of its files.

    Args:
        args: the flags.
        config: of the checkpoint folder.
        bf16: whether training computes in bf16.
    """
    if args.trainable_params == "full" or not bf16:
        return torch.float32
    if config.language_model is not None:
        return torch.bfloat16
    # The next checkpoint holds this language model too. In bf16 it would not be the same.
    if config.text_config.dtype == torch.float32:
        logger.warning(
            "%s holds its language model in float32, which training keeps. In bfloat16 it needs "
            "half the memory; write it with: python -m %s.convert_checkpoint --model %s --merge "
            "--llm_dtype bfloat16 --output_dir DIR",
            args.base_model,
            config.model_type,
            args.base_model,
        )
    return "auto"


def choose_device_map(args: ModelArguments) -> str | dict[str, int] | None:
    """Return where the language model is put; None leaves that to the Trainer.

    A quantized language model is put on the GPU of this process when it is opened, because weights
    are quantized on the device.
    """
    if args.quantization and args.device_map is None and torch.cuda.is_available():
        return {"": int(os.environ.get("LOCAL_RANK", 0))}
    return args.device_map


def apply_liger(
    model: LtuForConditionalGeneration, kernel_config: dict[str, bool] | None = None
) -> None:
    """Replace layers of the language model by the kernels of liger-kernel, which run on GPUs.

    The Trainer's own `--use_liger_kernel` looks up the type of the whole model, which is not in
    liger's table, and then does nothing.

    Args:
        kernel_config: `liger_kernel_config` of the TrainingArguments.

    Raises:
        ValueError: liger-kernel is not installed, or has no kernels for the language model.
    """
    language_model = model.language_model
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ValueError(f"--use_liger_kernel: {error}. pip install -e '.[liger]'") from error
    model_type = language_model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"--use_liger_kernel: liger-kernel has no kernels for a {model_type}. It has them for "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}. Leave the flag out."
        )
    apply_liger_kernel(language_model, kernel_config)


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
