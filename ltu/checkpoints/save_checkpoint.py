"""Writes checkpoint folders, merges the language model into one, and writes files of the original.

Every key and shape is compared with the model that the config describes, on the meta device, before
a byte is written. Weights are mapped and written shard by shard, so memory holds at most one shard,
however large the language model is.

No folder or file with NaN or infinite weights is written.

Merging uses peft's own arithmetic in fp32. The result has the dtype in which the language model is
stored.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from ltu.checkpoints.original_checkpoints import TO_ORIGINAL, load_state, rename_keys
from ltu.files import sync_and_rename
from ltu.models.configuration_ltu import LtuConfig
from ltu.models.finite_weights import check_finite
from ltu.models.locate_checkpoint import sha256_of_weights
from ltu.models.model_card import CARD, is_replaceable, write_model_card
from ltu.models.modeling_audio_encoder_wrapper import load_encoder_weights
from ltu.models.modeling_ltu import (
    LtuForConditionalGeneration,
    build_on_meta,
    check_language_model,
    find_audio_encoder,
    load_llm,
)
from ltu.models.processing_ltu import LtuProcessor
from ltu.models.provenance import (
    code_version,
    library_versions,
    lineage_from,
    read_record,
    write_record,
)

SHARD = "1GB"  # Size of a shard, which is what a conversion has in memory at once.
CONVERTED = ("init", "converted", "merged")  # Stages of folders that a conversion may replace.
LLM_PREFIX = "language_model."  # Of the keys of the language model in a checkpoint.
NAME_DIGITS = 12  # Of a hash, in the name of a served model.
MLP_ORDER = ("gate_proj", "down_proj", "up_proj")  # The layers of Llama's MLP in the original.


def is_llm(key: str) -> bool:
    """Return whether a key belongs to the language model itself, and not to its LoRA."""
    return key.startswith("language_model.") and ".lora_" not in key


def find_weights(name: str | Path) -> Path:
    """Return the folder of a language model; a hub id is downloaded if need be."""
    if Path(name).is_dir():
        return Path(name)
    # Download one of the two formats only: many models have both.
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
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
    """Write a checkpoint folder, if every key and shape fits the model that the config describes.

    Args:
        output_dir: the folder. A folder that a conversion made is replaced.
        config: of the model.
        state: the tensors by key. Some keys are renamed in place.
        processor: is saved in the folder.
        record: the content of ltu_state.json; the parameters are added.
        llm_dtype: dtype of a language model among `state`; by default each of its tensors keeps its
            own. All other tensors become fp32.
        finish: called with key and tensor when the shard of the tensor is written; its result is
            stored.

    Returns:
        how many tensors were written.

    Raises:
        ValueError: a key is missing or left over, or has another shape, or a weight is NaN or
            infinite.
        ValueError: `output_dir` contains something that no conversion made.
    """
    output_dir = Path(output_dir)
    model = build_on_meta(config)
    check_replaceable(output_dir)

    source = (record["parent"] or {}).get("name", "what was read")
    plan = plan_tensors(match_keys(state, model, source), state, config, llm_dtype)
    with replacing_folder(output_dir) as part:
        config.architectures = [type(model).__name__]
        config.save_pretrained(part)
        model.generation_config.save_pretrained(part)
        subject = f"{output_dir} is not written from {source}"
        write_shards(part, plan, lambda key: finish(key, state[key]), subject)
        processor.save_pretrained(part)
        if config.language_model is None:
            record["language_model"] = "in this folder"
        complete_record(record, model.num_parameters(), plan)
        write_record(part, record)
        if not is_replaceable(output_dir / CARD):  # Somebody wrote it, so it is not lost.
            shutil.copyfile(output_dir / CARD, part / CARD)
    write_model_card(output_dir)
    return len(plan)


def plan_tensors(
    keys: list[str], state: dict[str, Tensor], config: LtuConfig, llm_dtype: str | None
) -> dict[str, Tensor]:
    """Return the tensors that files will contain, on the meta device.

    Args:
        keys: of `state`, those that are written.
        state: the tensors by key.
        config: of the model; the dtype of its language model is set to that of most weights.
        llm_dtype: of the language model; by default each of its tensors keeps its own.
    """
    plan = {}
    llm_dtypes: Counter[torch.dtype] = Counter()
    for key in keys:
        dtype = torch.float32 if state[key].is_floating_point() else state[key].dtype
        if is_llm(key):
            dtype = getattr(torch, llm_dtype) if llm_dtype else state[key].dtype
            llm_dtypes[dtype] += 1
        plan[key] = torch.empty_like(state[key], dtype=dtype, device="meta")
    if llm_dtypes:
        config.text_config.dtype = llm_dtypes.most_common(1)[0][0]
    return plan


def complete_record(record: dict, num_parameters: int, plan: dict[str, Tensor]) -> None:
    """Add the parameters and the versions of code and libraries to a record of `ltu_state.json`."""
    stored = sum(value.numel() for value in plan.values())
    record["parameters"] = {"all": num_parameters, "stored": stored}
    record["versions"] = library_versions()
    record["code"] = code_version()


@contextmanager
def replacing_folder(output_dir: Path) -> Iterator[Path]:
    """Yield a folder to write, which replaces `output_dir` when everything is written.

    It is next to the final folder, where a relative path of the language model is the same.
    """
    part = output_dir.absolute().with_name(f".{output_dir.absolute().name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    if output_dir.is_dir():
        shutil.rmtree(output_dir)
    os.replace(part, output_dir)


def check_replaceable(folder: Path) -> None:
    """Raise ValueError if a folder contains something that no conversion made."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    stage = read_record(folder).get("stage")
    if stage not in CONVERTED:
        content = f"a trained checkpoint ({stage})" if stage else "files that are not ours"
        raise ValueError(
            f"{folder} contains {content}, which would be lost. Name another --output_dir."
        )


def write_shards(
    folder: Path, plan: dict[str, Tensor], get: Callable[[str], Tensor], subject: str
) -> None:
    """Write tensors as safetensors, in shards of at most SHARD.

    Args:
        folder: where the files are written.
        plan: tensors on the meta device, which have the final shapes and dtypes.
        get: returns the tensor of a key; called when its shard is written.
        subject: begins the message about weights that are not finite.

    Raises:
        ValueError: a weight is NaN or infinite. The folder is removed.
    """
    shards = split_torch_state_dict_into_shards(plan, max_shard_size=SHARD)
    for file, keys in shards.filename_to_tensors.items():
        tensors = {key: get(key).to(plan[key].dtype).contiguous() for key in keys}
        try:
            check_finite(tensors, subject)
        except ValueError:
            shutil.rmtree(folder)
            raise
        # safetensors refuses two names of one storage: copy all tensors of a storage but the first.
        first_key = {tensor.data_ptr(): key for key, tensor in reversed(tensors.items())}
        for key, tensor in tensors.items():
            if first_key[tensor.data_ptr()] != key:
                tensors[key] = tensor.clone()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors  # Free the memory before the next shard is loaded.
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        text = json.dumps(index, indent=1) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def match_keys(
    state: dict[str, Tensor], model: LtuForConditionalGeneration, source: str | Path
) -> list[str]:
    """Compare the keys and shapes of `state` with those of a model.

    `state` is changed: keys of a layer with LoRA get the name that they have inside peft's layer,
    and of two tied weights that are equal one is removed.

    Returns:
        the keys of `state` in the model's order.

    Raises:
        ValueError: a key is missing or left over, or has another shape.
    """
    own = {key: value.shape for key, value in model.state_dict().items() if model.is_own(key)}
    for key in own:
        bare_key = key.replace(".base_layer.", ".")
        if bare_key != key and key not in state and bare_key in state:
            state[key] = state.pop(bare_key)
    for key, twin in model.all_tied_weights_keys.items():
        if key in state and twin in state and torch.equal(state[key], state[twin]):
            del state[key]
    wanted = [key for key in own if key in state]
    found = {
        "missing": sorted(set(own) - set(state) - set(model.all_tied_weights_keys)),
        "left over": sorted(set(state) - set(own)),
        "of another shape": [
            f"{key}: {[*state[key].shape]} for {[*own[key]]}"
            for key in wanted
            if state[key].shape != own[key]
        ],
    }
    if any(found.values()):
        counts = ", ".join(f"{len(keys)} keys {what} {keys[:3]}" for what, keys in found.items())
        raise ValueError(
            f"{source} does not fit the model: {counts}. Check --llm and the kind of the file."
        )
    return wanted


def to_original(config: LtuConfig, folder: Path, file: Path) -> tuple[int, dict[str, str]]:
    """Write a checkpoint folder as a file of the original's Trainer: its keys, order and prefix.

    Returns:
        how many tensors were written; and the keys of the file that the folder was made of which
        are not restored, each with the reason.

    Raises:
        ValueError: the original has no such audio encoder or language model, or no LoRA on it, or a
            weight is NaN or infinite.
    """
    audio_encoder = config.audio_config.model_type
    llm = config.text_config.model_type
    if audio_encoder not in ("cavmae", "tltr") or llm != "llama":
        raise ValueError(
            f"{folder} has {audio_encoder} and {llm}; "
            "the original opens CAV-MAE or TLTR with Llama only."
        )
    time_pooling = getattr(config.audio_config, "time_pooling", None)
    if time_pooling != getattr(type(config.audio_config)(), "time_pooling", None):
        raise ValueError(
            f"{folder} averages {time_pooling} time steps of {audio_encoder} into an audio token, "
            "which the file cannot store: the original would average another number."
        )
    if config.encoder_lora is not None:
        raise ValueError(
            f"{folder} has LoRA on its audio encoder, which the original has not: merge it first, "
            "with --merge."
        )
    state = load_state(folder)
    keys = in_original_order(match_keys(state, build_on_meta(config), folder))
    placed, _ = rename_keys({key: state[key] for key in keys}, TO_ORIGINAL, (), folder)
    check_finite(placed, f"{file} is not written from {folder}")
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.tmp")
    torch.save(placed, unfinished)
    sync_and_rename(unfinished, file)
    if config.lora:
        print(
            f"LoRA has r {config.lora['r']} and alpha {config.lora['lora_alpha']}; "
            "the file cannot store alpha (original: 16)."
        )
    return len(placed), read_record(folder).get("dropped_keys", {})


def in_original_order(keys: list[str]) -> list[str]:
    """Return the keys of a model with Llama in the order that they have in the original.

    There, the audio encoder and the projection are inside the language model, between its layers
    and `lm_head`. In an MLP, `down_proj` comes before `up_proj` (transformers 4.28); the order has
    changed since.
    """
    first_of_block: dict[str, int] = {}

    def place(key: str) -> tuple[bool, bool, int, int]:
        block, is_mlp, rest = key.partition(".mlp.")
        if not is_mlp or not key.startswith("language_model."):
            return "lm_head" in key, not key.startswith("language_model."), positions[key], 0
        first = first_of_block.setdefault(block, positions[key])
        return False, False, first, MLP_ORDER.index(rest.partition(".")[0])

    positions = {key: position for position, key in enumerate(keys)}
    return sorted(keys, key=place)


@dataclass
class MergedModel:
    """A self-contained model whose LoRA is merged when a tensor is written.

    Attributes:
        state: the tensors by key, those of the language model without LoRA.
        finish: adds the product of LoRA to the tensor of a key.
        dropped: the keys that were dropped, each with the reason.
        record: the content of ltu_state.json, without the parameters.
    """

    state: dict[str, Tensor]
    finish: Callable[[str, Tensor], Tensor]
    dropped: dict[str, str]
    record: dict


def merge(
    config: LtuConfig,
    folder: Path,
    output_dir: str,
    processor: LtuProcessor,
    llm: str | None,
    llm_dtype: str | None,
) -> tuple[int, dict[str, str]]:
    """Write a self-contained folder: audio encoder, projection and language model, LoRA merged in.

    Args:
        config: of the checkpoint folder. It is changed to that of the new folder.
        folder: the checkpoint folder.
        output_dir: the new folder.
        processor: is saved in the new folder.
        llm: another path or hub id of the same language model, instead of the one in the config.
        llm_dtype: dtype of the language model's weights; None: as stored.

    Returns:
        how many tensors were written; and the keys that were dropped, each with the reason.

    Raises:
        ValueError: there is nothing to merge and `llm_dtype` is None, the language model is another
            one, or LoRA is on a tied weight.
    """
    is_whole = config.language_model is None and config.named_encoder is None
    if is_whole and config.lora is None and config.encoder_lora is None and llm_dtype is None:
        raise ValueError(
            f"{folder} contains its language model, and has no LoRA: there is nothing to merge. "
            "Name a dtype to write the language model in it: --llm_dtype bfloat16"
        )
    merged = plan_merge(config, folder, llm)
    count = write_folder(
        output_dir, config, merged.state, processor, merged.record, llm_dtype, merged.finish
    )
    return count, merged.dropped


def write_merged_llm(
    config: LtuConfig,
    folder: Path,
    output_dir: str | Path,
    processor: LtuProcessor,
    llm: str | None,
    llm_dtype: str | None,
) -> tuple[int, dict[str, str]]:
    """Write the language model alone, LoRA merged in, as a stock folder with its tokenizer.

    `AutoModelForCausalLM` opens it, and other programs that serve language models.

    Args, Returns: as of `merge`.

    Raises:
        ValueError: the language model is another one, or LoRA is on a tied weight, or a weight is
            NaN or infinite, or `output_dir` contains something that no conversion made.
    """
    output_dir = Path(output_dir)
    check_replaceable(output_dir)
    merged = plan_merge(config, folder, llm)
    model = build_on_meta(config)
    keys = [key for key in match_keys(merged.state, model, folder) if is_llm(key)]
    plan = {}
    for key, tensor in plan_tensors(keys, merged.state, config, llm_dtype).items():
        plan[key.removeprefix(LLM_PREFIX)] = tensor

    def get(name: str) -> Tensor:
        key = LLM_PREFIX + name
        return merged.finish(key, merged.state[key])

    language_model = model.language_model
    language_model.config.architectures = [type(language_model).__name__]
    # Answers end at the same tokens as ours.
    language_model.generation_config.eos_token_id = config.eos_token_id
    with replacing_folder(output_dir) as part:
        language_model.config.save_pretrained(part)
        language_model.generation_config.save_pretrained(part)
        write_shards(part, plan, get, f"{output_dir} is not written from {folder}")
        processor.tokenizer.save_pretrained(part)
        complete_record(merged.record, language_model.num_parameters(), plan)
        write_record(part, merged.record)
    return len(plan), merged.dropped


def served_name(sha256: str) -> str:
    """Return the name under which another server serves the merged language model of a checkpoint.

    Args:
        sha256: of the checkpoint's weights.
    """
    return f"ltu-{sha256[:NAME_DIGITS]}"


def plan_merge(config: LtuConfig, folder: Path, llm: str | None) -> MergedModel:
    """Collect the tensors of a checkpoint and its language model; nothing is written.

    Args:
        config: of the checkpoint folder. It is changed to that of the merged model.
        folder: the checkpoint folder.
        llm: another path or hub id of the same language model, instead of the one in the config.

    Raises:
        ValueError: the language model is another one, or LoRA is on a tied weight.
    """
    with_lora = build_on_meta(config)
    own = load_state(folder)
    match_keys(own, with_lora, folder)
    state = {}
    dropped = {}
    for key, value in own.items():
        if ".lora_" in key:
            dropped[key] = "merged"
        else:
            state[key.replace(".base_layer.", ".")] = value
    with_lora.load_state_dict({key: own[key] for key in dropped}, strict=False, assign=True)

    # Add the weights of a language model that is stored elsewhere.
    if config.language_model is not None:
        config.language_model = llm or config.find_language_model(folder)
        check_language_model(config, folder)
        stored = load_state(find_weights(config.language_model))
        names = {key.replace(".base_layer.", ".") for key in with_lora.state_dict()} - set(own)
        stored_names = {f"language_model.{key}" for key in stored}
        if names - stored_names - set(with_lora.all_tied_weights_keys):
            # Some models are stored under other names than they have in memory. transformers knows
            # these names, but reads the whole model into memory.
            llm_model = load_llm(config.language_model, dtype="auto")
            stored = llm_model.state_dict()
        for key, value in stored.items():
            if f"language_model.{key}" in names:
                state[f"language_model.{key}"] = value
            else:
                dropped[key] = "no weight of the model"

    if config.named_encoder is not None:
        find_audio_encoder(config, folder)
        audio_config = config.audio_config
        weights = load_encoder_weights(audio_config.encoder, audio_config.encoder_config)
        for key, value in weights.items():
            state[f"audio_tower.encoder.{key}"] = value
        with_lora.audio_tower.own_weights()
        config.audio_config.encoder = None
        config.audio_config.encoder_sha256 = None

    # Find the layers with LoRA, by the key of the weight that it changes.
    lora_layers = {}
    for name, module in with_lora.named_modules():
        if hasattr(module, "get_delta_weight"):
            lora_layers[f"{name}.weight"] = module
    config.lora = None
    config.encoder_lora = None
    config.language_model = None
    config.language_model_sha256 = None
    for pair in build_on_meta(config).all_tied_weights_keys.items():
        if lora_layers.keys() & set(pair):
            raise ValueError(
                f"{folder} has LoRA on one of {pair}, which are one tensor: it cannot be merged."
            )

    def finish(key: str, tensor: Tensor) -> Tensor:
        if key not in lora_layers:
            return tensor
        return tensor.float() + lora_layers[key].get_delta_weight("default")

    parent = {"name": folder.resolve().name, "sha256": sha256_of_weights(folder)}
    lineage = lineage_from(folder, parent["sha256"])
    record = {"stage": "merged", "parent": parent, "lineage": lineage, "dropped_keys": dropped}
    return MergedModel(state, finish, dropped, record)
