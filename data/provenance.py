"""Reports, and what a file of rows was made of: FILE.provenance.json beside it."""

import json
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from data.audio_ids import NO_AUDIO
from ltu.data.dataset_files import RowWriter, stream_rows
from ltu.files import replace_file, sha256_of


def write_json(value: Any, path: Path) -> None:
    """Write a report or recipe, whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    # Names of files may be no UTF-8.
    replace_file(path, text.encode("utf-8", "backslashreplace"), is_synced=True)


def provenance_path(output: str | Path) -> Path:
    return Path(f"{output}.provenance.json")


@contextmanager
def write_rows(path: Path, inputs: Iterable[str | Path] = ()) -> Iterator[RowWriter]:
    """A `RowWriter` that removes the recipe of older rows before the new ones get their name.

    So what is killed at any time may leave rows without a recipe, but never beside the recipe of others.
    """
    with RowWriter(path, inputs) as output:
        yield output
        provenance_path(path).unlink(missing_ok=True)


def audio_root_of(
    output: Path, sources: Iterable[Path], root: Path | None = None
) -> dict[str, Any]:
    """What a recipe says of relative `audio_id`s that were looked up in another folder than the output's.

    They are kept as they are, since they name the clips in every file of a data set; a line says what training needs.

    Args:
        sources: files whose rows went into the output. What the recipe beside one says of its own ids holds on.
        root: where their relative ids are looked up, if the user said so.
    """
    here = str(output.parent.resolve())
    folders = {source: [str(root.resolve())] if root else _roots_of(source) for source in sources}
    roots = {folder for found in folders.values() for folder in found}
    if not roots <= {here}:
        roots = {
            folder
            for source, found in folders.items()
            if _has_relative_ids(source)
            for folder in found
        }
    roots = sorted(roots)
    if set(roots) <= {here}:
        return {}
    if len(roots) == 1:
        print(f"{output}: its audio_ids are relative to another folder: --audio_root {roots[0]}")
        return {"audio_root": roots[0]}
    print(
        f"{output}: its audio_ids are relative to {len(roots)} folders ({', '.join(roots)}), so no --audio_root finds "
        "all of them: give every input absolute ids first, by data.remap_paths."
    )
    return {"audio_root": roots}


def _roots_of(source: Path) -> list[str]:
    recipe = provenance_path(source)
    known = json.loads(recipe.read_bytes()).get("audio_root") if recipe.is_file() else None
    return [known] if isinstance(known, str) else known or [str(source.parent.resolve())]


def _has_relative_ids(path: Path) -> bool:
    """Reads until the first."""
    for row in stream_rows(path):
        audio_id = row.get("audio_id")
        if audio_id not in NO_AUDIO and not str(audio_id).startswith("/"):
            return True
    return False


def write_provenance(
    output: str | Path, verb: str, inputs: Iterable[str | Path], **facts: Any
) -> dict[str, Any]:
    """Write FILE.provenance.json beside the output: what it was made of, by which settings. Same run, same bytes."""
    output = Path(output)
    versions = {"python": platform.python_version(), "msgspec": msgspec.__version__}
    sources = [
        {"path": str(path), "bytes": Path(path).stat().st_size, "sha256": sha256_of(path)}
        for path in inputs
    ]
    recipe = {"verb": verb, "inputs": sources, **facts}
    recipe |= {"output": {"path": output.name, "sha256": sha256_of(output)}, "versions": versions}
    write_json(recipe, provenance_path(output))
    return recipe
