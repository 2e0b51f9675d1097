"""Released files and small parts -> one of our checkpoint folders, every key accounted for.

    python -m ltu.convert_checkpoint --llm DIR_OR_ID --checkpoint FILE.bin --output_dir DIR
    python -m ltu.convert_checkpoint --init --llm DIR_OR_ID --ear FILE_OR_DIR --output_dir DIR

The first opens an original trainable-only file; the second writes the folder that stage 1 starts from.

Notable:
- Each key of a file is placed, renamed, or dropped by a rule with a reason; one left over or missing is an error.
- Pickles are opened with `weights_only=True` alone. The language model's weights are not read, except its embeddings
  for `--init`.
- A file without an ear gives a random one, and says so loudly.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import cached_file

from ltu.configuration_ltu import CavMaeConfig, LtuConfig, hash_language_model
from ltu.modeling_ltu import LtuMultiModalProjector
from ltu.original_files import CAV_MAE_KEYS, FOLDER_KEYS, ORIGINAL_KEYS, load_pickle, load_shards, rename_keys
from ltu.processing_ltu import LtuProcessor

EARS = ("cavmae", "yamnet", "tltr")  # Folders with an ear of ours.


def lora_settings(state: dict[str, Tensor], alpha: int, dropout: float) -> dict | None:
    """Rank and targets as the keys show them; alpha and dropout are in no file (the original: 16 and 0.05)."""
    ranks = {tensor.shape[0] for key, tensor in state.items() if ".lora_A." in key}
    if not ranks:
        return None
    if len(ranks) > 1:
        raise ValueError(f"LoRA of several ranks in one file: {sorted(ranks)}.")
    targets = sorted({key.split(".lora_A.")[0].split(".")[-1] for key in state if ".lora_A." in key})
    return {"r": ranks.pop(), "alpha": alpha, "dropout": dropout, "target_modules": targets}


def cav_mae_config(state: dict[str, Tensor]) -> CavMaeConfig:
    """Width and depth as the tensors show them. Heads cannot be seen: 64 channels each, as all ViTs of that family."""
    if "audio_tower.pos_embed_a" not in state:
        raise KeyError("The file holds no audio encoder (audio_tower.pos_embed_a): not a whole checkpoint of LTU.")
    width = state["audio_tower.pos_embed_a"].shape[-1]
    blocks = {key.split(".attn.")[0] for key in state if ".attn.qkv.weight" in key}
    inner = state["audio_tower.blocks_a.0.mlp.fc1.weight"].shape[0]
    return CavMaeConfig(
        hidden_size=width, num_hidden_layers=len(blocks), num_attention_heads=width // 64, intermediate_size=inner
    )


class LtuKind:
    """What the conversion must know of a model of the family; LTU-AS overrides it."""

    config_class = LtuConfig
    processor_class = LtuProcessor
    ear_keys = CAV_MAE_KEYS

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Flags of this kind alone."""

    def ear_config(self, state: dict[str, Tensor], args: argparse.Namespace) -> PreTrainedConfig:
        """Config of the ear whose tensors are `state`; of a random one if that is empty."""
        return cav_mae_config(state) if state else CavMaeConfig()

    def finish_ear(self, state: dict[str, Tensor], args: argparse.Namespace) -> None:
        """What a random ear needs beside its random weights; added to `state`."""

    def extractor_settings(self, args: argparse.Namespace) -> dict:
        """Settings of the feature extractor beside its sizes."""
        return {}


def load_ear(kind: LtuKind, args: argparse.Namespace) -> tuple[PreTrainedConfig, dict[str, Tensor], dict[str, str]]:
    """Config, tensors and dropped keys of an ear: its own `.pth`, a folder of ours, a released folder of the original
    (with its projection), or none (random)."""
    path = args.ear
    if path is None:
        print(
            "NO EAR FILE: the audio encoder is RANDOM. It hears nothing until it has been trained on a lot of sound.",
            file=sys.stderr,
        )
        config = kind.ear_config({}, args)
        state = {f"audio_tower.{key}": value for key, value in AutoModel.from_config(config).state_dict().items()}
        kind.finish_ear(state, args)
        return config, state, {}
    if not Path(path).is_dir():
        state, dropped = rename_keys(load_pickle(path), kind.ear_keys, ("module.",), path)
    elif (Path(path) / "model.safetensors").is_file() and AutoConfig.from_pretrained(path).model_type in EARS:
        state = load_file(Path(path) / "model.safetensors")
        return AutoConfig.from_pretrained(path), {f"audio_tower.{key}": value for key, value in state.items()}, {}
    else:
        state, dropped = rename_keys(load_shards(Path(path)), FOLDER_KEYS, (), path)
    return kind.ear_config(state, args), state, dropped


def init_projector(config: LtuConfig, llm: str | Path) -> dict[str, Tensor]:
    """A fresh projection whose vectors are about as long as token embeddings, so that stage 1 starts on scale."""
    projector = LtuMultiModalProjector(config)
    # LayerNorm gives each input channel unit variance.
    std = _embedding_std(llm) / config.audio_config.hidden_size**0.5
    torch.nn.init.normal_(projector.linear.weight, std=std)
    torch.nn.init.zeros_(projector.linear.bias)
    return {f"multi_modal_projector.{key}": value for key, value in projector.state_dict().items()}


def _embedding_std(llm: str | Path) -> float:
    index = cached_file(llm, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    weight_map = json.loads(Path(index).read_text())["weight_map"] if index else None
    names = (
        "model.embed_tokens.weight",
        "gpt_neox.embed_in.weight",
        "transformer.wte.weight",
        "model.language_model.embed_tokens.weight",
    )
    for name in names:
        if weight_map is not None and name not in weight_map:
            continue
        file = cached_file(
            llm, weight_map[name] if weight_map else "model.safetensors", _raise_exceptions_for_missing_entries=False
        )
        if file is None:
            break
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():
                return float(tensors.get_tensor(name).float().std())
    return 0.02  # The usual initializer range, where the embeddings lie in a pickle or under another name.


def write_folder(
    output_dir: str | Path, config: LtuConfig, state: dict[str, Tensor], processor: LtuProcessor, record: dict
) -> None:
    """Write a checkpoint folder after holding every key and shape against the model that the config describes.

    Raises:
        KeyError: a key is missing or left over, or has another shape.
    """
    output_dir = Path(output_dir)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {key: value.shape for key, value in model.state_dict().items() if model._is_own(key)}
    missing, left_over = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    wrong = [
        f"{k}: {tuple(state[k].shape)} for {tuple(wanted[k])}"
        for k in wanted
        if k in state and state[k].shape != wanted[k]
    ]
    if missing or left_over or wrong:
        raise KeyError(
            f"The file does not fill the model: {len(missing)} keys missing {missing[:3]}, {len(left_over)} left "
            f"over {left_over[:3]}, "
            f"{len(wrong)} of another shape {wrong[:3]}. Is it the right --llm and the right kind of file?"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(output_dir)
    model.generation_config.save_pretrained(output_dir)
    save_file(
        {key: value.float().contiguous() for key, value in state.items()},
        output_dir / "model.safetensors",
        metadata={"format": "pt"},
    )
    processor.save_pretrained(output_dir)
    record["parameters"] = {"all": model.num_parameters(), "stored": sum(shape.numel() for shape in wanted.values())}
    (output_dir / "ltu_state.json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None, kind: LtuKind | None = None) -> None:
    kind = kind or LtuKind()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--llm", required=True, help="folder or hub id of the language model that the checkpoint was trained with"
    )
    parser.add_argument("--checkpoint", help="an original trainable-only file (.bin)")
    parser.add_argument("--init", action="store_true", help="write the folder that stage 1 starts from")
    parser.add_argument(
        "--ear", help="with --init: a .pth, a folder with an ear of ours, or a released vicuna folder; none: random"
    )
    parser.add_argument("--lora_alpha", type=int, default=16, help="not stored in original files")
    parser.add_argument("--lora_dropout", type=float, default=0.05, help="not stored in original files")
    parser.add_argument("--seed", type=int, default=42, help="of random parts")
    parser.add_argument("--output_dir", required=True)
    kind.add_flags(parser)
    args = parser.parse_args(argv)
    if args.init == bool(args.checkpoint) or (args.ear and not args.init):
        parser.error("give either --checkpoint FILE, or --init with an optional --ear")
    torch.manual_seed(args.seed)
    text_config = AutoConfig.from_pretrained(args.llm)
    origin = {
        "text_config": text_config,
        "language_model": str(args.llm),
        "language_model_sha256": hash_language_model(args.llm),
    }
    if args.init:
        audio_config, state, dropped = load_ear(kind, args)
        config = kind.config_class(audio_config=audio_config, **origin)
        state = init_projector(config, args.llm) | state
    else:
        state, dropped = rename_keys(
            load_pickle(args.checkpoint), ORIGINAL_KEYS, ("base_model.model.",), args.checkpoint
        )
        lora = lora_settings(state, args.lora_alpha, args.lora_dropout)
        config = kind.config_class(audio_config=kind.ear_config(state, args), lora=lora, **origin)
    processor = kind.processor_class.from_config(config, args.llm, **kind.extractor_settings(args))
    parent = args.checkpoint or args.ear
    record = {
        "stage": "init" if args.init else "converted",
        "parent": None if parent is None else {"name": Path(parent).name, "sha256": sha256_of(parent)},
        "dropped_keys": dropped,
    }
    write_folder(args.output_dir, config, state, processor, record)
    print(f"{args.output_dir}: {len(state)} keys placed, {len(dropped)} dropped, none missing, none left over.")
    for reason in sorted(set(dropped.values())):
        print(f"  dropped, {reason}: {sum(value == reason for value in dropped.values())} keys")


def sha256_of(path: str | Path) -> str:
    """Hash of a file, or of the weights in a folder; of a folder in shards, that of `hash_language_model`."""
    if Path(path).is_dir() and not (Path(path) / "model.safetensors").is_file():
        return hash_language_model(path)
    path = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, KeyError, ValueError) as error:  # The user's to mend; a traceback would hide it.
        sys.exit(f"error: {error.args[-1] if isinstance(error, KeyError) else error}")
