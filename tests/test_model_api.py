"""Methods of transformers' models that users call on ours: vocabulary, attention, export."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ltu import LtuConfig, LtuForConditionalGeneration, LtuProcessor
from ltu_as import LtuAsConfig, LtuAsForConditionalGeneration, TltrConfig
from tests import tiny

TLTR = TltrConfig(hidden_size=32, num_whisper_layers=3, num_audio_tokens=4, num_layer_heads=2)


def make(kind: str = "ltu") -> LtuForConditionalGeneration:
    """A model that holds its language model."""
    torch.manual_seed(0)
    text_config = LlamaConfig(**(tiny.LLM | tiny.SPECIAL))
    if kind == "ltu_as":
        config = LtuAsConfig(audio_config=TLTR, text_config=text_config)
        return LtuAsForConditionalGeneration(config).eval()
    config = LtuConfig(audio_config=tiny.audio_config(), text_config=text_config)
    return LtuForConditionalGeneration(config).eval()


def make_batch(model: LtuForConditionalGeneration) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    num_audio = model.config.num_audio_tokens
    input_ids = torch.randint(3, 512, (2, num_audio + 5))
    input_ids[:, :num_audio] = model.config.audio_token_id
    features = torch.randn(2, *model.config.audio_config.feature_shape)
    mask = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": mask, "input_features": features}


@torch.no_grad()
def compute_logits(model: LtuForConditionalGeneration) -> torch.Tensor:
    return model(**make_batch(model)).logits


def test_resize_token_embeddings(tmp_path: Path) -> None:
    """New tokens move the placeholder, and are in the checkpoint; a named LLM lacks them."""
    llm = tiny.write_llm(tmp_path / "llm")
    folder = tiny.write_checkpoint(tmp_path / "model", llm, lora=tiny.LORA)
    model = LtuForConditionalGeneration.from_pretrained(folder)
    before = compute_logits(model)
    embeddings = model.resize_token_embeddings(520, mean_resizing=False)
    assert embeddings.weight.shape == (520, 64)
    assert model.get_input_embeddings() is embeddings
    assert model.get_output_embeddings().weight.shape == (520, 64)
    assert model.config.audio_token_id == 520
    after = compute_logits(model)
    assert torch.equal(after[..., :512], before)
    model.save_pretrained(tmp_path / "resized")
    opened = LtuForConditionalGeneration.from_pretrained(tmp_path / "resized")
    assert opened.config.language_model is None
    assert torch.equal(compute_logits(opened), after)
    processor = LtuProcessor.from_config(opened.config, tiny.GOLDEN / "tokenizer")
    batch = processor(text=["What is it?"], audio=[tiny.clip(0)], return_tensors="pt")
    assert opened.generate(**batch, max_new_tokens=2).shape[0] == 1


def test_resizing_to_the_same_size_keeps_the_language_model_elsewhere(tmp_path: Path) -> None:
    llm = tiny.write_llm(tmp_path / "llm")
    folder = tiny.write_checkpoint(tmp_path / "model", llm)
    model = LtuForConditionalGeneration.from_pretrained(folder)
    model.resize_token_embeddings(512)
    assert model.config.language_model == str(llm)


def test_embeddings_are_those_of_the_language_model() -> None:
    model = make()
    new_input, new_output = nn.Embedding(512, 64), nn.Linear(64, 512, bias=False)
    model.set_input_embeddings(new_input)
    model.set_output_embeddings(new_output)
    assert model.language_model.model.embed_tokens is new_input
    assert model.language_model.lm_head is new_output


def test_attention_of_a_language_model_in_the_checkpoint(tmp_path: Path) -> None:
    """It is chosen when the folder is opened, as that of a language model elsewhere is."""
    model = make()
    model.save_pretrained(tmp_path / "model")
    classes = (LtuForConditionalGeneration, AutoModelForCausalLM)
    for cls, attention in itertools.product(classes, ("eager", "sdpa")):
        opened = cls.from_pretrained(tmp_path / "model", attn_implementation=attention)
        assert opened.language_model.config._attn_implementation == attention
        torch.testing.assert_close(compute_logits(opened), compute_logits(model))
    assert "attn_implementation" not in (tmp_path / "model" / "config.json").read_text()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["ltu", "ltu_as"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, use_reentrant: bool) -> None:
    """Nor do parameters of the first block lack one, whose input needs none."""
    model = make(kind).train()
    model.set_trainable("full")
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    gradients = []
    for either in (model, checkpointed):
        batch = make_batch(either)
        either(**batch, labels=batch["input_ids"].clamp(max=511)).loss.backward()
        gradients.append({name: p.grad for name, p in either.named_parameters()})
    plain, recomputed = gradients
    with_gradient = {name for name, gradient in plain.items() if gradient is not None}
    assert {name for name, gradient in recomputed.items() if gradient is not None} == with_gradient
    for name in with_gradient:
        torch.testing.assert_close(recomputed[name], plain[name])


@pytest.mark.parametrize("kind", ["ltu", "ltu_as"])
def test_export(kind: str) -> None:
    """`torch.export` takes the model with its audio; clips and lengths are those of the example."""
    model = make(kind)
    batch = make_batch(model) | {"use_cache": False}
    with torch.no_grad():
        exported = torch.export.export(model, args=(), kwargs=batch, strict=False)
        torch.testing.assert_close(exported.module()(**batch).logits, model(**batch).logits)


def test_inputs_is_another_name_of_input_ids() -> None:
    model = make()
    batch = make_batch(model)
    named = model.generate(**batch, max_new_tokens=3, do_sample=False)
    batch["inputs"] = batch.pop("input_ids")
    assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), named)
