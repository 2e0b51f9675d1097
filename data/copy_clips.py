"""Copies clips into a folder that may be published: only audio, and only from given folders.

A dataset file may name any file of the machine. A clip is copied only if it is, after all links are
followed, a regular file below one of the given folders, and decodes as audio. All clips are checked
before the first byte is copied. They are copied as they are, with tags that they may have.
"""

import filecmp
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ltu.data.audio import AudioError, decode_audio
from ltu.data.columns import ColumnFlags
from ltu.data.dataset_io import typed_examples
from ltu.data.dataset_source import DatasetSource
from ltu.data.table_clip import TableClip

AUDIO_FOLDER = "audio"  # Within the folder of the output.
MAX_SHOWN = 240  # Characters of an audio_id in a message.


@dataclass
class CheckedClip:
    """A clip that may be copied.

    Attributes:
        audio_id: in the dataset file.
        path: of the file, after all links.
        identity: device, number, size and time of change of the file that was checked.
    """

    audio_id: str
    path: Path
    identity: tuple[int, ...]


def identity_of(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file from another one, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_clips(
    names: set[str], source: DatasetSource, roots: list[Path], columns: ColumnFlags
) -> list[CheckedClip]:
    """Check that clips may be copied.

    Args:
        names: `audio_id`s.
        source: the dataset that names them.
        roots: folders below which clips may be; relative `audio_id`s are relative to the first.
        columns: of the dataset.

    Returns:
        the clips, sorted by `audio_id`.

    Raises:
        ValueError: a folder does not exist; or a clip is not below the folders, is no regular file
            or does not decode. The message has the number of its first example.
    """
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder, so no clip can be copied from it.")
    resolved_roots = [root.resolve() for root in roots]
    clips: list[CheckedClip] = []
    reasons: dict[str, str] = {}  # audio_id -> why it must not be copied.
    for name in sorted(names):
        try:
            clips.append(_find(name, roots[0], resolved_roots))
        except OSError as error:
            reasons[name] = error.strerror or "cannot be opened"
        except ValueError as error:
            reasons[name] = str(error)
    # Only files that may be copied are decoded, in several threads.
    with ThreadPoolExecutor() as pool:
        for clip, reason in zip(clips, pool.map(_why_undecodable, clips), strict=True):
            if reason:
                reasons[clip.audio_id] = reason
    if reasons:
        raise ValueError(_refusal(source, reasons, columns))
    return clips


def _find(name: str, root: Path, resolved_roots: list[Path]) -> CheckedClip:
    """Return a clip that is a regular file below one of the folders.

    Raises:
        OSError, ValueError: it is not.
    """
    if TableClip.parse(name) is not None:
        raise ValueError("it is stored in a table, not in a file. Use --embed_audio")
    try:
        path = (root / name).resolve(strict=True)
    except RuntimeError as error:  # Before Python 3.13.
        raise ValueError("a loop of links") from error
    if not any(path.is_relative_to(resolved) for resolved in resolved_roots):
        raise ValueError(
            f"{str(path)!r} is outside of {', '.join(map(str, resolved_roots))}. Name its folder "
            "with --allowed_root DIR if it may be copied"
        )
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    return CheckedClip(name, path, identity_of(status))


def _why_undecodable(clip: CheckedClip) -> str | None:
    """Return why a file does not decode as audio, or None."""
    try:
        decode_audio(clip.path)
    except AudioError as error:
        return f"not audio that can be decoded: {error.detail}"
    return None


def _refusal(source: DatasetSource, reasons: dict[str, str], columns: ColumnFlags) -> str:
    """Return the message about clips that must not be copied, by the first of them in the file."""
    for number, example in enumerate(typed_examples(source, columns), start=1):
        name = example.get("audio_id")
        if name in reasons:
            return (
                f"{source.name}, example {number}, audio_id {name[:MAX_SHOWN]!r}: {reasons[name]}. "
                f"{len(reasons):,} of the sampled clips are refused, and nothing was copied."
            )
    return f"{source.name} changed while it was read for the second time. Run it again."


@contextmanager
def copied_clips(clips: list[CheckedClip], folder: Path) -> Iterator[dict[str, str]]:
    """Copy clips into folder/audio; if the `with` block fails, remove these copies.

    If another clip already has the file name, a part of a hash is put in front of it. A file that
    is there and equals the clip is used as it is.

    Args:
        clips: from `check_clips`.
        folder: folder of the output.

    Yields:
        `audio_id` -> new `audio_id`, relative to `folder`.

    Raises:
        ValueError: a clip changed since it was checked.
    """
    new_ids: dict[str, str] = {}
    taken: set[str] = set()
    with ExitStack() as removal:
        for clip in clips:
            target = _free_name(clip, folder / AUDIO_FOLDER, taken)
            taken.add(target.name)
            new_ids[clip.audio_id] = f"{AUDIO_FOLDER}/{target.name}"
            if not target.exists():
                _copy(clip, target)
                removal.callback(target.unlink, missing_ok=True)
        yield new_ids
        # No error: keep the copies.
        removal.pop_all()


def _free_name(clip: CheckedClip, folder: Path, taken: set[str]) -> Path:
    """Return a path that no other clip has; it may be that of an equal file."""
    name = Path(clip.audio_id).name
    target = folder / name
    hashed = clip.audio_id.encode("utf-8", "surrogatepass")
    while target.name in taken or _is_another_file(clip.path, target):
        prefix = hashlib.blake2b(hashed, digest_size=4).hexdigest()
        target = folder / f"{prefix}_{name}"
        hashed += b"/"
    return target


def _is_another_file(source: Path, target: Path) -> bool:
    """Return whether the target exists with another content than the source."""
    return target.exists() and not filecmp.cmp(source, target, shallow=False)


def _copy(clip: CheckedClip, target: Path) -> None:
    """Copy a clip whole, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.tmp")
    try:
        with clip.path.open("rb") as source, unfinished.open("wb") as copy:
            if identity_of(os.fstat(source.fileno())) != clip.identity:
                raise ValueError(f"{clip.path} changed after it was checked. Run it again.")
            shutil.copyfileobj(source, copy)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
