"""Clips -> what the language model hears of them, each content once.

Notable:
- What the ear made of a clip is kept by a hash of the clip's content, never by its name, up to a size limit; what was
  asked for least recently goes first.
- A clip's waveform is dropped as soon as it is encoded, and clips are encoded before too much sound has gathered.
"""

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltu.data.audio import AudioClip, AudioError, AudioSource, Waveform, load_audio
from ltu.files import sha256_of

MAX_WAITING_SECONDS = 600  # of sound, at most, between hearing and encoding: 40 MB at 16 kHz
CHUNKS_PER_PASS = 16  # through the ear


def hash_content(audio: AudioSource) -> str | None:
    """sha256 of a file's bytes, or of an array with its shape, type and rate; None if there is nothing to read."""
    if isinstance(audio, str | Path):
        try:
            found = os.stat(audio)
            # A pipe, or a file of the kernel's, which has no size, could be read for ever.
            return sha256_of(audio) if stat.S_ISREG(found.st_mode) and found.st_size else None
        except (OSError, ValueError):
            return None
    if isinstance(audio, bytes):
        return hashlib.sha256(audio).hexdigest()
    if isinstance(audio, Waveform):
        audio = audio.waveform, audio.sampling_rate
    array, rate = audio if isinstance(audio, tuple) and len(audio) == 2 else (audio, None)
    if not isinstance(array, np.ndarray):  # None; of what is no clip, hearing says what it is.
        return None
    described = f"{array.shape} {array.dtype} {rate}".encode()
    return hashlib.sha256(described + np.ascontiguousarray(array).tobytes()).hexdigest()


class EmbeddingCache:
    """The ear of a engine.

    Args:
        model, processor: of one checkpoint folder.
        megabytes: what is kept at most, on the device of the model. 0: nothing, beyond one call of `encode`.
    """

    def __init__(self, model: Any, processor: Any, megabytes: float = 256):
        if not megabytes >= 0:
            raise ValueError(f"{megabytes} MB cannot be kept of clips; give a number from 0.")
        self.model, self.processor = model, processor
        self.limit = int(megabytes * 2**20)
        self.entries: OrderedDict[tuple, AudioClip] = OrderedDict()
        self.size = 0
        self.encoded = 0  # clips that went through the ear, ever
        self.lock = threading.Lock()

    def hash_of(self, request: Any) -> str | None:
        """Hash of a request's clip: of what the feature folder holds, else of its content."""
        try:
            stored = (
                self.processor.stored(request.audio, request.audio_id)
                if request.num_chunks == 1
                else None
            )
        except AudioError:
            return None
        if stored is None:
            return hash_content(request.audio)
        speech = (stored.transcript or "").encode("utf-8", "surrogatepass")
        return hashlib.sha256(stored.features.contiguous().numpy().tobytes() + speech).hexdigest()

    def encode(self, requests: Sequence[Any]) -> list[AudioClip | AudioError | None]:
        """What is heard of each request's clip: encoded, transcribed where that is wanted; or why it cannot be."""
        with self.lock:
            keys = [None if request.audio is None else self._key(request) for request in requests]
            found: dict[tuple, AudioClip | AudioError] = {}
            waiting: list[tuple[tuple, AudioClip, bool, bool]] = []
            for key in dict.fromkeys(key for key in keys if key is not None):
                asking = [
                    request for request, own in zip(requests, keys, strict=True) if own == key
                ]
                needs_sound = any(request.mode != "asr_only" for request in asking)
                needs_words = self.processor.transcribes and any(
                    request.transcript is None and request.mode != "audio_only"
                    for request in asking
                )
                known = self.entries.get(key, AudioClip(None, 0.0))
                needs_sound = needs_sound and known.embeds is None
                needs_words = needs_words and known.transcript is None
                if key in self.entries and not needs_sound and not needs_words:
                    self.entries.move_to_end(key)
                    found[key] = known
                    continue
                try:
                    clip = self._load(asking[0], needs_words)
                except AudioError as error:
                    found[key] = error
                    continue
                clip.embeds, clip.transcript = known.embeds, known.transcript or clip.transcript
                found[key] = clip
                waiting.append((key, clip, needs_sound, needs_words))
                if sum(clip.seconds for _, clip, _, _ in waiting) > MAX_WAITING_SECONDS:
                    found |= self._encode_waiting(waiting)
                    waiting = []
            found |= self._encode_waiting(waiting)
            return [None if key is None else found[key] for key in keys]

    def _key(self, request: Any) -> tuple:
        digest = self.hash_of(request)
        # Without content there is nothing to keep, but two requests of one call may mean the same.
        named = None if digest else (str(request.audio), request.audio_id)
        return digest, named, request.num_chunks, self.processor.audio_settings

    def _load(self, request: Any, needs_words: bool) -> AudioClip:
        clip = self.processor.load_clip(request.audio, request.audio_id, request.num_chunks)
        config = self.model.config
        clip.num_chunks = min(
            clip.num_chunks, max(1, config.num_positions // config.num_audio_tokens)
        )
        if needs_words and clip.transcript is None and clip.waveform is None:
            clip.waveform = load_audio(clip.source)  # The feature folder has no words of it.
        return clip

    @torch.no_grad()
    def _encode_waiting(
        self, waiting: list[tuple[tuple, AudioClip, bool, bool]]
    ) -> dict[tuple, AudioError]:
        """Transcripts and vectors of clips; then they are kept, without their waveforms. Returns what failed."""
        speech = [
            clip for _, clip, _, needs_words in waiting if needs_words and clip.transcript is None
        ]
        if speech:
            self.processor.complete_transcripts(speech, [None] * len(speech))
        passes: list[list[AudioClip]] = []  # As many clips as fill a pass; a long clip goes alone.
        for clip in (clip for _, clip, needs_sound, _ in waiting if needs_sound):
            if (
                not passes
                or sum(own.num_chunks for own in passes[-1]) + clip.num_chunks > CHUNKS_PER_PASS
            ):
                passes.append([])
            passes[-1].append(clip)
        failed: dict[int, AudioError] = {}
        while passes:
            clips = passes.pop()
            try:
                self._embed(clips)
            except AudioError as error:  # One clip's; the others of its pass must not suffer.
                passes += [[clip] for clip in clips] if len(clips) > 1 else []
                failed |= {id(clips[0]): error} if len(clips) == 1 else {}
        for key, clip, _, _ in waiting:
            clip.waveform = clip.features = None
            if id(clip) not in failed:
                self._store(key, clip)
        return {key: failed[id(clip)] for key, clip, _, _ in waiting if id(clip) in failed}

    def _embed(self, clips: list[AudioClip]) -> None:
        features = self.processor.extract_features(clips)  # (chunks, ...)
        # On a new GPU convolutions would be rounded to 10 bits, and differ with what else is in the pass.
        with torch.backends.cudnn.flags(allow_tf32=False):
            embeds = torch.cat(
                [self.model.get_audio_features(part) for part in features.split(CHUNKS_PER_PASS)]
            )
        for clip, own in zip(clips, embeds.split([clip.num_chunks for clip in clips]), strict=True):
            clip.embeds = own.clone()  # A view would hold the whole pass in memory.
        self.encoded += len(clips)

    def _store(self, key: tuple, clip: AudioClip) -> None:
        if key[0] is None or self.limit == 0:
            return
        if not isinstance(clip.source, str | Path):
            clip.source = None  # The sound itself is not to be kept.
        self._drop(key)
        self.entries[key] = clip
        self.size += _size_of(clip)
        while self.size > self.limit:
            self._drop(next(iter(self.entries)))

    def _drop(self, key: tuple) -> None:
        if key in self.entries:
            self.size -= _size_of(self.entries.pop(key))


def _size_of(clip: AudioClip) -> int:
    vectors = 0 if clip.embeds is None else clip.embeds.nbytes
    return vectors + len(clip.transcript or "") + 1000  # of the entry itself, about
