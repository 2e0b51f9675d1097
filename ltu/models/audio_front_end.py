"""Converts audio clips into the input of an audio encoder, and their speech into transcripts.

`AudioFrontEnd` serves each audio encoder that takes a spectrogram. An audio encoder that needs more
(a pretrained model that computes its features, stored features, transcripts) has a subclass, which
is registered for the class of its feature extractor. Training, inference and serving use this
interface only, and never ask which encoder it is.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ltu.data.audio import (
    SAMPLING_RATE,
    AudioClip,
    AudioError,
    AudioSource,
    Downmix,
    decode_audio,
)
from ltu.models.feature_extraction_ltu import ChunkedFeatureExtractor

_REGISTERED: dict[type, type["AudioFrontEnd"]] = {}  # By the class of the feature extractor.


class AudioFrontEnd:
    """Decodes clips and extracts their features; examples without a transcript get "".

    Args:
        feature_extractor: converts waveforms into the input of the audio encoder.

    Attributes:
        transcribes: whether a clip without a transcript is transcribed.
        downmix: how several channels of a clip become one, for `ltu.data.audio.decode_audio`.
        flags: settings that can change after opening: the names of flags, with their help texts.
        dataset_flags: those of `flags` that need the clips of a dataset file.
        place_flags: those of `flags` that say where something is, and do not change the features.
        title: a headline for the flags.
    """

    transcribes = False
    downmix: Downmix = "first"
    flags: dict[str, str] = {}
    dataset_flags: tuple[str, ...] = ()
    place_flags: tuple[str, ...] = ()
    title = ""

    def __init__(self, feature_extractor: ChunkedFeatureExtractor):
        self.feature_extractor = feature_extractor

    @property
    def settings(self) -> tuple:
        """The values of settings that can change after opening and that change the features."""
        return ()

    @property
    def needs_gpu(self) -> bool:
        """Whether features are computed on a GPU, which a forked process cannot use."""
        return False

    @property
    def is_exact(self) -> bool:
        """Whether features are computed in fp32, and so do not depend on the batch."""
        return True

    def configure(self, **settings: str | None) -> None:
        """Change settings; one that is None stays as it is.

        Args:
            settings: values of `flags`.

        Raises:
            ValueError: this audio encoder has no such setting.
        """
        given = [f"--{name}" for name, value in settings.items() if value is not None]
        if given:
            raise ValueError(
                f"The audio encoder of this checkpoint does not use {', '.join(given)}."
            )

    def to(self, device: str | torch.device) -> None:
        """Move what computes the features to a device; filterbanks are computed on the CPU."""

    def load_clip(
        self, audio: AudioSource, audio_id: str | None = None, num_chunks: int = 1
    ) -> AudioClip:
        """Load a clip.

        Args:
            audio: a path, the bytes of a file, or a waveform.
            audio_id: the name of the clip in its example, by which its stored features are found.
            num_chunks: the number of chunks to encode, at most those of the clip; 0 for all.

        Raises:
            ltu.data.audio.AudioError: the clip cannot be decoded.
        """
        decoded = decode_audio(audio, downmix=self.downmix)
        available_chunks = self.feature_extractor.count_chunks(len(decoded.waveform))
        return AudioClip(
            audio,
            len(decoded.waveform) / SAMPLING_RATE,
            decoded.waveform,
            sampling_rate=decoded.sampling_rate,
            channels=decoded.channels,
            is_cut_short=decoded.is_cut_short,
            warnings=decoded.warnings,
            num_chunks=min(num_chunks or available_chunks, available_chunks),
        )

    def find_stored_features(self, audio: AudioSource, audio_id: str | None = None) -> Any | None:
        """Return the stored features of a clip, or None if there are none.

        Raises:
            ltu.data.audio.AudioError: the file of the features is damaged.
        """
        return None

    def find_source(self, example: dict) -> str:
        """Return the path of the file from which `load_features` computes or reads features.

        It need not exist.
        """
        return example["audio"]

    def describe_features(self) -> dict[str, Any]:
        """Return all that decides the features of a given source: JSON values."""
        return self.feature_extractor.to_dict() | {"downmix": self.downmix}

    def extract_features(self, clips: list[AudioClip]) -> Tensor:
        """Return the input of the audio encoder: (chunks of all clips, frames, mel bins).

        Features that a clip holds already are not computed again.
        """
        new_clips = [clip for clip in clips if clip.features is None]
        new_features: Iterator[Tensor] = iter(())
        if new_clips:
            num_chunks = [clip.num_chunks for clip in new_clips]
            output = self.feature_extractor(
                [clip.waveform for clip in new_clips],
                sampling_rate=SAMPLING_RATE,
                num_chunks=num_chunks,
            )
            new_features = iter(output.input_features.split(num_chunks))
        features = []
        for clip in clips:
            if clip.features is None:
                features.append(next(new_features))  # (chunks, frames, mel bins)
            else:
                features.append(clip.features[None])  # (1, frames, mel bins)
        return torch.cat(features)

    def load_features(self, example: dict) -> Tensor:
        """Return the input of the audio encoder for the clip of an example: (frames, mel bins)."""
        clip = self.load_clip(example["audio"], example.get("audio_id"))
        return self.extract_features([clip])[0]

    def complete_transcripts(
        self, clips: list[AudioClip | None], transcripts: list[str | None]
    ) -> list[str]:
        """Replace each transcript that is None: by that of its clip if it is transcribed, or ""."""
        return [transcript or "" for transcript in transcripts]

    def add_transcripts(
        self, examples: list[dict], errors: dict[str, AudioError] | None = None
    ) -> list[dict]:
        """Return examples with `input` where it is absent, as in `complete_transcripts`.

        Args:
            errors: gets the error of each clip that cannot be decoded, by path. Its example gets
                the transcript "".
        """
        return [example | {"input": example.get("input") or ""} for example in examples]


def register_front_end(extractor_class: type, front_end_class: type[AudioFrontEnd]) -> None:
    """Use a front end for all feature extractors of a class."""
    _REGISTERED[extractor_class] = front_end_class


def make_front_end(feature_extractor: Any) -> AudioFrontEnd:
    """Return the front end that is registered for a feature extractor, or `AudioFrontEnd`."""
    front_end_class = _REGISTERED.get(type(feature_extractor), AudioFrontEnd)
    return front_end_class(feature_extractor)


def add_front_end_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all registered front ends to a command."""
    for front_end_class in _REGISTERED.values():
        group = parser.add_argument_group(front_end_class.title)
        for name, text in front_end_class.flags.items():
            group.add_argument(f"--{name}", help=text)


def read_front_end_flags(args: argparse.Namespace) -> dict[str, str | None]:
    """Return the values of the flags that `add_front_end_flags` has added."""
    names = [name for front_end in _REGISTERED.values() for name in front_end.flags]
    return {name: getattr(args, name) for name in names}


def find_dataset_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that are given and that need the clips of a dataset file."""
    names = [name for front_end in _REGISTERED.values() for name in front_end.dataset_flags]
    return [f"--{name}" for name in names if getattr(args, name) is not None]


def list_place_flags() -> list[str]:
    """Return the `place_flags` of all registered front ends, without the dashes."""
    return [name for front_end in _REGISTERED.values() for name in front_end.place_flags]
