"""Tensors -> files: a checkpoint folder, one with the language model merged in, or the original's trainable-only file.

Notable:
- Every key and shape is held against the model that the config describes, on the meta device, before a byte is written.
- Weights are mapped and written shard by shard, so memory holds a shard at most, however large the language model is.
- Merging is peft's own arithmetic, in fp32; the result has the dtype that the language model is stored in.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ltu.checkpoints.original_checkpoints import TO_ORIGINAL, load_state, rename_keys
from ltu.models.checkpoint_folder import sha256_of_weights
from ltu.models.configuration_ltu import LtuConfig
from ltu.models.modeling_ltu import LtuForConditionalGeneration, check_language_model
from ltu.models.processing_ltu import LtuProcessor

SHARD = "1GB"  # What a conversion has in memory at once.
CONVERTED = ("init", "converted", "merged")  # Stages that a conversion may replace: it made them.


def build_on_meta(config: LtuConfig) -> LtuForConditionalGeneration:
    """The model that a config describes, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def is_llm(key: str) -> bool:
    """Whether a key of ours is the language model's own, not its LoRA's."""
    return key.startswith("language_model.") and ".lora_" not in key


def find_weights(name: str | Path) -> Path:
    """The folder of a language model: `name` itself, or where the hub's copy of it was put."""
    if Path(name).is_dir():
        return Path(name)
    for weights in ("model*.safetensors", "pytorch_model*.bin"):  # Not both: many have both.
        folder = Path(snapshot_download(str(name), allow_patterns=["*.json", weights]))
        if any(folder.glob(weights)):
            break
    return folder


def write_folder(
    output_dir: str | Path,
    config: LtuConfig,
    state: dict[str, Tensor],
    processor: LtuProcessor,
    record: dict,
    llm_dtype: str | None = None,
    finish: Callable[[str, Tensor], Tensor] = lambda key, tensor: tensor,
) -> int:
    """Write a checkpoint folder after holding every key and shape against the model that the config describes.

    Args:
        llm_dtype: of a language model among `state`; by default each tensor keeps its own. The rest is fp32.
        finish: called with each tensor when its shard is written.

    Returns:
        how many tensors were written.

    Raises:
        KeyError: a key is missing or left over, or has another shape.
        ValueError: something else lies in `output_dir`.
    """
    output_dir, model = Path(output_dir), build_on_meta(config)
    check_replaceable(output_dir)
    plan = {}  # On the meta device: what the files will hold.
    for key in match_keys(state, model, (record["parent"] or {}).get("name", "what was read")):
        dtype = torch.float32
        if is_llm(key):
            dtype = config.text_config.dtype = (
                getattr(torch, llm_dtype) if llm_dtype else state[key].dtype
            )
        plan[key] = torch.empty_like(state[key], dtype=dtype, device="meta")
    # Beside its place, where a relative path of the language model is the same; what is there is replaced when all is
    # written.
    part = output_dir.absolute().with_name(f".{output_dir.absolute().name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(part)
    model.generation_config.save_pretrained(part)
    write_shards(part, plan, lambda key: finish(key, state[key]))
    processor.save_pretrained(part)
    if config.language_model is None:
        record["language_model"] = "in this folder"
    record["parameters"] = {
        "all": model.num_parameters(),
        "stored": sum(value.numel() for value in plan.values()),
    }
    (part / "ltu_state.json").write_text(json.dumps(record, indent=1) + "\n")
    if output_dir.is_dir():
        shutil.rmtree(output_dir)
    os.replace(part, output_dir)
    return len(plan)


def check_replaceable(folder: Path) -> None:
    """Raise ValueError if a folder holds what a conversion did not make."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    record = folder / "ltu_state.json"
    stage = json.loads(record.read_text()).get("stage") if record.is_file() else None
    if stage not in CONVERTED:
        what = f"a trained checkpoint ({stage})" if stage else "files that are not ours"
        raise ValueError(f"{folder} holds {what}, which would be lost. Name another --output_dir.")


def write_shards(folder: Path, plan: dict[str, Tensor], get: Callable[[str], Tensor]) -> None:
    """Write the tensors that `plan` holds on the meta device; `get` gives each when its shard is written."""
    shards = split_torch_state_dict_into_shards(plan, max_shard_size=SHARD)
    for file, keys in shards.filename_to_tensors.items():
        tensors = {key: get(key).to(plan[key].dtype).contiguous() for key in keys}
        first = {tensor.data_ptr(): key for key, tensor in reversed(tensors.items())}
        for (
            key,
            tensor,
        ) in tensors.items():  # Two names of one storage, which safetensors does not write.
            tensors[key] = tensor if first[tensor.data_ptr()] == key else tensor.clone()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors  # Before the next shard's are made.
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def match_keys(
    state: dict[str, Tensor], model: LtuForConditionalGeneration, source: str | Path
) -> list[str]:
    """The keys of `state` in the model's order; those of a layer with LoRA take the name that it has inside peft's."""
    own = {key: value.shape for key, value in model.state_dict().items() if model.is_own(key)}
    for key in own:
        if (
            ".base_layer." in key
            and key not in state
            and (bare := key.replace(".base_layer.", ".")) in state
        ):
            state[key] = state.pop(bare)
    for (
        key,
        twin,
    ) in model.all_tied_weights_keys.items():  # One tensor under two names is stored once.
        if key in state and twin in state and torch.equal(state[key], state[twin]):
            del state[key]
    wanted = [key for key in own if key in state]
    found = {
        "missing": sorted(set(own) - set(state) - set(model.all_tied_weights_keys)),
        "left over": sorted(set(state) - set(own)),
        "of another shape": [
            f"{k}: {[*state[k].shape]} for {[*own[k]]}" for k in wanted if state[k].shape != own[k]
        ],
    }
    if any(found.values()):
        counts = ", ".join(f"{len(keys)} keys {what} {keys[:3]}" for what, keys in found.items())
        raise KeyError(
            f"{source} does not fill the model: {counts}. Is it the right --llm, the right kind of file?"
        )
    return wanted


def to_original(config: LtuConfig, folder: Path, file: Path) -> tuple[int, dict[str, str]]:
    """Write a checkpoint folder as the original's Trainer would have: its keys, in its order, with its prefix.

    Returns:
        how many tensors were written; which keys of the file that the folder was made of are not restored, and why.

    Raises:
        ValueError: the original has no such ear or language model.
    """
    parts = config.audio_config.model_type, config.text_config.model_type
    if parts[0] not in ("cavmae", "tltr") or parts[1] != "llama":
        raise ValueError(
            f"{folder} has {parts[0]} and {parts[1]}; the original opens CAV-MAE or TLTR with Llama only."
        )
    state = load_state(folder)
    # The original's order: ear and projection are inside the language model, between its layers and lm_head.
    keys = match_keys(state, build_on_meta(config), folder)
    keys.sort(key=lambda key: ("lm_head" in key, not key.startswith("language_model.")))
    placed, _ = rename_keys({key: state[key] for key in keys}, TO_ORIGINAL, (), folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(placed, file)
    if config.lora:
        print(
            f"LoRA has r {config.lora['r']} and alpha {config.lora['alpha']}; the file cannot say so (original: 16)."
        )
    record = folder / "ltu_state.json"
    return len(placed), json.loads(record.read_text()).get(
        "dropped_keys", {}
    ) if record.is_file() else {}


def merge(
    config: LtuConfig,
    folder: Path,
    output_dir: str,
    processor: LtuProcessor,
    llm: str | None,
    llm_dtype: str | None,
) -> tuple[int, dict[str, str]]:
    """Write a folder that needs no other: ear, projection and language model, LoRA merged into its weights.

    Args:
        llm: another place of the same language model, instead of the one that the folder names.
        llm_dtype: of the language model's weights; None: as stored.

    Returns:
        how many tensors were written; which keys were dropped, and why.

    Raises:
        ValueError: nothing is to merge, the language model is another one, or LoRA is on a tied weight.
    """
    if config.language_model is None and config.lora is None:
        raise ValueError(
            f"{folder} holds its language model, and has no LoRA: there is nothing to merge."
        )
    with_lora, own = build_on_meta(config), load_state(folder)
    match_keys(own, with_lora, folder)
    state = {
        key.replace(".base_layer.", "."): value for key, value in own.items() if ".lora_" not in key
    }
    dropped = {key: "merged" for key in own if ".lora_" in key}
    with_lora.load_state_dict({key: own[key] for key in dropped}, strict=False, assign=True)
    if config.language_model is not None:
        config.language_model = llm or config.find_language_model(folder)
        check_language_model(config, folder)
        place = config.language_model
        stored = load_state(find_weights(place))
        names = {key.replace(".base_layer.", ".") for key in with_lora.state_dict()} - set(own)
        if (
            names
            - {f"language_model.{key}" for key in stored}
            - set(with_lora.all_tied_weights_keys)
        ):
            # Some kinds are stored under other names than they have in memory. transformers knows them; it reads all.
            stored = AutoModelForCausalLM.from_pretrained(place, dtype="auto").state_dict()
        state |= {
            f"language_model.{key}": value
            for key, value in stored.items()
            if f"language_model.{key}" in names
        }
        dropped |= {
            key: "no weight of the model" for key in stored if f"language_model.{key}" not in names
        }
    layers = {
        f"{name}.weight": part
        for name, part in with_lora.named_modules()
        if hasattr(part, "get_delta_weight")
    }
    config.lora = config.language_model = config.language_model_sha256 = None
    for pair in build_on_meta(config).all_tied_weights_keys.items():
        if layers.keys() & set(pair):
            raise ValueError(
                f"{folder} has LoRA on one of {pair}, which are one tensor: it cannot be merged."
            )

    def finish(key: str, tensor: Tensor) -> Tensor:
        return tensor.float() + layers[key].get_delta_weight("default") if key in layers else tensor

    parent = {"name": folder.resolve().name, "sha256": sha256_of_weights(folder)}
    record = {"stage": "merged", "parent": parent, "dropped_keys": dropped}
    return write_folder(output_dir, config, state, processor, record, llm_dtype, finish), dropped
