"""Attacks a server as slow, silent and heavy clients do; nothing here is an answer to compare.

Each client has an address of its own (127.0.0.2 and so on, which Linux has). It attacks in one way
for a few seconds, then in another.
"""

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from urllib.parse import urlsplit

import numpy as np
import soundfile

NUM_CONNECTIONS = 120  # of one client, above the limit of the server
ROUND_SECONDS = 3.0
DRIP_SECONDS = 0.2  # between two bytes of a slow client
NUM_HEAVY = 4  # heavy clips at the same time
REQUEST_LINE = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
JSON_HEADER = b"Content-Type: application/json\r\n"
# A clip of 6 channels at the highest rate of a flac, almost without a signal: a small file.
CHANNELS = 6
RATE = 655_350
HEAVY_SECONDS = 120


def heavy_clip() -> bytes:
    """Return a flac of less than 1 MB with 470 million values."""
    file = io.BytesIO()
    samples = np.zeros((RATE, CHANNELS), np.int16)
    samples[:100, 0] = 1000
    with soundfile.SoundFile(file, "w", RATE, CHANNELS, format="FLAC", subtype="PCM_16") as flac:
        for _ in range(HEAVY_SECONDS):
            flac.write(samples)
    return file.getvalue()


class HostileClient:
    """A client that attacks.

    Args:
        url: of the server.
        number: of the client; it determines its address and the order of its attacks.
        body: of a valid request.
        heavy: a clip of `heavy_clip`.
    """

    def __init__(self, url: str, number: int, body: dict, heavy: bytes):
        address = urlsplit(url)
        self.host = address.hostname
        self.port = address.port
        self.source = (f"127.0.0.{2 + number}", 0)
        self.rng = random.Random(number)
        self.valid_request = self._request(body)
        audio = {"data": base64.b64encode(heavy).decode(), "format": "flac"}
        content = [{"type": "input_audio", "input_audio": audio}]
        messages = [{"role": "user", "content": content}]
        self.heavy_request = self._request(body | {"messages": messages, "stream": False})
        self.way = ""  # of the attack that runs
        self.connections: Counter[str] = Counter()  # that were opened, by the way of the attack

    async def run(self, seconds: float) -> None:
        """Attack for a while."""
        deadline = time.monotonic() + seconds
        ways: dict[str, Callable[[float], Awaitable[None]]] = {
            "silent": lambda end: self._hold(b"", False, end),
            "partial headers": lambda end: self._hold(REQUEST_LINE + b"X-Slow: ", True, end),
            "slow bodies": lambda end: self._hold(self._slow_body(), True, end),
            "heavy clips": self._send_heavy_clips,
            "disconnects": self._disconnect,
        }
        order: list[str] = []
        while time.monotonic() < deadline:
            if not order:
                order = self.rng.sample(list(ways), len(ways))
            self.way = order.pop()
            await ways[self.way](min(deadline, time.monotonic() + ROUND_SECONDS))

    def _request(self, body: dict) -> bytes:
        data = json.dumps(body).encode()
        return REQUEST_LINE + JSON_HEADER + b"Content-Length: %d\r\n\r\n" % len(data) + data

    def _slow_body(self) -> bytes:
        return REQUEST_LINE + JSON_HEADER + b"Content-Length: 1000000\r\n\r\n{"

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.connections[self.way] += 1
        return await asyncio.open_connection(self.host, self.port, local_addr=self.source)

    async def _hold(self, data: bytes, drips: bool, end: float) -> None:
        """Open many connections, send data and perhaps a byte now and then."""
        writers = []
        for _ in range(NUM_CONNECTIONS):
            with suppress(OSError):
                _, writer = await self._open()
                writer.write(data)
                writers.append(writer)
        while time.monotonic() < end:
            await asyncio.sleep(DRIP_SECONDS)
            for writer in writers:
                if drips and not writer.is_closing():
                    writer.write(b"a")
        for writer in writers:
            writer.close()

    async def _send_heavy_clips(self, end: float) -> None:
        """Send a few heavy clips at a time, and wait for the replies."""

        async def send() -> None:
            with suppress(OSError):
                reader, writer = await self._open()
                writer.write(self.heavy_request)
                await reader.read(100)
                writer.close()

        while time.monotonic() < end:
            await asyncio.gather(*(send() for _ in range(NUM_HEAVY)))

    async def _disconnect(self, end: float) -> None:
        """Send valid requests and leave at once, or a moment later."""
        while time.monotonic() < end:
            with suppress(OSError):
                _, writer = await self._open()
                writer.write(self.valid_request)
                await writer.drain()
                await asyncio.sleep(self.rng.choice((0, 0.02, 0.2)))
                writer.close()
