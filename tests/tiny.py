"""A model small enough to build in a test: an ear of two blocks and 64 frames, a language model of two layers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ltu import CavMaeConfig, LtuConfig, LtuForConditionalGeneration, LtuProcessor
from ltu.configuration_ltu import hash_language_model

GOLDEN = Path(__file__).parent / "golden"
LLM = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def audio_config() -> CavMaeConfig:
    """0.64 s of 32 bins -> 2 audio tokens of width 32."""
    return CavMaeConfig(
        num_mel_bins=32, num_frames=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )


def write_llm(
    folder: Path,
    model_type: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    **settings: Any,
) -> Path:
    """A language model with random weights and a tokenizer (the golden one), as Hugging Face folders are."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(LLM | SPECIAL | settings), max_position_embeddings=2048)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # Larger than the usual init, so that one token differs clearly from another.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.to(dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return folder
    for file in (GOLDEN / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def write_checkpoint(
    folder: Path, llm: Path, lora: dict | None = None, seed: int = 0, prompt_template: dict | None = None
) -> Path:
    """A checkpoint folder around that language model; a LoRA in it does something."""
    torch.manual_seed(seed)
    text_config = AutoConfig.from_pretrained(llm)
    config = LtuConfig(
        audio_config=audio_config(),
        text_config=text_config,
        language_model=str(llm),
        language_model_sha256=hash_language_model(llm),
        lora=lora,
        prompt_template=prompt_template,
    )
    # AutoTokenizer opens the golden tokenizer in a Qwen2 folder as a Qwen2 tokenizer without words.
    golden = (llm / "tokenizer.model").is_file()
    processor = LtuProcessor.from_config(config, GOLDEN / "tokenizer" if golden else llm)
    model = LtuForConditionalGeneration(config, language_model=AutoModelForCausalLM.from_pretrained(llm))
    torch.nn.init.normal_(model.multi_modal_projector.linear.weight, std=0.3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def clip(seed: int, seconds: float = 0.5) -> np.ndarray:
    """Noise, (samples,) at 16 kHz."""
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)


def write_rows(folder: Path, count: int, seed: int = 0, without_audio: int = 0) -> Path:
    """Rows of unequal length about clips of noise; the first `without_audio` have none."""
    import soundfile

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        soundfile.write(folder / f"{index}.wav", clip(seed + index), 16_000)
        words = " ".join(rng.choice(["a", "dog", "rain", "loud", "bell", "far", "sound"], rng.integers(1, 9)))
        audio_id = "empty" if index < without_audio else f"{index}.wav"
        rows.append({"instruction": f"What is it? {words}", "input": "", "audio_id": audio_id, "output": words})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"
