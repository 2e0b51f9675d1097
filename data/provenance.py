"""Writes FILE.provenance.json next to a dataset file: its inputs and settings."""

import argparse
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ltu.data.check_examples import NO_AUDIO
from ltu.data.columns import ColumnFlags
from ltu.data.dataset_io import ExampleWriter, stream_examples
from ltu.data.dataset_source import DatasetSource
from ltu.data.parquet_writer import ClipContent
from ltu.files import read_json_object, sha256_of, write_json


def provenance_path(output: str | Path) -> Path:
    """Return the path of the provenance file of an output."""
    return Path(f"{output}.provenance.json")


def files_of(inputs: Iterable[str | Path | DatasetSource]) -> list[Path]:
    """Return the files of inputs: of a dataset all its files, each file once."""
    files: dict[Path, None] = {}  # An ordered set.
    for given in inputs:
        own = given.files if isinstance(given, DatasetSource) else [Path(given)]
        files.update(dict.fromkeys(own))
    return list(files)


@contextmanager
def write_examples(
    path: Path,
    inputs: Iterable[str | Path | DatasetSource] = (),
    read_clip: Callable[[str | None], ClipContent | None] | None = None,
) -> Iterator[ExampleWriter]:
    """Open an `ExampleWriter`, and remove an older provenance file.

    It is removed before the output gets its name. A run that is killed may therefore leave a
    dataset file without provenance, but never one with the provenance of another.
    """
    with ExampleWriter(path, files_of(inputs), read_clip) as output:
        yield output
        provenance_path(path).unlink(missing_ok=True)


def audio_root_of(
    output: Path,
    sources: Iterable[DatasetSource],
    root: Path | None = None,
    columns: ColumnFlags | None = None,
) -> dict[str, Any]:
    """Return the provenance entry for relative `audio_id`s, and print a hint if there is one.

    Relative `audio_id`s are copied unchanged, because they name the clips in every file of a
    dataset. If they were relative to another folder than that of the output, training needs
    --audio_root, and the entry says which.

    Args:
        output: the dataset file that is written.
        sources: datasets whose examples were copied. An `audio_root` in the provenance of one
            applies to its ids.
        root: the folder of the relative ids, if the user gave it.
        columns: of the datasets.

    Returns:
        `{"audio_root": folder or list of folders}`, or `{}` if training does not need it.
    """
    here = str(output.parent.resolve())
    folders_of = {}
    for source in sources:
        folders_of[source] = [str(root.resolve())] if root else _roots_of(source)
    roots = set().union(*folders_of.values())
    # Only sources that have relative ids count. To find out, they are read, so this comes second.
    if not roots <= {here}:
        relevant = []
        for source, folders in folders_of.items():
            if _has_relative_ids(source, columns):
                relevant.append(folders)
        roots = set().union(*relevant)
    if roots <= {here}:
        return {}
    found = sorted(roots)
    if len(found) == 1:
        print(f"{output}: its audio_ids are relative to another folder: --audio_root {found[0]}")
        return {"audio_root": found[0]}
    print(
        f"{output}: its audio_ids are relative to {len(found)} folders ({', '.join(found)}), so no "
        "--audio_root finds all of them: make the ids of every input absolute first, with "
        "data.remap_paths, or store the clips with --embed_audio."
    )
    return {"audio_root": found}


def clip_facts(
    args: argparse.Namespace, output: Path, sources: Iterable[DatasetSource], columns: ColumnFlags
) -> dict[str, Any]:
    """Return the entries of a provenance file about where the clips of the output are."""
    if args.embed_audio:
        return {"embedded_audio": True}
    return audio_root_of(output, sources, getattr(args, "audio_root", None), columns)


def clip_root_of(source: DatasetSource) -> Path:
    """Return the folder that the relative ids of a dataset are relative to.

    Raises:
        ValueError: they are relative to several, or the provenance file is damaged.
    """
    roots = _roots_of(source)
    if len(roots) > 1:
        raise ValueError(
            f"{source.name}: its audio_ids are relative to {len(roots)} folders "
            f"({', '.join(roots)}). Combine their datasets again, with --embed_audio."
        )
    return Path(roots[0])


def _roots_of(source: DatasetSource) -> list[str]:
    """Return the folders that the relative ids of a dataset are relative to.

    Raises:
        ValueError: the provenance file of the dataset is damaged.
    """
    path = provenance_path(source.path)
    known = read_json_object(path).get("audio_root") if path.is_file() else None
    if known is None:
        return [str(source.root.resolve())]
    if isinstance(known, str):
        return [known]
    if not isinstance(known, list) or not all(isinstance(root, str) for root in known):
        raise ValueError(f"{path}: audio_root is {known!r}, not text or a list of texts. Fix it.")
    return known


def _has_relative_ids(source: DatasetSource, columns: ColumnFlags | None) -> bool:
    """Read a dataset up to the first relative `audio_id`."""
    for example in stream_examples(source, columns):
        audio_id = example.get("audio_id")
        if audio_id not in NO_AUDIO and not str(audio_id).startswith("/"):
            return True
    return False


def write_provenance(
    output: str | Path, command: str, inputs: Iterable[str | Path | DatasetSource], **facts: Any
) -> dict[str, Any]:
    """Write FILE.provenance.json next to the output and return its content.

    The same run writes the same bytes.

    Args:
        output: the file that was written.
        command: name of the command that wrote it.
        inputs: the datasets and files that it read. The hash of each of their files is recorded.
        facts: settings and counts.
    """
    output = Path(output)
    sources = [
        {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in files_of(inputs)
    ]
    content = {
        "command": command,
        "inputs": sources,
        **facts,
        "output": {"path": output.name, "sha256": sha256_of(output)},
        "versions": {"python": platform.python_version(), "msgspec": msgspec.__version__},
    }
    write_json(content, provenance_path(output))
    return content
