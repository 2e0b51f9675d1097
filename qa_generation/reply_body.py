"""Limits the body of an endpoint's reply, before and after decompression.

An HTTP client reads a body whole, also that of an error or of a redirection. A body without an end,
or a small one that decompresses to gigabytes, would fill the memory.
"""

import math
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

# Requests ask for a body as it is, but some endpoints compress all the same.
REQUEST_HEADERS = {"accept-encoding": "identity"}
GZIP_OR_ZLIB = zlib.MAX_WBITS | 32  # zlib finds out which of the two it is.
COMPRESSIONS = ("gzip", "x-gzip", "deflate")


class UnreadableReply(Exception):
    """The body of a reply is too long, or compressed in a way that is not supported."""


class BodyLimit:
    """Makes an HTTP client stop at bodies of more than `max_bytes`.

    `apply` and `apply_async` are response hooks of httpx, which calls them before it reads a body:

        httpx.Client(event_hooks={"response": [BodyLimit(1000).apply]})

    While a body is read, an `UnreadableReply` is raised as soon as it has more bytes.

    Args:
        max_bytes: limit of a body, compressed and decompressed.
        max_seconds: limit of the time from the headers to the end of the body. The time-out of a
            client is that between two blocks only.
    """

    def __init__(self, max_bytes: int, max_seconds: float = math.inf):
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds

    def apply(self, response: Any) -> None:
        """Limit the body of a response of a synchronous client."""
        decoder = self._take_decoder(response)
        response.stream = type(response)(200, content=_read(response.stream, decoder)).stream

    async def apply_async(self, response: Any) -> None:
        """Limit the body of a response of an asynchronous client."""
        decoder = self._take_decoder(response)
        response.stream = type(response)(200, content=_read_async(response.stream, decoder)).stream

    def _take_decoder(self, response: Any) -> "_BodyDecoder":
        """Return what decompresses the body, so that the client does not do it too."""
        # A charset of Python's such as zlib_codec would decompress without a limit.
        response.encoding = "utf-8"
        compression = response.headers.pop("content-encoding", "")
        return _BodyDecoder(compression, self.max_bytes, self.max_seconds)


class _BodyDecoder:
    """Decompresses a body block by block, and counts its bytes.

    Raises:
        UnreadableReply: its compression is not supported.
    """

    def __init__(self, compression: str, max_bytes: int, max_seconds: float):
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds
        self.start = time.monotonic()
        self.num_received = 0
        self.num_decoded = 0
        self.decompressor: Any = None
        name = compression.strip().lower()
        if name in COMPRESSIONS:
            self.decompressor = zlib.decompressobj(GZIP_OR_ZLIB)
        elif name not in ("", "identity"):
            raise UnreadableReply(f"it is compressed with {name[:40]!r}; only gzip is supported")

    def __call__(self, block: bytes) -> bytes:
        """Decompress the next block.

        Raises:
            UnreadableReply: the body is too long, too slow or damaged.
        """
        if time.monotonic() - self.start > self.max_seconds:
            raise UnreadableReply(f"it is not complete after {self.max_seconds:g} seconds")
        self.num_received += len(block)
        if self.decompressor is not None and self.num_received <= self.max_bytes:
            # One byte more than the limit shows that there is more.
            room = self.max_bytes - self.num_decoded + 1
            try:
                block = self.decompressor.decompress(block, room)
            except zlib.error as error:
                raise UnreadableReply(f"it cannot be decompressed ({error})") from None
        self.num_decoded += len(block)
        if max(self.num_received, self.num_decoded) > self.max_bytes:
            raise UnreadableReply(f"it has more than {self.max_bytes} bytes")
        return block


def _read(stream: Any, decode: _BodyDecoder) -> Iterator[bytes]:
    """Yield the decompressed blocks of a stream, and close it at the end or on an error."""
    try:
        for block in stream:
            yield decode(block)
    finally:
        stream.close()


async def _read_async(stream: Any, decode: _BodyDecoder) -> AsyncIterator[bytes]:
    """Yield the decompressed blocks of a stream, and close it at the end or on an error."""
    try:
        async for block in stream:
            yield decode(block)
    finally:
        await stream.aclose()
