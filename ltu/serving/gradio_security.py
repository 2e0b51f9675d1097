"""Restricts the page in the browser: clips are uploads only, and nothing of a request remains.

Gradio accepts a file of a request by its path on the server or by an address. It would download an
address, and take any entry below the folder of uploads, also a folder, for a file of its own.
`check_request` refuses both before Gradio handles the request, and all endpoints that the page does
not need. `check_is_upload` checks a path again before the clip is decoded.

`remove_uploads` removes old uploads instead of Gradio, whose removal ends for good at the first
entry that it cannot remove. `discard_output` discards what Gradio and other libraries print,
because their tracebacks quote requests. The page of Gradio 6.0 names a script of another host;
`OwnSourcesMiddleware` adds a header that makes browsers refuse it.
"""

import asyncio
import math
import os
import re
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import gradio as gr
from fastapi import Depends, FastAPI, HTTPException, Request
from starlette.middleware import Middleware

from ltu.data.audio import AudioError

# The sources from which a browser may load anything. Gradio's page needs the two unsafe ones.
CONTENT_SECURITY_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
# Bodies of these types are no JSON; those of uploads are large and are read as a stream.
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
# The endpoints to which the page and its clients send data.
OPEN_ENDPOINTS = re.compile(r".*/gradio_api/(api|call|cancel|queue/join|reset|run|upload)(/.*)?")
# Seconds between two searches for old uploads, and the age at which an upload is removed.
SEARCH_SECONDS = 300
UPLOAD_SECONDS = 3600


def fastapi_settings(is_shared: bool) -> dict[str, Any]:
    """Return the settings of the page's FastAPI app, the `app_kwargs` of `gr.Blocks.launch`.

    Args:
        is_shared: the page is shared at a public address of Gradio's; its scripts are then from
            Gradio's host, and the browser must load them.
    """
    settings: dict[str, Any] = {
        "dependencies": [Depends(check_request)],
        "lifespan": remove_uploads,
    }
    if not is_shared:
        settings["middleware"] = [Middleware(OwnSourcesMiddleware)]
    return settings


# --- what a request may contain


async def check_request(request: Request) -> None:
    """Refuse a request to an endpoint that the page does not need, or with a file of the server.

    Gradio looks for files in the values of all components, so the whole body is searched.

    Raises:
        HTTPException: the endpoint is closed, the body is no JSON, or it names a file that is not
            an upload.
    """
    if request.method != "POST":
        return
    if not OPEN_ENDPOINTS.fullmatch(request.url.path):
        raise HTTPException(404, "There is no such endpoint here.")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type in FORM_TYPES:
        return
    try:
        body = await request.json()  # Starlette caches it for Gradio's routes.
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "The body is not JSON.") from error
    for path in find_paths(body):
        if not isinstance(path, str) or "://" in path:
            raise HTTPException(403, "Upload the clip: addresses are not fetched here.")
        try:
            check_is_upload(path)
        except AudioError as error:
            raise HTTPException(
                403, "Upload the clip: this is not an uploaded file, or it was removed."
            ) from error


def find_paths(body: Any) -> list[Any]:
    """Return the "path" of each dict inside a JSON value that has one."""
    paths = []
    remaining = [body]
    while remaining:
        value = remaining.pop()
        if isinstance(value, dict):
            if "path" in value:
                paths.append(value["path"])
            remaining.extend(value.values())
        elif isinstance(value, list):
            remaining.extend(value)
    return paths


def check_is_upload(path: str) -> None:
    """Raise AudioError unless a path is a regular file in the folder of uploads, and no link."""
    folder = upload_folder().resolve()
    try:
        is_inside = Path(path).resolve().is_relative_to(folder)
        is_upload = is_inside and stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):  # No such file, or characters that no path can have.
        is_upload = False
    if not is_upload:
        raise AudioError(path, "missing", "is not an upload")


# --- what remains of a request


def upload_folder() -> Path:
    """Return the folder in which Gradio stores uploads and examples."""
    return Path(gr.utils.get_upload_folder())


@asynccontextmanager
async def remove_uploads(app: FastAPI) -> AsyncIterator[None]:
    """Remove uploads that are old while the server runs, and all files when it ends.

    What is in the folder when the server starts, the examples, remains until the end.
    """
    folder = upload_folder()
    examples = frozenset(folder.rglob("*"))
    removal = asyncio.create_task(remove_regularly(folder, examples))
    yield
    removal.cancel()
    remove_entries(folder, math.inf)


async def remove_regularly(folder: Path, kept: frozenset[Path]) -> None:
    """Remove uploads once they are `UPLOAD_SECONDS` old; runs until it is cancelled."""
    while True:
        await asyncio.sleep(SEARCH_SECONDS)
        await asyncio.to_thread(remove_entries, folder, time.time() - UPLOAD_SECONDS, kept)


def remove_entries(folder: Path, before: float, kept: frozenset[Path] = frozenset()) -> None:
    """Remove all entries of a folder that were last changed before a time.

    An entry of any kind is removed: also what an upload that broke off has left, links (not their
    targets), pipes and empty folders. An entry that cannot be removed remains; that of others does
    not depend on it.

    Args:
        folder: the folder, which itself remains.
        before: time in seconds since 1970.
        kept: entries that remain.
    """
    with suppress(OSError):  # The folder itself cannot be read.
        # Entries are removed relative to their opened folder, so that none outside is removed if a
        # folder becomes a link.
        for path, folders, files, descriptor in os.fwalk(folder, topdown=False):
            for name in (*files, *folders):
                if Path(path, name) not in kept:
                    with suppress(OSError):
                        remove_entry(name, before, descriptor)


def remove_entry(name: str, before: float, descriptor: int) -> None:
    """Remove an old entry of an opened folder. Raises OSError if it cannot be removed."""
    status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    if status.st_ctime >= before:
        return
    if stat.S_ISDIR(status.st_mode):
        os.rmdir(name, dir_fd=descriptor)
    else:
        os.unlink(name, dir_fd=descriptor)


@contextmanager
def discard_output() -> Iterator[TextIO]:
    """Discard all that this process prints, also by C libraries.

    Returns:
        What stdout was before.
    """
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    descriptors = [stream.fileno() for stream in streams]
    copies = [os.dup(descriptor) for descriptor in descriptors]
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in descriptors:
            os.dup2(nothing, descriptor)
        with open(copies[0], "w", closefd=False, encoding=sys.stdout.encoding) as terminal:
            yield terminal
    finally:
        for stream, descriptor, copy in zip(streams, descriptors, copies, strict=True):
            stream.flush()
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nothing)


class OwnSourcesMiddleware:
    """ASGI middleware that makes browsers load nothing from other hosts.

    It adds a Content-Security-Policy header to every response and leaves the body, which may be a
    stream, as it is.
    """

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", CONTENT_SECURITY_POLICY)
                message = message | {"headers": [*message["headers"], policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)
