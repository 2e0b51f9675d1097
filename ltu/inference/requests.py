"""Defines requests and answers, and groups requests into batches."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ltu.data.audio import MIN_SAMPLES, SAMPLING_RATE, AudioClip, AudioError, AudioSource
from ltu.inference.row_cache import RowCache
from ltu.models.configuration_ltu import LtuConfig

# Settings that may differ between the rows of a batch.
ROW_SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p")
# A shorter rest of a clip, in seconds, is no chunk and counts as used.
UNUSED_SECONDS = MIN_SAMPLES / SAMPLING_RATE
# Statuses of an answer that has a text.
ANSWERED_STATUSES = ("ok", "truncated", "truncated_file")
# Statuses of an answer that another server did not give: it was busy, or failed.
BUSY = "engine_busy"
FAILED = "engine_failed"
MODES = ("joint", "audio_only", "asr_only")
# Takes the number of a request and its text so far; False cancels the request.
OnText = Callable[[int, str], bool | None]
# Takes the number of a request and its answer.
OnAnswer = Callable[[int, "Answer"], None]
# Takes the number of tokens of a turn so far; True ends the turn.
IsTurnOver = Callable[[int], bool]
# Batches whose requests are sorted by length together.
BATCHES_SORTED_TOGETHER = 8


@dataclass
class Request:
    """A question about a clip, or about none.

    Args:
        question: the text of the user.
        audio: path, bytes of a file, 16 kHz mono waveform, or (waveform, rate in Hz).
        transcript: of the clip. Without one LTU-AS transcribes the clip; "" says that it has none.
        audio_id: the clip's name in a feature folder.
        mode: "joint", "audio_only" (without the transcript) or "asr_only" (without the audio).
        decoding: settings that change those of the call.
        seed: of sampling.
        num_chunks: how many chunks of the clip are used, one after the other; 0 for all.
        history: messages before the question, {"role", "content"}, where the prompt template is the
            language model's own.
        paused: what was generated so far, if `LtuEngine.run` paused the request.
    """

    question: str
    audio: AudioSource = None
    transcript: str | None = None
    audio_id: str | None = None
    mode: str = "joint"
    decoding: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    num_chunks: int = 1
    history: list[dict] = field(default_factory=list)
    paused: "Prompt | None" = None

    def check(self) -> None:
        """Check mode and number of chunks.

        Raises:
            ValueError: there is no such mode, or the number is impossible.
        """
        if self.mode not in MODES:
            raise ValueError(
                f"The mode of a request is {self.mode!r}; there are {', '.join(MODES)}."
            )
        if not isinstance(self.num_chunks, int) or self.num_chunks < 0:
            raise ValueError(
                f"num_chunks of a request is {self.num_chunks!r}; "
                "give a number from 1, or 0 for all."
            )


@dataclass
class Answer:
    """The generated text, and what is known about its clip.

    `status` is one of `ANSWERED_STATUSES`: "ok", "truncated" (only `seconds_heard` of the clip were
    used) or "truncated_file" (the file ends before the length that its header promises; what it has
    is used, as far as `seconds_heard`). Else it is the reason why there is no answer: "missing",
    "unreadable", "too_short", "too_long", "silent" or "damaged" for the clip, "engine_busy" or
    "engine_failed" for another server that generates; then `text` is empty and `error` has
    the message. `warnings` are sentences about the clip, with any status: that the file is cut
    short, or that its samples are in the range of integers.

    Seconds are 0 for a question without audio.
    `sampling_rate` and `channels` are those of the clip. `transcript` is that of the prompt.
    `prompt_tokens` include audio tokens. `finish_reason` is "stop", "length" or "cancelled".
    `seconds` is the wall time of the batch.
    """

    text: str
    status: str = "ok"
    error: str | None = None
    warnings: list[str] = field(default_factory=list)
    seconds_heard: float = 0.0
    seconds_total: float = 0.0
    num_chunks: int = 0
    sampling_rate: int | None = None
    channels: int | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    finish_reason: str | None = None
    transcript: str = ""
    model: str = ""
    checkpoint: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def answered(self) -> bool:
        return self.status in ANSWERED_STATUSES

    def note_clip(self, clip: AudioClip | AudioError | None) -> None:
        """Record what is known about the clip, or why it cannot be decoded."""
        if isinstance(clip, AudioError):
            self.status = clip.reason
            self.error = str(clip)
        elif clip is not None:
            self.seconds_total = clip.seconds
            self.sampling_rate = clip.sampling_rate
            self.channels = clip.channels
            self.warnings = list(clip.warnings)
            if clip.is_cut_short:
                self.status = "truncated_file"

    def note_prompt(
        self, text_tokens: int, num_chunks: int, chunk_seconds: float, config: LtuConfig
    ) -> None:
        """Record how much of the clip is used, and whether there are enough positions."""
        self.num_chunks = num_chunks
        self.prompt_tokens = text_tokens + num_chunks * config.num_audio_tokens
        self.seconds_heard = min(self.seconds_total, num_chunks * chunk_seconds)
        if self.prompt_tokens >= config.num_positions:
            self.status = "too_long"
            self.num_chunks = 0
            self.seconds_heard = 0.0
            self.error = (
                f"The prompt has {self.prompt_tokens} tokens, the language model takes "
                f"{config.num_positions}: shorten the question, the clip or the transcript."
            )
        elif self.status == "ok" and num_chunks:
            # "truncated_file" stays: a file that is damaged matters more than a long one.
            if self.seconds_heard < self.seconds_total - UNUSED_SECONDS:
                self.status = "truncated"


@dataclass
class Prompt:
    """A request of a batch on its way through the model.

    Attributes:
        answer: its answer, without a text until it is complete.
        settings: of decoding.
        seed: of sampling.
        tokens: of the text.
        embeds: (chunks, audio tokens, hidden), or None without audio.
        max_new_tokens: as many as it may generate.
        index: its number in the batch.
        new_tokens: those that it generated before it was paused.
        shown: their text, as far as later tokens cannot change it.
        cache: keys and values of all tokens but the last; None if they must be computed again.
    """

    answer: Answer
    settings: dict[str, Any]
    seed: str = ""
    tokens: list[int] = field(default_factory=list)
    embeds: Tensor | None = None
    max_new_tokens: int = 0
    index: int = 0
    new_tokens: list[int] = field(default_factory=list)
    shown: str = ""
    cache: RowCache | None = None

    @property
    def all_tokens(self) -> list[int]:
        """The tokens of the text and those that were generated."""
        return self.tokens + self.new_tokens

    @property
    def num_chunks(self) -> int:
        return 0 if self.embeds is None else len(self.embeds)


def batches(requests: list[Request], settings: list[dict], batch_size: int) -> Iterator[list[int]]:
    """Group requests into batches.

    Requests of a batch have equal settings, except for `ROW_SETTINGS` without beams. Requests about
    the same clip are near each other, and requests of similar length share a batch.

    Yields:
        the numbers of the requests of a batch.
    """
    groups: dict[str, list[int]] = {}
    clip_numbers: dict[Any, int] = {}
    for index, request in enumerate(requests):
        common = dict(settings[index])
        if common.get("num_beams", 1) == 1:
            for name in ROW_SETTINGS:
                common.pop(name, None)
        groups.setdefault(json.dumps(common, sort_keys=True), []).append(index)
        clip_numbers.setdefault(_clip_name(request.audio), len(clip_numbers))
    for group in groups.values():
        group.sort(key=lambda index: clip_numbers[_clip_name(requests[index].audio)])
        size = batch_size * BATCHES_SORTED_TOGETHER
        for start in range(0, len(group), size):
            near = group[start : start + size]
            near.sort(key=lambda index: _length(requests[index]))
            for first in range(0, len(near), batch_size):
                yield near[first : first + batch_size]


def _length(request: Request) -> tuple[bool, int]:
    return request.audio is None, len(request.question) + len(request.transcript or "")


def _clip_name(audio: AudioSource) -> Any:
    if isinstance(audio, str | Path):
        return str(audio)
    if isinstance(audio, bytes):
        return audio
    return id(audio)
