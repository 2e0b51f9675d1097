"""Tests the wire format between processor, collator, model and trainer on a tiny model."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from ltu import LtuConfig, LtuForConditionalGeneration, LtuProcessor
from ltu.models.generation_ltu import find_cache
from ltu.training.collator import LtuCollator
from tests.tiny import GOLDEN, LLM, LORA, audio_config, clip, write_checkpoint, write_llm

FIXED = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("contract")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def model(folder):
    return LtuForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return LtuProcessor.from_pretrained(folder)


QUESTIONS = [
    "What is it?",
    "Which of the two sounds comes first, and why do you think so?",
    "Loud?",
    "Name the sound.",
]
CLIPS = [clip(1), clip(2, 2.0), None, clip(3, 0.1)]


def answers(model, batch, **kwargs):
    """Return the generated tokens of each row."""
    return model.generate(**batch, **(FIXED | kwargs))[:, batch["input_ids"].shape[1] :].tolist()


# --- the sequence


def test_sequence_is_audio_padding_text(processor, model):
    batch = processor(text=QUESTIONS, audio=CLIPS)
    num_tokens = model.config.num_audio_tokens
    audio = model.config.audio_token_id
    assert (
        audio == model.config.text_config.vocab_size == model.get_output_embeddings().out_features
    )
    assert batch["input_features"].shape == (3, 64, 32)
    for row, (question, audio_clip) in enumerate(zip(QUESTIONS, CLIPS, strict=True)):
        ids = batch["input_ids"][row].tolist()
        mask = batch["attention_mask"][row].tolist()
        prompt = processor.prompt(question)
        text = [1, *processor.tokenizer(prompt, add_special_tokens=False).input_ids]
        assert ids[-len(text) :] == text and mask[-len(text) :] == [1] * len(text)
        has_audio = audio_clip is not None
        assert ids[:num_tokens] == [audio if has_audio else processor.pad_token_id] * num_tokens
        assert mask[:num_tokens] == [int(has_audio)] * num_tokens
        assert not any(mask[num_tokens : len(ids) - len(text)])


def test_collator_pads_to_eight_and_labels_the_text(processor):
    rows = [
        {"instruction": "a", "output": "bell"},
        {"instruction": "a longer one, by far", "output": "a dog and rain"},
    ]
    items = []
    for row in rows:
        ids, labels = processor.encode_example(row, 96)
        items.append({"input_ids": ids, "labels": labels, "input_features": torch.zeros(64, 32)})
    plain = LtuCollator(processor)(items)
    original = LtuCollator(processor, original_positions=True)(items)
    length = plain["input_ids"].shape[1]
    assert (length - 2) % 8 == 0
    assert torch.equal(plain["input_ids"], original["input_ids"])
    assert "position_ids" not in plain
    assert torch.equal(original["position_ids"][1], torch.arange(length))
    start = length - len(items[0]["input_ids"])
    # The original predicts <s> from the padding token before it.
    assert plain["labels"][0, start] == -100 and original["labels"][0, start] == 1
    assert plain["labels"][0, start + 1 :].tolist() == items[0]["labels"][1:]
    assert (plain["labels"][:, :2] == -100).all()


def test_a_literal_control_token_stays_text(processor):
    ids = processor.encode(processor.prompt("a <s> and </s> typed"))
    assert ids.count(1) == 1 and 2 not in ids


# --- the model


def test_padding_may_be_anywhere(model, processor):
    batch = processor(text=QUESTIONS[:2], audio=CLIPS[:2])
    length = batch["input_ids"].shape[1]
    audio = 2
    padding = int((batch["attention_mask"][0] == 0).sum())
    # Move the padding of the first row in front of its audio.
    order = torch.arange(length).repeat(2, 1)
    order[0] = torch.cat(
        [
            torch.arange(audio, audio + padding),
            torch.arange(audio),
            torch.arange(audio + padding, length),
        ]
    )
    moved = {key: batch[key].gather(1, order) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**batch).logits
        found = model(**moved, input_features=batch["input_features"]).logits
    start = audio + padding
    torch.testing.assert_close(found[:, start:], expected[:, start:], atol=1e-5, rtol=0)


def test_without_a_mask_all_tokens_are_attended_to(model, processor):
    batch = processor(text=QUESTIONS[:1], audio=CLIPS[:1])
    # transformers would take these positions for those of packed sequences.
    gaps = torch.arange(batch["input_ids"].shape[1])[None] * 2
    with torch.no_grad():
        expected = model(**batch, position_ids=gaps).logits
        del batch["attention_mask"]
        torch.testing.assert_close(
            model(**batch, position_ids=gaps).logits, expected, atol=1e-6, rtol=0
        )


def test_a_loaded_language_model_computes_as_before(folder, processor):
    """Building LTU around a language model, from its own config, does not change it."""
    language_model = AutoModelForCausalLM.from_pretrained(folder.parent / "llm")
    text = processor.tokenizer("which of them is it?", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = language_model(text).logits
        config = LtuConfig(audio_config=audio_config(), text_config=language_model.config)
        model = LtuForConditionalGeneration(config, language_model=language_model)
        torch.testing.assert_close(model(text).logits, expected, atol=0, rtol=0)


def test_audio_changes_the_logits(model, processor):
    with torch.no_grad():
        logits = [
            model(**processor(text="What is it?", audio=[clip(seed)])).logits[0, -1]
            for seed in (1, 2)
        ]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_placeholders_must_match_clips(model, processor):
    batch = processor(text=QUESTIONS[:2], audio=CLIPS[:2])
    with pytest.raises(ValueError, match="4 audio placeholders .* 1 clips x 2 tokens = 2"):
        model(**(batch | {"input_features": batch["input_features"][:1]}))
    with pytest.raises(ValueError, match="4 audio placeholders"):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


@pytest.mark.parametrize(
    "decoding", [{}, {"num_beams": 3}, {"repetition_penalty": 1.3}, {"use_cache": False}]
)
def test_batch_equals_single(model, processor, decoding):
    alone = [
        answers(model, processor(text=q, audio=[c]), **decoding)[0]
        for q, c in zip(QUESTIONS, CLIPS, strict=True)
    ]
    assert answers(model, processor(text=QUESTIONS, audio=CLIPS), **decoding) == alone


def test_any_mix_equals_single(model, processor):
    """Random batches differ in lengths, order, and clips: none, shared or cut ones."""
    rng = np.random.default_rng(0)
    for _ in range(6):
        size = int(rng.integers(2, 6))
        questions = [
            " ".join(rng.choice(["bell", "rain", "why", "so", "?"], rng.integers(1, 30)))
            for _ in range(size)
        ]
        clips = [
            None if rng.random() < 0.3 else clip(int(rng.integers(5)), rng.uniform(0.03, 3))
            for _ in range(size)
        ]
        alone = [
            answers(model, processor(text=q, audio=[c]))[0]
            for q, c in zip(questions, clips, strict=True)
        ]
        assert answers(model, processor(text=questions, audio=clips)) == alone


def test_repetition_penalty_counts_text_only(model, processor):
    batch = processor(text=QUESTIONS[:2], audio=CLIPS[:2])
    # A padding token that is a real token is still not text.
    batch["input_ids"][batch["attention_mask"] == 0] = 300
    found = answers(model, batch, repetition_penalty=1.5)
    for row in range(2):
        ids = processor(text=QUESTIONS[row], audio=[CLIPS[row]])
        sequence = ids["input_ids"][0]
        features = ids["input_features"]
        expected = []
        for _ in range(10):
            with torch.no_grad():
                output = model(input_ids=sequence[None], input_features=features)
            scores = output.logits[0, -1].clone()
            seen = sequence[sequence < 512].unique()
            scores[seen] = torch.where(scores[seen] < 0, scores[seen] * 1.5, scores[seen] / 1.5)
            scores[2] = -torch.inf
            expected.append(int(scores.argmax()))
            sequence = torch.cat([sequence, scores.argmax()[None]])
        assert found[row] == expected


def test_sampling_repeats_with_its_seed(model, processor):
    batch = processor(text=QUESTIONS, audio=CLIPS)
    sampling = {
        "do_sample": True,
        "temperature": 2.0,
        "top_p": 0.95,
        "top_k": 500,
        "repetition_penalty": 1.1,
    }
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(answers(model, batch, **sampling))
    assert runs[0] == runs[1] != runs[2]


def two_clips_per_row(processor):
    """Return a batch whose row 0 has clips 0 and 1, and whose row 1 has clip 2."""
    audio = processor.audio_token_id
    text = processor.encode(processor.prompt("Loud?"))
    rows = [[audio] * 4 + text, [audio] * 2 + [0] * 2 + text]
    ids = torch.tensor(rows)
    features = processor.feature_extractor([clip(1), clip(2), clip(3)]).input_features
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "input_features": features}


@pytest.mark.parametrize("decoding", [{"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
def test_rows_with_two_clips_expand_by_row(model, processor, decoding):
    batch = two_clips_per_row(processor)
    alone = []
    for row, clips in ((0, [0, 1]), (1, [2])):
        seen = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][seen][None]
        features = batch["input_features"][clips]
        single = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "input_features": features,
        }
        alone.append(answers(model, single, **decoding)[0])
    assert answers(model, batch, **decoding) == alone
    assert alone[0] != alone[1]


def test_num_return_sequences(model, processor):
    batch = two_clips_per_row(processor)
    found = answers(model, batch, num_beams=2, num_return_sequences=2)
    assert len(found) == 4 and [found[0], found[2]] == answers(model, batch, num_beams=2)


def test_one_clip_many_questions(model, processor):
    batch = processor(text=QUESTIONS, audio=[CLIPS[0]] * 4)
    shared = batch | {
        "input_features": batch["input_features"][:1],
        "audio_index": torch.zeros(4, dtype=torch.long),
    }
    assert answers(model, shared) == answers(model, batch)
    assert answers(model, shared, num_beams=2) == answers(model, batch, num_beams=2)


@pytest.mark.parametrize("beams", [1, 3])
def test_one_audio_prefix_is_shared(model, processor, beams):
    """The audio is encoded once, and its cache is repeated for each question and beam."""
    batch = processor(text=QUESTIONS, audio=[CLIPS[0]] * 4)
    with torch.no_grad():
        prefix = model(
            input_ids=batch["input_ids"][:1, :2],
            input_features=batch["input_features"][:1],
            use_cache=True,
        )
    cache_name, cache = find_cache(prefix)
    cache.batch_repeat_interleave(4 * beams)
    prefixed = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    prefixed[cache_name] = cache
    assert answers(model, prefixed, num_beams=beams) == answers(model, batch, num_beams=beams)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "gemma"])
def test_any_causal_lm(tmp_path, model_type):
    targets = ["query_key_value"] if model_type == "gpt_neox" else ["q_proj", "v_proj"]
    llm = write_llm(tmp_path / "llm", model_type)
    folder = write_checkpoint(tmp_path / "checkpoint", llm, LORA | {"target_modules": targets})
    model = LtuForConditionalGeneration.from_pretrained(folder)
    processor = LtuProcessor.from_pretrained(folder)
    alone = [
        answers(model, processor(text=q, audio=[c]))[0]
        for q, c in zip(QUESTIONS, CLIPS, strict=True)
    ]
    assert answers(model, processor(text=QUESTIONS, audio=CLIPS), repetition_penalty=1.0) == alone


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_old_llama_folders_add_bos(folder, processor, tmp_path, add_bos):
    """An old Llama folder has no setting for <s>, which is added; a setting survives saving."""
    for file in (GOLDEN / "tokenizer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["add_bos_token"] = add_bos
    settings = {key: value for key, value in settings.items() if value is not None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    fresh = LtuProcessor.from_config(LtuConfig.from_pretrained(folder), tmp_path)
    fresh.save_pretrained(tmp_path / "saved")
    for made in (fresh, LtuProcessor.from_pretrained(tmp_path / "saved")):
        assert made.encode("a dog") == processor.encode("a dog")[add_bos is False :]


def test_a_language_model_without_bos(folder, processor):
    plain = LtuProcessor.from_pretrained(folder)
    plain.tokenizer.bos_token = None
    with_bos, without = (
        p(text="Loud?", audio=[clip(1)])["input_ids"][0].tolist() for p in (processor, plain)
    )
    assert without == with_bos[:2] + with_bos[3:]


# --- the checkpoint folder


def test_folder_holds_what_was_trained(folder, model):
    keys = set(load_file(folder / "model.safetensors"))
    assert keys == {
        k for k in model.state_dict() if ".lora_" in k or not k.startswith("language_model.")
    }
    assert "language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in keys
    assert all(
        value.dtype == torch.float32 for value in load_file(folder / "model.safetensors").values()
    )
    stored = json.loads((folder / "config.json").read_text())
    assert stored["language_model"] == "../llm" and len(stored["language_model_sha256"]) == 64


def test_auto_classes_open_it(folder, model, processor):
    assert isinstance(AutoConfig.from_pretrained(folder), LtuConfig)
    assert isinstance(AutoProcessor.from_pretrained(folder), LtuProcessor)
    batch = processor(text=QUESTIONS, audio=CLIPS)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(**batch).logits
        torch.testing.assert_close(found, model(**batch).logits, atol=0, rtol=0)


def test_save_then_load(folder, model, processor, tmp_path):
    shutil.copytree(folder.parent / "llm", tmp_path / "llm")
    moved = LtuForConditionalGeneration.from_pretrained(folder, language_model=tmp_path / "llm")
    moved.save_pretrained(tmp_path / "deep" / "copy")
    assert (
        json.loads((tmp_path / "deep" / "copy" / "config.json").read_text())["language_model"]
        == "../../llm"
    )
    again = LtuForConditionalGeneration.from_pretrained(tmp_path / "deep" / "copy")
    batch = processor(text=QUESTIONS, audio=CLIPS)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=0, rtol=0)


def test_a_local_language_model_is_not_pushed(folder):
    with pytest.raises(ValueError, match="hub id"):
        LtuForConditionalGeneration.from_pretrained(folder).push_to_hub("someone/ltu")


def test_unknown_arguments_are_refused(folder):
    with pytest.raises(TypeError, match="no_such"):
        LtuForConditionalGeneration.from_pretrained(folder, no_such=1)


def test_a_penalty_of_one_is_no_penalty(model, processor):
    batch = processor(text=QUESTIONS[:2], audio=CLIPS[:2])
    plain = answers(model, batch)
    model.generation_config.repetition_penalty = 2.0
    assert answers(model, batch, repetition_penalty=1.0) == plain != answers(model, batch)
    model.generation_config.repetition_penalty = 1.0


def test_a_trained_language_model_is_saved_whole(folder, model, processor, tmp_path):
    whole = LtuForConditionalGeneration.from_pretrained(folder)
    whole.config.language_model = None
    whole.save_pretrained(tmp_path)
    again = LtuForConditionalGeneration.from_pretrained(tmp_path)
    batch = processor(text=QUESTIONS, audio=CLIPS)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=0, rtol=0)


def test_another_language_model_is_refused(folder, tmp_path):
    other = write_llm(tmp_path / "other", "qwen2")
    with pytest.raises(ValueError, match="--llm"):
        LtuForConditionalGeneration.from_pretrained(folder, language_model=other)
    with pytest.raises(FileNotFoundError, match="--llm"):
        LtuForConditionalGeneration.from_pretrained(folder, language_model=tmp_path / "nowhere")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_every_key_is_accounted_for(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "checkpoint")
    shutil.copytree(folder.parent / "llm", tmp_path / "llm")
    state = load_file(folder / "model.safetensors")
    if change == "missing":
        state.pop("audio_tower.pos_embed_a")
    else:
        state["stray"] = torch.zeros(1)
    save_file(state, tmp_path / "checkpoint" / "model.safetensors")
    with pytest.raises(
        ValueError, match="1 keys missing" if change == "missing" else "1 left over"
    ):
        LtuForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")


def test_trainable_parameters_are_fp32_on_a_bf16_language_model(folder, tmp_path):
    llm = write_llm(tmp_path / "llm", dtype=torch.bfloat16)
    model = LtuForConditionalGeneration.from_pretrained(
        write_checkpoint(tmp_path / "checkpoint", llm)
    )
    assert model.language_model.dtype == torch.bfloat16
    model.add_lora(**LORA)
    model.set_trainable("all")
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32} and any(".lora_" in name for name in trained)
    assert not any(name.startswith("language_model.") and ".lora_" not in name for name in trained)
    model.set_trainable("proj")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "multi_modal_projector.linear.weight",
        "multi_modal_projector.linear.bias",
    }


def test_seven_billion_parameters_on_the_meta_device():
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    with torch.device("meta"):
        model = LtuForConditionalGeneration(
            LtuConfig(text_config={"model_type": "llama"}, lora=lora)
        )
    model.set_trainable("all")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 93_065_216
    assert sum(p.numel() for p in model.parameters()) == 6_831_480_832


def test_lora_settings_that_peft_does_not_know_are_refused() -> None:
    """The names are those of peft's LoraConfig."""
    lora = {"r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(ValueError, match=r"lora\.lora_alpha is absent"):
        LtuConfig(text_config=LLM, lora=lora)
    config = LtuConfig(text_config=LLM, lora=lora | {"lora_alpha": 16})
    with pytest.raises(ValueError, match="no arguments of peft.*lora_alpha"):
        LtuForConditionalGeneration(config)
