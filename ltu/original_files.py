"""Files that others wrote: opened without running their code; a rule places, renames, drops or refuses each key."""

import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# (pattern, replacement, None) places or renames a key; (pattern, None, reason) drops it; a reason that begins with
# REFUSED refuses the file. The first match decides.
ORIGINAL_KEYS = [
    (r"model\.audio_encoder\.(.+)", r"audio_tower.\1", None),
    (r"model\.audio_proj\.1\.(weight|bias)", r"multi_modal_projector.linear.\1", None),
    (r"(model\.layers\..+\.lora_[AB])(?:\.default)?\.weight", r"language_model.\1.default.weight", None),
    (r".+\.rotary_emb\.inv_freq", None, "a constant that the language model computes"),
]
CAV_MAE_KEYS = [
    (r"(patch_embed_a\.proj\..+|pos_embed_a|modality_a|blocks_a\..+|blocks_u\..+|norm_a\..+)", r"audio_tower.\1", None),
    (r"(patch_embed_v|pos_embed_v|modality_v|blocks_v|norm_v)(\..+)?", None, "the branch that sees"),
    (r"(norm|mlp_head\w*)(\..+)?", None, "the classifier of fine-tuning"),
    (r"(decoder_\w+|mask_token)(\..+)?", None, "the decoder of pre-training"),
]

# A folder of the original that holds its language model too (vicuna_ltu, vicuna_ltuas): ear and projection are taken.
REFUSED = "refused: "
FOLDER_KEYS = [*ORIGINAL_KEYS[:2], (r"(model|lm_head)\..+", None, "the language model's own, which --llm names")]


def load_pickle(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a `.bin` or `.pth` file; never runs code from it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there. --checkpoint and --ear take a file on this disk.")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a state dict (name -> tensor).")
    return state


def rename_keys(
    state: dict[str, Tensor], rules: list[tuple], prefixes: tuple[str, ...], path: str | Path
) -> tuple[dict, dict]:
    """Apply `rules` to every key of a file.

    Returns:
        the tensors under our names, and why each of the others was dropped.

    Raises:
        KeyError: a key that no rule knows, or two that land on one name.
    """
    placed, dropped, unknown = {}, {}, []
    for key, tensor in state.items():
        bare = key
        for prefix in prefixes:
            bare = bare.removeprefix(prefix)
        for pattern, replacement, reason in rules:
            match = re.fullmatch(pattern, bare)
            if match is None:
                continue
            if replacement is None and reason.startswith(REFUSED):
                raise ValueError(f"{path}, key {key}: {reason}.")
            if replacement is None:
                dropped[key] = reason
                break
            name = match.expand(replacement)
            if name in placed:
                raise KeyError(f"{path}: {key} and another key both mean {name}.")
            placed[name] = tensor
            break
        else:
            unknown.append(key)
    if unknown:
        raise KeyError(
            f"{path}: {len(unknown)} keys that no rule knows: {unknown[:5]}. It is not a file of the kind asked for."
        )
    return placed, dropped


def load_shards(folder: Path) -> dict[str, Tensor]:
    """Every key of a released folder, with at least the tensors of ear and projection.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no weights (*.safetensors or pytorch_model*.bin). Is it the folder meant?"
        )
    if files[0].suffix == ".bin":
        return {key: value for file in files for key, value in load_pickle(file).items()}
    state = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:  # The language model's are named, not read.
            state |= {key: tensors.get_tensor(key) if ".audio_" in key else None for key in tensors.keys()}
    return state
