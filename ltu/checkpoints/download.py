"""A file from an address to this disk: whole, checked, and once.

Notable:
- A file has its name when it is whole and checked; before that it is NAME.part. NAME.received.json says what came
  (link, bytes, sha256), so that a second call transfers nothing.
- A broken transfer goes on where it stopped if the server names a version (ETag, Last-Modified) and still has it; else
  it begins again. A folder on Dropbox comes as a zip that is packed anew each time.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import time
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from ltu.files import replace_file, sha256_of

TIMEOUT, RETRIES, WAIT = (
    60,
    6,
    1.0,
)  # seconds of silence; tries without one byte more; seconds before the first of them
SMALL_JSON = 1 << 28  # bytes; a larger file is not parsed, only its two ends are looked at
HINT = "Other way: --from DIR_OR_URL, a folder or mirror with files of the table's names."


class DownloadError(ValueError):
    """A file that cannot be downloaded. The message has its name, the reason and a hint."""


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Args:
        name: of the file in messages, and of the folder that a zip is unpacked into.
        file: its name on this disk.
        size: in bytes; None, or a text, if only a rounded size is known.
        sha256: its hash, if it is known.
    """

    name: str
    file: str
    size: int | str | None = None
    sha256: str | None = None


def fetch(row: RemoteFile, url: str, folder: Path) -> Path:
    """Download a file into a folder, once, from `url` or from that path.

    Returns:
        the file; for a zip, a folder with its name that holds what was in it.

    Raises:
        DownloadError: it cannot be had, or is not what it should be.
    """
    target = folder / row.file
    place = folder / row.name if row.file.endswith(".zip") else target
    part, receipt = (target.with_name(target.name + end) for end in (".part", ".received.json"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # The ranks of a run may all ask for one file.
        came = json.loads(receipt.read_text()) if receipt.is_file() else None
        # A folder appears when it is whole, so one without a receipt was unpacked by hand.
        if place.is_dir() or (came and place.is_file() and place.stat().st_size == came["bytes"]):
            return place
        by_hand = target.is_file()  # Or left by a call that was stopped just here.
        if not by_hand:
            transfer(row, url, part)
        try:
            came = check(row, target if by_hand else part, str(target) if by_hand else url)
            if place != target:
                unpack(target if by_hand else part, place)
            elif not by_hand:
                os.replace(part, target)
        except DownloadError:
            part.unlink(missing_ok=True)  # Going on with a wrong file would never make it right.
            raise
        content = json.dumps({"url": None if by_hand else url} | came) + "\n"
        replace_file(receipt, content.encode())
        for left in (part, Path(f"{part}.json")):
            left.unlink(missing_ok=True)
    return place


def check(row: RemoteFile, path: Path, origin: str) -> dict:
    """Bytes and sha256 of a received file. Raises DownloadError if it is not what the row says."""
    size, digest, wrong = path.stat().st_size, sha256_of(path), None
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
        file.seek(max(0, size - 512))
        ends = head[:1] + file.read().rstrip()[-1:]
    if head.startswith((b"<!doctype html", b"<html")):
        wrong = "a web page, not the file; the link may have died"
    elif isinstance(row.size, int) and row.size != size:
        wrong = f"{size:,} bytes instead of {row.size:,}"
    elif row.sha256 not in (None, digest):
        wrong = f"another file: sha256 {digest} instead of {row.sha256}"
    elif row.file.endswith((".zip", ".bin")) and not zipfile.is_zipfile(path):
        wrong = f"no whole {'zip' if row.file.endswith('.zip') else 'file of torch.save'} ({size:,} bytes)"
    elif row.file.endswith(".bin") and not any(
        n.endswith("data.pkl") for n in zipfile.ZipFile(path).namelist()
    ):
        wrong = "a zip, but not of torch.save (no data.pkl in it)"
    elif row.file.endswith(".json") and size > SMALL_JSON and ends not in (b"[]", b"{}"):
        wrong = "not JSON, or cut off"
    elif row.file.endswith(".json") and size <= SMALL_JSON:
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            wrong = f"not JSON ({error})"
    if wrong:
        raise DownloadError(f"{row.name}: {origin} is {wrong}. {HINT}")
    return {"bytes": size, "sha256": digest}


def transfer(row: RemoteFile, url: str, part: Path) -> None:
    """Receive a file into `part`, going on from what is there; patient as long as bytes come. Raises DownloadError."""
    if "://" not in url:
        if not Path(url).is_file():
            raise DownloadError(f"{row.name}: {url} is not there. {HINT}")
        shutil.copyfile(url, part)
        return
    most, failures = 0, 0
    while True:
        try:
            return receive(row, url, part)
        except (OSError, HTTPException) as error:
            code = getattr(error, "code", 500)  # Of an HTTPError; else the connection failed.
            if code == 416:  # The part is not shorter than the file.
                part.unlink(missing_ok=True)
            elif code < 500 and code not in (408, 429):
                raise DownloadError(f"{row.name}: {url}: {error}. {HINT}") from error
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise DownloadError(
                    f"{part}: the disk is full. Make room and run it again; it goes on."
                ) from error
            kept = part.stat().st_size if part.is_file() else 0
            most, failures = max(most, kept), 1 if kept > most else failures + 1
            if failures > RETRIES:
                raise DownloadError(
                    f"{row.name}: {url}: {error!r}, {failures} times. {kept:,} bytes are kept in {part}; run it again "
                    f"to go on. {HINT}"
                ) from error
            time.sleep(min(WAIT * 2 ** (failures - 1), 30))


def receive(row: RemoteFile, url: str, part: Path) -> None:
    """One request for what is missing. Raises OSError or HTTPException where another may do better."""
    notes = Path(f"{part}.json")  # Of which version the part is.
    known = json.loads(notes.read_text()) if notes.is_file() and part.is_file() else {}
    start = part.stat().st_size if known.get("version") and known["url"] == url else 0
    if start and known["total"] == str(
        start
    ):  # A call was stopped between the last byte and the check.
        return
    headers = {"Range": f"bytes={start}-", "If-Range": known["version"]} if start else {}
    request = urllib.request.Request(url, headers={"User-Agent": "ltu"} | headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError(
                f"{row.name}: {url} gives a web page; the link may have died. {HINT}"
            )
        tag, total = response.headers.get("ETag", "W/"), response.headers.get("Content-Length")
        # A weak tag ("W/") does not promise equal bytes.
        version = response.headers.get("Last-Modified") if tag.startswith("W/") else tag
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            found = span and (int(span[1]), version or known.get("version"), span[2])
            if found != (start, known.get("version"), known.get("total")):
                notes.unlink(missing_ok=True)
                raise ConnectionError("the file changed at its source")
            total = span[2]
        else:
            start = 0
        with part.open(
            "ab" if start else "wb"
        ) as file:  # Emptied before the notes say of what it is a part.
            notes.write_text(json.dumps({"url": url, "version": version, "total": total}))
            size = int(total) if total else None
            with tqdm(desc=row.file, total=size, initial=start, unit="B", unit_scale=True) as bar:
                while block := response.read1(1 << 16):
                    bar.update(file.write(block))
    if size is not None and part.stat().st_size != size:
        raise ConnectionError(
            f"the connection ended after {part.stat().st_size:,} of {size:,} bytes"
        )


def unpack(archive: Path, place: Path) -> None:
    """Unzip into the folder `place`, which appears when it is whole. Raises DownloadError: links, or ways out of it."""
    scratch = place.with_name(f".{place.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
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
            scratch.mkdir(parents=True)
            opened.extractall(scratch, members)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            shutil.rmtree(scratch)
            raise DownloadError(f"{archive} is damaged ({error}). Run the same again.") from error
    os.replace(scratch, place)
