"""Released files and small parts -> one of our checkpoint folders, every key accounted for; and back.

    python -m ltu.convert_checkpoint --llm DIR_OR_ID --checkpoint FILE_OR_DIR --output_dir DIR
    python -m ltu.convert_checkpoint --init --llm DIR_OR_ID --ear FILE_OR_DIR --output_dir DIR
    python -m ltu.convert_checkpoint --model DIR --to_original FILE.bin
    python -m ltu.convert_checkpoint --model DIR --merge --output_dir DIR

The first opens an original file, trainable parameters alone or a whole model (then `--llm` gives config and tokenizer,
and the new folder holds the language model). The second writes what stage 1 starts from, the third a file as the
original's Trainer would have, the fourth a folder that needs no other.

Notable:
- Each key of a file is placed, renamed, or dropped by a rule with a reason; one left over or missing is an error.
- Pickles are opened with `weights_only=True` alone. Of a language model that is not copied, only the embeddings are
  read, for `--init`.
- A file without an ear gives a random one, and says so loudly.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from ltu.configuration_ltu import CavMaeConfig, LtuConfig, find_checkpoint, hash_language_model
from ltu.export_checkpoint import build_on_meta, find_weights, is_llm, merge, to_original, write_folder
from ltu.modeling_ltu import LtuMultiModalProjector
from ltu.original_files import (
    CAV_MAE_KEYS,
    FOLDER_KEYS,
    ORIGINAL_KEYS,
    PREFIX,
    check_ear,
    load_state,
    rename_keys,
    sha256_of,
)
from ltu.processing_ltu import LtuProcessor
from ltu.prompt_template import load_prompt_template

EARS = ("cavmae", "yamnet", "tltr")  # Folders with an ear of ours.
EMBEDDINGS = ("model.embed_tokens", "gpt_neox.embed_in", "transformer.wte", "wte", "model.language_model.embed_tokens")


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
        state, dropped = rename_keys(load_state(path), kind.ear_keys, ("module.",), path)
    elif (Path(path) / "model.safetensors").is_file() and AutoConfig.from_pretrained(path).model_type in EARS:
        state = load_state(Path(path) / "model.safetensors")
        return AutoConfig.from_pretrained(path), {f"audio_tower.{key}": value for key, value in state.items()}, {}
    else:
        state, dropped = rename_keys(load_state(path), FOLDER_KEYS, (), path)
    check_ear(state, kind.config_class.model_type, path)
    return kind.ear_config(state, args), state, dropped


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


def parse_args(argv: list[str] | None, kind: LtuKind) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--llm", help="folder or hub id of the language model that the checkpoint was trained with")
    parser.add_argument("--checkpoint", help="an original file (.bin), or a folder with all of a model's")
    parser.add_argument("--init", action="store_true", help="write the folder that stage 1 starts from")
    parser.add_argument(
        "--ear", help="with --init: a .pth, a folder with an ear of ours, or a released vicuna folder; none: random"
    )
    parser.add_argument("--model", help="a checkpoint folder of ours, for --to_original or --merge")
    parser.add_argument("--to_original", metavar="FILE", help="write it as the original's trainable-only file")
    parser.add_argument("--merge", action="store_true", help="write it with its language model, LoRA merged in")
    parser.add_argument("--lora_alpha", type=int, default=16, help="not stored in original files")
    parser.add_argument("--lora_dropout", type=float, default=0.05, help="not stored in original files")
    parser.add_argument("--llm_dtype", choices=("float32", "float16", "bfloat16"), help="of an LLM that is written")
    parser.add_argument("--prompt_template", default="alpaca_short", help="of --init: that, a JSON file, or chat")
    parser.add_argument("--seed", type=int, default=42, help="of random parts")
    parser.add_argument("--output_dir")
    kind.add_flags(parser)
    args = parser.parse_args(argv)
    commands = [bool(flag) for flag in (args.checkpoint, args.init, args.to_original, args.merge)]
    out, in_folder = any(commands[2:]), args.checkpoint or args.merge
    fits = bool(args.model) == out and (out or args.llm) and bool(args.output_dir) != bool(args.to_original)
    is_new = args.ear or args.prompt_template != "alpaca_short"
    if sum(commands) != 1 or not fits or (is_new and not args.init) or (args.llm_dtype and not in_folder):
        parser.error(
            "give --llm and --output_dir with --checkpoint or --init (and its --ear, --prompt_template); --model "
            "with --to_original; or --model and --output_dir with --merge. --llm_dtype is for --checkpoint and --merge"
        )
    for source in (args.llm, args.checkpoint, args.ear, args.model):
        if source and args.output_dir and Path(source).resolve() == Path(args.output_dir).resolve():
            parser.error(f"--output_dir {args.output_dir} is what is read. Name another folder.")
    return args


def main(argv: list[str] | None = None, kind: LtuKind | None = None) -> None:
    kind = kind or LtuKind()
    args = parse_args(argv, kind)
    torch.manual_seed(args.seed)
    if args.model:
        folder = find_checkpoint(args.model)
        config = AutoConfig.from_pretrained(folder)
        if (package := config.model_type) != kind.config_class.model_type:
            raise ValueError(f"{folder} is of {package}. Use: python -m {package}.convert_checkpoint")
        if args.to_original:
            return report(args.to_original, *to_original(config, folder, Path(args.to_original)))
        processor = kind.processor_class.from_pretrained(folder)
        return report(args.output_dir, *merge(config, folder, args.output_dir, processor, args.llm, args.llm_dtype))
    parts = {"text_config": AutoConfig.from_pretrained(args.llm)}
    if args.init:
        parts["prompt_template"] = load_prompt_template(args.prompt_template, args.llm)
        parts["audio_config"], state, dropped = load_ear(kind, args)
    else:
        state, dropped = rename_keys(load_state(args.checkpoint), ORIGINAL_KEYS, (PREFIX,), args.checkpoint)
        check_ear(state, kind.config_class.model_type, args.checkpoint)
        parts["audio_config"] = kind.ear_config(state, args)
        parts["lora"] = lora_settings(state, args.lora_alpha, args.lora_dropout)
    if not any(map(is_llm, state)):  # Else it was trained too, and the folder holds it.
        if args.llm_dtype:
            raise ValueError(f"{args.checkpoint} holds no language model; --llm_dtype has nothing to say about it.")
        parts |= {"language_model": str(args.llm), "language_model_sha256": hash_language_model(args.llm)}
    config = kind.config_class(**parts)
    if args.init:
        state = init_projector(config, args.llm) | state
    processor = kind.processor_class.from_config(config, args.llm, **kind.extractor_settings(args))
    parent = args.checkpoint or args.ear
    record = {
        "stage": "init" if args.init else "converted",
        "parent": None if parent is None else {"name": Path(parent).name, "sha256": sha256_of(parent)},
        "dropped_keys": dropped,
    }
    report(args.output_dir, write_folder(args.output_dir, config, state, processor, record, args.llm_dtype), dropped)


def report(place: str | Path, placed: int, dropped: dict[str, str]) -> None:
    print(f"{place}: {placed} keys placed, {len(dropped)} dropped, none missing, none left over.")
    for reason, count in sorted(Counter(dropped.values()).items()):
        print(f"  dropped, {reason}: {count} keys")


def run(command: Callable[[], None]) -> None:
    """Run a command; what is the user's to mend is one line, which a traceback would hide."""
    try:
        command()
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        message = error.args[-1] if isinstance(error, KeyError) else error
        sys.exit(f"error: {' '.join(str(message).split())}")


if __name__ == "__main__":
    run(main)
