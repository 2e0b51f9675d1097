"""Encodes clips with an audio encoder of transformers, and averages its hidden states to tokens.

Any model that maps `input_features` or `input_values` to a sequence of hidden states can be
wrapped: `find_encoder` finds the encoder in it. Its positions may be time steps (Whisper,
wav2vec2), or patches of a spectrogram (AST), or a map of frequency and time (CLAP). The mean over
frequency is taken, then over neighbouring time steps, so that a chunk has `num_audio_tokens`.
"""

import copy
import inspect
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from ltu.models.config_checks import refuse_malformed
from ltu.models.configuration_audio_encoder_wrapper import AudioEncoderWrapperConfig
from ltu.models.lora import find_parameters

INPUT_NAMES = ("input_features", "input_values")
# Names of sub-configs that belong to an audio encoder, in the configs of larger models.
AUDIO_CONFIGS = ("audio_config", "audio_encoder_config", "encoder_config")


class AudioEncoderWrapperModel(PreTrainedModel):
    """An audio encoder of transformers as the audio encoder of LTU.

    Args:
        config: how the hidden states become audio tokens. The encoder is built from its
            `encoder_config`, with random weights.

    Attributes:
        fixed_parameter_names: parameters that the encoder itself does not train, such as Whisper's
            sine-shaped position embeddings.
    """

    config_class = AudioEncoderWrapperConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    # An attention implementation chosen for LTU is meant for its language model.
    _supports_sdpa = True
    _supports_flash_attn = True
    encoder: PreTrainedModel

    def __init__(self, config: AudioEncoderWrapperConfig):
        super().__init__(config)
        encoder_class, encoder_config = find_encoder_class(config.encoder_config)
        self.encoder = encoder_class(encoder_config)
        self.fixed_parameter_names = frozenset(
            name for name, parameter in self.named_parameters() if not parameter.requires_grad
        )
        self.post_init()

    def init_weights(self) -> None:
        """Do nothing: the encoder initialises itself, and a loaded one is kept."""

    def is_own(self, key: str) -> bool:
        """Return whether a checkpoint holds this key of the state dict, or names its model."""
        return self.config.encoder is None or ".lora_" in key or not key.startswith("encoder.")

    def own_weights(self) -> None:
        """Let checkpoints hold the encoder, instead of naming another copy of it."""
        self.config.encoder = None
        self.config.encoder_sha256 = None

    def load_encoder(self, **hub_kwargs: Any) -> None:
        """Load the weights of the model that the config names.

        Raises:
            ValueError: they do not fit the config.
        """
        config = self.config
        weights = load_encoder_weights(config.encoder, config.encoder_config, **hub_kwargs)
        names = {name.replace(".base_layer.", "."): name for name in self.encoder.state_dict()}
        state = {names.get(name, name): value for name, value in weights.items()}
        with refuse_malformed(f"The audio encoder {self.config.encoder}"):
            self.encoder.load_state_dict(state, strict=False)

    def train(self, mode: bool = True) -> "AudioEncoderWrapperModel":
        """Switch dropout on or off.

        A frozen encoder has none, so that its output can be cached. Batch normalisation always uses
        its stored statistics, so that an example does not depend on the others of its batch.
        """
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.encoder.parameters()):
            self.encoder.eval()
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    @cached_property
    def unused_parameter_names(self) -> list[str]:
        """Parameters without gradient, named as in `state_dict`, such as those of unused layers."""
        was_training = self.training
        was_trained = {parameter: parameter.requires_grad for parameter in self.parameters()}
        self.eval()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self.fixed_parameter_names)
        with torch.enable_grad():
            output = self(torch.zeros(1, *self.config.feature_shape, device=self.device))
        used = find_parameters(output)
        for parameter, is_trained in was_trained.items():
            parameter.requires_grad_(is_trained)
        self.train(was_training)
        return [name for name, parameter in self.named_parameters() if parameter not in used]

    def forward(self, input_features: Tensor, **kwargs: Any) -> Tensor:
        """Return the audio tokens.

        Args:
            input_features: `(batch, *feature_shape)`

        Returns:
            `(batch, num_audio_tokens, hidden_size)`

        Raises:
            ValueError: the features have another shape.
        """
        config = self.config
        if list(input_features.shape[1:]) != config.feature_shape:
            shape = ", ".join(map(str, config.feature_shape))
            raise ValueError(
                f"{type(self.encoder).__name__} takes features of shape (batch, {shape}), got "
                f"{tuple(input_features.shape)}. Make them with the feature extractor that was "
                "saved with this model."
            )
        hidden = compute_hidden_states(
            self.encoder, input_features, config.hidden_layer, config.constant_inputs
        )
        steps = self._time_steps(hidden)[:, : config.num_time_steps]  # (batch, steps, hidden)
        pooling = pooling_matrix(config.num_time_steps, config.num_audio_tokens).to(steps)
        return pooling @ steps  # (batch, num_audio_tokens, hidden_size)

    def _time_steps(self, hidden: Tensor) -> Tensor:
        """Return the time steps `(batch, steps, hidden_size)` among hidden states.

        Raises:
            ValueError: they have another shape than the config says.
        """
        config = self.config
        steps = None
        if hidden.ndim == 4:  # (batch, hidden, frequencies, steps)
            steps = hidden.mean(2).transpose(1, 2)
        elif config.grid is None:  # (batch, positions, hidden)
            steps = hidden[:, config.num_special_tokens :]
        elif hidden.shape[1] == config.num_special_tokens + prod(config.grid):
            patches = hidden[:, config.num_special_tokens :].unflatten(1, config.grid)
            steps = patches.mean(2 - config.time_axis)
        fewest = config.num_time_steps
        if steps is None or steps.shape[1] < fewest or steps.shape[2] != config.hidden_size:
            raise ValueError(
                f"{type(self.encoder).__name__} returns hidden states of shape "
                f"{tuple(hidden.shape)}, which do not fit the config of the checkpoint. Write it "
                "again with: python -m ltu.convert_checkpoint --init"
            )
        return steps


def compute_hidden_states(
    encoder: PreTrainedModel,
    features: Tensor,
    hidden_layer: int | str,
    constant_inputs: dict[str, list],
) -> Tensor:
    """Return the hidden states that `hidden_layer` names.

    Args:
        encoder: of transformers.
        features: `(batch, *feature_shape)`, its main input.
        hidden_layer, constant_inputs: as in `AudioEncoderWrapperConfig`.

    Returns:
        `(batch, positions, hidden)`, or `(batch, hidden, frequencies, steps)`.
    """
    inputs = {find_input_name(encoder): features} | repeat_constants(constant_inputs, features)
    needs_all = hidden_layer != "last"
    output = encoder(**inputs, output_hidden_states=needs_all, return_dict=True)
    if not needs_all:
        return output.last_hidden_state
    if hidden_layer == "mean":
        return torch.stack(output.hidden_states).mean(0)
    return output.hidden_states[hidden_layer]


def repeat_constants(constant_inputs: dict[str, list], features: Tensor) -> dict[str, Tensor]:
    """Return inputs that are the same for all clips, with an axis of the batch of `features`."""
    inputs = {}
    for name, value in constant_inputs.items():
        constant = torch.tensor(value, device=features.device)
        inputs[name] = constant.expand(len(features), *constant.shape)
    return inputs


def pooling_matrix(num_steps: int, num_tokens: int) -> Tensor:
    """Return the weights `(num_tokens, num_steps)` by which time steps are averaged to tokens.

    The bins are those of `torch.nn.AdaptiveAvgPool1d`, whose gradient on a GPU is not repeatable.
    """
    steps = torch.arange(num_steps)
    tokens = torch.arange(num_tokens)[:, None]
    starts = tokens * num_steps // num_tokens
    ends = -(-(tokens + 1) * num_steps // num_tokens)
    is_inside = (steps >= starts) & (steps < ends)  # (num_tokens, num_steps)
    return is_inside / is_inside.sum(1, keepdim=True)


def find_input_name(encoder: PreTrainedModel) -> str:
    """Return the name of the input of an audio encoder.

    Raises:
        ValueError: it takes no audio.
    """
    parameters = inspect.signature(encoder.forward).parameters
    for name in (encoder.main_input_name, *INPUT_NAMES):
        if name in INPUT_NAMES and name in parameters:
            return name
    raise ValueError(
        f"{type(encoder).__name__} takes {encoder.main_input_name}; an audio encoder takes "
        f"{' or '.join(INPUT_NAMES)}."
    )


def find_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the audio encoder in a model of transformers, which may be the model itself.

    It is the part that an audio config of the model describes (CLAP, Qwen2-Audio), or the encoder
    of an encoder and decoder (Whisper), or the whole model (AST, wav2vec2).
    """
    for name in AUDIO_CONFIGS:
        audio_config = getattr(model.config, name, None)
        if not isinstance(audio_config, PreTrainedConfig):
            continue
        for module in model.modules():
            is_part = module is not model and isinstance(module, PreTrainedModel)
            if is_part and type(module.config) is type(audio_config):
                return module
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    return model


def find_encoder_class(
    config: PreTrainedConfig,
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the class of the audio encoder of a model, and its config.

    Args:
        config: of the whole model, which is built on the meta device only.

    Raises:
        ValueError: transformers has no model of this config, or it cannot be built.
    """
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"transformers has no base model of type {config.model_type!r}.")
    with torch.device("meta"), refuse_malformed(f"The config of {config.model_type}"):
        encoder = find_encoder(AutoModel.from_config(config))
    return type(encoder), encoder.config


def load_encoder_weights(
    name: str | Path, config: PreTrainedConfig, **hub_kwargs: Any
) -> dict[str, Tensor]:
    """Return the weights of the audio encoder of a model, fp32, by their names in the encoder.

    Args:
        name: folder or hub id of the whole model.
        config: of the whole model, by which a checkpoint builds the encoder.
        hub_kwargs: arguments of `AutoModel.from_pretrained`, such as `token`.

    Weights that the files lack, which transformers would make up, are left out.
    """
    model, info = AutoModel.from_pretrained(
        name,
        config=copy.deepcopy(config),
        dtype=torch.float32,
        output_loading_info=True,
        **hub_kwargs,
    )
    encoder = find_encoder(model)
    prefix = next(f"{path}." if path else "" for path, m in model.named_modules() if m is encoder)
    missing = set(info["missing_keys"])
    state = encoder.state_dict()
    return {key: value for key, value in state.items() if prefix + key not in missing}


AutoModel.register(AudioEncoderWrapperConfig, AudioEncoderWrapperModel)
