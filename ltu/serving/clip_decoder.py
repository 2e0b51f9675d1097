"""Decodes the clips of requests in threads of its own, within a limit of values and of time.

A small file can hold very many values: a flac of 2 MiB five minutes of six channels at 655 kHz. Its
decoding ends when its request is over, or when it has more values than usual recordings.

A clip that turns out to be long starts again in a thread that decodes such clips only. Clips of one
client wait for each other, so that those of others are decoded between them.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

from ltu.data.audio import BLOCK, AudioError
from ltu.serving.request_parser import PendingRequest, RequestParser

# Values of a clip that is not long, over all channels: 87 s of two channels at 48 kHz.
MAX_SHORT_VALUES = 2 * BLOCK
# Values per second of the longest clip, over all channels: two at 192 kHz, or eight at 48 kHz. A
# shorter clip may have more.
MAX_VALUES_PER_SECOND = 2 * 192_000
THREADS_FOR_SHORT_CLIPS = 2
THREADS_FOR_LONG_CLIPS = 1


class RequestIsOver(Exception):
    """Nobody waits for the clip any more."""


class TooManyValues(Exception):
    """A clip has more values than the threads of its kind decode."""


class DecoderThreads:
    """Threads that decode clips up to a number of values.

    Args:
        parser: decodes the clip of a request.
        num_threads: clips that are decoded at the same time.
        per_client: those of them that may be of one client.
        max_values: the largest number of values of a clip, over all channels.
    """

    def __init__(self, parser: RequestParser, num_threads: int, per_client: int, max_values: int):
        self.parser = parser
        self.threads = ThreadPoolExecutor(num_threads, "decoders")
        self.slots = asyncio.Semaphore(num_threads)
        self.per_client = per_client
        self.max_values = max_values
        # Those of the clients that have a clip here.
        self.client_slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def decode(self, pending: PendingRequest, client: str) -> None:
        """Decode the clip of a request. Raises TooManyValues, and as `ClipDecoder.decode`."""
        loop = asyncio.get_running_loop()
        slots_of_client = self.client_slots.get(client)
        if slots_of_client is None:
            slots_of_client = asyncio.Semaphore(self.per_client)
            self.client_slots[client] = slots_of_client
        # The client's own come first: clips that wait there do not stand in the line of all.
        async with slots_of_client, self.slots:
            await loop.run_in_executor(self.threads, self._decode, pending)

    def _decode(self, pending: PendingRequest) -> None:
        num_values = 0

        def check() -> None:
            nonlocal num_values
            if pending.is_over:
                raise RequestIsOver
            # The blocks before this one, which are full.
            if num_values > self.max_values:
                raise TooManyValues
            num_values += BLOCK

        if pending.is_over:
            raise RequestIsOver
        self.parser.decode(pending, check)


class ClipDecoder:
    """Decodes clips.

    Args:
        parser: decodes the clip of a request.
        max_seconds: the length of the longest clip.
        is_fair: short clips of a client wait for each other; not if all clients have one address.
    """

    def __init__(self, parser: RequestParser, max_seconds: float, is_fair: bool):
        self.max_seconds = max_seconds
        per_client = 1 if is_fair else THREADS_FOR_SHORT_CLIPS
        self.short = DecoderThreads(parser, THREADS_FOR_SHORT_CLIPS, per_client, MAX_SHORT_VALUES)
        max_values = int(max_seconds * MAX_VALUES_PER_SECOND)
        self.long = DecoderThreads(parser, THREADS_FOR_LONG_CLIPS, 1, max_values)

    async def decode(self, pending: PendingRequest, client: str) -> None:
        """Decode the clip of a request, if it has one.

        Raises:
            AudioError: the clip cannot be decoded, or has too many values.
            RequestIsOver: the request ended before the clip was decoded.
        """
        if pending.encoded_clip is None:
            return
        try:
            await self.short.decode(pending, client)
        except TooManyValues:
            await self._decode_long(pending, client)

    async def _decode_long(self, pending: PendingRequest, client: str) -> None:
        try:
            await self.long.decode(pending, client)
        except TooManyValues as error:
            detail = (
                f"more than {self.long.max_values} values over all channels, as many as "
                f"{self.max_seconds:g} s of two channels at 192,000 Hz"
            )
            name = f"<{len(pending.encoded_clip)} bytes>"
            raise AudioError(name, "too_long", detail) from error
