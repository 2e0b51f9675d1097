"""Weights that are never stored: every parameter follows from its key and shape (numpy only).

key   the original's state-dict key without a leading "base_model.model."
h     crc32 of the key in UTF-8
z_i   splitmix64's mix of (h << 32) + i + 0x9E3779B97F4A7C15 modulo 2**64, for the flat C-order
      index i
u_i   (z_i >> 11) * 2**-52 - 1, float64 in [-1, 1)
value 1 + 0.1 u for the weight of a norm, 0.02 u for any other vector, u for token embeddings,
      0.5 u for positions and modalities, else sqrt(3 / fan_in) u; computed in float64, rounded to
      float32. Buffers are not touched.
"""

import zlib

import numpy as np

PREFIX = "base_model.model."


def uniform(key: str, count: int) -> np.ndarray:
    """float64 `(count,)` in [-1, 1), keyed by a name."""
    crc = zlib.crc32(key.removeprefix(PREFIX).encode("utf-8"))
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64) + np.uint64(
            ((crc << 32) + 0x9E3779B97F4A7C15) % 2**64
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


def rule(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of the parameter called `key`."""
    u = uniform(key, int(np.prod(shape)))
    if len(shape) <= 1:
        values = 1.0 + 0.1 * u if key.endswith("weight") else 0.02 * u
    elif key.endswith(("embed_tokens.weight", "token_embedding.weight")):
        values = u
    elif key.endswith(("modality_a", "pos_embed_a", "positional_embedding")):
        values = 0.5 * u
    else:
        values = np.sqrt(3.0 / float(np.prod(shape[1:]))) * u
    return values.astype(np.float32).reshape(shape)


def seeded(name: str, shape: tuple[int, ...], lo: float = -1.0, hi: float = 1.0) -> np.ndarray:
    """float32 uniform noise in [lo, hi), keyed by a free name: inputs of tests."""
    return (
        (lo + (hi - lo) * (uniform(name, int(np.prod(shape))) + 1.0) / 2.0)
        .astype(np.float32)
        .reshape(shape)
    )
