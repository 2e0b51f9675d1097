"""Makes a checkpoint folder of released files or pretrained components, every key accounted for.

Each key of a file is placed, renamed, or dropped by a rule with a reason; one left over or missing is
an error. Pickles are opened with `weights_only=True` alone. Of a language model that is not copied,
only the embeddings are read, for a fresh projection.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from ltu.checkpoints.export import (
    build_on_meta,
    find_weights,
    is_llm,
    merge,
    to_original,
    write_folder,
)
from ltu.checkpoints.original_checkpoints import (
    CAV_MAE_KEYS,
    FOLDER_KEYS,
    ORIGINAL_KEYS,
    PREFIX,
    check_audio_encoder,
    load_state,
    rename_keys,
)
from ltu.models.checkpoint_folder import find_checkpoint, hash_language_model, sha256_of_weights
from ltu.models.configuration_ltu import CavMaeConfig, LtuConfig
from ltu.models.modeling_ltu import LtuMultiModalProjector
from ltu.models.processing_ltu import LtuProcessor
from ltu.models.prompt_template import load_prompt_template

AUDIO_ENCODERS = ("cavmae", "yamnet", "tltr")  # Folders with an ear of ours.
EMBEDDINGS = (
    "model.embed_tokens",
    "gpt_neox.embed_in",
    "transformer.wte",
    "wte",
    "model.language_model.embed_tokens",
)


def lora_settings(state: dict[str, Tensor], alpha: int, dropout: float) -> dict | None:
    """Rank and targets as the keys show them; alpha and dropout are in no file (the original: 16 and 0.05)."""
    ranks = {tensor.shape[0] for key, tensor in state.items() if ".lora_A." in key}
    if not ranks:
        return None
    if len(ranks) > 1:
        raise ValueError(f"LoRA of several ranks in one file: {sorted(ranks)}.")
    targets = sorted(
        {key.split(".lora_A.")[0].split(".")[-1] for key in state if ".lora_A." in key}
    )
    return {"r": ranks.pop(), "alpha": alpha, "dropout": dropout, "target_modules": targets}


def cav_mae_config(state: dict[str, Tensor]) -> CavMaeConfig:
    """Width and depth as the tensors show them. Heads cannot be seen: 64 channels each, as all ViTs of that family."""
    width = state["audio_tower.pos_embed_a"].shape[-1]
    blocks = {key.split(".attn.")[0] for key in state if ".attn.qkv.weight" in key}
    inner = state["audio_tower.blocks_a.0.mlp.fc1.weight"].shape[0]
    return CavMaeConfig(
        hidden_size=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=width // 64,
        intermediate_size=inner,
    )


class LtuKind:
    """What the conversion must know of a model of the family; LTU-AS overrides it."""

    config_class = LtuConfig
    processor_class = LtuProcessor
    audio_encoder_keys = CAV_MAE_KEYS

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Flags of this kind alone."""

    def make_audio_config(
        self, state: dict[str, Tensor], args: argparse.Namespace
    ) -> PreTrainedConfig:
        """Config of the ear whose tensors are `state`; of a random one if that is empty."""
        return cav_mae_config(state) if state else CavMaeConfig()

    def finish_audio_encoder(self, state: dict[str, Tensor], args: argparse.Namespace) -> None:
        """What a random ear needs beside its random weights; added to `state`."""

    def extractor_settings(self, args: argparse.Namespace) -> dict:
        """Settings of the feature extractor beside its sizes."""
        return {}


def load_audio_encoder(
    kind: LtuKind, args: argparse.Namespace
) -> tuple[PreTrainedConfig, dict[str, Tensor], dict[str, str]]:
    """Config, tensors and dropped keys of an ear: its own `.pth`, a folder of ours, a released folder of the original
    (with its projection), or none (random)."""
    path = args.audio_encoder
    if path is None:
        print(
            "NO EAR FILE: the audio encoder is RANDOM. It hears nothing until it has been trained on a lot of sound.",
            file=sys.stderr,
        )
        config = kind.make_audio_config({}, args)
        state = {
            f"audio_tower.{key}": value
            for key, value in AutoModel.from_config(config).state_dict().items()
        }
        kind.finish_audio_encoder(state, args)
        return config, state, {}
    if not Path(path).is_dir():
        state, dropped = rename_keys(load_state(path), kind.audio_encoder_keys, ("module.",), path)
    elif (Path(path) / "model.safetensors").is_file() and AutoConfig.from_pretrained(
        path
    ).model_type in AUDIO_ENCODERS:
        state = load_state(Path(path) / "model.safetensors")
        return (
            AutoConfig.from_pretrained(path),
            {f"audio_tower.{key}": value for key, value in state.items()},
            {},
        )
    else:
        state, dropped = rename_keys(load_state(path), FOLDER_KEYS, (), path)
    check_audio_encoder(state, kind.config_class.model_type, path)
    return kind.make_audio_config(state, args), state, dropped


def init_projector(config: LtuConfig, llm: str | Path) -> dict[str, Tensor]:
    """A fresh projection whose vectors are about as long as token embeddings, so that stage 1 starts on scale."""
    projector = LtuMultiModalProjector(config)
    # LayerNorm gives each input channel unit variance.
    std = _embedding_std(llm) / config.audio_config.hidden_size**0.5
    # Gemma multiplies its embeddings by sqrt(hidden), and what is put in their place not.
    std *= getattr(build_on_meta(config).get_input_embeddings(), "scalar_embed_scale", 1.0)
    torch.nn.init.normal_(projector.linear.weight, std=std)
    torch.nn.init.zeros_(projector.linear.bias)
    return {f"multi_modal_projector.{key}": value for key, value in projector.state_dict().items()}


def _embedding_std(llm: str | Path) -> float:
    state = load_state(find_weights(llm))
    found = [state[f"{name}.weight"] for name in EMBEDDINGS if f"{name}.weight" in state]
    return float(found[0].float().std()) if found else 0.02  # The usual initializer range.


def convert(args: argparse.Namespace, kind: LtuKind) -> None:
    """Do what the flags of `ltu.convert_checkpoint` ask for."""
    torch.manual_seed(args.seed)
    if args.model:
        folder = find_checkpoint(args.model)
        config = AutoConfig.from_pretrained(folder)
        if (package := config.model_type) != kind.config_class.model_type:
            raise ValueError(
                f"{folder} is of {package}. Use: python -m {package}.convert_checkpoint"
            )
        if args.to_original:
            return report(args.to_original, *to_original(config, folder, Path(args.to_original)))
        processor = kind.processor_class.from_pretrained(folder)
        return report(
            args.output_dir,
            *merge(config, folder, args.output_dir, processor, args.llm, args.llm_dtype),
        )
    parts = {"text_config": AutoConfig.from_pretrained(args.llm)}
    if args.init:
        parts["prompt_template"] = load_prompt_template(args.prompt_template, args.llm)
        parts["audio_config"], state, dropped = load_audio_encoder(kind, args)
    else:
        state, dropped = rename_keys(
            load_state(args.checkpoint), ORIGINAL_KEYS, (PREFIX,), args.checkpoint
        )
        check_audio_encoder(state, kind.config_class.model_type, args.checkpoint)
        parts["audio_config"] = kind.make_audio_config(state, args)
        parts["lora"] = lora_settings(state, args.lora_alpha, args.lora_dropout)
    if not any(map(is_llm, state)):  # Else it was trained too, and the folder holds it.
        if args.llm_dtype:
            raise ValueError(
                f"{args.checkpoint} holds no language model; --llm_dtype has nothing to say about it."
            )
        parts |= {
            "language_model": str(args.llm),
            "language_model_sha256": hash_language_model(args.llm),
        }
    config = kind.config_class(**parts)
    if args.init:
        state = init_projector(config, args.llm) | state
    processor = kind.processor_class.from_config(config, args.llm, **kind.extractor_settings(args))
    parent = args.checkpoint or args.audio_encoder
    record = {
        "stage": "init" if args.init else "converted",
        "parent": None
        if parent is None
        else {"name": Path(parent).name, "sha256": sha256_of_weights(parent)},
        "dropped_keys": dropped,
    }
    report(
        args.output_dir,
        write_folder(args.output_dir, config, state, processor, record, args.llm_dtype),
        dropped,
    )


def report(place: str | Path, placed: int, dropped: dict[str, str]) -> None:
    print(f"{place}: {placed} keys placed, {len(dropped)} dropped, none missing, none left over.")
    for reason, count in sorted(Counter(dropped.values()).items()):
        print(f"  dropped, {reason}: {count} keys")
