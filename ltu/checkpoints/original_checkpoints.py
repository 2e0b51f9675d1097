"""Opens files that others wrote and renames their keys, without running code from the files.

A rule places, renames, drops or refuses each key. Tensors are mapped from the file, not read, so a
file larger than memory costs only the part of it that is used. The first bytes of a file decide
which format it has, not its name.
"""

import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ltu.files import check_regular_file
from ltu.models.locate_checkpoint import weight_files
from ltu.models.weight_headers import read_header


@dataclass(frozen=True)
class KeyRule:
    """What happens to the keys that match a pattern. The first rule that matches a key applies.

    Attributes:
        pattern: a regular expression, which the whole key matches.
        new_name: the key is renamed to it; it may have groups of the pattern.
        drop: the key is dropped, for this reason.
        refuse: the whole file is refused, for this reason.
    """

    pattern: str
    new_name: str | None = None
    drop: str | None = None
    refuse: str | None = None


ORIGINAL_KEYS = [
    KeyRule(r"model\.audio_encoder\.(.+)", r"audio_tower.\1"),
    KeyRule(r"model\.audio_proj\.1\.(weight|bias)", r"multi_modal_projector.linear.\1"),
    KeyRule(
        r"(model\.layers\..+\.lora_[AB])(?:\.default)?\.weight",
        r"language_model.\1.default.weight",
    ),
    KeyRule(r".+\.rotary_emb\.inv_freq", drop="a constant that the language model computes"),
    KeyRule(
        r"((?:model\.(?:embed_tokens|layers|norm)|lm_head).*?)(?:\.base_layer)?(\.\w+)",
        r"language_model.\1\2",
    ),
]
CAV_MAE_KEYS = [
    KeyRule(
        r"(patch_embed_a\.proj\..+|pos_embed_a|modality_a|blocks_a\..+|blocks_u\..+|norm_a\..+)",
        r"audio_tower.\1",
    ),
    KeyRule(
        r"(patch_embed_v|pos_embed_v|modality_v|blocks_v|norm_v)(\..+)?",
        drop="the visual branch",
    ),
    KeyRule(r"(norm|mlp_head\w*)(\..+)?", drop="the classifier of fine-tuning"),
    KeyRule(r"(decoder_\w+|mask_token)(\..+)?", drop="the decoder of pre-training"),
]

# For a folder of the original that also contains the language model (vicuna_ltu, vicuna_ltuas):
# the audio encoder and the projection are taken from it.
FOLDER_KEYS = [
    *ORIGINAL_KEYS[:2],
    KeyRule(r"(model|lm_head)\..+", drop="the language model's own, which --llm names"),
]
# Our names -> the names that the original's Trainer writes.
PREFIX = "base_model.model."
TO_ORIGINAL = [
    KeyRule(
        r"audio_tower\.feature_(?:mean|std)",
        refuse="the original's TLTR does not standardize its features",
    ),
    KeyRule(r"audio_tower\.(.+)", rf"{PREFIX}model.audio_encoder.\1"),
    KeyRule(r"multi_modal_projector\.linear\.(.+)", rf"{PREFIX}model.audio_proj.1.\1"),
    KeyRule(r"language_model\.(.+?)(?:\.base_layer)?(\.\w+)", rf"{PREFIX}\1\2"),
]
# Package -> the name of its audio encoder, and a tensor that only this audio encoder has.
AUDIO_ENCODER_MARKS = {
    "ltu": ("CAV-MAE", "audio_tower.pos_embed_a"),
    "ltu_as": ("TLTR", "audio_tower.time_tr.attn.query.weight"),
}
# How torch.save began a file before it wrote zip files.
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a file, or of all weight files of a folder, mapped from disk.

    No code from the file is run.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no weights.
        ValueError: the file is damaged or of another kind, or no regular file, or contains more
            than tensors.
    """
    path = Path(path)
    if path.is_dir():
        state = {}
        for file in weight_files(path):
            state.update(load_state(file))
        return state
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there. --checkpoint and --audio_encoder take a file on this disk."
        )
    check_regular_file(path)
    # Find out the format.
    with open(path, "rb") as stream:
        head = stream.read(len(LEGACY))
    if not head:
        raise ValueError(f"{path} is empty. Download it again.")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{path} is a web page, not the file of the link. Download it again.")
    is_torch = head.startswith((b"PK", LEGACY))
    if not is_torch and head[8:9] != b"{":
        raise ValueError(
            f"{path} is neither a torch file nor safetensors (it begins with {head[:8]!r})."
        )
    if not is_torch:
        read_header(path)
    # Map the tensors.
    try:
        state = _load_torch(path, head.startswith(b"PK")) if is_torch else load_file(path)
    except UnpicklingError as error:
        name = "".join(re.findall(r"GLOBAL (\S+)", str(error))[:1])
        raise ValueError(
            f"{path} contains more than tensors ({name}): opening it could run code, so it is "
            "refused. Ask its authors for a plain state dict, or for safetensors."
        ) from error
    except (RuntimeError, EOFError, SafetensorError) as error:
        reason = re.split(r"\. |\n", str(error).strip())[0]
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {reason}. "
            "If it is damaged or cut short, download it again."
        ) from error
    is_state_dict = isinstance(state, dict) and all(
        isinstance(value, Tensor) for value in state.values()
    )
    if not is_state_dict:
        raise ValueError(f"{path} is not a state dict (name -> tensor).")
    return state


def _load_torch(path: Path, is_zip: bool) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
    # Linux refuses a private map of a file larger than its memory, but not a shared map. The map
    # is never written to.
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_audio_encoder(state: dict[str, Tensor], package: str, path: str | Path) -> None:
    """Check that a file contains the audio encoder of a package.

    Raises:
        ValueError: it contains no audio encoder, or that of the other model of the family.
    """
    for other_package, (audio_encoder, mark) in AUDIO_ENCODER_MARKS.items():
        if mark in state and other_package != package:
            raise ValueError(
                f"{path} contains {audio_encoder}, {state[mark].shape[-1]} wide, which is not the "
                f"audio encoder of {package}. "
                f"Convert it with: python -m {other_package}.convert_checkpoint"
            )
    _, mark = AUDIO_ENCODER_MARKS[package]
    if mark not in state:
        raise ValueError(
            f"{path} contains no audio encoder ({mark}): not a whole checkpoint of {package}."
        )


def find_rule(key: str, rules: list[KeyRule]) -> tuple[KeyRule, re.Match] | None:
    """Return the first rule that matches a key, with the match, or None."""
    for rule in rules:
        match = re.fullmatch(rule.pattern, key)
        if match is not None:
            return rule, match
    return None


def rename_keys(
    state: dict[str, Tensor], rules: list[KeyRule], prefixes: tuple[str, ...], path: str | Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Apply rules to every key of a file.

    Args:
        state: the tensors of the file by key.
        rules: the first one that matches a key applies.
        prefixes: what is removed from the start of a key before the rules apply.
        path: the file, for messages.

    Returns:
        the tensors under our names; and the keys that were dropped, each with the reason.

    Raises:
        ValueError: no rule matches a key, two keys get the same name, or a rule refuses the file.
    """
    placed = {}
    dropped = {}
    unknown = []
    for key, tensor in state.items():
        bare_key = key
        for prefix in prefixes:
            bare_key = bare_key.removeprefix(prefix)
        found = find_rule(bare_key, rules)
        if found is None:
            unknown.append(key)
            continue
        rule, match = found
        if rule.refuse is not None:
            raise ValueError(f"{path}, key {key}: refused: {rule.refuse}.")
        if rule.drop is not None:
            dropped[key] = rule.drop
            continue
        name = match.expand(rule.new_name)
        if name in placed:
            raise ValueError(f"{path}: {key} and another key both mean {name}.")
        placed[name] = tensor
    if unknown:
        raise ValueError(
            f"{path}: no rule matches {len(unknown)} keys: {unknown[:5]}. The file is not of the "
            "kind that is expected here."
        )
    return placed, dropped
