"""Reports, and what a file of rows was made of: FILE.recipe.json beside it."""

import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from ltu.row_files import BLOCK, sync_and_rename


def write_json(value: Any, path: Path) -> None:
    """A report or recipe, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    text = json.dumps(value, indent=1, ensure_ascii=False)
    unfinished.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # Names may be no UTF-8.
    sync_and_rename(unfinished, path)


def hash_file(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_recipe(output: str | Path, verb: str, inputs: Iterable[str | Path], **facts: Any) -> dict[str, Any]:
    """Write FILE.recipe.json beside the output: what it was made of, by which settings. Same run, same bytes."""
    output = Path(output)
    versions = {"python": platform.python_version(), "msgspec": msgspec.__version__}
    sources = [{"path": str(path), "bytes": Path(path).stat().st_size, "sha256": hash_file(path)} for path in inputs]
    recipe = {"verb": verb, "inputs": sources, **facts}
    recipe |= {"output": {"path": output.name, "sha256": hash_file(output)}, "versions": versions}
    write_json(recipe, output.with_name(f"{output.name}.recipe.json"))
    return recipe
