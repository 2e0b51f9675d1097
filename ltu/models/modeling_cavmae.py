"""Encodes a filterbank to 32 audio tokens with the audio branch of CAV-MAE, LTU's audio encoder.

The encoder is a ViT-B on 16 x 16 patches: 8 steps of frequency and 64 of time, in frequency-major
order. Its output is averaged over the 8 frequency steps, then over two neighbouring time steps:
(batch, 32, hidden_size).

The parameters have the original's names, so its checkpoints need no renaming: `blocks_a` are the
audio blocks, and `blocks_u` holds the one block that CAV-MAE shares between audio and image. Every
block has 12 norm parameters, of which 8 are never used; see `CavMaeBlock`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, GradientCheckpointingLayer, PreTrainedModel
from transformers import initialization as init

from ltu.models.configuration_ltu import CavMaeConfig


class CavMaePatchEmbed(nn.Module):
    def __init__(self, config: CavMaeConfig):
        super().__init__()
        self.proj = nn.Conv2d(
            1, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        spectrogram = input_features.transpose(1, 2).unsqueeze(1)  # (batch, 1, bins, frames)
        patches = self.proj(spectrogram)  # (batch, hidden, bins / 16, frames / 16)
        return patches.flatten(2).transpose(1, 2)  # (batch, patches, hidden), frequency-major


class CavMaeAttention(nn.Module):
    def __init__(self, config: CavMaeConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, patches, hidden = hidden_states.shape
        head_width = hidden // self.num_heads
        qkv = self.qkv(hidden_states).view(batch, patches, 3, self.num_heads, head_width)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, batch, heads, patches, head width)
        query, key, value = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, patches, hidden))


class CavMaeMlp(nn.Module):
    def __init__(self, config: CavMaeConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class CavMaeBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block with the norms of three modalities.

    A block of CAV-MAE has six LayerNorms: joint (`norm1`, `norm2`), audio (`_a`) and image (`_v`).
    LTU uses the joint pair in `blocks_a` and the audio pair in `blocks_u`. The other four stay as
    parameters, because released files hold them and the published counts include them, but the
    forward pass does not use them. The original adds 0 times the sum of all six, so that DDP has a
    gradient for each; here `CavMaeModel.unused_parameter_names` lists them for DDP.
    """

    def __init__(self, config: CavMaeConfig, is_shared: bool):
        super().__init__()
        self.is_shared = is_shared
        for name in ("norm1", "norm1_a", "norm1_v"):
            setattr(self, name, nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))
        self.attn = CavMaeAttention(config)
        for name in ("norm2", "norm2_a", "norm2_v"):
            setattr(self, name, nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))
        self.mlp = CavMaeMlp(config)

    @property
    def unused_norms(self) -> tuple[str, ...]:
        other = ("norm1", "norm2") if self.is_shared else ("norm1_a", "norm2_a")
        return (*other, "norm1_v", "norm2_v")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm1 = self.norm1_a if self.is_shared else self.norm1
        norm2 = self.norm2_a if self.is_shared else self.norm2
        hidden_states = hidden_states + self.attn(norm1(hidden_states))
        return hidden_states + self.mlp(norm2(hidden_states))  # (batch, patches, hidden)


class CavMaePreTrainedModel(PreTrainedModel):
    config_class = CavMaeConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    # The encoder always calls scaled_dot_product_attention, which uses flash kernels by itself if
    # the device has them. An attention implementation chosen for LTU is meant for its language
    # model, and must not fail here.
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["CavMaeBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, CavMaeModel):
            rows = module.config.num_mel_bins // module.config.patch_size
            columns = module.config.num_frames // module.config.patch_size
            table = sincos_positions(rows, columns, module.config.hidden_size)
            init.copy_(module.pos_embed_a, table[None].to(module.pos_embed_a))
            init.trunc_normal_(module.modality_a, std=std)


class CavMaeModel(CavMaePreTrainedModel):
    """Audio encoder of Gong et al., "Contrastive Audio-Visual Masked Autoencoder", ICLR 2023."""

    def __init__(self, config: CavMaeConfig):
        super().__init__(config)
        patches = (config.num_mel_bins // config.patch_size) * (
            config.num_frames // config.patch_size
        )
        self.modality_a = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed_a = nn.Parameter(torch.zeros(1, patches, config.hidden_size))
        self.patch_embed_a = CavMaePatchEmbed(config)
        self.blocks_a = nn.ModuleList(
            CavMaeBlock(config, is_shared=False) for _ in range(config.num_hidden_layers - 1)
        )
        self.blocks_u = nn.ModuleList([CavMaeBlock(config, is_shared=True)])
        self.norm_a = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @property
    def unused_parameter_names(self) -> list[str]:
        """Parameters without gradient, named as in `state_dict`: four norms of every block."""
        names = []
        for path, module in self.named_modules():
            if isinstance(module, CavMaeBlock):
                for norm in module.unused_norms:
                    names += [f"{path}.{norm}.weight", f"{path}.{norm}.bias"]
        return names

    def encode(self, input_features: torch.Tensor) -> torch.Tensor:
        """Return the hidden state of each patch, after the last norm.

        Args:
            input_features: `(batch, num_frames, num_mel_bins)`

        Returns:
            `(batch, patches, hidden_size)`, frequency-major.

        Raises:
            ValueError: the features have another shape.
        """
        expected = (self.config.num_frames, self.config.num_mel_bins)
        if tuple(input_features.shape[1:]) != expected:
            raise ValueError(
                f"CAV-MAE takes features of shape (batch, {expected[0]}, {expected[1]}), got "
                f"{tuple(input_features.shape)}. Make them with the feature extractor that was "
                "saved with this model."
            )
        input_features = input_features.to(self.patch_embed_a.proj.weight.dtype)
        hidden_states = self.patch_embed_a(input_features)  # (batch, 512, 768)
        hidden_states = hidden_states + self.pos_embed_a + self.modality_a
        for block in (*self.blocks_a, *self.blocks_u):
            hidden_states = block(hidden_states)
        return self.norm_a(hidden_states)

    def forward(self, input_features: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return the audio tokens, before the division by `feature_divisor`.

        Args:
            input_features: `(batch, num_frames, num_mel_bins)`

        Returns:
            `(batch, num_audio_tokens, hidden_size)`
        """
        hidden_states = self.encode(input_features)  # (batch, 8 * 64, 768)
        rows = self.config.num_mel_bins // self.config.patch_size
        hidden_states = hidden_states.unflatten(1, (rows, -1)).mean(1)  # (batch, 64, 768)
        hidden_states = hidden_states.unflatten(1, (-1, self.config.time_pooling))
        return hidden_states.mean(2)  # (batch, 32, 768)


def sincos_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """Return a two-dimensional sine-cosine table `(rows * columns, width)`.

    The first half of the width encodes the column. The width must be a multiple of 4.
    """

    def one_axis(positions: np.ndarray) -> np.ndarray:
        frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
        angles = positions[:, None] * frequencies  # (rows * columns, width / 4)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = (axis.ravel() for axis in np.mgrid[:rows, :columns].astype(np.float64))
    table = np.concatenate([one_axis(column), one_axis(row)], axis=1)  # (rows * columns, width)
    return torch.from_numpy(table).float()


AutoModel.register(CavMaeConfig, CavMaeModel)
