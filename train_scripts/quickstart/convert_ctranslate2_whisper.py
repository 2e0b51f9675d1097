"""Converts Whisper weights in CTranslate2's format into an openai-whisper checkpoint.

The file (binary version 6) contains a u32 version, the name of the model specification (str), a u32
revision and a u32 count. Then, for each variable: its name (str), u8 rank, u32 sizes, u8 type, u32
number of bytes, and its data. Aliases follow: a u32 count and pairs of str. A str is a u16 length
and as many bytes, of which the last is NUL.

CTranslate2 fuses query, key and value into one matrix. Whisper's key has no bias, so that it is
stored as zeros. Every variable of the file is converted or matches `UNUSED`; any other one is an
error.
"""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BINARY_VERSION = 6
TYPES = {0: np.float32, 4: np.float16}
# Constants of CTranslate2's runtime, of which only the number of heads is read.
UNUSED = (
    "(en|de)coder/"
    "(activation|alibi|alignment_heads|alignment_layer|num_heads|pre_norm|scale_embeddings|"
    "start_from_zero_embedding)"
)


class BinaryReader:
    """Reads numbers, texts and bytes one after the other, all little-endian."""

    def __init__(self, data: bytes):
        self.data = data
        self.position = 0

    def number(self, kind: str) -> int:
        """Read a number of a type of the struct module: B, H or I."""
        value = struct.unpack_from("<" + kind, self.data, self.position)[0]
        self.position += struct.calcsize("<" + kind)
        return value

    def text(self) -> str:
        length = self.number("H")
        text = self.data[self.position : self.position + length]
        self.position += length
        return text.rstrip(b"\0").decode()

    def array(self, dtype: type, num_bytes: int) -> np.ndarray:
        count = num_bytes // np.dtype(dtype).itemsize
        values = np.frombuffer(self.data, dtype, count, self.position)
        self.position += num_bytes
        return values


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Read all variables of a file, by name, in their stored precision.

    Raises:
        ValueError: the file is not a Whisper model of the known binary version.
    """
    reader = BinaryReader(path.read_bytes())
    version = reader.number("I")
    specification = reader.text()
    reader.number("I")  # The revision.
    count = reader.number("I")
    if version != BINARY_VERSION or specification != "WhisperSpec":
        raise ValueError(
            f"{path} is {specification} of binary version {version}, not WhisperSpec of version "
            f"{BINARY_VERSION}."
        )
    variables = {}
    for _ in range(count):
        name = reader.text()
        rank = reader.number("B")
        sizes = [reader.number("I") for _ in range(rank)]
        dtype = TYPES.get(reader.number("B"), np.uint8)
        values = reader.array(dtype, reader.number("I"))
        # A type that is not in TYPES stays an array of bytes.
        has_known_type = values.size == np.prod(sizes, dtype=int)
        variables[name] = values.reshape(sizes) if has_known_type else values
    return variables


def convert_linear(
    name: str, prefix: str, layers: list[str], variables: dict[str, np.ndarray]
) -> dict[str, Tensor]:
    """Split a fused linear layer into Whisper's layers.

    Args:
        name: the fused layer, which is removed from `variables`.
        prefix: prefix of the names of Whisper's layers.
        layers: their names, in the order in which they are fused.
    """
    weights = np.split(variables.pop(f"{name}/weight"), len(layers))
    biases = np.split(variables.pop(f"{name}/bias"), len(layers))
    state = {}
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        state[f"{prefix}.{layer}.weight"] = torch.tensor(weight)
        if layer != "key":
            state[f"{prefix}.{layer}.bias"] = torch.tensor(bias)
        elif bias.any():
            raise ValueError(f"{name}: the bias of Whisper's key is not zero.")
    return state


def convert_norm(name: str, prefix: str, variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Convert a layer norm, which is removed from `variables`."""
    gamma = variables.pop(f"{name}/gamma")
    beta = variables.pop(f"{name}/beta")
    return {f"{prefix}.weight": torch.tensor(gamma), f"{prefix}.bias": torch.tensor(beta)}


def convert_block(side: str, number: int, variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Convert a transformer block of the encoder or the decoder."""
    source = f"{side}/layer_{number}"
    target = f"{side}.blocks.{number}"
    state = {}

    attention = f"{source}/self_attention"
    state |= convert_linear(
        f"{attention}/linear_0", f"{target}.attn", ["query", "key", "value"], variables
    )
    state |= convert_linear(f"{attention}/linear_1", f"{target}.attn", ["out"], variables)
    if side == "decoder":
        cross = f"{source}/attention"
        cross_target = f"{target}.cross_attn"
        state |= convert_linear(f"{cross}/linear_0", cross_target, ["query"], variables)
        state |= convert_linear(f"{cross}/linear_1", cross_target, ["key", "value"], variables)
        state |= convert_linear(f"{cross}/linear_2", cross_target, ["out"], variables)

    state |= convert_norm(f"{attention}/layer_norm", f"{target}.attn_ln", variables)
    state |= convert_norm(f"{source}/ffn/layer_norm", f"{target}.mlp_ln", variables)
    if side == "decoder":
        state |= convert_norm(f"{cross}/layer_norm", f"{target}.cross_attn_ln", variables)

    # Whisper's mlp is a sequence of a linear layer (0), an activation (1) and a linear layer (2).
    state |= convert_linear(f"{source}/ffn/linear_0", f"{target}.mlp", ["0"], variables)
    state |= convert_linear(f"{source}/ffn/linear_1", f"{target}.mlp", ["2"], variables)
    return state


def count_layers(side: str, variables: dict[str, np.ndarray]) -> int:
    """Return the number of transformer blocks of the encoder or the decoder."""
    matches = [re.match(rf"{side}/layer_(\d+)/", name) for name in variables]
    return 1 + max(int(match[1]) for match in matches if match)


def convert(path: Path) -> dict[str, Any]:
    """Convert a file to the checkpoint `{"dims", "model_state_dict"}`.

    `whisper.load_model` loads the checkpoint. The precision is that of the file.

    Raises:
        ValueError: the file is of another kind, or has an unknown variable.
    """
    variables = read_variables(path)
    heads = int(variables["encoder/num_heads"].view(np.int16).ravel()[0])
    state = {}
    num_layers = {}
    for side in ("encoder", "decoder"):
        num_layers[side] = count_layers(side, variables)
        for number in range(num_layers[side]):
            state |= convert_block(side, number, variables)
        positions = variables.pop(f"{side}/position_encodings/encodings")
        state[f"{side}.positional_embedding"] = torch.tensor(positions)
    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            value = variables.pop(f"encoder/{name}/{kind}")
            state[f"encoder.{name}.{kind}"] = torch.tensor(value)
    state |= convert_norm("encoder/layer_norm", "encoder.ln_post", variables)
    state |= convert_norm("decoder/layer_norm", "decoder.ln", variables)
    embeddings = variables.pop("decoder/embeddings/weight")
    state["decoder.token_embedding.weight"] = torch.tensor(embeddings)

    unknown = [name for name in variables if not re.fullmatch(UNUSED, name)]
    if unknown:
        raise ValueError(f"{path} has unknown variables: {unknown[:5]}")

    width = state["encoder.conv1.weight"].shape[0]
    dims = {
        "n_mels": state["encoder.conv1.weight"].shape[1],
        "n_audio_ctx": state["encoder.positional_embedding"].shape[0],
        "n_audio_state": width,
        "n_audio_head": heads,
        "n_audio_layer": num_layers["encoder"],
        "n_vocab": state["decoder.token_embedding.weight"].shape[0],
        "n_text_ctx": state["decoder.positional_embedding"].shape[0],
        "n_text_state": width,
        "n_text_head": heads,
        "n_text_layer": num_layers["decoder"],
    }
    return {"dims": dims, "model_state_dict": state}
