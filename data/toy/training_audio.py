"""Renders the training audio of a fold: versions of sounds, mixtures, pairs and versions of speech.

Each rendered file has a random stream of its own and an entry in the sources: which clips are in
it, and where.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import soundfile
import torch
import torchaudio.functional
from tqdm import tqdm

from data.toy import render_sounds
from data.toy.sound_clips import AUDIO, Sound
from data.toy.speech_clips import SPEECH, Clip
from ltu.data.audio import SAMPLING_RATE, load_audio

# Fraction of the samples that gives every category the same probability. The others give it to
# every clip.
BALANCE = 0.25
# Speeds of the changed versions of speech. Without them, the model would memorise the voices.
PERCENT = (88, 91, 94, 97, 103, 106, 109, 112)


@dataclass
class AudioPools:
    """The training audio about sounds.

    Attributes:
        crops: clip file -> `audio_id`s, of which the first is the committed clip itself.
        mixtures: (`audio_id`, two sounds) of each mixture.
        pairs: (`audio_id`, two sounds) of each ordered pair.
    """

    crops: dict[str, list[str]] = field(default_factory=dict)
    mixtures: list[tuple[str, tuple[Sound, Sound]]] = field(default_factory=list)
    pairs: list[tuple[str, tuple[Sound, Sound]]] = field(default_factory=list)


@dataclass
class Version:
    """A file with a spoken clip.

    Attributes:
        audio_id: the file.
        factor: how many times as fast as the committed clip it is played.
    """

    audio_id: str
    factor: float = 1.0


@dataclass
class RenderingPlan:
    """One file to render.

    Attributes:
        audio_id: the file, relative to the folder of the examples.
        render: renders the audio; returns the waveform, (samples,), and its provenance.
        source: what `render` takes: a sound, two sounds or a spoken clip.
        stream: name of the random stream.
    """

    audio_id: str
    render: Callable[..., tuple[np.ndarray, dict]]
    source: Sound | Clip | tuple[Sound, Sound]
    stream: str


def sample_sounds(sounds: list[Sound], count: int, rng: Random) -> list[Sound]:
    """Sample `count` sounds in random order, with rare categories above their proportion.

    Within the balanced fraction, the probability of a label grows with the square root of its
    number of clips. The samples are spaced evenly over the probabilities, so that every clip is
    sampled if `count` is large enough.
    """
    clips_of_label = Counter(sound["label"] for sound in sounds)
    labels = {(sound["label"], sound["category"]) for sound in sounds}
    weight_of_category: Counter = Counter()
    # Sorted, because the last bit of a sum of floats depends on the order.
    for label, category in sorted(labels):
        weight_of_category[category] += clips_of_label[label] ** 0.5
    probabilities = []
    for sound in sounds:
        weight = len(weight_of_category) * weight_of_category[sound["category"]]
        weight *= clips_of_label[sound["label"]] ** 0.5
        probabilities.append(BALANCE / weight + (1 - BALANCE) / len(sounds))
    # Sample systematically: one random offset, then equal steps over the sounds in random order.
    order = list(range(len(sounds)))
    rng.shuffle(order)
    sampled: list[Sound] = []
    cumulated = 0.0
    offset = rng.random()
    for index in order:
        cumulated += probabilities[index] * count
        sampled += [sounds[index]] * (int(cumulated + offset) - len(sampled))
    sampled += [sounds[order[-1]]] * (count - len(sampled))  # Missing because of rounding.
    rng.shuffle(sampled)
    return sampled[:count]


def sample_pairs(sounds: list[Sound], count: int, rng: Random) -> list[tuple[Sound, Sound]]:
    """Sample pairs of sounds of different categories."""
    pairs = []
    for first in sample_sounds(sounds, count, rng):
        others = [sound for sound in sounds if sound["category"] != first["category"]]
        second = sample_sounds(others, 1, rng)[0]
        pairs.append((first, second))
    return pairs


def change_speech(clip: Clip, rng: Random) -> tuple[np.ndarray, dict]:
    """Render a version of a spoken clip at another speed and level.

    Returns:
        waveform at 16 kHz, (samples,), and its provenance.
    """
    percent = rng.choice(PERCENT)
    waveform = torch.from_numpy(load_audio(SPEECH / clip["file"]))
    waveform = torchaudio.functional.resample(
        waveform, SAMPLING_RATE // 100 * percent, SAMPLING_RATE
    ).numpy()
    gain = render_sounds.random_gain(waveform, rng)
    part = {"clip": clip["file"], "start": 0, "samples": len(waveform), "gain": gain, "at": 0}
    return waveform * np.float32(gain), {"kind": "speech", "factor": percent / 100, "parts": [part]}


def committed_id(clip: Sound | Clip, clips: Path, folder: Path) -> str:
    """Return the `audio_id` of a committed clip, relative to the folder of the examples.

    Args:
        clip: entry of the manifest.
        clips: folder of the committed clips, `AUDIO` or `SPEECH`.
        folder: folder of the examples.
    """
    return Path(os.path.relpath(clips / clip["file"], folder)).as_posix()


def render_sound_audio(
    sounds: list[Sound], folder: Path, name: str, num_crops: int, num_mixtures: int, num_pairs: int
) -> tuple[AudioPools, dict[str, dict]]:
    """Write the training audio about sounds.

    Args:
        sounds: training clips.
        folder: folder of the examples.
        name: of the random streams.
        num_crops: number of versions of each clip, including the unchanged one.
        num_mixtures: number of clips of two sounds at once.
        num_pairs: number of clips of one sound after another.

    Returns:
        the audio, and `audio_id` -> provenance.
    """
    # Plan the versions of each sound, then the mixtures and pairs, and render everything.
    pools = AudioPools()
    plans = []
    for sound in sounds:
        stem = Path(sound["file"]).stem
        audio_ids = [committed_id(sound, AUDIO, folder)]
        for number in range(1, num_crops):
            audio_id = f"audio/{stem}_{number}.flac"
            plans.append(RenderingPlan(audio_id, render_sounds.crop, sound, f"{name}/{audio_id}"))
            audio_ids.append(audio_id)
        pools.crops[sound["file"]] = audio_ids
    for kind, render, count, pool in (
        ("mixture", render_sounds.mixture, num_mixtures, pools.mixtures),
        ("pair", render_sounds.pair, num_pairs, pools.pairs),
    ):
        for number, two in enumerate(sample_pairs(sounds, count, Random(f"{name}/{kind}"))):
            audio_id = f"audio/{kind}_{number:03d}.flac"
            plans.append(RenderingPlan(audio_id, render, two, f"{name}/{audio_id}"))
            pool.append((audio_id, two))
    return pools, _render(plans, folder, "rendering")


def render_speech_audio(
    clips: list[Clip], folder: Path, name: str, num_versions: int
) -> tuple[dict[str, list[Version]], dict[str, dict]]:
    """Write the changed versions of the training clips among spoken clips.

    Args:
        clips: all spoken clips.
        folder: folder of the examples.
        name: of the random streams.
        num_versions: number of versions of each clip, including the unchanged one.

    Returns:
        file -> versions, of which the first is the committed clip itself; `audio_id` -> provenance.
    """
    plans = []
    versions: dict[str, list[Version]] = {}
    for clip in clips:
        versions[clip["file"]] = [Version(committed_id(clip, SPEECH, folder))]
        if clip["split"] != "train":
            continue
        stem = Path(clip["file"]).stem
        for number in range(1, num_versions):
            audio_id = f"audio/speech_{stem}_{number}.flac"
            stream = f"{name}/{audio_id}"
            plans.append(RenderingPlan(audio_id, change_speech, clip, stream))
    sources = _render(plans, folder, "rendering speech")
    for plan in plans:
        version = Version(plan.audio_id, sources[plan.audio_id]["factor"])
        versions[plan.source["file"]].append(version)
    return versions, sources


def _render(plans: list[RenderingPlan], folder: Path, title: str) -> dict[str, dict]:
    """Render and write files; return `audio_id` -> provenance."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    sources = {}
    for plan in tqdm(plans, desc=title, unit="clip"):
        waveform, provenance = plan.render(plan.source, Random(plan.stream))
        soundfile.write(folder / plan.audio_id, waveform, SAMPLING_RATE, subtype="PCM_16")
        sources[plan.audio_id] = provenance | {"seconds": len(waveform) / SAMPLING_RATE}
    return sources
