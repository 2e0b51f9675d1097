"""Whisper weights in CTranslate2's file -> an openai-whisper checkpoint `{"dims", "model_state_dict"}`.

Notable:
- The file (binary version 6): u32 version; str spec; u32 revision; u32 count; then for each variable str name, u8 rank,
  u32 sizes, u8 type, u32 bytes, data; then u32 count and pairs of str for aliases. A str is u16 length, bytes, NUL.
- Query, key and value are one matrix there; Whisper's key has no bias, which is stored as zeros.
- Every variable is used or listed in `UNUSED`; another one is an error.
"""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TYPES = {0: np.float32, 4: np.float16}
# Constants of CTranslate2's runtime; the number of heads is the one that is read.
UNUSED = (
    "(en|de)coder/"
    "(activation|alibi|alignment_heads|alignment_layer|num_heads|pre_norm|scale_embeddings|start_from_zero_embedding)"
)


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Every variable of the file by name, each as it is stored."""
    data, place = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal place
        value = struct.unpack_from("<" + kind, data, place)[0]
        place += struct.calcsize("<" + kind)
        return value

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return data[place - length : place].rstrip(b"\0").decode()

    version, spec, _, count = number("I"), text(), number("I"), number("I")
    if (version, spec) != (6, "WhisperSpec"):
        raise ValueError(
            f"{path} is {spec} of binary version {version}, not WhisperSpec of version 6."
        )
    variables = {}
    for _ in range(count):
        name = text()
        sizes = [number("I") for _ in range(number("B"))]
        kind, length = TYPES.get(number("B"), np.uint8), number("I")
        values = np.frombuffer(data, kind, length // np.dtype(kind).itemsize, place)
        variables[name] = (
            values.reshape(sizes) if values.size == np.prod(sizes, dtype=int) else values
        )
        place += length
    return variables


def attention(
    name: str, ours: str, parts: list[str], variables: dict[str, np.ndarray]
) -> dict[str, Tensor]:
    """One fused linear layer -> its parts, by name."""
    weights = np.split(variables.pop(f"{name}/weight"), len(parts))
    biases = np.split(variables.pop(f"{name}/bias"), len(parts))
    state = {}
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        state[f"{ours}.{part}.weight"] = torch.tensor(weight)
        if part != "key":
            state[f"{ours}.{part}.bias"] = torch.tensor(bias)
        elif bias.any():
            raise ValueError(f"{name}: the bias of Whisper's key is not zero.")
    return state


def block(side: str, number: int, variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """One transformer block."""
    theirs, ours, state = f"{side}/layer_{number}", f"{side}.blocks.{number}", {}
    state |= attention(
        f"{theirs}/self_attention/linear_0", f"{ours}.attn", ["query", "key", "value"], variables
    )
    state |= attention(f"{theirs}/self_attention/linear_1", f"{ours}.attn", ["out"], variables)
    norms = {"self_attention/layer_norm": "attn_ln", "ffn/layer_norm": "mlp_ln"}
    if side == "decoder":
        cross = f"{theirs}/attention/linear_"
        for index, parts in enumerate((["query"], ["key", "value"], ["out"])):
            state |= attention(f"{cross}{index}", f"{ours}.cross_attn", parts, variables)
        norms["attention/layer_norm"] = "cross_attn_ln"
    for name, kept in norms.items():
        state |= norm(f"{theirs}/{name}", f"{ours}.{kept}", variables)
    for index, kept in ((0, 0), (1, 2)):
        state |= attention(f"{theirs}/ffn/linear_{index}", f"{ours}.mlp", [str(kept)], variables)
    return state


def norm(name: str, ours: str, variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    gamma, beta = variables.pop(f"{name}/gamma"), variables.pop(f"{name}/beta")
    return {f"{ours}.weight": torch.tensor(gamma), f"{ours}.bias": torch.tensor(beta)}


def convert(path: Path) -> dict[str, Any]:
    """The checkpoint as `whisper.load_model` takes it, in the precision of the file.

    Raises:
        ValueError: the file is of another kind, or holds a variable that is not known here.
    """
    variables = read_variables(path)
    heads = int(variables["encoder/num_heads"].view(np.int16).ravel()[0])
    state, depth = {}, {}
    for side in ("encoder", "decoder"):
        depth[side] = 1 + max(
            int(m[1]) for m in (re.match(rf"{side}/layer_(\d+)/", name) for name in variables) if m
        )
        for number in range(depth[side]):
            state |= block(side, number, variables)
        position = variables.pop(f"{side}/position_encodings/encodings")
        state[f"{side}.positional_embedding"] = torch.tensor(position)
    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            state[f"encoder.{name}.{kind}"] = torch.tensor(variables.pop(f"encoder/{name}/{kind}"))
    state |= norm("encoder/layer_norm", "encoder.ln_post", variables) | norm(
        "decoder/layer_norm", "decoder.ln", variables
    )
    state["decoder.token_embedding.weight"] = torch.tensor(
        variables.pop("decoder/embeddings/weight")
    )
    left_over = [name for name in variables if not re.fullmatch(UNUSED, name)]
    if left_over:
        raise ValueError(f"{path} holds variables that are not known here: {left_over[:5]}")
    width = state["encoder.conv1.weight"].shape[0]
    dims = {
        "n_mels": state["encoder.conv1.weight"].shape[1],
        "n_audio_ctx": state["encoder.positional_embedding"].shape[0],
        "n_audio_state": width,
        "n_audio_head": heads,
        "n_audio_layer": depth["encoder"],
        "n_vocab": state["decoder.token_embedding.weight"].shape[0],
        "n_text_ctx": state["decoder.positional_embedding"].shape[0],
        "n_text_state": width,
        "n_text_head": heads,
        "n_text_layer": depth["decoder"],
    }
    return {"dims": dims, "model_state_dict": state}
