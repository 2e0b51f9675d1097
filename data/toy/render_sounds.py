"""Renders training audio from clips: crops, mixtures and ordered pairs, each with its provenance.

The provenance names every source clip, the samples that were taken and the gain, so that a test can
check the audio.

The mean of a clip is removed before it is cut or joined: some sources have an offset that would
click at every cut.

Mixtures and pairs repeat their clips up to the length needed, as the audio encoder of the toy model
repeats a short clip. A pair fills the whole input of the audio encoder, so that it is not repeated
and "first" means what it says.
"""

from functools import lru_cache
from random import Random

import numpy as np

from data.toy.sound_clips import AUDIO, Sound
from ltu.data.audio import SAMPLING_RATE, load_audio

WINDOW = 163_840  # Samples, 10.24 s at 16 kHz: the input of the audio encoder.
PEAK = 0.98  # Of the loudest audio, so that none is clipped.
CROP_FROM = 24_000  # Samples, 1.5 s: shorter clips are not cropped.
FADE = 160  # Samples, 10 ms.
LEVEL = 0.1  # Root mean square of the two clips of a mixture or pair.
CROP_ATTEMPTS = 10

Provenance = dict  # {"kind": ..., "parts": [...]}; see `_part`.


@lru_cache(maxsize=512)
def centred(file: str) -> np.ndarray:
    """Return a committed clip without its mean, float32 (samples,)."""
    waveform = load_audio(AUDIO / file)
    return waveform - waveform.mean()


def crop(sound: Sound, rng: Random) -> tuple[np.ndarray, Provenance]:
    """Render 60 to 100 % of a clip at another level; clips up to 1.5 s are not cropped.

    Half of the crops end with up to 0.5 s of silence.

    Returns:
        waveform, (samples,), and provenance.
    """
    clip = centred(sound["file"])  # (samples,)
    start = 0
    length = len(clip)
    if length > CROP_FROM:
        energy = np.square(clip).sum()
        for _ in range(CROP_ATTEMPTS):
            size = int(len(clip) * rng.uniform(0.6, 1.0))
            offset = rng.randrange(len(clip) - size + 1)
            # A crop without the sound would have a wrong label: it must contain half of the energy.
            if np.square(clip[offset : offset + size]).sum() >= 0.5 * energy:
                start = offset
                length = size
                break
    part = clip[start : start + length]
    gain = random_gain(part, rng)
    silence = rng.randrange(SAMPLING_RATE // 2) if rng.random() < 0.5 else 0
    waveform = np.pad(part * np.float32(gain), (0, min(silence, WINDOW - length)))
    return waveform, {"kind": "crop", "parts": [_part(sound, start, length, gain, 0)]}


def random_gain(waveform: np.ndarray, rng: Random) -> float:
    """Return a random gain of -12 to 3 dB, or less if the waveform would exceed `PEAK`."""
    return min(10 ** (rng.uniform(-12.0, 3.0) / 20), PEAK / float(np.abs(waveform).max()))


def mixture(sounds: tuple[Sound, Sound], rng: Random) -> tuple[np.ndarray, Provenance]:
    """Render two clips at once, 2 s or as long as the longer one.

    Their levels differ by 4 dB at most.

    Returns:
        waveform, (samples,), and provenance.
    """
    clips = [centred(sound["file"]) for sound in sounds]
    length = min(max(2 * SAMPLING_RATE, *map(len, clips)), WINDOW)
    gains = []
    loops = []
    for clip in clips:
        gains.append(LEVEL / _level(clip) * 10 ** (rng.uniform(-2.0, 2.0) / 20))
        loops.append(np.resize(clip, length))
    scale = _headroom(gains[0] * loops[0] + gains[1] * loops[1])

    waveform = np.zeros(length, dtype=np.float32)
    parts = []
    for sound, clip, loop, gain in zip(sounds, clips, loops, gains, strict=True):
        gain *= scale
        waveform += np.float32(gain) * loop
        parts.append(_part(sound, 0, len(clip), gain, 0))
    return waveform, {"kind": "mixture", "parts": parts}


def pair(sounds: tuple[Sound, Sound], rng: Random) -> tuple[np.ndarray, Provenance]:
    """Render one clip, repeated for about 5 s, then another one: 10.24 s.

    There are 0.2 to 0.6 s of silence in the middle.

    Returns:
        waveform, (samples,), and provenance.
    """
    gap = int(rng.uniform(0.2, 0.6) * SAMPLING_RATE)
    half = (WINDOW - gap) // 2
    waveform = np.zeros(WINDOW, dtype=np.float32)
    parts = []
    for sound, start in zip(sounds, (0, WINDOW - half), strict=True):
        clip = centred(sound["file"])
        loop = np.resize(clip, half)
        gain = LEVEL / _level(loop)
        gain *= _headroom(gain * loop)
        waveform[start : start + half] = np.float32(gain) * loop * _fades(half)
        parts.append(_part(sound, 0, min(len(clip), half), gain, start))
    return waveform, {"kind": "pair", "parts": parts}


def _part(sound: Sound, start: int, samples: int, gain: float, at: int) -> dict:
    """Return the provenance of a part.

    It is `samples` of the clip from `start`, times `gain`, from sample `at` of the audio on.
    """
    return {"clip": sound["file"], "start": start, "samples": samples, "gain": gain, "at": at}


def _level(clip: np.ndarray) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.square(clip).mean()))


def _headroom(waveform: np.ndarray) -> float:
    """Return the largest gain, at most 1, at which a waveform is below `PEAK`."""
    return min(1.0, PEAK / float(np.abs(waveform).max()))


def _fades(length: int) -> np.ndarray:
    """Return gains that fade in and out over 10 ms, (length,)."""
    ramp = np.minimum(np.arange(length) + 1, np.arange(length)[::-1] + 1) / FADE
    return np.minimum(ramp, 1.0).astype(np.float32)
