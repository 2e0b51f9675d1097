"""Makes a checkpoint folder from released files or from pretrained components.

Each key of a file is placed, renamed, or dropped by a rule with a reason; a key that is left over
or missing is an error. Pickles are opened only with `weights_only=True`. Of a language model that
is not copied, only the embeddings are read, to initialize the projection.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from ltu.checkpoints.original_checkpoints import (
    CAV_MAE_KEYS,
    FOLDER_KEYS,
    ORIGINAL_KEYS,
    PREFIX,
    check_audio_encoder,
    load_state,
    rename_keys,
)
from ltu.checkpoints.save_checkpoint import (
    build_on_meta,
    find_weights,
    is_llm,
    merge,
    to_original,
    write_folder,
)
from ltu.models.configuration_ltu import CavMaeConfig, LtuConfig
from ltu.models.locate_checkpoint import find_checkpoint, hash_language_model, sha256_of_weights
from ltu.models.modeling_ltu import LtuMultiModalProjector
from ltu.models.processing_ltu import LtuProcessor
from ltu.models.prompt_template import load_prompt_template

AUDIO_ENCODERS = ("cavmae", "yamnet", "tltr")  # Model types of our folders of an audio encoder.
# Names of the input embeddings in the files of language models.
EMBEDDINGS = (
    "model.embed_tokens",
    "gpt_neox.embed_in",
    "transformer.wte",
    "wte",
    "model.language_model.embed_tokens",
)
INITIALIZER_RANGE = 0.02  # The usual standard deviation of embeddings, if no file shows it.


def lora_settings(state: dict[str, Tensor], alpha: int, dropout: float) -> dict | None:
    """Return the settings of the LoRA in `state`, or None if it has none.

    Rank and targets follow from the keys and shapes. Alpha and dropout are in no file (the original
    uses 16 and 0.05).

    Raises:
        ValueError: the layers have several ranks.
    """
    ranks = set()
    targets = set()
    for key, tensor in state.items():
        if ".lora_A." in key:
            ranks.add(tensor.shape[0])
            targets.add(key.split(".lora_A.")[0].split(".")[-1])
    if not ranks:
        return None
    if len(ranks) > 1:
        raise ValueError(f"LoRA of several ranks in one file: {sorted(ranks)}.")
    return {
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
    }


def cav_mae_config(state: dict[str, Tensor]) -> CavMaeConfig:
    """Return the config of a CAV-MAE: width and depth as the shapes of its tensors.

    The number of heads is in no tensor: as in all ViTs of this family, each has 64 channels.
    """
    width = state["audio_tower.pos_embed_a"].shape[-1]
    blocks = {key.split(".attn.")[0] for key in state if ".attn.qkv.weight" in key}
    intermediate_size = state["audio_tower.blocks_a.0.mlp.fc1.weight"].shape[0]
    return CavMaeConfig(
        hidden_size=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=width // 64,
        intermediate_size=intermediate_size,
    )


class LtuKind:
    """What the conversion depends on of a model of the family; LTU-AS overrides it."""

    config_class = LtuConfig
    processor_class = LtuProcessor
    audio_encoder_keys = CAV_MAE_KEYS

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags that only this model has."""

    def make_audio_config(
        self, state: dict[str, Tensor], args: argparse.Namespace
    ) -> PreTrainedConfig:
        """Return the config of the audio encoder with the tensors `state`.

        If `state` is empty, return that of a random audio encoder.
        """
        return cav_mae_config(state) if state else CavMaeConfig()

    def finish_audio_encoder(self, state: dict[str, Tensor], args: argparse.Namespace) -> None:
        """Add to `state` what a random audio encoder needs besides random weights."""

    def extractor_settings(self, args: argparse.Namespace) -> dict:
        """Return settings of the feature extractor, besides its sizes."""
        return {}


def load_audio_encoder(
    kind: LtuKind, args: argparse.Namespace
) -> tuple[PreTrainedConfig, dict[str, Tensor], dict[str, str]]:
    """Load the audio encoder of `--audio_encoder`.

    It is a `.pth` file, one of our folders of an audio encoder, a released folder of the original
    (of which the projection is loaded too), or None: then the audio encoder is random.

    Returns:
        its config; its tensors by key; and the keys that were dropped, each with the reason.

    Raises:
        KeyError: a key is unknown, or the file contains no audio encoder.
        ValueError: it contains the audio encoder of the other model, or cannot be opened.
    """
    path = args.audio_encoder
    if path is None:
        return _random_audio_encoder(kind, args)
    if not Path(path).is_dir():
        state, dropped = rename_keys(load_state(path), kind.audio_encoder_keys, ("module.",), path)
    else:
        weights = Path(path) / "model.safetensors"
        if weights.is_file():
            config = AutoConfig.from_pretrained(path)
            if config.model_type in AUDIO_ENCODERS:
                return config, _add_prefix("audio_tower", load_state(weights)), {}
        state, dropped = rename_keys(load_state(path), FOLDER_KEYS, (), path)
    check_audio_encoder(state, kind.config_class.model_type, path)
    return kind.make_audio_config(state, args), state, dropped


def _random_audio_encoder(
    kind: LtuKind, args: argparse.Namespace
) -> tuple[PreTrainedConfig, dict[str, Tensor], dict[str, str]]:
    print(
        "WARNING: no --audio_encoder: the audio encoder is RANDOM. Its embeddings mean nothing "
        "until it has been trained on a lot of audio.",
        file=sys.stderr,
    )
    config = kind.make_audio_config({}, args)
    state = _add_prefix("audio_tower", AutoModel.from_config(config).state_dict())
    kind.finish_audio_encoder(state, args)
    return config, state, {}


def _add_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in state.items()}


def init_projector(config: LtuConfig, llm: str | Path) -> dict[str, Tensor]:
    """Return a random projection whose audio embeddings are about as long as token embeddings.

    Stage 1 then starts at the right scale.
    """
    projector = LtuMultiModalProjector(config)
    # LayerNorm gives each input channel unit variance.
    std = _embedding_std(llm) / config.audio_config.hidden_size**0.5
    # Gemma multiplies its token embeddings by sqrt(hidden), but not the audio embeddings that
    # replace some of them.
    std *= getattr(build_on_meta(config).get_input_embeddings(), "scalar_embed_scale", 1.0)
    torch.nn.init.normal_(projector.linear.weight, std=std)
    torch.nn.init.zeros_(projector.linear.bias)
    return _add_prefix("multi_modal_projector", projector.state_dict())


def _embedding_std(llm: str | Path) -> float:
    """Return the standard deviation of the token embeddings of a language model."""
    state = load_state(find_weights(llm))
    for name in EMBEDDINGS:
        if f"{name}.weight" in state:
            return float(state[f"{name}.weight"].float().std())
    return INITIALIZER_RANGE


def convert(args: argparse.Namespace, kind: LtuKind) -> None:
    """Do the conversion that the flags of `ltu.convert_checkpoint` name.

    Raises:
        KeyError: keys or shapes of a file do not fit the model.
        ValueError: a file cannot be converted, or the flags contradict it.
        FileNotFoundError: a file or folder is not there.
    """
    torch.manual_seed(args.seed)
    if args.model:
        export_folder(args, kind)
    else:
        make_folder(args, kind)


def export_folder(args: argparse.Namespace, kind: LtuKind) -> None:
    """Write a checkpoint folder of ours as a file of the original, or merge it."""
    folder = find_checkpoint(args.model)
    config = AutoConfig.from_pretrained(folder)
    package = config.model_type
    if package != kind.config_class.model_type:
        raise ValueError(
            f"{folder} is a checkpoint of {package}. Use: python -m {package}.convert_checkpoint"
        )
    if args.to_original:
        placed, dropped = to_original(config, folder, Path(args.to_original))
        report(args.to_original, placed, dropped)
        return
    processor = kind.processor_class.from_pretrained(folder)
    placed, dropped = merge(config, folder, args.output_dir, processor, args.llm, args.llm_dtype)
    report(args.output_dir, placed, dropped)


def make_folder(args: argparse.Namespace, kind: LtuKind) -> None:
    """Write a checkpoint folder from an original file, or from pretrained components (`--init`)."""
    settings = {"text_config": AutoConfig.from_pretrained(args.llm)}
    if args.init:
        settings["prompt_template"] = load_prompt_template(args.prompt_template, args.llm)
        settings["audio_config"], state, dropped = load_audio_encoder(kind, args)
    else:
        file = load_state(args.checkpoint)
        state, dropped = rename_keys(file, ORIGINAL_KEYS, (PREFIX,), args.checkpoint)
        check_audio_encoder(state, kind.config_class.model_type, args.checkpoint)
        settings["audio_config"] = kind.make_audio_config(state, args)
        settings["lora"] = lora_settings(state, args.lora_alpha, args.lora_dropout)

    # A language model that was trained is in the file, and the folder then contains it. Else the
    # folder names the language model of --llm.
    if not any(map(is_llm, state)):
        if args.llm_dtype:
            raise ValueError(
                f"{args.checkpoint} contains no language model; --llm_dtype does not apply."
            )
        settings["language_model"] = str(args.llm)
        settings["language_model_sha256"] = hash_language_model(args.llm)
    config = kind.config_class(**settings)
    if args.init:
        state = init_projector(config, args.llm) | state
    processor = kind.processor_class.from_config(config, args.llm, **kind.extractor_settings(args))

    parent = args.checkpoint or args.audio_encoder
    provenance = None
    if parent is not None:
        provenance = {"name": Path(parent).name, "sha256": sha256_of_weights(parent)}
    record = {
        "stage": "init" if args.init else "converted",
        "parent": provenance,
        "dropped_keys": dropped,
    }
    placed = write_folder(args.output_dir, config, state, processor, record, args.llm_dtype)
    report(args.output_dir, placed, dropped)


def report(path: str | Path, placed: int, dropped: dict[str, str]) -> None:
    """Print how many keys were written to `path`, and how many were dropped for which reason."""
    print(f"{path}: {placed} keys placed, {len(dropped)} dropped, none missing, none left over.")
    for reason, count in sorted(Counter(dropped.values()).items()):
        print(f"  dropped, {reason}: {count} keys")
