"""Measures how an audio encoder of transformers becomes an audio encoder of LTU.

Sizes, strides and padding are not read from the fields of a config, whose names differ between
families of models. They are measured: the feature extractor is called with noise, and the encoder,
with random weights, with these features. So a family that transformers adds needs no code here, and
what cannot work is found before any weights are loaded.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoFeatureExtractor,
    FeatureExtractionMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from ltu.data.audio import SAMPLING_RATE
from ltu.models.config_checks import LIBRARY_ERRORS
from ltu.models.configuration_audio_encoder_wrapper import AudioEncoderWrapperConfig
from ltu.models.configuration_ltu import open_model_config
from ltu.models.feature_extraction_audio_encoder_wrapper import (
    PADDINGS,
    run_feature_extractor,
)
from ltu.models.finite_weights import check_finite
from ltu.models.locate_checkpoint import hash_model
from ltu.models.lora import find_parameters
from ltu.models.modeling_audio_encoder_wrapper import (
    compute_hidden_states,
    find_encoder_class,
    find_input_name,
    load_encoder_weights,
    repeat_constants,
)

DEFAULT_NUM_AUDIO_TOKENS = 32
DEFAULT_CHUNK_SECONDS = 10.24
# Lengths of a chunk that are tried to say which one is possible, in seconds.
TRIED_SECONDS = (30.0, 20.0, 10.24, 10.0, 8.0, 5.0, 4.0, 2.0, 1.0, 0.5)
# The end of a chunk, in seconds, that must reach the features. It is longer than a frame, because
# some feature extractors drop a last frame that is not whole.
END_SECONDS = 0.05
# Points of a chunk, as fractions, after which the waveform is changed to find the first feature
# that changes with it.
CHANGE_POINTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Of the largest change of the features. Smaller ones come from normalising the whole waveform.
MIN_CHANGE = 0.05
MAX_SPECIAL_TOKENS = 4  # In front of the patches of a spectrogram: AST has two.
MAX_CONSTANT_VALUES = 16  # Of an input that is the same for all clips.
NOISE_LEVEL = 0.1  # Standard deviation of the noise that is measured with.


@dataclass(frozen=True)
class FeatureLayout:
    """How a feature extractor treats a chunk.

    Attributes:
        padding: a key of `ltu.models.feature_extraction_audio_encoder_wrapper.PADDINGS`.
        shape: of the features of a chunk.
        chunk_fraction: the part of the features, along time, that belongs to the chunk; the rest
            is padding.
        constants: other outputs that are the same for all clips, by name.
    """

    padding: str
    shape: list[int]
    chunk_fraction: float
    constants: dict[str, list]


@dataclass(frozen=True)
class TimeLayout:
    """Where the time steps are in the hidden states of an encoder; see AudioEncoderWrapperConfig.

    Attributes:
        num_steps: all time steps, also those of padding.
    """

    hidden_size: int
    num_steps: int
    num_special_tokens: int = 0
    grid: list[int] | None = None
    time_axis: int = 0


@dataclass(frozen=True)
class WrappedAudioEncoder:
    """What a checkpoint needs of an audio encoder of transformers.

    Attributes:
        config: of the wrapper.
        extractor_settings: arguments of `AudioEncoderWrapperFeatureExtractor`, besides those that
            follow from the config.
    """

    config: AudioEncoderWrapperConfig
    extractor_settings: dict[str, Any]


def wrap_audio_encoder(
    name: str | Path,
    num_audio_tokens: int = DEFAULT_NUM_AUDIO_TOKENS,
    chunk_seconds: float = DEFAULT_CHUNK_SECONDS,
    hidden_layer: int | str = "last",
) -> WrappedAudioEncoder:
    """Prepare an audio encoder of transformers for a checkpoint, which names it.

    Args:
        name: folder or hub id of an audio model.
        num_audio_tokens: audio tokens of a chunk.
        chunk_seconds: length of a chunk.
        hidden_layer: "last", "mean" or the number of a layer.

    Raises:
        OSError: there is no such model.
        ValueError: it is no audio encoder, or does not support a setting, or its files lack weights
            that are used.
    """
    config, extractor = open_audio_model(name)
    try:
        encoder_class, encoder_config = find_encoder_class(config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    with torch.random.fork_rng([]):  # The random weights of the projector stay the same.
        encoder = encoder_class(encoder_config).eval()
    input_name = find_input_name(encoder)
    features = measure_features(extractor, input_name, chunk_seconds)
    accepted = inspect.signature(encoder.forward).parameters
    constants = {key: value for key, value in features.constants.items() if key in accepted}

    chunk_samples = round(chunk_seconds * SAMPLING_RATE)
    pair = []
    for noise in make_noise(chunk_samples, chunk_samples // 2):
        output = run_feature_extractor(extractor, noise, chunk_samples, features.padding)
        pair.append(torch.from_numpy(output[input_name]))
    try:
        layout = measure_time(encoder, torch.stack(pair), hidden_layer, {})
        constants = {}  # The encoder does not need them.
    except ValueError:
        if not constants:
            raise
        layout = measure_time(encoder, torch.stack(pair), hidden_layer, constants)
    num_time_steps = max(1, round(features.chunk_fraction * layout.num_steps))
    if num_audio_tokens > num_time_steps:
        raise ValueError(
            f"{name} has {num_time_steps} time steps in a chunk of {chunk_seconds:g} s, fewer than "
            f"--num_audio_tokens {num_audio_tokens}. Give at most {num_time_steps}."
        )
    used = find_used_parameters(encoder, pair[0], hidden_layer, constants)
    del encoder

    check_weights(name, config, used)
    wrapper_config = AudioEncoderWrapperConfig(
        encoder_config=config,
        encoder=str(name),
        encoder_sha256=hash_model(name, "audio encoder", "--audio_encoder"),
        hidden_layer=hidden_layer,
        hidden_size=layout.hidden_size,
        num_audio_tokens=num_audio_tokens,
        chunk_seconds=float(chunk_seconds),
        feature_shape=features.shape,
        num_time_steps=num_time_steps,
        num_special_tokens=layout.num_special_tokens,
        grid=layout.grid,
        time_axis=layout.time_axis,
        constant_inputs=constants,
    )
    settings = {
        "feature_extractor": extractor,
        "input_name": input_name,
        "padding": features.padding,
    }
    return WrappedAudioEncoder(wrapper_config, settings)


def open_audio_model(name: str | Path) -> tuple[PreTrainedConfig, FeatureExtractionMixin]:
    """Return the config and the feature extractor of an audio model.

    Raises:
        OSError: there is no such model.
        ValueError: it has no feature extractor, or a value in its config has a wrong size.
    """
    config = open_model_config(name)
    try:
        extractor = AutoFeatureExtractor.from_pretrained(name)
    except (OSError, ValueError, *LIBRARY_ERRORS) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} is a {config.model_type} without a feature extractor for audio "
            f"(preprocessor_config.json): {reason}"
        ) from error
    _switch_off_random_parts(config)
    return config, extractor


def _switch_off_random_parts(config: PreTrainedConfig) -> None:
    """Switch off layer drop and SpecAugment in a config and the configs in it.

    DDP needs a gradient of each layer in each step. SpecAugment would mask positions when the
    encoder is trained, and fails for chunks that are shorter than a mask.
    """
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _switch_off_random_parts(value)
        elif key.endswith("layerdrop") or (key.startswith("mask_") and key.endswith("_prob")):
            setattr(config, key, 0.0)


def make_noise(num_samples: int, num_changed: int) -> tuple[Tensor, Tensor]:
    """Return two waveforms of noise (samples,) that differ in their last samples only.

    Args:
        num_samples: their length.
        num_changed: how many samples differ.
    """
    generator = torch.Generator().manual_seed(0)
    first = NOISE_LEVEL * torch.randn(num_samples, generator=generator)
    second = first.clone()
    second[-num_changed:] = NOISE_LEVEL * torch.randn(num_changed, generator=generator)
    return first, second


def measure_features(
    extractor: FeatureExtractionMixin, input_name: str, chunk_seconds: float
) -> FeatureLayout:
    """Measure how a feature extractor treats a chunk, and one of half its length.

    Raises:
        ValueError: it makes no features of that name, or does not use the whole chunk.
    """
    layout = _try_chunk(extractor, input_name, chunk_seconds)
    if layout is not None:
        return layout
    for seconds in TRIED_SECONDS:
        if seconds < chunk_seconds and _try_chunk(extractor, input_name, seconds) is not None:
            hint = f"Give --chunk_seconds {seconds:g} or less."
            break
    else:
        hint = "It cannot be used."
    raise ValueError(
        f"{type(extractor).__name__} cuts clips of {chunk_seconds:g} s, so that not all of them "
        f"reaches the encoder. {hint}"
    )


def _try_chunk(
    extractor: FeatureExtractionMixin, input_name: str, chunk_seconds: float
) -> FeatureLayout | None:
    """Return the layout of the features of a chunk, or None if they are not of the whole chunk.

    Raises:
        ValueError: the feature extractor makes no features of that name.
    """
    chunk_samples = round(chunk_seconds * SAMPLING_RATE)
    whole, other_end = make_noise(chunk_samples, round(END_SECONDS * SAMPLING_RATE))
    half = whole[: chunk_samples // 2]
    run = partial(run_feature_extractor, extractor, chunk_samples=chunk_samples)

    def call(waveform: Tensor, padding: str) -> dict[str, np.ndarray]:
        try:
            output = run(waveform, padding=padding)
        except (ValueError, *LIBRARY_ERRORS) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{type(extractor).__name__} makes no features of a clip of {chunk_seconds:g} s "
                f"({type(error).__name__}: {reason})."
            ) from error
        if input_name not in output:
            raise ValueError(
                f"{type(extractor).__name__} makes {', '.join(output)}, and the encoder takes "
                f"{input_name}."
            )
        return output

    # Choose the first padding by which half a chunk gets the features of a whole one.
    natural = call(whole, "fixed")
    for padding in PADDINGS:
        of_whole = call(whole, padding)
        of_half = call(half, padding)
        shapes = {of_whole[input_name].shape, of_half[input_name].shape}
        if shapes == {natural[input_name].shape}:
            break
    else:
        raise ValueError(
            f"{type(extractor).__name__} makes features of other lengths for padded clips."
        )

    # A clip that is too long may be cropped at random, or its end may be cut.
    features = of_whole[input_name]
    if not np.array_equal(features, call(whole, padding)[input_name]):
        return None
    if np.array_equal(features, call(other_end, padding)[input_name]):
        return None
    chunk_fraction = 1.0
    if padding == "fixed":  # Otherwise, there are as many features as a chunk has.
        changes = []
        for point in CHANGE_POINTS:
            _, other = make_noise(chunk_samples, round((1 - point) * chunk_samples))
            changes.append(np.abs(features - call(other, padding)[input_name]))
        chunk_fraction = _measure_chunk_fraction(changes)

    constants = {}
    for name, value in of_whole.items():
        is_small = value.size <= MAX_CONSTANT_VALUES
        if name != input_name and is_small and np.array_equal(value, of_half[name]):
            constants[name] = value.tolist()
    shape = list(features.shape)
    return FeatureLayout(padding, shape, chunk_fraction, constants)


def _measure_chunk_fraction(changes: list[np.ndarray]) -> float:
    """Return the part of the features, along time, that belongs to the chunk.

    Frames overlap, so the first that changes is somewhat before the point where the waveform does,
    by the same amount at each point. The slope does not depend on this amount.

    Args:
        changes: of the features (*feature_shape), for each of `CHANGE_POINTS`.
    """
    fractions = []
    for axis in range(changes[0].ndim):
        other_axes = tuple(other for other in range(changes[0].ndim) if other != axis)
        first_changed = []
        for change in changes:
            is_changed = (change > MIN_CHANGE * change.max()).any(axis=other_axes)
            first_changed.append(np.flatnonzero(is_changed)[0])
        slope = np.polyfit(CHANGE_POINTS, first_changed, 1)[0]
        fractions.append(slope / changes[0].shape[axis])
    # Along other axes than time, the first of the features changes at each point.
    return float(np.clip(max(fractions), 0, 1))


def measure_time(
    encoder: PreTrainedModel,
    features: Tensor,
    hidden_layer: int | str,
    constants: dict[str, list],
) -> TimeLayout:
    """Measure where the time steps are in the hidden states of an encoder.

    Args:
        encoder: with any weights.
        features: (2, *feature_shape) of two clips that differ in their second half only.
        hidden_layer: "last", "mean" or the number of a layer.
        constants: further inputs.

    Raises:
        ValueError: the encoder does not run on these features, or has no such hidden states.
    """
    name = type(encoder).__name__
    images: list[Tensor] = []  # Outputs of two-dimensional convolutions, (2, channels, rows, cols).
    hooks = []
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            hook = module.register_forward_hook(lambda _, __, output: images.append(output))
            hooks.append(hook)
    try:
        with torch.no_grad():
            check_hidden_layer(encoder, features, hidden_layer, constants)
            images.clear()
            hidden = compute_hidden_states(encoder, features, hidden_layer, constants)
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} does not map {find_input_name(encoder)} alone to hidden states "
            f"({type(error).__name__}: {reason})."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if hidden.ndim == 4:  # (2, hidden, frequencies, steps)
        return TimeLayout(hidden_size=hidden.shape[1], num_steps=hidden.shape[3])
    if hidden.ndim != 3:
        raise ValueError(f"The hidden states of {name} have the shape {tuple(hidden.shape)}.")

    # The positions may be patches of a spectrogram: the outputs of a convolution, row by row.
    num_positions, hidden_size = hidden.shape[1:]
    for image in images:
        rows, columns = image.shape[2:]
        num_special_tokens = num_positions - rows * columns
        is_grid = rows > 1 and columns > 1 and 0 <= num_special_tokens <= MAX_SPECIAL_TOKENS
        if is_grid:
            change = (image[0] - image[1]).abs().amax(0)  # (rows, columns)
            is_changed = change > MIN_CHANGE * change.max()
            changed_rows = is_changed.any(1).float().mean()
            changed_columns = is_changed.any(0).float().mean()
            time_axis = 0 if changed_rows < changed_columns else 1
            grid = [rows, columns]
            return TimeLayout(hidden_size, grid[time_axis], num_special_tokens, grid, time_axis)
    return TimeLayout(hidden_size, num_positions)


def check_hidden_layer(
    encoder: PreTrainedModel,
    features: Tensor,
    hidden_layer: int | str,
    constants: dict[str, list],
) -> None:
    """Check that an encoder has the hidden states that `hidden_layer` names.

    Raises:
        ValueError: it has not.
    """
    if hidden_layer == "last":
        return
    name = type(encoder).__name__
    inputs = {find_input_name(encoder): features} | repeat_constants(constants, features)
    states = encoder(**inputs, output_hidden_states=True, return_dict=True).hidden_states
    if not states:
        raise ValueError(f"{name} returns no hidden states of its layers: --encoder_layers last.")
    shapes = {tuple(state.shape) for state in states}
    if hidden_layer == "mean" and len(shapes) > 1:
        raise ValueError(
            f"The layers of {name} have hidden states of {len(shapes)} shapes, of which there is "
            "no mean: --encoder_layers last, or a number."
        )
    if hidden_layer != "mean" and not -len(states) <= hidden_layer < len(states):
        raise ValueError(
            f"--encoder_layers {hidden_layer}: {name} has layers 0 (its input) to "
            f"{len(states) - 1}."
        )


def find_used_parameters(
    encoder: PreTrainedModel,
    features: Tensor,
    hidden_layer: int | str,
    constants: dict[str, list],
) -> set[str]:
    """Return the names of the parameters that the hidden states of a clip depend on.

    Args:
        features: of the clip, feature_shape.
    """
    with torch.enable_grad():
        hidden = compute_hidden_states(encoder, features[None], hidden_layer, constants)
    used = find_parameters(hidden)
    return {name for name, parameter in encoder.named_parameters() if parameter in used}


def check_weights(name: str | Path, config: PreTrainedConfig, used: set[str]) -> None:
    """Check the files of an audio model.

    Args:
        name: its folder or hub id.
        config: by which the encoder is built.
        used: names of the parameters that are needed.

    Raises:
        ValueError: one of them is not in the files, which transformers would make up, or a weight
            is NaN or infinite.
    """
    weights = load_encoder_weights(name, config)
    missing = sorted(used - weights.keys())
    if missing:
        raise ValueError(
            f"{name} does not fit its own config: {len(missing)} keys missing {missing[:3]}. "
            "Copy or download it again."
        )
    check_finite(weights, str(name))
