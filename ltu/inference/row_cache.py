"""Takes the key-value cache of a batch apart into rows, and joins rows into a batch.

So a row can leave a batch between two calls of `generate` and continue in another batch, without
its prompt and the tokens so far going through the model again. Keys carry their position, which
counts the tokens of the row only: so padding can be removed from a row and added in front of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput


@dataclass
class RowCache:
    """The key-value cache of one row, without padding.

    Attributes:
        name: the argument of `forward` that takes it, which depends on the version of transformers.
        layers: keys and values of each layer, (heads, length, width of a head).
    """

    name: str
    layers: list[tuple[Tensor, Tensor]]

    @property
    def length(self) -> int:
        """The number of tokens that went through the model."""
        return self.layers[0][0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)


def split_cache(
    output: ModelOutput, attention_mask: Tensor, rows: list[int]
) -> list[RowCache] | None:
    """Copy rows out of the cache of a batch.

    Args:
        output: of `forward` or `generate`, with the cache.
        attention_mask: (batch, length of the cache), 0 for padding.
        rows: those that are copied.

    Returns:
        the cache of each row; None without a cache, or if it has layers that do not hold keys and
        values of all tokens, such as those of a sliding window, of linear attention, or of a fixed
        size.
    """
    found = [(name, value) for name, value in output.items() if isinstance(value, Cache)]
    if not found:
        return None
    name, cache = found[0]
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    row_caches = []
    for row in rows:
        layers = []
        for layer in cache.layers:
            is_token = attention_mask[row].bool().to(layer.keys.device)  # (length,)
            keys = layer.keys[row][:, is_token]  # (heads, tokens, width of a head)
            values = layer.values[row][:, is_token]
            layers.append((keys, values))
        row_caches.append(RowCache(name, layers))
    return row_caches


def join_caches(row_caches: list[RowCache]) -> DynamicCache:
    """Return the cache of a batch of these rows, with padding in front of the shorter ones."""
    width = max(row_cache.length for row_cache in row_caches)
    layers = []
    for number in range(len(row_caches[0].layers)):
        keys = [_pad(row_cache.layers[number][0], width) for row_cache in row_caches]
        values = [_pad(row_cache.layers[number][1], width) for row_cache in row_caches]
        layers.append((torch.stack(keys), torch.stack(values)))  # (batch, heads, width, ...)
    return DynamicCache(layers)


def _pad(states: Tensor, width: int) -> Tensor:
    """Return (heads, width, width of a head) from (heads, length, width of a head)."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[1], 0))
