"""Restricts the page in the browser: clips are uploads only, and no other host provides scripts.

Gradio accepts a file of a request by its path on the server or by an address. Gradio checks that a
path is inside the folder of uploads, but it downloads an address, so `refuse_addresses` refuses a
request with an address before Gradio handles it. `check_is_upload` checks a path again before the
clip is decoded, with links resolved. The page of Gradio 6.0 names a script of another host;
`OwnSourcesMiddleware` adds a header that makes browsers refuse it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import Depends, HTTPException, Request
from starlette.middleware import Middleware

from ltu.data.audio import AudioError

# The sources from which a browser may load anything. Gradio's page needs the two unsafe ones.
CONTENT_SECURITY_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
# Bodies of these types are no JSON; those of uploads are large and are read as a stream.
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")


def fastapi_settings(is_shared: bool) -> dict[str, Any]:
    """Return the settings of the page's FastAPI app, the `app_kwargs` of `gr.Blocks.launch`.

    Args:
        is_shared: the page is shared at a public address of Gradio's; its scripts are then from
            Gradio's host, and the browser must load them.
    """
    settings: dict[str, Any] = {"dependencies": [Depends(refuse_addresses)]}
    if not is_shared:
        settings["middleware"] = [Middleware(OwnSourcesMiddleware)]
    return settings


async def refuse_addresses(request: Request) -> None:
    """Refuse a request whose JSON body has a file with an address instead of a path.

    Gradio looks for files in the values of all components, so the whole body is searched.

    Raises:
        HTTPException: there is such a file.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method != "POST" or content_type in FORM_TYPES:
        return
    try:
        body = await request.json()  # Starlette caches it for Gradio's routes.
    except (ValueError, RecursionError):
        return  # Gradio's routes cannot parse it either.
    if has_address(body):
        raise HTTPException(403, "Upload the clip: addresses are not fetched here.")


def has_address(body: Any) -> bool:
    """Return whether any dict inside a JSON value has a "path" that is an address."""
    remaining = [body]
    while remaining:
        value = remaining.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and "://" in path:
                return True
            remaining.extend(value.values())
        elif isinstance(value, list):
            remaining.extend(value)
    return False


def check_is_upload(path: str) -> None:
    """Raise AudioError unless a path, with all links resolved, is in the folder of uploads."""
    folder = Path(gr.utils.get_upload_folder()).resolve()
    if not Path(path).resolve().is_relative_to(folder):
        raise AudioError(path, "missing", "is not an upload")


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
