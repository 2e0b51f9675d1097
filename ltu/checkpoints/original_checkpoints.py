"""Files that others wrote: opened without running their code; a rule places, renames, drops or refuses each key.

Notable:
- Tensors are mapped from the file, not read: a file larger than memory costs what is used of it.
- What a file is, its first bytes tell, not its name.
"""

import mmap
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ltu.models.checkpoint_folder import weight_files

# (pattern, replacement, None) places or renames a key; (pattern, None, reason) drops it; a reason that begins with
# REFUSED refuses the file. The first match decides.
ORIGINAL_KEYS = [
    (r"model\.audio_encoder\.(.+)", r"audio_tower.\1", None),
    (r"model\.audio_proj\.1\.(weight|bias)", r"multi_modal_projector.linear.\1", None),
    (
        r"(model\.layers\..+\.lora_[AB])(?:\.default)?\.weight",
        r"language_model.\1.default.weight",
        None,
    ),
    (r".+\.rotary_emb\.inv_freq", None, "a constant that the language model computes"),
    (
        r"((?:model\.(?:embed_tokens|layers|norm)|lm_head).*?)(?:\.base_layer)?(\.\w+)",
        r"language_model.\1\2",
        None,
    ),
]
CAV_MAE_KEYS = [
    (
        r"(patch_embed_a\.proj\..+|pos_embed_a|modality_a|blocks_a\..+|blocks_u\..+|norm_a\..+)",
        r"audio_tower.\1",
        None,
    ),
    (
        r"(patch_embed_v|pos_embed_v|modality_v|blocks_v|norm_v)(\..+)?",
        None,
        "the branch that sees",
    ),
    (r"(norm|mlp_head\w*)(\..+)?", None, "the classifier of fine-tuning"),
    (r"(decoder_\w+|mask_token)(\..+)?", None, "the decoder of pre-training"),
]

# A folder of the original that holds its language model too (vicuna_ltu, vicuna_ltuas): ear and projection are taken.
REFUSED = "refused: "
FOLDER_KEYS = [
    *ORIGINAL_KEYS[:2],
    (r"(model|lm_head)\..+", None, "the language model's own, which --llm names"),
]
# Our names as the original's Trainer writes them.
PREFIX = "base_model.model."
TO_ORIGINAL = [
    (
        r"audio_tower\.feature_(?:mean|std)",
        None,
        f"{REFUSED}the original's TLTR does not standardize its features",
    ),
    (r"audio_tower\.(.+)", rf"{PREFIX}model.audio_encoder.\1", None),
    (r"multi_modal_projector\.linear\.(.+)", rf"{PREFIX}model.audio_proj.1.\1", None),
    (r"language_model\.(.+?)(?:\.base_layer)?(\.\w+)", rf"{PREFIX}\1\2", None),
]
# The package whose model has an ear, its name, and a tensor that it alone has.
AUDIO_ENCODER_MARKS = {
    "ltu": ("CAV-MAE", "audio_tower.pos_embed_a"),
    "ltu_as": ("TLTR", "audio_tower.time_tr.attn.query.weight"),
}
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # How torch.save began a file before it wrote zip files.


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file, or of all weight files of a folder, mapped; never runs code from it.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds no weights.
        ValueError: the file is damaged or of another kind, or holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        return {
            key: value for file in weight_files(path) for key, value in load_state(file).items()
        }
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there. --checkpoint and --audio_encoder take a file on this disk."
        )
    with open(path, "rb") as stream:
        head = stream.read(len(LEGACY))
    is_torch = head.startswith((b"PK", LEGACY))
    if not head or head.lstrip().startswith(b"<"):
        raise ValueError(
            f"{path} is {'a web page, not the file of the link' if head else 'empty'}. Download it again."
        )
    if not is_torch and head[8:9] != b"{":
        raise ValueError(
            f"{path} is neither a torch file nor safetensors (it begins with {head[:8]!r})."
        )
    try:
        state = _load_torch(path, head.startswith(b"PK")) if is_torch else load_file(path)
    except UnpicklingError as error:
        name = "".join(re.findall(r"GLOBAL (\S+)", str(error))[:1])
        raise ValueError(
            f"{path} holds more than tensors ({name}): opening it could run code, so it is refused. Ask whoever made "
            "it for a plain state dict, or for safetensors."
        ) from error
    except (RuntimeError, EOFError, SafetensorError) as error:
        reason = re.split(r"\. |\n", str(error).strip())[0]
        what = f"{path} ({path.stat().st_size:,} bytes) cannot be read: {reason}"
        raise ValueError(f"{what}. If it is damaged or cut short, download it again.") from error
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(f"{path} is not a state dict (name -> tensor).")
    return state


def _load_torch(path: Path, is_zip: bool) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
    # Linux refuses a private map of a file larger than its memory, but not a shared one. Nothing here writes to it.
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_audio_encoder(state: dict[str, Tensor], package: str, path: str | Path) -> None:
    """Refuse a file without an ear, or with the ear of the other model of the family."""
    for theirs, (audio_encoder, mark) in AUDIO_ENCODER_MARKS.items():
        if mark in state and theirs != package:
            raise ValueError(
                f"{path} holds {audio_encoder}, {state[mark].shape[-1]} wide, which is not the ear of {package}. "
                f"Convert it with: python -m {theirs}.convert_checkpoint"
            )
    if (mark := AUDIO_ENCODER_MARKS[package][1]) not in state:
        raise KeyError(
            f"{path} holds no audio encoder ({mark}): not a whole checkpoint of {package}."
        )


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
