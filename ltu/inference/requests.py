"""What is asked, what is answered, and which requests are answered together."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltu.data.audio import MIN_SAMPLES, SAMPLING_RATE, AudioClip, AudioError, AudioSource
from ltu.models.configuration_ltu import LtuConfig

ROW_SETTINGS = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
)  # that rows of a batch may differ in
UNUSED_SECONDS = (
    MIN_SAMPLES / SAMPLING_RATE
)  # seconds: what is left under them is no chunk, and counts as heard
MODES = ("joint", "audio_only", "asr_only")
OnText = Callable[
    [int, str], bool | None
]  # number of a request, its text so far -> False cancels it
GATHERED_BATCHES = 8  # that are sorted by length together


@dataclass
class Request:
    """A question about a clip (path, bytes of a file, 16 kHz mono waveform, or waveform and rate), or about none.

    Without a `transcript` LTU-AS transcribes the clip; "" says that it has none. `audio_id` is the clip's name in a
    feature folder. `mode` is "joint", "audio_only" (the transcript is left out) or "asr_only" (the sound is).
    `decoding` changes that of the call, `seed` is of sampling. `num_chunks` are heard, one after the other, 0 for all.
    `history` are messages before the question, {"role", "content"}, where the prompt template is the model's own.
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

    def check(self) -> None:
        """Raises ValueError for a mode that there is not, or an impossible number of chunks."""
        if self.mode not in MODES:
            raise ValueError(
                f"The mode of a request is {self.mode!r}; there are {', '.join(MODES)}."
            )
        if not isinstance(self.num_chunks, int) or self.num_chunks < 0:
            raise ValueError(
                f"num_chunks of a request is {self.num_chunks!r}; give a number from 1, or 0 for all."
            )


@dataclass
class Answer:
    """What the model says, and what it heard.

    `status` is "ok", "truncated" (answered, but only `seconds_heard` of the clip were heard), or why there is no
    answer: "missing", "unreadable", "too_short", "too_long", "silent", "damaged"; then `text` is empty and `error`
    says more. Seconds are 0 for a question without audio. `sampling_rate` and `channels` are those of the clip.
    `transcript` is what was in the prompt, whose tokens include those of the audio. `finish_reason` is "stop",
    "length" or "cancelled". `seconds` is the wall time of the batch.
    """

    text: str
    status: str = "ok"
    error: str | None = None
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
        return self.status in ("ok", "truncated")

    def note_clip(self, clip: AudioClip | AudioError | None) -> None:
        """What was found, or why nothing can be heard."""
        if isinstance(clip, AudioError):
            self.status, self.error = clip.reason, str(clip)
        elif clip is not None:
            self.seconds_total, self.sampling_rate, self.channels = (
                clip.seconds,
                clip.sampling_rate,
                clip.channels,
            )

    def note_prompt(
        self, text_tokens: int, num_chunks: int, chunk_seconds: float, config: LtuConfig
    ) -> None:
        """How much of the clip is heard in front of the text, and whether the language model has positions for both."""
        self.num_chunks, self.prompt_tokens = (
            num_chunks,
            text_tokens + num_chunks * config.num_audio_tokens,
        )
        self.seconds_heard = min(self.seconds_total, num_chunks * chunk_seconds)
        if self.prompt_tokens >= config.num_positions:
            self.status, self.num_chunks, self.seconds_heard = "too_long", 0, 0.0
            self.error = (
                f"The prompt has {self.prompt_tokens} tokens, the language model takes {config.num_positions}: ask "
                "less, or give a shorter clip or transcript."
            )
        elif num_chunks and self.seconds_heard < self.seconds_total - UNUSED_SECONDS:
            self.status = "truncated"


def batches(requests: list[Request], settings: list[dict], batch_size: int) -> Iterator[list[int]]:
    """Numbers of requests: with equal settings, those about a clip near each other, and of like length."""
    groups: dict[str, list[int]] = {}
    clips: dict[Any, int] = {}
    for index, request in enumerate(requests):
        own = ROW_SETTINGS if settings[index].get("num_beams", 1) == 1 else ()
        common = {name: value for name, value in settings[index].items() if name not in own}
        groups.setdefault(json.dumps(common, sort_keys=True), []).append(index)
        clips.setdefault(_name(request.audio), len(clips))
    for group in groups.values():
        group.sort(key=lambda index: clips[_name(requests[index].audio)])
        for start in range(0, len(group), batch_size * GATHERED_BATCHES):
            near = group[start : start + batch_size * GATHERED_BATCHES]
            near.sort(key=lambda index: _length(requests[index]))
            for first in range(0, len(near), batch_size):
                yield near[first : first + batch_size]


def _length(request: Request) -> tuple[bool, int]:
    return request.audio is None, len(request.question) + len(request.transcript or "")


def _name(audio: AudioSource) -> Any:
    return (
        str(audio)
        if isinstance(audio, str | Path)
        else audio
        if isinstance(audio, bytes)
        else id(audio)
    )
