"""Computes the audio embeddings of clips and caches them by content.

The embeddings and the transcript of a clip are cached under a hash of the clip's content, never
under its name. The hash says of what kind the content is (an encoded file, an array, a decoded
waveform, stored features), because equal bytes of two kinds are two clips. It covers everything
that an answer states about the clip, and it is that of the content that was decoded: a file that is
replaced in between is refused.

If the cache is full, the entry that was not used for the longest time goes first. A waveform is
dropped as soon as it is encoded, and clips are encoded before too many wait.
"""

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from ltu.data.audio import (
    SAMPLING_RATE,
    AudioClip,
    AudioError,
    AudioSource,
    Waveform,
    load_audio,
)
from ltu.data.table_clip import TableClip, sha256_of_clip
from ltu.files import sha256_of
from ltu.inference.requests import Request
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.models.processing_ltu import LtuProcessor

# Seconds of audio that are decoded and not yet encoded, at most: 40 MB at 16 kHz.
MAX_WAITING_SECONDS = 600
# Chunks in one forward pass of the audio encoder.
CHUNKS_PER_PASS = 16
# Bytes of a cache entry besides embeddings and transcript, about.
ENTRY_BYTES = 1000
# How the hash of a file, or of its bytes, begins.
ENCODED = "encoded:"


def hash_content(audio: AudioSource) -> str | None:
    """Return the kind of a clip's content, and a sha256 of all that decides how it is decoded.

    A file, a clip in a table and their bytes are of one kind, because they are decoded alike: rate
    and channels are stated in them. For an array they are part of the hash.

    Returns None if there is nothing to read.
    """
    if isinstance(audio, str | Path):
        try:
            if TableClip.parse(audio) is not None:
                return ENCODED + sha256_of_clip(audio)
            status = os.stat(audio)
            # A pipe, or a file of the kernel's, which has no size, could be read for ever.
            is_readable = stat.S_ISREG(status.st_mode) and status.st_size
            return ENCODED + sha256_of(audio) if is_readable else None
        except (OSError, ValueError):
            return None
    if isinstance(audio, bytes):
        return ENCODED + hashlib.sha256(audio).hexdigest()
    if isinstance(audio, Waveform):
        facts = {}
        for field in fields(audio):
            if field.name != "waveform":
                facts[field.name] = getattr(audio, field.name)
        return f"waveform:{_hash_array(audio.waveform, facts)}"
    array = audio
    rate: object = SAMPLING_RATE
    if isinstance(audio, tuple) and len(audio) == 2:
        array, rate = audio
    if not isinstance(array, np.ndarray):  # None, or a type that decoding refuses.
        return None
    return f"array:{_hash_array(array, rate)}"


def _hash_array(array: np.ndarray, *facts: object) -> str:
    """Return the sha256 of an array's shape, type and values, and of facts about it."""
    # The zero byte ends the description, so that no byte of an array can be read as part of it.
    description = repr((array.shape, array.dtype.str, *facts)).encode("utf-8", "surrogatepass")
    content = np.ascontiguousarray(array).tobytes()
    return hashlib.sha256(description + b"\0" + content).hexdigest()


@dataclass
class PendingClip:
    """A clip that is loaded, and what is still missing for its requests."""

    key: tuple
    clip: AudioClip
    needs_embeds: bool
    needs_transcript: bool


class EmbeddingCache:
    """Encodes the clips of requests, each content once.

    Args:
        model, processor: of one checkpoint folder.
        megabytes: size of the cache, at most, on the device of the model. 0: nothing is cached
            beyond one call of `encode`.
    """

    def __init__(
        self, model: LtuForConditionalGeneration, processor: LtuProcessor, megabytes: float = 256
    ):
        if not megabytes >= 0:
            raise ValueError(f"A cache of {megabytes} MB is not possible; give a number from 0.")
        self.model = model
        self.processor = processor
        self.limit = int(megabytes * 2**20)
        self.entries: OrderedDict[tuple, AudioClip] = OrderedDict()
        self.size = 0
        self.encoded = 0  # Clips that the audio encoder has encoded, ever.
        self.lock = threading.Lock()

    def hash_of(self, request: Request) -> str | None:
        """Return a hash of a clip: of its stored features if there are any, else of its content.

        It begins with the kind of what is hashed, as that of `hash_content`.
        """
        stored = None
        if request.num_chunks == 1:
            try:
                stored = self.processor.front_end.find_stored_features(
                    request.audio, request.audio_id
                )
            except AudioError:
                return None
        if stored is None:
            return hash_content(request.audio)
        features, *facts = stored
        return f"features:{_hash_array(features.numpy(), *facts)}"

    def encode(self, requests: Sequence[Request]) -> list[AudioClip | AudioError | None]:
        """Return the clip of each request, with the embeddings and transcript that it needs.

        A clip that cannot be decoded is an AudioError in its place, a request without audio is
        None.
        """
        # Hashing needs no shared state, so it does not make other threads wait.
        keys = [None if request.audio is None else self._key(request) for request in requests]
        requests_by_key: dict[tuple, list[Request]] = {}
        for key, request in zip(keys, requests, strict=True):
            if key is not None:
                requests_by_key.setdefault(key, []).append(request)
        with self.lock:
            results: dict[tuple, AudioClip | AudioError] = {}
            pending: list[PendingClip] = []
            for key, same_clip in requests_by_key.items():
                try:
                    found = self._find_or_load(key, same_clip)
                except AudioError as error:
                    results[key] = error
                    continue
                results[key] = found.clip
                if not found.needs_embeds and not found.needs_transcript and key in self.entries:
                    continue
                pending.append(found)
                if sum(waiting.clip.seconds for waiting in pending) > MAX_WAITING_SECONDS:
                    results |= self._encode_pending(pending)
                    pending = []
            results |= self._encode_pending(pending)
        return [None if key is None else results[key] for key in keys]

    def _key(self, request: Request) -> tuple:
        digest = self.hash_of(request)
        # Without content nothing can be cached, but two requests of one call may mean the same.
        name = None if digest else (type(request.audio), str(request.audio), request.audio_id)
        return digest, name, request.num_chunks, self.processor.front_end.settings

    def _find_or_load(self, key: tuple, requests: list[Request]) -> PendingClip:
        """Take a clip from the cache, or load it if the requests need more than the cache has."""
        needs_embeds = any(request.mode != "asr_only" for request in requests)
        needs_transcript = self.processor.front_end.transcribes and any(
            request.transcript is None and request.mode != "audio_only" for request in requests
        )
        known = self.entries.get(key, AudioClip(None, 0.0))
        needs_embeds = needs_embeds and known.embeds is None
        needs_transcript = needs_transcript and known.transcript is None
        if key in self.entries and not needs_embeds and not needs_transcript:
            self.entries.move_to_end(key)
            return PendingClip(key, known, False, False)
        clip = self._load(requests[0], needs_transcript)
        _check_unchanged(requests[0].audio, key[0])
        clip.embeds = known.embeds
        if known.transcript is not None:  # "" is a transcript too.
            clip.transcript = known.transcript
        return PendingClip(key, clip, needs_embeds, needs_transcript)

    def _load(self, request: Request, needs_transcript: bool) -> AudioClip:
        clip = self.processor.front_end.load_clip(
            request.audio, request.audio_id, request.num_chunks
        )
        config = self.model.config
        max_chunks = max(1, config.num_positions // config.num_audio_tokens)
        clip.num_chunks = min(clip.num_chunks, max_chunks)
        if needs_transcript and clip.transcript is None and clip.waveform is None:
            # The feature folder has no transcript of it.
            clip.waveform = load_audio(clip.source, self.processor.front_end.downmix)
        return clip

    @torch.no_grad()
    def _encode_pending(self, pending: list[PendingClip]) -> dict[tuple, AudioError]:
        """Transcribe, encode and cache clips, and drop their waveforms. Return what failed."""
        without_transcript = [
            waiting.clip
            for waiting in pending
            if waiting.needs_transcript and waiting.clip.transcript is None
        ]
        if without_transcript:
            self.processor.front_end.complete_transcripts(
                without_transcript, [None] * len(without_transcript)
            )
        batches = _make_batches([waiting.clip for waiting in pending if waiting.needs_embeds])
        failed: dict[int, AudioError] = {}
        while batches:
            clips = batches.pop()
            try:
                self._embed(clips)
            except AudioError as error:
                if len(clips) == 1:
                    failed[id(clips[0])] = error
                else:  # The error is that of one clip, so each is tried alone.
                    batches += [[clip] for clip in clips]
        errors = {}
        for waiting in pending:
            clip = waiting.clip
            clip.waveform = None
            clip.features = None
            if id(clip) in failed:
                errors[waiting.key] = failed[id(clip)]
            else:
                self._store(waiting.key, clip)
        return errors

    def _embed(self, clips: list[AudioClip]) -> None:
        features = self.processor.front_end.extract_features(clips)  # (chunks, ...)
        # Without cuDNN, which would round convolutions to the 10 bits of TF32, and may choose its
        # algorithm by the size of the batch. Embeddings then do not depend on the batch.
        with torch.backends.cudnn.flags(enabled=False):
            parts = [
                self.model.get_audio_features(part) for part in features.split(CHUNKS_PER_PASS)
            ]
        embeds = torch.cat(parts)  # (chunks, audio tokens, hidden)
        embeds_of_clips = embeds.split([clip.num_chunks for clip in clips])
        for clip, own_embeds in zip(clips, embeds_of_clips, strict=True):
            clip.embeds = own_embeds.clone()  # A view would hold the whole batch in memory.
        self.encoded += len(clips)

    def _store(self, key: tuple, clip: AudioClip) -> None:
        digest = key[0]
        if digest is None or self.limit == 0:
            return
        if not isinstance(clip.source, str | Path):
            clip.source = None  # The audio itself is not cached.
        self._drop(key)
        self.entries[key] = clip
        self.size += _size_of(clip)
        while self.size > self.limit:
            self._drop(next(iter(self.entries)))

    def _drop(self, key: tuple) -> None:
        if key in self.entries:
            self.size -= _size_of(self.entries.pop(key))


def _check_unchanged(audio: AudioSource, digest: str | None) -> None:
    """Check that a file that was just decoded is the one that was hashed before.

    Otherwise its embeddings would be cached, and answer requests, under the hash of another clip.

    Raises:
        AudioError: it is another one.
    """
    is_hashed_file = isinstance(audio, str | Path) and (digest or "").startswith(ENCODED)
    if is_hashed_file and hash_content(audio) != digest:
        raise AudioError(str(audio), "unreadable", "the file changed while it was read")


def _make_batches(clips: list[AudioClip]) -> list[list[AudioClip]]:
    """Group clips, in their order, into batches of at most `CHUNKS_PER_PASS` chunks.

    A clip with more chunks is a batch of its own.
    """
    batches: list[list[AudioClip]] = []
    num_chunks = 0  # Of the last batch.
    for clip in clips:
        if not batches or num_chunks + clip.num_chunks > CHUNKS_PER_PASS:
            batches.append([])
            num_chunks = 0
        batches[-1].append(clip)
        num_chunks += clip.num_chunks
    return batches


def _size_of(clip: AudioClip) -> int:
    """Return the bytes of a cache entry, about."""
    embeds = 0 if clip.embeds is None else clip.embeds.nbytes
    return embeds + len(clip.transcript or "") + ENTRY_BYTES
