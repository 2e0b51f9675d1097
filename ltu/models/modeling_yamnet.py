"""The small ear: YAMNet, a MobileNet of 3.7 M parameters trained on AudioSet, from a log-mel picture to 32 vectors.

Notable:
- architecture and TensorFlow's SAME padding as in tensorflow/models, research/audioset/yamnet; batch norm is folded
  into the convolutions;
- it was trained on 0.96 s patches; here the whole 10.24 s goes in at once and the mean is taken over frequency only, so
  that a 1024 x 64 picture gives a token every 0.32 s, as LTU's ear does;
- `feature_mean` and `feature_std` (zeros and ones unless filled) make channels comparable: most are near zero mostly.
"""

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
    """A 3 x 3 convolution padded as TensorFlow does: with stride 2 an even size gets one row or column, at its end."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int = 1):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size=3,
            stride=stride,
            padding=2 - stride,
            groups=groups,
        )

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        if self.stride == (2, 2):
            rows, columns = (
                1 + size % 2 for size in picture.shape[-2:]
            )  # rows and columns to add in all
            picture = F.pad(
                picture, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
            )
        return super().forward(
            picture
        )  # (batch, channels, ceil(frames / stride), ceil(bins / stride))


class YamnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.depthwise = SameConv2d(in_channels, in_channels, stride, groups=in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        picture = F.relu(self.depthwise(picture), inplace=True)  # (batch, channels, frames, bins)
        # A 1 x 1 convolution is a matrix product over the last axis of channels_last, several times faster on a CPU.
        rows = picture.permute(0, 2, 3, 1)  # (batch, frames, bins, channels)
        mixed = F.linear(rows, self.pointwise.weight.flatten(1), self.pointwise.bias)
        return F.relu(mixed, inplace=True).permute(0, 3, 1, 2)  # (batch, channels, frames, bins)


class YamnetModel(PreTrainedModel):
    """Log-mel picture to audio vectors."""

    config_class = YamnetConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    input_modalities = ("audio",)
    _supports_sdpa = True  # It has no attention, so whatever is chosen for the language model fits.
    _supports_flash_attn = True
    _no_split_modules = ["YamnetBlock"]

    def __init__(self, config: YamnetConfig):
        super().__init__(config)
        if config.hidden_size % 32:
            raise ValueError(
                f"YAMNet's first layer has a 32nd of its hidden_size: use a multiple of 32, not {config.hidden_size}."
            )
        widths = [config.hidden_size * channels // FULL_WIDTH for channels, _ in BLOCKS]
        first = config.hidden_size // 32
        self.conv1 = SameConv2d(1, first, stride=2)
        self.blocks = nn.ModuleList(
            YamnetBlock(before, after, stride)
            for before, after, (_, stride) in zip(
                [first, *widths[:-1]], widths, BLOCKS, strict=True
            )
        )
        self.classifier = nn.Linear(config.hidden_size, config.num_classes)
        self.register_buffer("feature_mean", torch.zeros(config.hidden_size))
        self.register_buffer("feature_std", torch.ones(config.hidden_size))
        self.post_init()

    @property
    def unused_parameter_names(self) -> list[str]:
        """Parameters that get no gradient when the model listens: the AudioSet classifier."""
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
        """`(batch, frames, num_mel_bins)` → `(batch, hidden_size, ceil(frames / 32), ceil(num_mel_bins / 32))`"""
        if input_features.ndim != 3 or input_features.shape[2] != self.config.num_mel_bins:
            raise ValueError(
                f"YAMNet takes features of shape (batch, frames, {self.config.num_mel_bins}), got "
                f"{tuple(input_features.shape)}. Make them with the feature extractor that was saved with this model."
            )
        picture = input_features.to(self.conv1.weight.dtype).unsqueeze(
            1
        )  # (batch, 1, frames, bins)
        picture = F.relu(self.conv1(picture), inplace=True)  # (batch, 32, frames / 2, bins / 2)
        picture = picture.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            picture = block(picture)
        return picture

    def forward(self, input_features: torch.Tensor, **kwargs) -> torch.Tensor:
        """`(batch, frames, num_mel_bins)` → `(batch, ceil(frames / 32), hidden_size)`"""
        vectors = self.encode(input_features).mean(3).transpose(1, 2)  # (batch, 32, 1024)
        return (vectors - self.feature_mean) / self.feature_std

    def classify(self, input_features: torch.Tensor) -> torch.Tensor:
        """`(batch, frames, num_mel_bins)` → AudioSet logits `(batch, num_classes)`; a sigmoid makes scores of them."""
        return self.classifier(self.encode(input_features).mean((2, 3)))


AutoModel.register(YamnetConfig, YamnetModel)
