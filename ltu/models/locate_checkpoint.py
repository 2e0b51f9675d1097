"""Finds checkpoint folders and hashes their weights."""

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

WEIGHT_FILES = {"safetensors": "model*.safetensors", "bin": "pytorch_model*.bin"}
CHECKPOINT_FILES = ("config.json", "processor_config.json")


def relative_path_of(path: str | os.PathLike, folder: str | os.PathLike) -> str:
    """Return the path of a file or folder relative to a checkpoint folder.

    It begins with a dot, which no hub id does.
    """
    relative = os.path.relpath(Path(path).resolve(), Path(folder).resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def find_checkpoint(
    name: str | os.PathLike, needed: tuple[str, ...] = ("config.json",), **hub_kwargs: Any
) -> Path:
    """Return the folder of a checkpoint, which is downloaded if need be.

    Args:
        name: a folder, the name of a folder in pretrained_mdls, or a hub id.
        needed: files that the folder must hold.
        hub_kwargs: arguments of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: there is no such folder and it is no hub id, or the folder holds no
            checkpoint.
    """
    if Path(name).is_dir() or "/" in str(name):
        folder = Path(name)
    else:
        folder = Path("pretrained_mdls", name)
    if not folder.is_dir():
        if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"The checkpoint {name} is not there. Give a folder of a finished stage, or the "
                "name of one in pretrained_mdls, where train_scripts/*/prep_train.sh puts released "
                "ones (python -m ltu.released lists them). Write one with: "
                "python -m ltu.convert_checkpoint"
            )
        folder = Path(snapshot_download(str(name), **hub_kwargs))
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is no checkpoint folder: it has no {' and no '.join(missing)}. "
            "Write one with: python -m ltu.convert_checkpoint"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise FileNotFoundError(
            f"{folder} holds a model of type {model_type!r}, which is not known here. For 'ltu_as' "
            "use the commands of ltu_as (python -m ltu_as.ask ...; in Python: import ltu_as)."
        )
    return folder


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders checkpoint-N of a run, complete or not, the newest first."""
    by_step = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal():
            by_step[int(step)] = path
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def weight_files(folder: Path, formats: tuple[str, ...] = ("safetensors", "bin")) -> list[Path]:
    """Return the files that hold the weights of a folder, in the first format that it has.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    patterns = [WEIGHT_FILES[name] for name in formats]
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise FileNotFoundError(
        f"{folder} holds no weights ({' or '.join(patterns)}). Write a checkpoint folder with: "
        "python -m ltu.convert_checkpoint"
    )


def sha256_of_weights(path: str | Path) -> str:
    """Return the sha256 of a file, or of the weights in a folder, shard after shard.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    path = Path(path)
    return sha256_of(*(weight_files(path) if path.is_dir() else [path]))


def find_model_file(name: str | os.PathLike, file: str, **hub_kwargs: Any) -> Path | None:
    """Return the path of a file of a model in a folder or on the hub; download it if need be.

    Returns None if the model has no such file, or if the file is not cached and the hub cannot be
    reached.

    Raises:
        OSError: the hub refuses the file.
    """
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(name), file, **hub_kwargs))
    except EntryNotFoundError:
        return None


def hash_language_model(name: str | os.PathLike, **hub_kwargs: Any) -> str:
    """Return a sha256 that identifies a language model without reading its weights.

    It is that of `config.json` and the index of the weight files. A model in one safetensors file
    has no index, so its header (names, shapes, offsets) is used; of one `.bin` file, its size.

    Args:
        name: a folder, or a hub id.
        hub_kwargs: arguments of `huggingface_hub.hf_hub_download`, such as `token`.

    Raises:
        FileNotFoundError: there is no such model, or it has no weights.
    """
    if str(name).startswith((".", "/")) and not Path(name).is_dir():
        raise FileNotFoundError(
            f"The language model {name} is not there. Give its folder or hub id: --llm DIR_OR_ID "
            "(language_model=... in Python)."
        )
    digest = hashlib.sha256(Path(cached_file(name, "config.json", **hub_kwargs)).read_bytes())
    for index in (
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
    ):
        file = find_model_file(name, index, **hub_kwargs)
        if file is None:
            continue
        with open(file, "rb") as stream:
            if index.endswith(".json"):
                digest.update(stream.read())
            elif index.endswith(".safetensors"):
                # The file begins with the length of its header, in 8 bytes.
                header_length = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(header_length))
            else:
                digest.update(str(os.path.getsize(file)).encode())
        return digest.hexdigest()
    raise FileNotFoundError(
        f"{name} holds no weights (model.safetensors or pytorch_model.bin, or an index of them)."
    )
