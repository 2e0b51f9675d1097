"""Converts clips into the input of an audio encoder of transformers, by its own feature extractor.

Each chunk is given to the feature extractor alone, so the features of a clip do not depend on the
batch. A chunk at the end of a clip is shorter, and is padded as the feature extractor does it; no
attention mask is used. A feature extractor of another sampling rate gets the 16 kHz waveform
resampled, which has nothing above 8 kHz.
"""

import json
from typing import Any

import numpy as np
import torch
import torchaudio.functional
import transformers
from transformers import AutoFeatureExtractor, FeatureExtractionMixin

from ltu.data.audio import SAMPLING_RATE
from ltu.models.config_checks import check_numbers, refuse_malformed, show
from ltu.models.configuration_audio_encoder_wrapper import AudioEncoderWrapperConfig
from ltu.models.feature_extraction_ltu import ChunkedFeatureExtractor, LtuFeatureExtractor

MAX_SETTING = 2**24  # Of a number of a feature extractor; 30 s at 48 kHz are 1.4 million samples.
# How a chunk that is shorter than the others gets as many features as they have.
PADDINGS = {
    "fixed": "the feature extractor always returns the same number of features",
    "max_length": "the feature extractor pads to the samples of a chunk",
    "silence": "zeros are added to the waveform",
}


class AudioEncoderWrapperFeatureExtractor(ChunkedFeatureExtractor):
    """Calls a feature extractor of transformers for each chunk of a clip.

    Args:
        feature_extractor: of the audio encoder, or its dict, which names its class.
        input_name: the output of the feature extractor that the encoder takes.
        chunk_seconds: length of a chunk.
        feature_shape: of the features of one chunk.
        padding: a key of `PADDINGS`.
    """

    def __init__(
        self,
        feature_extractor: FeatureExtractionMixin | dict,
        input_name: str,
        chunk_seconds: float,
        feature_shape: list[int],
        padding: str,
        **kwargs: Any,
    ):
        if padding not in PADDINGS:
            raise ValueError(f"padding is {show(padding)}; possible: {', '.join(PADDINGS)}.")
        if isinstance(feature_extractor, dict):
            feature_extractor = make_feature_extractor(feature_extractor)
        for name in ("feature_size", "sampling_rate", "padding_value"):
            kwargs.pop(name, None)  # The base class saves them, and they follow from the rest.
        super().__init__(
            feature_size=getattr(feature_extractor, "feature_size", 1),
            sampling_rate=SAMPLING_RATE,
            padding_value=0.0,
            **kwargs,
        )
        self.feature_extractor = feature_extractor
        self.input_name = input_name
        self._chunk_seconds = chunk_seconds
        self.feature_shape = list(feature_shape)
        self.padding = padding

    @property
    def chunk_seconds(self) -> float:
        return self._chunk_seconds

    @property
    def chunk_step(self) -> int:
        return round(self._chunk_seconds * SAMPLING_RATE)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, with those of the encoder's own feature extractor."""
        content = super().to_dict()
        content["chunk_seconds"] = content.pop("_chunk_seconds")
        content["feature_extractor"] = json.loads(self.feature_extractor.to_json_string())
        return content

    def extract_chunks(self, waveform: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """Return features `(chunks, *feature_shape)` of a waveform `(samples,)`, float32.

        Raises:
            ValueError: the feature extractor makes features of another shape.
        """
        step = self.chunk_step
        features = []
        for start in range(0, num_chunks * step, step):
            chunk = waveform[start : start + step]
            output = run_feature_extractor(self.feature_extractor, chunk, step, self.padding)
            features.append(torch.from_numpy(output[self.input_name]))
        stacked = torch.stack(features)  # (chunks, *feature_shape)
        if list(stacked.shape[1:]) != self.feature_shape:
            raise ValueError(
                f"{type(self.feature_extractor).__name__} makes features of shape "
                f"{[*stacked.shape[1:]]} of a chunk, and the checkpoint needs {self.feature_shape}."
                " Write the checkpoint again with: python -m ltu.convert_checkpoint --init"
            )
        return stacked

    def spectrogram(self, waveform: torch.Tensor) -> torch.Tensor:
        """Return a log-mel spectrogram `(frames, bins)`, which is not the encoder's input."""
        return LtuFeatureExtractor().spectrogram(waveform)


def make_feature_extractor(settings: dict[str, Any]) -> FeatureExtractionMixin:
    """Return the feature extractor of transformers that a dict describes.

    Raises:
        ValueError: there is no such class, or a setting is wrong.
    """
    name = settings.get("feature_extractor_type")
    extractor_class = getattr(transformers, name, None) if isinstance(name, str) else None
    is_known = isinstance(extractor_class, type)
    if not is_known or not issubclass(extractor_class, FeatureExtractionMixin):
        raise ValueError(
            f"The feature extractor of the audio encoder is {show(name)}, which is no class of "
            f"transformers {transformers.__version__}."
        )
    subject = f"The settings of {name}"
    check_numbers(settings, subject)
    for key, value in settings.items():
        if isinstance(value, int) and abs(value) > MAX_SETTING:
            raise ValueError(f"{subject}: {key} is {value}; possible: at most {MAX_SETTING}.")
    with refuse_malformed(subject):
        return extractor_class.from_dict(settings)


def run_feature_extractor(
    extractor: FeatureExtractionMixin, waveform: torch.Tensor, chunk_samples: int, padding: str
) -> dict[str, np.ndarray]:
    """Return all that a feature extractor makes of one chunk.

    Args:
        extractor: of transformers.
        waveform: `(samples,)`, 16 kHz, at most `chunk_samples`.
        chunk_samples: samples of a whole chunk, at 16 kHz.
        padding: a key of `PADDINGS`.

    Returns:
        The outputs by name, without the axis of the batch.
    """
    rate = getattr(extractor, "sampling_rate", SAMPLING_RATE)
    if padding == "silence":
        waveform = torch.nn.functional.pad(waveform, (0, chunk_samples - len(waveform)))
    if rate != SAMPLING_RATE:
        waveform = torchaudio.functional.resample(waveform, SAMPLING_RATE, rate)
    settings = {}
    if padding == "max_length":
        max_length = round(chunk_samples * rate / SAMPLING_RATE)
        settings = {"padding": "max_length", "max_length": max_length, "truncation": True}
    # A list: some feature extractors take a single waveform of a batch for a batch of samples.
    output = extractor([waveform.numpy()], sampling_rate=rate, return_tensors="np", **settings)
    return {name: value[0] for name, value in output.items()}


AutoFeatureExtractor.register(AudioEncoderWrapperConfig, AudioEncoderWrapperFeatureExtractor)
