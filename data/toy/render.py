"""Training audio from clips: crops, mixtures and ordered pairs, each with the recipe that made it.

Notable:
- A recipe names every source clip, the samples taken and the gain, so that a test can check a render.
- The mean of a clip is removed before it is cut or joined: some sources carry an offset that would click at every cut.
- Mixtures and pairs repeat their clips up to the length needed, as the ear repeats a short clip; a pair fills the
  window, so that the ear does not repeat it and "first" keeps its meaning.
"""

from functools import lru_cache
from random import Random

import numpy as np

from data.toy.sounds import AUDIO, Sound
from ltu.data.audio import SAMPLING_RATE, load_audio

WINDOW = 163_840  # samples, 10.24 s at 16 kHz: what the ear hears of a clip
PEAK = 0.98  # no render is louder, so none is clipped
CROP_FROM = 24_000  # samples, 1.5 s: shorter clips are kept whole
FADE = 160  # samples, 10 ms
LEVEL = 0.1  # root mean square to which the two clips of a mixture or pair are brought

Recipe = dict


@lru_cache(maxsize=512)
def centred(file: str) -> np.ndarray:
    """A committed clip without its mean, float32 (samples,)."""
    waveform = load_audio(AUDIO / file)
    return waveform - waveform.mean()


def crop(sound: Sound, rng: Random) -> tuple[np.ndarray, Recipe]:
    """A part of a clip (60 to 100 % of one over 1.5 s) at another level; half of them end with up to 0.5 s silence."""
    clip = centred(sound["file"])  # (samples,)
    start, length = 0, len(clip)
    if length > CROP_FROM:
        for _ in range(10):
            size = int(len(clip) * rng.uniform(0.6, 1.0))
            offset = rng.randrange(len(clip) - size + 1)
            # A crop without the sound that its label names would teach a falsehood: it must hold half of the energy.
            if np.square(clip[offset : offset + size]).sum() >= 0.5 * np.square(clip).sum():
                start, length = offset, size
                break
    part = clip[start : start + length]
    gain = min(10 ** (rng.uniform(-12.0, 3.0) / 20), PEAK / float(np.abs(part).max()))
    silence = rng.randrange(SAMPLING_RATE // 2) if rng.random() < 0.5 else 0
    waveform = np.pad(part * np.float32(gain), (0, min(silence, WINDOW - length)))
    return waveform, {"kind": "crop", "parts": [_part(sound, start, length, gain, 0)]}


def mixture(sounds: tuple[Sound, Sound], rng: Random) -> tuple[np.ndarray, Recipe]:
    """Two clips at once, 2 s or as long as the longer one; their levels differ by 4 dB at most."""
    clips = [centred(sound["file"]) for sound in sounds]
    length = min(max(2 * SAMPLING_RATE, *map(len, clips)), WINDOW)
    gains = [LEVEL / _level(clip) * 10 ** (rng.uniform(-2.0, 2.0) / 20) for clip in clips]
    loops = [np.resize(clip, length) for clip in clips]
    scale = _headroom(sum(gain * loop for gain, loop in zip(gains, loops, strict=True)))
    gains = [gain * scale for gain in gains]
    waveform = sum(np.float32(gain) * loop for gain, loop in zip(gains, loops, strict=True))
    parts = [
        _part(sound, 0, len(clip), gain, 0)
        for sound, clip, gain in zip(sounds, clips, gains, strict=True)
    ]
    return waveform, {"kind": "mixture", "parts": parts}


def pair(sounds: tuple[Sound, Sound], rng: Random) -> tuple[np.ndarray, Recipe]:
    """One clip, repeated for about 5 s, then the other: 10.24 s with 0.2 to 0.6 s of silence in the middle."""
    gap = int(rng.uniform(0.2, 0.6) * SAMPLING_RATE)
    half = (WINDOW - gap) // 2
    waveform = np.zeros(WINDOW, dtype=np.float32)
    parts = []
    for sound, start in zip(sounds, (0, WINDOW - half), strict=True):
        loop = np.resize(centred(sound["file"]), half)
        gain = LEVEL / _level(loop)
        gain *= _headroom(gain * loop)
        waveform[start : start + half] = np.float32(gain) * loop * _fades(half)
        parts.append(_part(sound, 0, min(len(centred(sound["file"])), half), gain, start))
    return waveform, {"kind": "pair", "parts": parts}


def _part(sound: Sound, start: int, samples: int, gain: float, at: int) -> dict:
    """`samples` of the clip from `start`, times `gain`, first heard `at` a sample of the render."""
    return {"clip": sound["file"], "start": start, "samples": samples, "gain": gain, "at": at}


def _level(clip: np.ndarray) -> float:
    return float(np.sqrt(np.square(clip).mean()))


def _headroom(waveform: np.ndarray) -> float:
    return min(1.0, PEAK / float(np.abs(waveform).max()))


def _fades(length: int) -> np.ndarray:
    """Up and down over 10 ms at both ends, (length,)."""
    ramp = np.minimum(np.arange(length) + 1, np.arange(length)[::-1] + 1) / FADE
    return np.minimum(ramp, 1.0).astype(np.float32)
