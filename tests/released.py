"""Builds the tiny golden model as the original would have released it.

That is the folder of a language model, and a file of the rest. Every value comes from
`golden/rule_init.py`, names and shapes from `golden/layout_*.json`. The language model is tiny, but
the audio encoder has its full size: the file has 340 MB (LTU) or 160 MB (LTU-AS).
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ltu import LtuForConditionalGeneration
from ltu.checkpoints.original_checkpoints import ORIGINAL_KEYS, rename_keys
from ltu.convert_checkpoint import main
from tests.golden.rule_init import PREFIX, rule

GOLDEN = Path(__file__).parent / "golden"
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


CUTOFF = 96  # Text tokens of an example, in all golden batches.
# Bound of gradients and of trained weights: sums of many terms, each rounded to 6e-8.
RELATIVE = 2e-5


def worst(found: torch.Tensor, expected: np.ndarray) -> float:
    """Return the largest difference of two arrays of the same shape."""
    assert tuple(found.shape) == expected.shape
    return float(np.abs(found.detach().numpy() - expected).max())


def stored(name: str) -> dict[str, np.ndarray]:
    return np.load(GOLDEN / f"{name}.npz")


def read(name: str) -> dict | list:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@dataclass
class Run:
    """Results of a forward and a backward pass on a golden batch."""

    batch: dict[str, torch.Tensor]
    audio: torch.Tensor  # (clips, tokens, hidden)
    logits: torch.Tensor  # (batch, text, vocabulary)
    loss: float
    gradients: dict[str, torch.Tensor]


def run_batch(model: LtuForConditionalGeneration, batch: dict[str, torch.Tensor]) -> Run:
    """Run a forward and a backward pass with all weights trainable, but no optimizer step."""
    audio: list[torch.Tensor] = []
    projector = model.multi_modal_projector
    hook = projector.register_forward_hook(lambda *call: audio.append(call[2].detach()))
    model.set_trainable("all")
    output = model(**batch)
    hook.remove()
    output.loss.backward()
    gradients = {}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[key] = parameter.grad
    model.zero_grad(set_to_none=True)
    logits = output.logits.detach()[:, model.config.num_audio_tokens :]
    return Run(batch, audio[0], logits, output.loss.item(), gradients)


def our_name(key: str) -> str:
    """Return our name of a key of the original, by the rules of the conversion."""
    placed, _ = rename_keys({key: None}, ORIGINAL_KEYS, (PREFIX,), "the layout")
    return next(iter(placed))


def narrow(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the shapes of a file whose audio encoder is small.

    It is a CAV-MAE 64 wide with two blocks, or a TLTR of Whisper tiny (384 wide).
    """
    sizes = {768: 64, 2304: 192, 3072: 256, 1280: 384, 5120: 1536}
    narrowed = {}
    for key, shape in shapes.items():
        if not re.search(r"blocks_a\.(?!0\.)", key):
            narrowed[key] = [sizes.get(size, size) for size in shape]
    return narrowed


def trained_state(layout: str = "layout_ltu") -> dict[str, torch.Tensor]:
    """Return what the original's Trainer saves: LoRA, audio encoder and projection."""
    shapes = read(layout)["tiny.lora_all"]["saved_by_trainer"]
    return {key: torch.from_numpy(rule(key, tuple(shape))) for key, shape in shapes.items()}


def write_llm(folder: Path) -> Path:
    """Write a Hugging Face folder with tokenizer, such as the original was trained with."""
    shutil.copytree(GOLDEN / "tokenizer", folder)
    shapes = read("layout_ltu")["tiny.lora_all"]["base_state_dict"]
    tensors = {}
    for key, shape in shapes.items():
        if "audio" not in key and "rotary" not in key:
            tensors[key] = torch.from_numpy(rule(key, tuple(shape)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def convert(state: dict[str, torch.Tensor], llm: Path, folder: Path, main: Callable = main) -> Path:
    """Save a state dict as the original does, and convert it, without dropout of LoRA."""
    file = folder.with_suffix(".bin")
    torch.save(state, file)
    flags = ["--llm", str(llm), "--checkpoint", str(file), "--output_dir", str(folder)]
    try:
        main([*flags, "--lora_dropout", "0"])
    finally:
        file.unlink()
    return folder
