"""Decodes the clips of requests in threads of its own, within a limit of values and of time.

A small file can hold very many values: a flac of 2 MiB a minute of six channels at 655 kHz. Its
decoding ends when its request is over, or when it has more values than any usual recording. Clips
of a client wait for each other, so that those of others are decoded between them.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

from ltu.data.audio import BLOCK, AudioError, decode_audio
from ltu.serving.request_parser import PendingRequest

DECODER_THREADS = 2
# Values per second of the longest clip, over all channels: two at 192 kHz, or eight at 48 kHz. More
# is decoded of a shorter clip.
MAX_VALUES_PER_SECOND = 2 * 192_000


class RequestIsOver(Exception):
    """Nobody waits for the clip any more."""


class ClipDecoder:
    """Decodes clips.

    Args:
        max_seconds: the length of the longest clip.
        clips_per_client: clips of one client that are decoded at the same time.
    """

    def __init__(self, max_seconds: float, clips_per_client: int):
        self.max_seconds = max_seconds
        self.max_values = int(max_seconds * MAX_VALUES_PER_SECOND)
        self.clips_per_client = clips_per_client
        self.threads = ThreadPoolExecutor(DECODER_THREADS, "decoders")
        self.slots = asyncio.Semaphore(DECODER_THREADS)
        # Those of the clients that have a clip here.
        self.client_slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def decode(self, pending: PendingRequest, client: str) -> None:
        """Decode the clip of a request, if it has one: bytes become a `Waveform`.

        Raises:
            AudioError: the clip cannot be decoded, or has too many values.
            RequestIsOver: the request ended before the clip was decoded.
        """
        if pending.request.audio is None:
            return
        loop = asyncio.get_running_loop()
        slots_of_client = self.client_slots.get(client)
        if slots_of_client is None:
            slots_of_client = asyncio.Semaphore(self.clips_per_client)
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
                name = f"<{len(pending.request.audio)} bytes>"
                detail = (
                    f"more than {self.max_values} values over all channels, which is "
                    f"{self.max_seconds:g} s of two channels at 192,000 Hz"
                )
                raise AudioError(name, "too_long", detail)
            num_values += BLOCK

        if pending.is_over:
            raise RequestIsOver
        pending.request.audio = decode_audio(
            pending.request.audio, max_seconds=self.max_seconds, on_block=check
        )
