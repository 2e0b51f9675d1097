"""Downloads a file completely, checks it, and does not download it twice.

A file gets its name when it is complete and checked; before that it is NAME.part.
NAME.received.json records the link, the number of bytes and the sha256, so that a second call
transfers nothing.

A broken transfer is resumed if the server names a version of the file (ETag, Last-Modified) and
still has that version; else it begins again. Dropbox sends a folder as a zip, which it packs again
for each request.
"""

import errno
import json
import os
import re
import shutil
import stat
import time
import urllib.request
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar

import msgspec
from filelock import FileLock
from tqdm import tqdm

from ltu.files import read_json_object, replace_file, sha256_of

T = TypeVar("T")

TIMEOUT = 60  # seconds without a byte until a connection is given up
RETRIES = 6  # retries without a further byte, until a transfer is given up
WAIT = 1.0  # seconds before the first retry; the next waits are twice as long each
MAX_WAIT = 30  # seconds
SMALL_JSON = 1 << 28  # bytes; of a larger file only both ends are checked, and it is not parsed
HINT = "Other way: --mirror DIR_OR_URL, a folder or an address that has this file."


class DownloadError(ValueError):
    """A file that cannot be downloaded. The message has its name, the reason and a hint."""


@dataclass(frozen=True)
class Receipt:
    """The content of NAME.received.json; `url` is None for a file that was put there by hand."""

    url: str | None
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PartNotes:
    """The content of NAME.part.json: the version of the file that NAME.part is a part of.

    Attributes:
        url: the address of the file.
        version: its ETag or Last-Modified; None if the server sends neither.
        total: the size of the whole file in bytes, if the server sends it.
    """

    url: str
    version: str | None = None
    total: int | None = None


def fetch(url: str, target: Path, size: int | None = None, sha256: str | None = None) -> Path:
    """Download a file, unless it is there already.

    Args:
        url: the address of the file, or a path.
        target: the path of the file on this disk. Its folder is created. A zip is unpacked into a
            folder of its name without ".zip", and not stored.
        size: the expected size in bytes, if it is known.
        sha256: the expected hash, if it is known.

    Returns:
        the path of the file; for a zip, the folder with its content.

    Raises:
        DownloadError: the file cannot be downloaded, or its content is not what is expected.
    """
    is_zip = target.suffix == ".zip"
    result = target
    if is_zip:
        result = target.with_suffix("")
    part = target.with_name(f"{target.name}.part")
    receipt_path = target.with_name(f"{target.name}.received.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The ranks of a run may all request the same file.
    with FileLock(target.with_name(f".{target.name}.lock")):
        # A folder appears when it is complete: a folder without a receipt was unpacked by hand.
        if result.is_dir() or _is_received(result, receipt_path):
            return result
        # A file without a receipt was put there by hand, or by a call that was stopped just here.
        is_by_hand = target.is_file()
        if is_by_hand:
            received = target
            origin = str(target)
        else:
            transfer(url, part, size)
            received = part
            origin = url
        try:
            digest = check(received, target.name, origin, size, sha256)
            receipt = Receipt(url, received.stat().st_size, digest)
            if is_zip:
                unpack(received, result)
            elif not is_by_hand:
                os.replace(part, target)
        except DownloadError:
            part.unlink(missing_ok=True)  # Resuming the transfer of a wrong file cannot help.
            raise
        if is_by_hand:
            receipt = replace(receipt, url=None)
        replace_file(receipt_path, (json.dumps(asdict(receipt)) + "\n").encode())
        part.unlink(missing_ok=True)
        _notes_path(part).unlink(missing_ok=True)
    return result


def _is_received(path: Path, receipt_path: Path) -> bool:
    """Return whether a file is there with the size that its receipt records."""
    receipt = _read_record(receipt_path, Receipt)
    return receipt is not None and path.is_file() and path.stat().st_size == receipt.bytes


def _read_record(path: Path, kind: type[T]) -> T | None:
    """Return what `fetch` recorded in a JSON file; None if it is not there, or damaged."""
    try:
        return msgspec.convert(read_json_object(path), kind)
    except (FileNotFoundError, ValueError):
        return None


def check(path: Path, name: str, origin: str, size: int | None, sha256: str | None) -> str:
    """Check a received file and return its sha256.

    Args:
        path: the received file.
        name: the name that the file is to have; its ending says what the file must contain.
        origin: where the file is from, for messages.
        size: the expected size in bytes, or None.
        sha256: the expected hash, or None.

    Raises:
        DownloadError: the file has another size, hash or kind of content.
    """
    num_bytes = path.stat().st_size
    digest = sha256_of(path)
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        wrong = "a web page, not the file; the link may have died"
    elif size not in (None, num_bytes):
        wrong = f"{num_bytes:,} bytes instead of {size:,}"
    elif sha256 not in (None, digest):
        wrong = f"another file: sha256 {digest} instead of {sha256}"
    else:
        wrong = _what_is_wrong(path, Path(name).suffix)
    if wrong:
        raise DownloadError(f"{name}: {origin} is {wrong}. {HINT}")
    return digest


def _what_is_wrong(path: Path, suffix: str) -> str | None:
    """Return why a file is not a whole file of its kind, or None."""
    size = path.stat().st_size
    if suffix == ".zip" and not zipfile.is_zipfile(path):
        return f"not a complete zip ({size:,} bytes)"
    if suffix == ".bin":
        if not zipfile.is_zipfile(path):
            return f"not a complete file of torch.save ({size:,} bytes)"
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        if not any(name.endswith("data.pkl") for name in members):
            return "a zip, but not of torch.save (no data.pkl in it)"
    if suffix == ".json" and size > SMALL_JSON:
        return _what_is_wrong_at_the_ends(path)
    if suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            return f"not JSON ({error})"
    return None


def _what_is_wrong_at_the_ends(path: Path) -> str | None:
    """Return why a JSON file is not whole, or None. Only its first and last bytes are read."""
    with path.open("rb") as file:
        head = file.read(512).lstrip()
        file.seek(max(0, path.stat().st_size - 512))
        tail = file.read().rstrip()
    if head[:1] + tail[-1:] in (b"[]", b"{}"):
        return None
    return "not JSON, or cut off"


def transfer(url: str, part: Path, size: int | None = None) -> None:
    """Download a file into `part`, resuming what is there, until no more bytes can be had.

    Args:
        url: the address of the file, or a path.
        part: the file to write.
        size: its size in bytes, if it is known. No more is received.

    Raises:
        DownloadError: the file cannot be downloaded, or is larger.
    """
    name = part.name.removesuffix(".part")
    if "://" not in url:
        if not Path(url).is_file():
            raise DownloadError(f"{name}: {url} is not there. {HINT}")
        shutil.copyfile(url, part)
        return
    most_received = 0
    failures = 0  # In a row, without a further byte.
    while True:
        try:
            return receive(url, part, size)
        except (OSError, HTTPException) as error:
            code = getattr(error, "code", 500)  # Of an HTTPError; else the connection failed.
            if code == 416:  # The part is not shorter than the file.
                part.unlink(missing_ok=True)
            elif code < 500 and code not in (408, 429):
                raise DownloadError(f"{name}: {url}: {error}. {HINT}") from error
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise DownloadError(
                    f"{part}: the disk is full. Make room and run it again; it goes on."
                ) from error

            received = _size_of(part)
            if received > most_received:
                most_received = received
                failures = 0
            failures += 1
            if failures > RETRIES:
                raise DownloadError(
                    f"{name}: {url}: {error!r}, {failures} times. {received:,} bytes are "
                    f"stored in {part}; run it again to go on. {HINT}"
                ) from error
            time.sleep(min(WAIT * 2 ** (failures - 1), MAX_WAIT))


def _size_of(path: Path) -> int:
    """Return the size of a file in bytes, 0 if it is not there."""
    if not path.is_file():
        return 0
    return path.stat().st_size


def _notes_path(part: Path) -> Path:
    return Path(f"{part}.json")


def _read_notes(part: Path) -> PartNotes | None:
    """Return the notes of a part; None if there is no part, or none of a known version."""
    notes = _read_record(_notes_path(part), PartNotes)
    if notes is None or not notes.version or not part.is_file():
        return None
    return notes


def receive(url: str, part: Path, size: int | None = None) -> None:
    """Request what is missing in `part`, once, and append it.

    Args:
        url: the address of the file.
        part: the file to append to.
        size: its size in bytes when it is complete, if it is known.

    Raises:
        OSError, HTTPException: another try may succeed.
        DownloadError: the link has died, or gives a file of another size; then `part` is removed.
    """
    name = part.name.removesuffix(".part")
    headers = {"User-Agent": "ltu"}
    start = 0
    notes = _read_notes(part)
    if notes is not None and notes.url == url:
        start = _size_of(part)
        if start == notes.total:
            return  # A call was stopped between the last byte and the check.
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": notes.version}

    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError(f"{name}: {url} gives a web page; the link may have died. {HINT}")
        if response.status != 206:  # The whole file, not the rest of it.
            start = 0
            notes = _notes_of_response(url, response.headers)
        elif not _continues(response.headers, notes, start):
            _notes_path(part).unlink(missing_ok=True)
            raise ConnectionError("the file changed at its source")
        if size is not None and notes.total not in (None, size):
            part.unlink(missing_ok=True)
            raise DownloadError(
                f"{name}: {url} is {notes.total:,} bytes instead of {size:,}. {HINT}"
            )
        with part.open("ab") as file:
            # Empty a new part before the notes are written: they must never describe old bytes.
            file.truncate(start)
            replace_file(_notes_path(part), json.dumps(asdict(notes)).encode())
            bar = tqdm(desc=name, total=notes.total, initial=start, unit="B", unit_scale=True)
            received = start
            with bar:
                while block := response.read1(1 << 16):
                    received += file.write(block)
                    bar.update(len(block))
                    # A server that sends no length could send without end.
                    if size is not None and received > size:
                        part.unlink()
                        raise DownloadError(
                            f"{name}: {url} is more than the {size:,} bytes of the file. {HINT}"
                        )
    if notes.total not in (None, received):
        raise ConnectionError(f"the connection ended after {received:,} of {notes.total:,} bytes")


def _version_of(headers: Message) -> str | None:
    """Return the version of a file that a server promises to be of equal bytes, if it does."""
    tag = headers.get("ETag", "W/")
    if tag.startswith("W/"):  # A weak tag does not promise equal bytes.
        return headers.get("Last-Modified")
    return tag


def _notes_of_response(url: str, headers: Message) -> PartNotes:
    length = headers.get("Content-Length")
    if length is None:
        return PartNotes(url, _version_of(headers))
    return PartNotes(url, _version_of(headers), int(length))


def _continues(headers: Message, notes: PartNotes | None, start: int) -> bool:
    """Return whether a response has the rest, from `start`, of the file that the notes describe."""
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
    if span is None or notes is None:
        return False
    is_same_version = _version_of(headers) in (None, notes.version)
    return is_same_version and int(span[1]) == start and int(span[2]) == notes.total


def unpack(archive: Path, folder: Path) -> None:
    """Unzip into a folder, which appears when it is complete.

    Raises:
        DownloadError: the zip is damaged, contains a link, or has a path that leads out.
    """
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    with zipfile.ZipFile(archive) as opened:
        # Dropbox puts the folder itself into its zips, as "/".
        members = [info for info in opened.infolist() if info.filename.strip("/")]
        for info in members:
            parts = re.split(r"[/\\]", info.filename)
            if ".." in parts or not parts[0] or stat.S_ISLNK(info.external_attr >> 16):
                raise DownloadError(
                    f"{archive}: {info.filename!r} leads out or is a link. Not unpacked. {HINT}"
                )
        try:
            unfinished.mkdir(parents=True)
            opened.extractall(unfinished, members)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            shutil.rmtree(unfinished)
            raise DownloadError(f"{archive} is damaged ({error}). Run the same again.") from error
    os.replace(unfinished, folder)
