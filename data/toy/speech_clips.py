"""Reads the spoken clips of the toy dataset, and measures and names their pitch and speed.

Pitch and speed are measured on the clip, and never taken from the settings of a synthesiser. Both
depend on nothing but the clip, its transcript and the training clips, so that a test can check
every label. The cut points between low, medium and high, and between slow, normal and fast, are
thirds of the training clips.
"""

import re

import numpy as np

from data.closed_qa import name_of, thirds
from data.toy.sound_clips import HERE, read_json_lines

SPEECH = HERE / "speech"
RATE = 8000  # Sampling rate of the committed clips in Hz, as of the recorded prompts.
PEAK = 0.7
PITCHES = ("low", "medium", "high")
SPEEDS = ("slow", "normal", "fast")
PERSONS = {"female": "woman", "male": "man"}  # By the gender of a voice.
F0_RANGE = (60.0, 400.0)  # Hz
FRAME = 0.05  # Seconds, three periods of the lowest voice.
HOP = 0.01  # Seconds between the starts of two frames.
QUIET = 0.02  # Of the level of the loudest frame (-34 dB); below it is silence.
DIGITS = dict(
    zip("0123456789", "zero one two three four five six seven eight nine".split(), strict=True)
)
# Ends of words that are written with a vowel but do not have a syllable of their own.
SILENT_END = re.compile(
    r"[^aeiouyl]e$|[^aeiouytd]ed$|[^aeiouysxzcgh]es$|[aeiouy]le$",
)

Clip = dict  # One line of speech/manifest.jsonl.


def read_speech() -> list[Clip]:
    """Return a new dict for each clip: file, text, voice, speaker, gender, split, speed, ..."""
    return read_json_lines(SPEECH / "manifest.jsonl")


def spoken_span(waveform: np.ndarray, rate: int = RATE) -> tuple[int, int]:
    """Return the part of a waveform between the silence at its start and at its end.

    It consists of whole frames of 10 ms.

    Args:
        waveform: (samples,).
        rate: sampling rate in Hz.

    Returns:
        the first sample and one past the last.
    """
    size = rate // 100
    frames = waveform[: len(waveform) // size * size].reshape(-1, size)  # (frames, size)
    levels = np.sqrt(np.square(frames).mean(axis=1))  # (frames,)
    loud = np.flatnonzero(levels > QUIET * levels.max())
    return int(loud[0]) * size, int(loud[-1] + 1) * size


def median_f0(waveform: np.ndarray, rate: int = RATE) -> float:
    """Return the median fundamental frequency in Hz over the voiced frames, by autocorrelation.

    A frame is voiced if it is louder than a tenth of the loudest one and its autocorrelation has a
    peak above one half. Of the peaks within 15 % of the highest, the one with the shortest lag is
    taken, because a multiple of the period correlates too.

    Args:
        waveform: (samples,).
        rate: sampling rate in Hz.

    Raises:
        ValueError: no frame is voiced.
    """
    windows = np.lib.stride_tricks.sliding_window_view(waveform, int(FRAME * rate))
    frames = windows[:: int(HOP * rate)]  # (frames, size)
    levels = np.sqrt(np.square(frames).mean(axis=1))
    frames = frames[levels > 0.1 * levels.max()]
    frames = frames - frames.mean(axis=1, keepdims=True)
    size = frames.shape[1]
    power = np.abs(np.fft.rfft(frames, 2 * size)) ** 2
    correlation = np.fft.irfft(power)[:, :size]  # (frames, lags)
    # Divide by the energy and by the fraction of the frame that overlaps at each lag.
    correlation = correlation / correlation[:, :1] * (size / (size - np.arange(size)))
    shortest = int(rate / F0_RANGE[1])
    longest = int(rate / F0_RANGE[0])
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
    """Return the number of syllables of an English text: groups of vowels without a silent e."""
    spelled = re.sub(r"\d", lambda digit: f" {DIGITS[digit[0]]} ", text.lower())
    count = 0
    for word in re.findall(r"[a-z]+", spelled):
        groups = len(re.findall(r"[aeiouy]+", word))
        if groups > 1 and SILENT_END.search(word):
            groups -= 1
        count += max(1, groups)
    return count


def cut_offs(clips: list[Clip]) -> dict[str, tuple[float, float]]:
    """Return the two values that divide the training clips into thirds, rounded.

    Returns:
        "f0_hz" -> cut points to 5 Hz, "syllables_per_second" -> cut points to 0.1.
    """
    cuts = {}
    for key, step in (("f0_hz", 5.0), ("syllables_per_second", 0.1)):
        low, high = thirds([clip[key] for clip in clips if clip["split"] == "train"])
        cuts[key] = (_rounded(low, step), _rounded(high, step))
    return cuts


def _rounded(value: float, step: float) -> float:
    """Return the multiple of `step` that is nearest."""
    return round(round(value / step) * step, 1)


def pitch_and_speed(
    clip: Clip, factor: float, cuts: dict[str, tuple[float, float]]
) -> tuple[str, str]:
    """Return the names of pitch and speed of a clip.

    Args:
        clip: with its measured values.
        factor: how many times as fast the clip is played; pitch and speed both rise with it.
        cuts: of `cut_offs`.
    """
    pitch = name_of(clip["f0_hz"] * factor, cuts["f0_hz"], PITCHES)
    syllable_rate = clip["syllables_per_second"] * factor
    speed = name_of(syllable_rate, cuts["syllables_per_second"], SPEEDS)
    return pitch, speed
