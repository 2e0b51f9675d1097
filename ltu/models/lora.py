"""Finds the layers of a language model that take LoRA, injects it with peft, and merges it.

LoRA weights are fp32, whatever the dtype of the language model.
"""

from peft import LoraConfig, inject_adapter_in_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel

from ltu.models.config_checks import LIBRARY_ERRORS


def find_targets(
    model: PreTrainedModel,
    target_modules: list[str] | None = None,
    flag: str = "--lora_target_modules",
) -> list[str]:
    """Return the names of the layers that take LoRA.

    Args:
        model: a causal LM, or an audio encoder.
        target_modules: the layers; by default q_proj and v_proj, as in the papers, or else those
            that peft knows for this type of model.
        flag: by which they are given, for the message.

    Raises:
        ValueError: a named layer is not in the model, or no default fits it.
    """
    modules = dict(model.named_modules())
    model_type = model.config.model_type
    candidates = [["q_proj", "v_proj"], PEFT_TARGETS.get(model_type)]
    if target_modules:
        candidates = [target_modules]
    for targets in candidates:
        # For some types of model peft has a regular expression, which is not used here.
        if isinstance(targets, list) and all(_has_layer(modules, target) for target in targets):
            return list(targets)

    output_layer = model.get_output_embeddings()
    linear = set()
    for name, module in modules.items():
        if isinstance(module, nn.Linear | Conv1D) and module is not output_layer:
            linear.add(name.split(".")[-1])
    if target_modules:
        reason = f"LoRA cannot be added to {target_modules}: the model lacks at least one of them"
    else:
        reason = "The usual target layers of LoRA are not known"
    raise ValueError(
        f"{reason}. The linear layers of this {model_type} are {', '.join(sorted(linear))}. Use "
        f"{flag} '[NAME,NAME]'."
    )


def _has_layer(modules: dict[str, nn.Module], target: str) -> bool:
    return any(f".{name}".endswith(f".{target}") for name in modules)


def inject_lora(model: PreTrainedModel, lora: dict) -> None:
    """Inject a new LoRA, whose product is zero at first, into the layers of `target_modules`.

    Args:
        model: a causal LM or an audio encoder, which is changed.
        lora: arguments of peft's `LoraConfig`.

    Raises:
        ValueError: peft does not know one of the arguments, or adds no LoRA to such a layer.
    """
    try:
        config = LoraConfig(**lora)
    except TypeError as error:
        known = "r, lora_alpha, lora_dropout and target_modules"
        raise ValueError(
            f"The LoRA settings {lora} are no arguments of peft's LoraConfig ({error}). Use the "
            f"names {known} in config.json."
        ) from error
    try:
        inject_adapter_in_model(config, model)
    except (ValueError, *LIBRARY_ERRORS) as error:  # peft knows some classes of layers only.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"peft cannot add LoRA of r {config.r} to {lora['target_modules']} of this "
            f"{model.config.model_type}: {reason}"
        ) from error
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def find_parameters(output: Tensor) -> set[nn.Parameter]:
    """Return the parameters that an output depends on, by its graph of gradients."""
    found = set()
    seen = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return found


def can_merge_lora(language_model: PreTrainedModel) -> bool:
    """Return whether LoRA is on weights in memory that are neither tied nor quantized."""
    if _is_offloaded(language_model) or getattr(language_model, "is_quantized", False):
        return False
    return find_tied_lora(language_model) is None


def _is_offloaded(language_model: PreTrainedModel) -> bool:
    """Return whether weights are on the meta device until a forward pass needs them."""
    return any(parameter.is_meta for parameter in language_model.parameters())


def find_tied_lora(language_model: PreTrainedModel) -> tuple[str, str] | None:
    """Return the names of two weights that are one tensor and that LoRA is on, or None."""
    changed = {f"{name}.weight" for name in lora_layers(language_model)}
    for pair in language_model.all_tied_weights_keys.items():
        if changed & set(pair):
            return pair
    return None


def lora_layers(language_model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the layers of peft by their names."""
    layers = {}
    for name, module in language_model.named_modules():
        if hasattr(module, "get_delta_weight"):
            layers[name] = module
    return layers


def merge_lora(language_model: PreTrainedModel) -> None:
    """Add the product of LoRA to the weights, by peft's own arithmetic, and remove LoRA.

    Args:
        language_model: a causal LM with LoRA, which is changed; or an audio encoder.

    Raises:
        ValueError: LoRA is on a tied weight, whose other use has no LoRA, or weights are offloaded,
            so that a sum would be lost.
    """
    if _is_offloaded(language_model):
        raise ValueError(
            "Weights of the language model are offloaded, and LoRA cannot be merged into them: use "
            "more memory, or leave merging out."
        )
    tied = find_tied_lora(language_model)
    if tied is not None:
        raise ValueError(f"LoRA is on one of {tied}, which are one tensor: it cannot be merged.")
    for name, layer in lora_layers(language_model).items():
        layer.merge()
        language_model.set_submodule(name, layer.get_base_layer())
    # peft would otherwise take a later LoRA for a second one next to this.
    del language_model.peft_config
