"""Where LoRA goes in a language model, and putting it there with peft. LoRA is fp32, whatever the model is."""

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn
from transformers import Conv1D


def find_targets(language_model: Any, named: list[str] | None = None) -> list[str]:
    """The named layers; by default q_proj and v_proj, as in the papers, or what peft knows of this kind of model.

    Raises:
        ValueError: a named layer is not there, or no default is.
    """
    modules, kind = dict(language_model.named_modules()), language_model.config.model_type
    for targets in [named] if named else (["q_proj", "v_proj"], PEFT_TARGETS.get(kind)):
        if isinstance(targets, list) and all(
            any(f".{n}".endswith(f".{t}") for n in modules) for t in targets
        ):
            return list(targets)
    modules = {n: m for n, m in modules.items() if m is not language_model.get_output_embeddings()}
    linear = sorted(
        {n.split(".")[-1] for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    )
    reason = (
        f"LoRA cannot go into {named}: not all of them are there"
        if named
        else "no usual place of LoRA is known"
    )
    raise ValueError(
        f"{reason}. The linear layers of this {kind} are {', '.join(linear)}. Use --lora_target_modules '[NAME,NAME]'."
    )


def inject_lora(language_model: Any, lora: dict) -> None:
    """Put a fresh LoRA, whose product is zero at first, into the layers that `lora["target_modules"]` names."""
    names = {
        "r": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "target_modules": "target_modules",
    }
    inject_adapter_in_model(
        LoraConfig(**{theirs: lora[ours] for ours, theirs in names.items()}), language_model
    )
    for name, parameter in language_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
