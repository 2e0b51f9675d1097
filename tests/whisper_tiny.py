"""Writes a tiny Whisper, with weights of tests/golden/rule_init.py, and an LTU-AS around it.

The Whisper has 4 layers of width 64.
"""

import json
import sys
from pathlib import Path

import torch
from whisper.model import ModelDimensions, Whisper

from ltu_as.convert_checkpoint import main as convert

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from rule_init import rule  # noqa: E402


def save_whisper(path: Path, suffix: str = "", is_sure: bool = True, **dims: int) -> str:
    """Save it. `suffix` gives other weights; an unsure one finds all words equally likely."""
    sizes = json.loads((GOLDEN / "whisper.json").read_text())["dims"] | dims
    model = Whisper(ModelDimensions(**sizes))
    weights = {
        key: torch.from_numpy(rule(key + suffix, p.shape)) for key, p in model.named_parameters()
    }
    weights["decoder.token_embedding.weight"] *= 1.0 if is_sure else 0.01
    model.load_state_dict(
        weights, strict=False
    )  # Whisper's sinusoids are a buffer, which it makes itself.
    torch.save({"dims": sizes, "model_state_dict": model.state_dict()}, path)
    return str(path)


def write_ltu_as(folder: Path, llm: Path) -> Path:
    """Write a new LTU-AS checkpoint and, next to it, its Whisper as `whisper.pt`.

    Args:
        folder: of the checkpoint.
        llm: folder of the language model.
    """
    whisper = save_whisper(folder.parent / "whisper.pt")
    flags = f"--init --llm {llm} --whisper {whisper} --feature_precision fp32 --num_layer_heads 2"
    convert(f"{flags} --output_dir {folder}".split())
    return folder
