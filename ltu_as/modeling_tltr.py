"""Encodes the pooled layers of Whisper's encoder with a time-and-layer-wise transformer (TLTR).

First each layer attends over its time steps, then each time step over the layers. The output is
the mean over the layers. Neither transformer has position embeddings. The key projection has no
bias, as in Whisper.

Means and products of matrices are taken as early as possible. That saves a quarter of the work, and
changes only the rounding. The parameters are named as in the released files.
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
        """Attend over the length.

        Args:
            hidden: (batch, length, width)

        Returns:
            (batch, length, width)
        """
        if self.num_heads == 1:
            return self._attend_with_one_head(hidden)
        heads = []
        for projection in (self.query, self.key, self.value):
            projected = projection(hidden).unflatten(-1, (self.num_heads, -1))
            heads.append(projected.transpose(1, 2))  # (batch, heads, length, width / heads)
        attended = F.scaled_dot_product_attention(*heads)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _attend_with_one_head(self, hidden: Tensor) -> Tensor:
        """Attend as `forward` with one head, with fewer projections.

        The attention scores depend only on the product of the query and key matrices, and `out`
        follows directly on `value`. So each of the two pairs is multiplied to one matrix. The
        attention weights of a position sum to one, so the bias of `value` is added unchanged.
        """
        query_key = self.key.weight.T @ self.query.weight  # (width, width)
        query = F.linear(hidden, query_key, self.query.bias @ self.key.weight)
        attended = F.scaled_dot_product_attention(query, hidden, hidden)  # (batch, length, width)
        return F.linear(attended, self.out.weight @ self.value.weight, self.out(self.value.bias))


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
        """Compute the block.

        Args:
            hidden: (batch, length, width)
            mean: whether to return the mean over the length.

        Returns:
            (batch, length, width), or (batch, width) if `mean`.
        """
        hidden = hidden + self.attn(self.attn_ln(hidden))
        inner = self.mlp[:2](self.mlp_ln(hidden))  # (batch, length, 4 x width)
        if mean:
            # Take the mean before the last linear map: the result is the same, for a third of the
            # work.
            hidden = hidden.mean(1)
            inner = inner.mean(1)
        return hidden + self.mlp[2](inner)


class TltrModel(PreTrainedModel):
    """TLTR as an audio encoder of the layers of Whisper's encoder."""

    config_class = TltrConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    # TLTR always uses sdpa, so any attention implementation chosen for the language model fits.
    _supports_sdpa = True
    _supports_flash_attn = True
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
        """Return the audio tokens.

        Args:
            input_features: (batch, layers, time, width)

        Returns:
            (batch, time, width)

        Raises:
            ValueError: the features are those of another Whisper.
        """
        config = self.config
        expected = (config.num_whisper_layers, config.num_audio_tokens, config.hidden_size)
        if input_features.ndim != 4 or tuple(input_features.shape[1:]) != expected:
            raise ValueError(
                "TLTR takes features (batch, layers, time, width) = (batch, "
                f"{', '.join(map(str, expected))}), got {tuple(input_features.shape)}. Make them "
                "with the Whisper that the checkpoint names."
            )
        if config.standardize:
            input_features = (input_features - self.feature_mean) / self.feature_std
        if self._recomputes_inputs():
            input_features = input_features.detach().requires_grad_()
        batch, layers, time, _ = input_features.shape
        hidden = self.time_tr(input_features.flatten(0, 1))  # (batch x layers, time, width)
        hidden = hidden.unflatten(0, (batch, layers))
        hidden = hidden.transpose(1, 2)  # (batch, time, layers, width)
        hidden = self.layer_tr(hidden.flatten(0, 1), mean=True)  # (batch x time, width)
        return hidden.unflatten(0, (batch, time))  # (batch, time, width)

    def _recomputes_inputs(self) -> bool:
        """Return whether the features need a gradient, so that the first block gets its own.

        With reentrant gradient checkpointing, a block has gradients only if its input has one.
        """
        is_trained = self.training and self.time_tr.attn.out.weight.requires_grad
        return is_trained and torch.is_grad_enabled() and self.time_tr.gradient_checkpointing


AutoModel.register(TltrConfig, TltrModel)
