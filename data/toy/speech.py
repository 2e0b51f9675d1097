"""The spoken clips of the toy data: what they are, and how their pitch and speed are measured and named.

Notable:
- Pitch and speed are measured on the clip, never taken from the settings of a synthesiser; both rules are pure
  functions of the clip, its words and the training clips, so a test can check every label.
- The cut-offs between low, medium and high, and between slow, normal and fast, are thirds of the training clips.
"""

import json
import re

import numpy as np

from data.closed_qa import name_of, thirds
from data.toy.sounds import HERE

SPEECH = HERE / "speech"
RATE = 8000  # Hz, of the committed clips: the recorded prompts have no more
PEAK = 0.7
PITCHES = ("low", "medium", "high")
SPEEDS = ("slow", "normal", "fast")
F0_RANGE = (60.0, 400.0)  # Hz
FRAME, HOP = 0.05, 0.01  # seconds; a frame holds three periods of the lowest voice
QUIET = 0.02  # of the loudest frame's level (-34 dB): below it, nothing is sounding
DIGITS = dict(
    zip("0123456789", "zero one two three four five six seven eight nine".split(), strict=True)
)

Clip = dict  # One line of speech/manifest.jsonl.


def read_speech() -> list[Clip]:
    """One dict a clip: file, text, voice, speaker, gender, split, speed, pitch, f0_hz, ...; a fresh list each time."""
    with open(SPEECH / "manifest.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def spoken_span(waveform: np.ndarray, rate: int = RATE) -> tuple[int, int]:
    """First and one past the last sample that belongs to a sounding frame of 10 ms."""
    size = rate // 100
    levels = np.sqrt(
        np.square(waveform[: len(waveform) // size * size].reshape(-1, size)).mean(axis=1)
    )  # (frames,)
    sounding = np.flatnonzero(levels > QUIET * levels.max())
    return int(sounding[0]) * size, int(sounding[-1] + 1) * size


def median_f0(waveform: np.ndarray, rate: int = RATE) -> float:
    """Median fundamental frequency in Hz over the voiced frames, by autocorrelation.

    A frame counts if it is louder than a tenth of the loudest and its autocorrelation peaks above one half; of the
    peaks within 15 % of the highest, the shortest lag is taken, so that no period is counted double.
    """
    frames = np.lib.stride_tricks.sliding_window_view(waveform, int(FRAME * rate))[
        :: int(HOP * rate)
    ]
    levels = np.sqrt(np.square(frames).mean(axis=1))
    frames = frames[levels > 0.1 * levels.max()]
    frames = frames - frames.mean(axis=1, keepdims=True)
    size = frames.shape[1]
    power = np.abs(np.fft.rfft(frames, 2 * size)) ** 2
    correlation = np.fft.irfft(power)[:, :size]  # (frames, lags)
    correlation = correlation / correlation[:, :1] * (size / (size - np.arange(size)))
    shortest, longest = int(rate / F0_RANGE[1]), int(rate / F0_RANGE[0])
    pitches = []
    for lags in correlation[:, shortest : longest + 1]:
        inner = lags[1:-1]
        is_peak = (inner > lags[:-2]) & (inner >= lags[2:]) & (inner > 0.85 * lags.max())
        if lags.max() > 0.5 and is_peak.any():
            pitches.append(rate / (shortest + 1 + int(np.argmax(is_peak))))
    if not pitches:
        raise ValueError("No frame is voiced: the clip has no pitch. Leave it out.")
    return float(np.median(pitches))


def syllables(text: str) -> int:
    """Syllables of an English text, counted as groups of vowels without the usual silent e."""
    count = 0
    for word in re.findall(
        r"[a-z]+", re.sub(r"\d", lambda digit: f" {DIGITS[digit[0]]} ", text.lower())
    ):
        groups = len(re.findall(r"[aeiouy]+", word))
        if (
            re.search(r"[^aeiouyl]e$|[^aeiouytd]ed$|[^aeiouysxzcgh]es$|[aeiouy]le$", word)
            and groups > 1
        ):
            groups -= 1
        count += max(1, groups)
    return count


def cut_offs(clips: list[Clip]) -> dict[str, tuple[float, float]]:
    """The two values that divide the training clips into thirds, by key of the manifest, rounded.

    Returns:
        "f0_hz" to 5 Hz, "syllables_per_second" to 0.1.
    """
    cuts = {}
    for key, step in (("f0_hz", 5.0), ("syllables_per_second", 0.1)):
        values = [clip[key] for clip in clips if clip["split"] == "train"]
        low, high = (round(round(cut / step) * step, 1) for cut in thirds(values))
        cuts[key] = (low, high)
    return cuts


def pitch_and_speed(
    clip: Clip, factor: float, cuts: dict[str, tuple[float, float]]
) -> tuple[str, str]:
    """Pitch and speed of a clip played `factor` times as fast: both rise with it."""
    return (
        name_of(clip["f0_hz"] * factor, cuts["f0_hz"], PITCHES),
        name_of(clip["syllables_per_second"] * factor, cuts["syllables_per_second"], SPEEDS),
    )
