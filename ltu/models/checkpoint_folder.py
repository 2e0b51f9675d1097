"""Finds checkpoint folders and hashes what they hold."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import CONFIG_MAPPING
from transformers.utils import cached_file

from ltu.files import sha256_of

CHECKPOINT_FILES = ("config.json", "processor_config.json")


def relative_path_of(place: str | os.PathLike, folder: str | os.PathLike) -> str:
    """Where a file or folder lies, seen from a checkpoint folder; begins with a dot, which no hub id does."""
    relative = os.path.relpath(Path(place).resolve(), Path(folder).resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def find_checkpoint(
    name: str | os.PathLike, needed: tuple[str, ...] = ("config.json",), **hub_kwargs: Any
) -> Path:
    """The folder of a checkpoint: `name` itself, or where the hub's copy of it was put.

    Args:
        needed: files that the folder must hold.

    Raises:
        FileNotFoundError: it is neither a folder nor a hub id, or the folder holds no checkpoint.
    """
    folder = (
        Path(name) if Path(name).is_dir() or "/" in str(name) else Path("pretrained_mdls", name)
    )
    if not folder.is_dir():
        if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"The checkpoint {name} is not there. Give a folder of a finished stage, or the name of one in "
                "pretrained_mdls, where train_scripts/*/prep_train.sh puts released ones (python -m ltu.released lists "
                "them). Write one with: python -m ltu.convert_checkpoint"
            )
        folder = Path(snapshot_download(str(name), **hub_kwargs))
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a checkpoint of ours: it has no {' and no '.join(missing)}. "
            "Write one with: python -m ltu.convert_checkpoint"
        )
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in CONFIG_MAPPING:
        raise FileNotFoundError(
            f"{folder} holds a model of kind {kind!r}, which is not known here. For 'ltu_as' use the commands of "
            "ltu_as (python -m ltu_as.ask ...; in Python: import ltu_as)."
        )
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights; of two formats, safetensors.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no weights (model*.safetensors or pytorch_model*.bin)."
        )
    return files


def sha256_of_weights(path: str | Path) -> str:
    """Return the sha256 of a file, or of the weights in a folder, shard after shard.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    path = Path(path)
    return sha256_of(*(weight_files(path) if path.is_dir() else [path]))


def find_model_file(name: str | os.PathLike, file: str) -> Path | None:
    """Return the path of a file of a model in a folder or on the hub, which is downloaded if need be.

    Returns None if the model has no such file, or if it is neither cached nor can the hub be reached.

    Raises:
        OSError: the hub refuses it.
    """
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(name), file))
    except EntryNotFoundError:
        return None


def hash_language_model(name: str | os.PathLike) -> str:
    """sha256 over what identifies a language model without reading its weights: `config.json` and the index of its
    weight files.

    Args:
        name: a folder, or a hub id. A model in one safetensors file has no index; its header (names, shapes, places)
            stands for it.

    Raises:
        FileNotFoundError: there is no such model, or it has no weights.
    """
    if str(name).startswith((".", "/")) and not Path(name).is_dir():
        raise FileNotFoundError(
            f"The language model {name} is not there. Name its place: --llm DIR_OR_ID (language_model=... in Python)."
        )
    digest = hashlib.sha256(Path(cached_file(name, "config.json")).read_bytes())
    for index in (
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
    ):
        file = find_model_file(name, index)
        if file is None:
            continue
        with open(file, "rb") as stream:
            if index.endswith(".json"):
                digest.update(stream.read())
            elif index.endswith(".safetensors"):
                digest.update(
                    stream.read(int.from_bytes(stream.read(8), "little"))
                )  # An 8-byte length, then the header.
            else:
                digest.update(str(os.path.getsize(file)).encode())
        return digest.hexdigest()
    raise FileNotFoundError(
        f"{name} holds no weights (model.safetensors or pytorch_model.bin, or an index of them)."
    )
