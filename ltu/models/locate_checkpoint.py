"""Finds checkpoint folders and hashes their weights."""

import hashlib
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import CONFIG_MAPPING
from transformers.utils import cached_file

from ltu.files import check_regular_file, read_json_object, sha256_of
from ltu.models.weight_headers import read_header, read_headers

WEIGHT_FILES = {"safetensors": "model*.safetensors", "bin": "pytorch_model*.bin"}
CHECKPOINT_FILES = ("config.json", "processor_config.json")
# Files that libraries read in the folder of a model; each contains a JSON object.
CONFIG_FILES = ("config.json", "processor_config.json", "ltu_state.json")
LIBRARY_FILES = (
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


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
        ValueError: as of `check_files`.
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
    check_files(folder)
    model_type = read_json_object(folder / "config.json").get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise FileNotFoundError(
            f"{folder} holds a model of type {model_type!r}, which is not known here. For 'ltu_as' "
            "use the commands of ltu_as (python -m ltu_as.ask ...; in Python: import ltu_as)."
        )
    return folder


def check_files(folder: Path) -> None:
    """Check the files of a model's folder before a library opens them.

    Raises:
        ValueError: there is something other than files and folders, such as a pipe; or a JSON file
            is damaged, or too large, or contains no object; or the index of the weights names files
            in other folders; or the header of a weight file is damaged.
    """
    named = (*CONFIG_FILES, *LIBRARY_FILES, *INDEX_FILES)
    for path in sorted(folder.iterdir()):
        # A link may lead nowhere; then the file is missing.
        if path.exists() and (path.name in named or not path.is_dir()):
            check_regular_file(path)
    for name in named:
        path = folder / name
        if not path.is_file():
            continue
        content = read_json_object(path, unique_keys=name in CONFIG_FILES)
        # Names of classes, by which transformers chooses what it opens.
        for key in ("processor_class", "tokenizer_class"):
            if not isinstance(content.get(key), str | None):
                raise ValueError(f"{path}: {key} is {content[key]!a:.80}, not the name of a class.")
        if name in INDEX_FILES:
            check_weight_index(content, path)
    read_headers(sorted(folder.glob(WEIGHT_FILES["safetensors"])))


def check_weight_index(content: dict[str, Any], path: Path) -> None:
    """Check the index of the files that hold the weights.

    Raises:
        ValueError: it does not map names of weights to names of files in its folder.
    """
    weight_map = content.get("weight_map")
    files = set()
    is_map = isinstance(weight_map, dict) and bool(weight_map)
    if is_map:
        is_map = all(isinstance(file, str) for file in weight_map.values())
    if is_map:
        files = set(weight_map.values())
    if not is_map or any(Path(file).name != file for file in files):
        raise ValueError(
            f"{path} is malformed: its weight_map does not map names of weights to files of the "
            "folder. Copy or write it again."
        )


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
        ValueError: one of them is no regular file.
    """
    patterns = [WEIGHT_FILES[name] for name in formats]
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        for file in files:
            check_regular_file(file)
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


def hash_model(
    name: str | os.PathLike,
    kind: str = "language model",
    hint: str = "--llm DIR_OR_ID (language_model=... in Python)",
    **hub_kwargs: Any,
) -> str:
    """Return a sha256 that identifies a model without reading its weights.

    It is that of `config.json` and the index of the weight files. A model in one safetensors file
    has no index, so its header (names, shapes, offsets) is used; of one `.bin` file, its size.

    Args:
        name: a folder, or a hub id.
        kind, hint: what it is, and how to name it, for messages.
        hub_kwargs: arguments of `huggingface_hub.hf_hub_download`, such as `token`.

    Raises:
        FileNotFoundError: there is no such model, or it has no weights.
        ValueError: a file of it is damaged, or is no regular file.
    """
    if str(name).startswith((".", "/")) and not Path(name).is_dir():
        raise FileNotFoundError(
            f"The {kind} {name} is not there. Give its folder or hub id: {hint}."
        )
    if Path(name).is_dir():
        check_files(Path(name))
        config = Path(name, "config.json")
    else:
        config = Path(cached_file(name, "config.json", **hub_kwargs))
    digest = hashlib.sha256(config.read_bytes())
    for index in (
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
    ):
        file = find_model_file(name, index, **hub_kwargs)
        if file is None:
            continue
        if index.endswith(".json"):
            digest.update(file.read_bytes())
        elif index.endswith(".safetensors"):
            digest.update(read_header(file))
        else:
            digest.update(str(os.path.getsize(file)).encode())
        return digest.hexdigest()
    raise FileNotFoundError(
        f"{name} holds no weights (model.safetensors or pytorch_model.bin, or an index of them)."
    )
