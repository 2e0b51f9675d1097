"""Defines the config of an audio encoder of transformers that is used as it is.

The config holds the whole config of the model that the encoder is a part of (`encoder_config`), and
how its hidden states become audio tokens. `ltu.checkpoints.wrap_audio_encoder` measures these
settings on the model and its feature extractor; nothing here is specific to a family of models.
"""

import copy
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoConfig, PreTrainedConfig

from ltu.models.config_checks import (
    A_SHA256,
    LARGEST,
    LARGEST_LAYER,
    ModelName,
    Sha256,
    check_fields,
    check_sizes,
)
from ltu.models.configuration_ltu import as_config

MAX_CHUNK_SECONDS = 3600.0
MAX_POSITIONS = 2**20
Size = Annotated[int, Field(ge=1, le=MAX_POSITIONS)]


class AudioEncoderWrapperFields(BaseModel):
    """The fields of `AudioEncoderWrapperConfig` besides `encoder_config`."""

    model_config = ConfigDict(strict=True)

    encoder: ModelName | None = Field(
        None, description="the folder or hub id of an audio model, or null"
    )
    encoder_sha256: Sha256 | None = Field(None, description=A_SHA256)
    hidden_layer: int | str = Field(description='"last", "mean" or the number of a layer')
    hidden_size: Annotated[int, Field(ge=1, le=LARGEST["hidden_size"])] = Field(
        description=f"a whole number from 1 to {LARGEST['hidden_size']}"
    )
    num_audio_tokens: Annotated[int, Field(ge=1, le=LARGEST["num_audio_tokens"])] = Field(
        description=f"a whole number from 1 to {LARGEST['num_audio_tokens']}"
    )
    chunk_seconds: Annotated[float, Field(gt=0, le=MAX_CHUNK_SECONDS)] = Field(
        description=f"a number above 0, at most {MAX_CHUNK_SECONDS:g}"
    )
    feature_shape: Annotated[list[Size], Field(min_length=1, max_length=4)] = Field(
        description=f"a list of one to four sizes of at most {MAX_POSITIONS}"
    )
    num_time_steps: Size = Field(description=f"a whole number from 1 to {MAX_POSITIONS}")
    num_special_tokens: Annotated[int, Field(ge=0, le=MAX_POSITIONS)] = Field(
        description="a whole number from 0"
    )
    grid: Annotated[list[Size], Field(min_length=2, max_length=2)] | None = Field(
        None, description="a list of two sizes, or null"
    )
    time_axis: Annotated[int, Field(ge=0, le=1)] = Field(description="0 or 1")
    constant_inputs: dict[str, list] = Field(description="an object of lists")


class AudioEncoderWrapperConfig(PreTrainedConfig):
    """An audio encoder of transformers, whose hidden states are averaged to audio tokens.

    Args:
        encoder_config: whole config of the model that the encoder is a part of, or its dict.
        encoder: hub id or folder of the weights of that model. `config.json` names a folder
            relative to the checkpoint. None if the checkpoint itself holds the encoder.
        encoder_sha256: hash of that model's `config.json` and weight index.
        hidden_layer: the hidden states that are used: "last" for the output of the encoder, "mean"
            for the mean over all layers, or the number of a layer (0 is the input of the first
            layer, -1 the last).
        hidden_size: width of the hidden states.
        num_audio_tokens: audio tokens of a chunk, each the mean of neighbouring time steps.
        chunk_seconds: length of a chunk.
        feature_shape: of the features of one chunk, as the feature extractor makes them.
        num_time_steps: time steps of the encoder that belong to a chunk. An encoder whose feature
            extractor pads clips to more than a chunk has more of them, which are not used.
        num_special_tokens: positions in front of the first time step that are no time steps.
        grid: (rows, columns) of the positions of an encoder that cuts a spectrogram into patches,
            row by row; None if each position is a time step.
        time_axis: the axis of `grid` that is time; the mean over the other one is taken.
        constant_inputs: further inputs of the encoder, for one clip, that do not depend on it.
        feature_divisor: see `CavMaeConfig`; not needed here.
    """

    model_type = "audio_encoder_wrapper"
    sub_configs = {"encoder_config": AutoConfig}

    def __init__(
        self,
        encoder_config: PreTrainedConfig | dict | None = None,
        encoder: str | None = None,
        encoder_sha256: str | None = None,
        hidden_layer: int | str = "last",
        hidden_size: int = 768,
        num_audio_tokens: int = 32,
        chunk_seconds: float = 10.24,
        feature_shape: list[int] | tuple[int, ...] = (1024, 128),
        num_time_steps: int = 101,
        num_special_tokens: int = 2,
        grid: list[int] | None = (12, 101),
        time_axis: int = 1,
        constant_inputs: dict[str, list] | None = None,
        feature_divisor: float = 1.0,
        **kwargs: Any,
    ):
        self.encoder_config = as_config(encoder_config, "audio-spectrogram-transformer")
        self.encoder = encoder
        self.encoder_sha256 = encoder_sha256
        self.hidden_layer = hidden_layer
        self.hidden_size = hidden_size
        self.num_audio_tokens = num_audio_tokens
        self.chunk_seconds = chunk_seconds
        self.feature_shape = _as_list(feature_shape)
        self.num_time_steps = num_time_steps
        self.num_special_tokens = num_special_tokens
        self.grid = _as_list(grid)
        self.time_axis = time_axis
        self.constant_inputs = {} if constant_inputs is None else constant_inputs
        self.feature_divisor = feature_divisor
        subject = f"The config of {self.model_type}"
        fields = {name: getattr(self, name) for name in AudioEncoderWrapperFields.model_fields}
        check_fields(AudioEncoderWrapperFields, fields, subject)
        is_number = type(hidden_layer) is int and abs(hidden_layer) <= LARGEST_LAYER
        if hidden_layer not in ("last", "mean") and not is_number:
            raise ValueError(
                f"{subject}: hidden_layer is {hidden_layer!a:.80}; possible: last, mean, or the "
                "number of a layer."
            )
        steps = num_time_steps if self.grid is None else self.grid[time_axis]
        if not num_audio_tokens <= num_time_steps <= steps:
            raise ValueError(
                f"{subject}: num_audio_tokens is {num_audio_tokens}, of {num_time_steps} time "
                f"steps, where the encoder has {steps}. Give at most as many tokens as time steps."
            )
        check_sizes(self)
        super().__init__(**kwargs)

    @property
    def extractor_settings(self) -> dict[str, Any]:
        """Arguments of the feature extractor that follow from the audio encoder."""
        return {"chunk_seconds": self.chunk_seconds, "feature_shape": self.feature_shape}

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dict, without the folder that the encoder was opened from."""
        content = super().to_dict()
        content["encoder_config"] = copy.deepcopy(content["encoder_config"])
        content["encoder_config"].pop("_name_or_path", None)
        return content


def _as_list(sizes: list[int] | tuple[int, ...] | None) -> list[int] | None:
    return list(sizes) if isinstance(sizes, tuple) else sizes


AutoConfig.register("audio_encoder_wrapper", AudioEncoderWrapperConfig)
