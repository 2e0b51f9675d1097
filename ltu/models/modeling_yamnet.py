"""Encodes a log-mel spectrogram to 32 audio tokens with YAMNet, the small audio encoder.

YAMNet is a MobileNet of 3.7 M parameters, trained on AudioSet. Architecture and TensorFlow's SAME
padding are as in tensorflow/models, research/audioset/yamnet; batch norm is folded into the
convolutions.

YAMNet was trained on patches of 0.96 s. Here it takes a chunk of 10.24 s at once, and the mean is
taken over frequency only. So a spectrogram of 1024 x 64 becomes one token per 0.32 s, as with
CAV-MAE, or the mean of several of them (`time_pooling`).

`feature_mean` and `feature_std` (zeros and ones by default) scale the channels to a common range,
because most channels are nearly always close to zero.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from ltu.models.configuration_ltu import YamnetConfig

# (channels, stride) of the 13 depthwise-separable blocks at the width of 1024.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
FULL_WIDTH = 1024


class SameConv2d(nn.Conv2d):
    """A 3 x 3 convolution with the padding of TensorFlow.

    With stride 2, an even size is padded by one row or column, at its end.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int = 1):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size=3,
            stride=stride,
            padding=2 - stride,
            groups=groups,
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return (batch, channels, ceil(frames / stride), ceil(bins / stride))."""
        if self.stride == (2, 2):
            num_frames, num_bins = features.shape[-2:]
            rows = 1 + num_frames % 2  # To add, half of them at each end.
            columns = 1 + num_bins % 2
            features = F.pad(
                features, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
            )
        return super().forward(features)


class YamnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.depthwise = SameConv2d(in_channels, in_channels, stride, groups=in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.depthwise(features), inplace=True)  # (batch, channels, frames, bins)
        # Compute the 1 x 1 convolution as a matrix product over the last axis of channels_last,
        # which is several times faster on a CPU.
        features = features.permute(0, 2, 3, 1)  # (batch, frames, bins, channels)
        features = F.linear(features, self.pointwise.weight.flatten(1), self.pointwise.bias)
        return F.relu(features, inplace=True).permute(0, 3, 1, 2)  # (batch, channels, frames, bins)


class YamnetModel(PreTrainedModel):
    """YAMNet as an audio encoder, with its classifier of AudioSet classes."""

    config_class = YamnetConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    input_modalities = ("audio",)
    # YAMNet has no attention, so any implementation chosen for the language model fits.
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["YamnetBlock"]

    def __init__(self, config: YamnetConfig):
        super().__init__(config)
        if config.hidden_size % 32:
            raise ValueError(
                f"The first layer of YAMNet has hidden_size / 32 channels: use a hidden_size that "
                f"is a multiple of 32, not {config.hidden_size}."
            )
        time_stride = 2 * prod(stride for _, stride in BLOCKS)
        if config.time_stride != time_stride:
            raise ValueError(
                f"time_stride is {config.time_stride}, but the strides of YAMNet's convolutions "
                f"make {time_stride}. Remove it from the config."
            )
        widths = [config.hidden_size * channels // FULL_WIDTH for channels, _ in BLOCKS]
        num_channels = config.hidden_size // 32
        self.conv1 = SameConv2d(1, num_channels, stride=2)
        self.blocks = nn.ModuleList()
        for width, (_, stride) in zip(widths, BLOCKS, strict=True):
            self.blocks.append(YamnetBlock(num_channels, width, stride))
            num_channels = width
        self.classifier = nn.Linear(config.hidden_size, config.num_classes)
        self.register_buffer("feature_mean", torch.zeros(config.hidden_size))
        self.register_buffer("feature_std", torch.ones(config.hidden_size))
        self.post_init()

    @property
    def unused_parameter_names(self) -> list[str]:
        """Parameters without gradient when YAMNet is an audio encoder: the classifier."""
        return ["classifier.weight", "classifier.bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, YamnetModel):
            init.zeros_(module.feature_mean)
            init.ones_(module.feature_std)

    def encode(self, input_features: torch.Tensor) -> torch.Tensor:
        """Return the output of the last convolution.

        Args:
            input_features: `(batch, frames, num_mel_bins)`

        Returns:
            `(batch, hidden_size, ceil(frames / 32), ceil(num_mel_bins / 32))`

        Raises:
            ValueError: the features have another shape.
        """
        if input_features.ndim != 3 or input_features.shape[2] != self.config.num_mel_bins:
            raise ValueError(
                f"YAMNet takes features of shape (batch, frames, {self.config.num_mel_bins}), got "
                f"{tuple(input_features.shape)}. Make them with the feature extractor that was "
                "saved with this model."
            )
        features = input_features.to(self.conv1.weight.dtype)
        features = features.unsqueeze(1)  # (batch, 1, frames, bins)
        features = F.relu(self.conv1(features), inplace=True)  # (batch, 32, frames / 2, bins / 2)
        features = features.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            features = block(features)
        return features

    def forward(self, input_features: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return the audio tokens, scaled to a common range.

        Args:
            input_features: `(batch, frames, num_mel_bins)`

        Returns:
            `(batch, ceil(frames / 32) / time_pooling, hidden_size)`
        """
        hidden_states = self.encode(input_features).mean(3).transpose(1, 2)  # (batch, 32, 1024)
        hidden_states = (hidden_states - self.feature_mean) / self.feature_std
        if self.config.time_pooling == 1:
            return hidden_states
        return hidden_states.unflatten(1, (-1, self.config.time_pooling)).mean(2)

    def classify(self, input_features: torch.Tensor) -> torch.Tensor:
        """Return the logits of the AudioSet classes; their sigmoid is the score of a class.

        Args:
            input_features: `(batch, frames, num_mel_bins)`

        Returns:
            `(batch, num_classes)`
        """
        return self.classifier(self.encode(input_features).mean((2, 3)))


AutoModel.register(YamnetConfig, YamnetModel)
