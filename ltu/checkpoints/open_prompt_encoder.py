"""Opens the parts of a checkpoint that embed prompts, without the layers of the language model.

A prompt's embeddings need the audio encoder, the projection and one tensor of the language model:
its table of token embeddings. Of a 7B language model that is 2% of the weights. The rest of the
model is on the meta device, where it takes no memory and can compute nothing.
"""

import copy
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from ltu.checkpoints.save_checkpoint import LLM_PREFIX, find_weights
from ltu.models.configuration_ltu import LtuConfig, open_model_config
from ltu.models.finite_weights import check_finite
from ltu.models.locate_checkpoint import find_checkpoint, weight_files
from ltu.models.modeling_ltu import (
    LtuForConditionalGeneration,
    check_language_model,
    check_same_sizes,
    check_stored_weights,
    find_audio_encoder,
)

OWN_PREFIXES = ("audio_tower.", "multi_modal_projector.")


def open_prompt_encoder(
    folder: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    language_model: str | None = None,
) -> LtuForConditionalGeneration:
    """Return a model that can embed prompts, and whose language model has no layers.

    Args:
        folder: a checkpoint folder.
        device: of audio encoder, projection and token embeddings.
        dtype: of the token embeddings; "auto" is that of their file.
        language_model: another folder or hub id of the same language model, instead of the one
            that the checkpoint names.

    Raises:
        ValueError: as of `LtuForConditionalGeneration.from_pretrained`; or the language model's
            embeddings are more than a table.
        OSError: a file is missing, or the table is in no safetensors file.
    """
    folder = find_checkpoint(folder)
    config: LtuConfig = AutoConfig.from_pretrained(folder)
    if config.language_model is None and language_model:
        raise ValueError(f"{folder} holds its language model; leave --llm {language_model} out.")
    find_audio_encoder(config, folder)
    plan = copy.deepcopy(config)  # Of the model that is built to be compared with the files.
    llm_folder = None
    if config.language_model is not None:
        config.language_model = str(language_model or config.find_language_model(folder))
        check_language_model(config, folder)
        plan.text_config = open_model_config(config.language_model)
        check_same_sizes(config, plan.text_config, folder)
        config.text_config = copy.deepcopy(plan.text_config)
        llm_folder = find_weights(config.language_model)
    check_stored_weights(plan, folder, llm_folder)

    lora_targets = (config.lora or {}).get("target_modules", ())
    config.lora = None  # It is in the layers, which are not built.
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config.text_config)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config, language_model=llm)
    name = _find_table(llm, lora_targets, folder)

    own = {}
    for prefix in OWN_PREFIXES:
        own |= read_tensors(folder, prefix)
    names = [name]
    for pair in llm.all_tied_weights_keys.items():
        if name in pair:
            names += pair
    table = _read_table(llm_folder or folder, names, llm_folder is None)
    check_finite(own | {name: table}, f"{folder} is not opened")
    model.load_named_encoder()
    model.load_state_dict(own, strict=False)
    if dtype != "auto":
        table = table.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    embedding = llm.get_input_embeddings()
    embedding.weight = nn.Parameter(table, requires_grad=False)
    for part in (model.audio_tower, model.multi_modal_projector, embedding):
        part.to(device)
    model.checkpoint_folder = folder
    return model.eval()


def _find_table(llm: nn.Module, lora_targets: tuple[str, ...] | list[str], folder: Path) -> str:
    """Return the name of the table of token embeddings in a language model.

    Raises:
        ValueError: the embeddings are more than this table.
    """
    embedding = llm.get_input_embeddings()
    names = {id(module): name for name, module in llm.named_modules()}
    name = names[id(embedding)]
    if type(embedding) is not nn.Embedding:
        raise ValueError(
            f"{folder}: the language model's embeddings are of class {type(embedding).__name__}, "
            "which does more than look tokens up. Leave --engine out."
        )
    if name.rpartition(".")[2] in lora_targets:
        raise ValueError(
            f"{folder} has LoRA on the token embeddings. Merge it first: "
            "python -m ltu.convert_checkpoint --merge"
        )
    return f"{name}.weight"


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read the tensors of a folder's safetensors files whose keys begin with a prefix.

    Raises:
        FileNotFoundError: the folder has no such files.
    """
    found = {}
    for file in weight_files(folder, formats=("safetensors",)):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  the file is no dict
                if key.startswith(prefix):
                    found[key] = tensors.get_tensor(key)
    return found


def _read_table(folder: Path, names: list[str], is_ours: bool) -> Tensor:
    """Read a table under the first of several names that a folder has.

    Args:
        folder: of a language model, or of a checkpoint that holds one.
        names: of one tensor, which may be stored under any of them.
        is_ours: it is a checkpoint folder, whose keys have a prefix.

    Raises:
        FileNotFoundError: the folder has none of them.
    """
    for name in names:
        key = LLM_PREFIX + name if is_ours else name
        found = read_tensors(folder, key).get(key)
        if found is not None:
            return found
    raise FileNotFoundError(
        f"{folder} has no tensor {names[0]} in its safetensors files. Write a folder that has it: "
        "python -m ltu.convert_checkpoint --merge"
    )
