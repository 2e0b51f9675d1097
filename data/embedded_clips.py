"""Stores the clips of a dataset within the Parquet file that a command writes (--embed_audio).

A dataset file may name any file of the machine, and the output may be published. A clip is stored
only if it is, after all links are followed, a regular file below the folder of its dataset or below
--allowed_root that decodes as audio (silent, short and long clips do), or lies in a table that the
command reads or that is below these folders. The stored bytes are those of the file.

Relative audio_ids are made absolute when they are read, because a command may combine datasets of
several folders.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.provenance import clip_root_of
from ltu.data.audio import AudioError, decode_audio
from ltu.data.check_examples import NO_AUDIO
from ltu.data.dataset_source import DatasetSource
from ltu.data.parquet_writer import ClipContent
from ltu.data.table_clip import TableClip, find_content, name_of_clip
from ltu.files import check_regular_file

MAX_SHOWN = 240  # Characters of an audio_id in a message.


def add_embed_flags(parser: argparse.ArgumentParser) -> None:
    """Add --embed_audio and --allowed_root."""
    parser.add_argument(
        "--embed_audio",
        action="store_true",
        help="Store the clips in the output, which must be .parquet: a column `audio` of the type "
        "Audio of datasets, instead of audio_id.",
    )
    parser.add_argument(
        "--allowed_root",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="Another folder from which clips may be copied or stored; the flag can be repeated.",
    )


class ClipEmbedder:
    """Reads the clips of datasets, so that `ExampleWriter` stores them.

    Args:
        sources: the datasets.
        audio_root: folder of relative `audio_id`s, if the user gave it.
        allowed_roots: further folders below which clips may be.

    Raises:
        ValueError: a folder does not exist, or `audio_id`s of a dataset are relative to several.
    """

    def __init__(
        self,
        sources: Iterable[DatasetSource],
        audio_root: Path | None = None,
        allowed_roots: Iterable[Path] = (),
    ):
        self.root_of: dict[DatasetSource, Path] = {}
        self.tables: set[Path] = set()
        for source in sources:
            self.root_of[source] = audio_root or clip_root_of(source)
            self.tables.update(file.resolve() for file in source.files if source.kind != "json")
        self.roots: list[Path] = []
        for root in [*self.root_of.values(), *allowed_roots]:
            if not root.is_dir():
                raise ValueError(f"{root} is not a folder, so no clip can be read from it.")
            self.roots.append(root.resolve())

    def absolute(
        self, examples: Iterable[dict[str, Any]], source: DatasetSource
    ) -> Iterator[dict[str, Any]]:
        """Yield the examples of a dataset with absolute `audio_id`s."""
        root = self.root_of[source].absolute()
        for example in examples:
            audio_id = example.get("audio_id")
            if audio_id not in NO_AUDIO:
                example = example | {"audio_id": str(root / audio_id)}
            yield example

    def read(self, audio_id: str | None) -> ClipContent | None:
        """Return the clip of an absolute `audio_id`, or None for a question without audio.

        Raises:
            OSError, ValueError: it is missing, no regular file, or not below the folders.
        """
        if audio_id in NO_AUDIO:
            return None
        try:
            clip = TableClip.parse(audio_id)
            if clip is None:
                return self._read_file(Path(audio_id))
            self._check_place(Path(clip.file))
            content = find_content(audio_id)
            if isinstance(content, Path):
                return self._read_file(content)
            name = name_of_clip(audio_id) or f"{Path(clip.file).stem}_{clip.row}"
            return ClipContent(content, name)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"audio_id {audio_id[:MAX_SHOWN]!r}: {reason}") from error
        except ValueError as error:
            raise ValueError(f"audio_id {audio_id[:MAX_SHOWN]!r}: {error}") from error

    def _read_file(self, path: Path) -> ClipContent:
        self._check_place(path)
        check_regular_file(path)
        content = path.read_bytes()
        try:
            decode_audio(content)
        except AudioError as error:
            if error.reason == "unreadable":
                raise ValueError(f"not audio that can be decoded: {error.detail}") from error
        return ClipContent(content, path.name)

    def _check_place(self, path: Path) -> None:
        """Check that a clip or a table may be read.

        Raises:
            OSError, ValueError: it is missing, or outside of the folders.
        """
        try:
            resolved = path.resolve(strict=True)
        except RuntimeError as error:  # Before Python 3.13.
            raise ValueError("a loop of links") from error
        if resolved in self.tables or any(resolved.is_relative_to(root) for root in self.roots):
            return
        roots = ", ".join(dict.fromkeys(map(str, self.roots)))
        raise ValueError(
            f"{str(resolved)!r} is outside of {roots}. Name its folder with --allowed_root DIR if "
            "it may be stored"
        )


def make_embedder(
    args: argparse.Namespace, sources: Iterable[DatasetSource]
) -> ClipEmbedder | None:
    """Return what reads the clips of datasets, or None without --embed_audio."""
    if not args.embed_audio:
        return None
    return ClipEmbedder(sources, getattr(args, "audio_root", None), args.allowed_root)


def resolve_ids(
    embedder: ClipEmbedder | None, examples: Iterable[dict[str, Any]], source: DatasetSource
) -> Iterable[dict[str, Any]]:
    """Return examples whose `audio_id`s are absolute if their clips are stored."""
    if embedder is None:
        return examples
    return embedder.absolute(examples, source)


def reader_of(embedder: ClipEmbedder | None) -> Callable[[str | None], ClipContent | None] | None:
    """Return the argument `read_clip` of `ExampleWriter`."""
    return embedder.read if embedder is not None else None
