"""LTU-AS's ear: a time-and-layer-wise transformer (TLTR) over the pooled layers of Whisper's encoder.

Notable:
- first each layer attends over its time steps, then each time step over the layers; the mean over layers is left;
- neither transformer knows positions, and the key projection has no bias, as in Whisper;
- where a sum or a product may be taken earlier it is, which saves a quarter of the work and changes rounding only;
- names of parameters are those of the released files.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, GradientCheckpointingLayer, PreTrainedModel

from ltu_as.configuration_ltu_as import TltrConfig


class TltrAttention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, length, width) -> the same shape."""
        query, key, value, out = self.query, self.key, self.value, self.out
        if self.num_heads == 1:
            # One head: query and key meet in one product, value and out follow each other, so each pair is one matrix.
            # Rows of attention sum to one, so the bias of value passes through it.
            hidden_query = F.linear(hidden, key.weight.T @ query.weight, query.bias @ key.weight)
            mixed = F.scaled_dot_product_attention(
                hidden_query, hidden, hidden
            )  # (batch, length, width)
            return F.linear(mixed, out.weight @ value.weight, out(value.bias))
        heads = (
            part(hidden)
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)  # (batch, heads, length, width / heads)
            for part in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(*heads)
        return out(mixed.transpose(1, 2).flatten(2))


class TltrBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, eps: float):
        super().__init__()
        self.attn = TltrAttention(width, num_heads)
        self.attn_ln = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.mlp_ln = nn.LayerNorm(width, eps=eps)

    def forward(self, hidden: Tensor, mean: bool = False) -> Tensor:
        """(batch, length, width) -> the same shape, or its mean over the length, (batch, width)."""
        hidden = hidden + self.attn(self.attn_ln(hidden))
        inner = self.mlp[:2](self.mlp_ln(hidden))  # (batch, length, 4 x width)
        if (
            mean
        ):  # Taken before the last linear map, not after it: the same, and a third of the work.
            hidden, inner = hidden.mean(1), inner.mean(1)
        return hidden + self.mlp[2](inner)


class TltrModel(PreTrainedModel):
    """Whisper's layers to audio vectors."""

    config_class = TltrConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = (
        True  # Its own attention is always sdpa; whatever is chosen for the language model fits.
    )
    _no_split_modules = ["TltrBlock"]

    def __init__(self, config: TltrConfig):
        super().__init__(config)
        self.time_tr = TltrBlock(config.hidden_size, config.num_time_heads, config.layer_norm_eps)
        self.layer_tr = TltrBlock(config.hidden_size, config.num_layer_heads, config.layer_norm_eps)
        if config.standardize:
            shape = (config.num_whisper_layers, 1, config.hidden_size)
            self.register_buffer("feature_mean", torch.zeros(shape))
            self.register_buffer("feature_std", torch.ones(shape))
        self.post_init()

    def forward(self, input_features: Tensor, **kwargs) -> Tensor:
        """(batch, layers, time, width) -> (batch, time, width)

        Raises:
            ValueError: the features are those of another Whisper.
        """
        config = self.config
        wanted = (config.num_whisper_layers, config.num_audio_tokens, config.hidden_size)
        if input_features.ndim != 4 or tuple(input_features.shape[1:]) != wanted:
            raise ValueError(
                f"TLTR takes features (batch, layers, time, width) = (batch, {', '.join(map(str, wanted))}), got "
                f"{tuple(input_features.shape)}. Make them with the Whisper that the checkpoint names."
            )
        if config.standardize:
            input_features = (input_features - self.feature_mean) / self.feature_std
        batch, layers, time, _ = input_features.shape
        hidden = self.time_tr(input_features.flatten(0, 1))  # (batch x layers, time, width)
        hidden = hidden.unflatten(0, (batch, layers)).transpose(
            1, 2
        )  # (batch, time, layers, width)
        hidden = self.layer_tr(hidden.flatten(0, 1), mean=True)  # (batch x time, width)
        return hidden.unflatten(0, (batch, time))  # (batch, time, width)


AutoModel.register(TltrConfig, TltrModel)
