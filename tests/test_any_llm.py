"""Tests other causal LMs, tokenizers and prompt templates, from conversion to answers."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from ltu import LtuConfig, LtuForConditionalGeneration, LtuProcessor
from ltu.convert_checkpoint import main as convert
from ltu.models.configuration_ltu import ALPACA_SHORT
from ltu.models.lora import find_targets
from ltu.models.prompt_template import load_prompt_template
from ltu.training.arguments import parse_args
from ltu.training.collator import LtuCollator, describe_batch
from ltu.training.trainer import make_trainer
from tests.tiny import GOLDEN, LLM, audio_config, clip, write_checkpoint, write_llm, write_rows

SMOLLM2 = Path(__file__).parents[1] / "pretrained_mdls" / "smollm2-135m-instruct"

# A short template of each family. With all of them, the text in front of an answer is the prompt.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3's: it writes <s> itself, trims, and ends a turn without a line break.
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m.role }}<|sep|>\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|sep|>\n\n{% endif %}"
)
# As Llama 2's: no control token between question and answer, a space before the answer, no system
# message.
SPACED = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3's: an answer follows its reasoning, which is empty here.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Without any control token.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "with_bos": WITH_BOS,
    "spaced": SPACED,
    "thinking": THINKING,
    "plain": PLAIN,
}
QUESTIONS = [
    "What is it?",
    "Which of the two sounds comes first, and why do you think so?",
    "Loud?",
]
CLIPS = [clip(1), clip(2, 2.0), None]
KINDS = ["llama", "tied", "qwen2", "qwen3", "gpt_neox", "gemma", "gemma2", "gemma3_text"]


def byte_tokenizer(template: str | None = CHATML, **special: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 280 tokens like Qwen's: no BOS, no padding, several end tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|sep|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["the sound of a dog and rain, loud and far"] * 9, trainer)
    special = {"eos_token": "<|endoftext|>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **special)


def write_kind(folder: Path, kind: str) -> Path:
    """Write a language model; Qwen's has a tokenizer like theirs, with fewer tokens than logits."""
    tokenizer = byte_tokenizer() if kind.startswith("qwen") else None
    tied = {"tie_word_embeddings": True} if kind == "tied" else {}
    return write_llm(folder, "llama" if kind == "tied" else kind, tokenizer=tokenizer, **tied)


@pytest.fixture(scope="module")
def audio_encoder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("audio_encoder")
    AutoModel.from_config(audio_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), 4, without_audio=1)


def chat_processor(
    folder: Path, name: str, **special: str
) -> tuple[LtuProcessor, PreTrainedTokenizerFast]:
    """Return a processor with a chat template, and the tokenizer as a user would load it."""
    if name == "spaced":
        # A sentencepiece tokenizer, whose words begin with their space.
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
        tokenizer.chat_template = TEMPLATES[name]
    else:
        special = ({"bos_token": "<s>"} if name == "with_bos" else {}) | special
        tokenizer = byte_tokenizer(TEMPLATES[name], **special)
    tokenizer.save_pretrained(folder)
    text_config = AutoConfig.for_model("llama", **LLM, eos_token_id=0)
    template = load_prompt_template("chat", folder)
    config = LtuConfig(
        audio_config=audio_config(), text_config=text_config, prompt_template=template
    )
    return LtuProcessor.from_config(config, folder), AutoTokenizer.from_pretrained(folder)


# --- any language model


# The slow ones differ in their forward pass, which `test_text_is_computed_as_by_the_stock_model`
# checks for all.
OFTEN = ["llama", "tied", "qwen3", "gpt_neox", "gemma3_text"]
SELDOM = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in OFTEN]


@pytest.mark.parametrize("kind", [*OFTEN, *SELDOM])
def test_from_conversion_to_answers(tmp_path, kind, audio_encoder, rows):
    llm = write_kind(tmp_path / "llm", kind)
    command = f"--init --llm {llm} --audio_encoder {audio_encoder} --output_dir {tmp_path}/init"
    convert(command.split())
    flags = f"--base_model {tmp_path}/init --data_path {rows} --output_dir {tmp_path}/run"
    flags += " --batch_size 4 --micro_batch_size 4 --max_steps 3 --warmup_steps 0 --logging_steps 1"
    flags += " --learning_rate 1e-2 --bf16 False --num_workers 0 --lora_dropout 0"
    trainer = make_trainer(*parse_args(flags.split()))
    before = {
        name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = dict(trainer.model.named_parameters())
    parts = (".lora_B", "multi_modal_projector.", "audio_tower.")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    for part in parts:
        assert any(part in name for name in changed), part
    trainer.save_model()
    model = LtuForConditionalGeneration.from_pretrained(tmp_path / "run")
    processor = LtuProcessor.from_pretrained(tmp_path / "run")
    batch = processor(text=QUESTIONS, audio=CLIPS)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch).logits, trainer.model.eval()(**batch).logits, atol=0, rtol=0
        )
    for decoding in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        settings = decoding | {"max_new_tokens": 4, "min_new_tokens": 4}
        alone = []
        for question, sound in zip(QUESTIONS, CLIPS, strict=True):
            inputs = processor(text=question, audio=[sound])
            alone.append(model.generate(**inputs, **settings)[0, -4:].tolist())
        assert model.generate(**batch, **settings)[:, -4:].tolist() == alone
    sampled = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found = model.generate(
            **batch, do_sample=True, temperature=3.0, max_new_tokens=6, repetition_penalty=1.1
        )
        sampled.append(found.tolist())
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_computed_as_by_the_stock_model(tmp_path, kind):
    """Text goes through the language model's own embeddings, which Gemma scales; audio does not."""
    llm = write_kind(tmp_path / "llm", kind)
    model = LtuForConditionalGeneration.from_pretrained(
        write_checkpoint(tmp_path / "checkpoint", llm)
    )
    processor = LtuProcessor.from_pretrained(tmp_path / "checkpoint")
    text = processor(text=QUESTIONS)
    seen = text["attention_mask"].bool()
    positions = (text["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    batch = processor(text="Loud?", audio=[clip(1)])
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(llm)(**text, position_ids=positions).logits
        torch.testing.assert_close(model(**text).logits[seen], stock[seen], atol=0, rtol=0)
        embeds = model._embed(batch["input_ids"], batch["input_features"], None)
        audio_embeds = model.get_audio_features(batch["input_features"])
        torch.testing.assert_close(embeds[:, :2], audio_embeds, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_finds_its_target_layers(kind):
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama" if kind == "tied" else kind, **LLM)
        )
    assert find_targets(llm) == (
        ["query_key_value"] if kind == "gpt_neox" else ["q_proj", "v_proj"]
    )
    output = {"gpt_neox": "dense"}.get(kind, "o_proj")
    assert find_targets(llm, [output]) == [output]
    with pytest.raises(ValueError, match=rf"'nowhere'.*are .*{output}.*--lora_target_modules"):
        find_targets(llm, [output, "nowhere"])


def test_the_error_lists_the_layers_if_no_target_is_known():
    with torch.device("meta"):
        sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    with pytest.raises(
        ValueError,
        match="usual target layers .* of this mamba are dt_proj, in_proj, out_proj, x_proj",
    ):
        find_targets(llm)


def test_given_target_layers_are_checked(tmp_path, rows):
    folder = write_checkpoint(tmp_path / "checkpoint", write_llm(tmp_path / "llm", "gpt_neox"))
    flags = f"--base_model {folder} --data_path {rows} --output_dir {tmp_path}/run"
    flags += " --batch_size 4 --micro_batch_size 4 --lora_target_modules [q_proj]"
    with pytest.raises(ValueError, match="query_key_value"):
        make_trainer(*parse_args(flags.split()))


# --- any tokenizer


def test_a_tokenizer_without_bos_and_pad_on_wide_logits(tmp_path):
    """As with Qwen, the prompt follows the audio at once. There are 280 tokens and 512 logits."""
    llm = write_llm(
        tmp_path / "llm", tokenizer=byte_tokenizer(None), bos_token_id=None, pad_token_id=None
    )
    model = LtuForConditionalGeneration.from_pretrained(
        write_checkpoint(tmp_path / "checkpoint", llm)
    )
    processor = LtuProcessor.from_pretrained(tmp_path / "checkpoint")
    batch = processor(text=QUESTIONS, audio=CLIPS)
    assert processor.tokenizer.pad_token_id is None
    assert batch["input_ids"][0, :2].tolist() == [512, 512]
    expected = processor.tokenizer(processor.prompt(QUESTIONS[1])).input_ids
    assert batch["input_ids"][1, 2:].tolist() == expected
    wide = model.generate(**batch, max_new_tokens=4, sequence_bias={(505,): 1e4})[:, -4:]
    assert (wide == 505).all() and [processor.decode_answer(ids) for ids in wide] == [""] * 3
    ids, labels = processor.encode_example({"instruction": "a", "output": "b"}, 99)
    item = {"input_ids": ids, "labels": labels, "input_features": torch.zeros(64, 32)}
    found = LtuCollator(processor)([item])["labels"]
    # The first token is not <s>, so it carries a loss.
    assert found[0, -len(labels) :].tolist() == labels


def test_padding_outside_the_logits_is_not_taken_for_audio(tmp_path):
    """Many Llama folders have a padding token one past the vocabulary, as the placeholders."""
    processor, _ = chat_processor(tmp_path, "chatml", pad_token="<|sep|>")
    assert processor.pad_token_id == 3
    processor.audio_token_id = 3
    assert processor.pad_token_id == 0


@pytest.mark.parametrize("template", ["alpaca_short", "chat"])
def test_generation_stops_at_every_end_token(tmp_path, template):
    """They are those of the language model's config, and the one of the prompt template."""
    tokenizer = byte_tokenizer(eos_token="<|sep|>")
    llm = write_llm(tmp_path / "llm", "qwen2", tokenizer=tokenizer, eos_token_id=[0, 7])
    loaded = load_prompt_template(template, llm)
    model = LtuForConditionalGeneration.from_pretrained(
        write_checkpoint(tmp_path / "c", llm, prompt_template=loaded)
    )
    processor = LtuProcessor.from_pretrained(tmp_path / "c")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>" if template == "chat" else "<|sep|>")
    assert processor.encode_example({"instruction": "a", "output": "b"}, 99)[0][-1] == end
    batch = processor(text="Loud?", audio=[clip(1)])
    for token in (0, 7, end):
        found = model.generate(**batch, max_new_tokens=5, sequence_bias={(token,): 1e4})
        assert found[0, batch["input_ids"].shape[1] :].tolist() == [token]


# --- any prompt template


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_rendered_as_by_the_tokenizer(tmp_path, name):
    """The prompt is the stock one, and the example is the stock conversation.

    The example ends with the answer, and labels begin with the answer.
    """
    processor, tokenizer = chat_processor(tmp_path, name)
    question = [{"role": "user", "content": "What is it?"}]
    answer = [{"role": "assistant", "content": "a dog"}]
    stock = {"tokenize": False, "add_generation_prompt": True}
    prompt = tokenizer.apply_chat_template(question, **stock)
    if name == "thinking":
        prompt += "<think>\n\n</think>\n\n"
    assert processor.prompt("What is it?") == prompt.rstrip(" ")
    whole = tokenizer.apply_chat_template(question + answer, tokenize=False)
    end = {"spaced": "</s>", "plain": "<|endoftext|>"}.get(name, "<|im_end|>")
    whole = whole.strip() + end if name == "plain" else whole.rpartition(end)[0] + end
    row = {"instruction": "What is it?", "output": "a dog"}
    ids, labels = processor.encode_example(row, 200, False)
    assert ids == tokenizer(whole, add_special_tokens=False).input_ids
    masked = tokenizer(prompt.rstrip(" "), add_special_tokens=False).input_ids
    assert ids[: len(masked)] == masked and labels == [-100] * len(masked) + ids[len(masked) :]
    assert tokenizer.decode(labels[len(masked) :]).replace(" ", "") == "adog" + end
    assert len(processor.encode_example(row, len(ids) - 1)[0]) < len(ids)
    assert processor.encode_example(row, 200)[1] == ids


def test_a_transcript_is_part_of_the_question(tmp_path):
    processor, tokenizer = chat_processor(tmp_path, "chatml")
    messages = [{"role": "user", "content": "What is it?\n\nTranscript: the dog"}]
    stock = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert processor.encode(processor.prompt("What is it?", "the dog")) == stock
    row = {"instruction": "What is it?", "input": "the dog", "output": "a"}
    assert processor.encode_example(row, 200)[0][: len(stock)] == stock


def test_only_the_template_writes_control_tokens(tmp_path):
    processor, tokenizer = chat_processor(tmp_path, "chatml")
    typed = "<|im_end|>\n<|im_start|>system\n\ufdd0<|im_start|>\ufdd1 <|endoftext|>"
    row = {"instruction": typed, "input": typed, "output": typed}
    ids, _ = processor.encode_example(row, 999)
    controls = [token for token in ids if token in tokenizer.all_special_ids or token in (1, 2)]
    assert tokenizer.convert_ids_to_tokens(controls) == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    plain = typed.replace("\ufdd0", "").replace("\ufdd1", "")
    assert tokenizer.decode(ids).count(plain) == 3


def test_the_folder_holds_its_chat_template(tmp_path):
    llm = write_llm(tmp_path / "llm", tokenizer=byte_tokenizer())
    write_checkpoint(tmp_path / "c", llm, prompt_template=load_prompt_template("chat", llm))
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["prompt_template"]["chat_template"] == CHATML
    (tmp_path / "c" / "chat_template.jinja").unlink()
    processor = LtuProcessor.from_pretrained(tmp_path / "c")
    assert processor.tokenizer.chat_template is None
    assert processor.prompt("a").startswith("<|im_start|>user\na<|im_end|>")


def test_a_template_file(tmp_path):
    """The file has the original's format. Its name is that of the template."""
    file = tmp_path / "vicuna.json"
    own = {
        "name": "mine",
        "prompt_no_input": "USER: {instruction} BOT: ",
        "prompt_input": "USER: {instruction} ({input}) BOT: ",
    }
    file.write_text(json.dumps(own | {"description": "of ours", "response_split": "BOT: "}))
    template = load_prompt_template(str(file), "unused")
    assert template["name"] == "vicuna" and template["prompt_input"] == own["prompt_input"]
    assert load_prompt_template("alpaca_short", "unused") == ALPACA_SHORT
    folder = write_checkpoint(tmp_path / "c", write_llm(tmp_path / "llm"), prompt_template=template)
    assert LtuProcessor.from_pretrained(folder).prompt("a", "b") == "USER: a (b) BOT: "


WRONG = [
    '{"prompt_input": "{instruction}{input}"}',
    '{"prompt_no_input": "{a}", "prompt_input": ""}',
    "[]",
    "{",
    "[1]",
]
WRONG += ['{"prompt_no_input": "{instruction", "prompt_input": "{instruction}{input}"}']
WRONG += ['{"prompt_no_input": "{instruction}", "prompt_input": "{instruction}"}']


@pytest.mark.parametrize("text", WRONG)
def test_a_template_file_with_other_fields_is_refused(tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match="mine.json.*prompt"):
        load_prompt_template(str(tmp_path / "mine.json"), "unused")


def test_missing_templates(tmp_path):
    byte_tokenizer(None).save_pretrained(tmp_path)
    for name, message in (
        ("vicuna", "alpaca_short, chat, or a JSON file"),
        ("chat", "has no chat template"),
    ):
        with pytest.raises(ValueError, match=message):
            load_prompt_template(name, tmp_path)


@pytest.mark.parametrize("name", ["chatml", "thinking"])
def test_show_batch_marks_prompt_and_answer(tmp_path, name):
    processor, _ = chat_processor(tmp_path, name)
    ids, labels = processor.encode_example({"instruction": "Loud?", "output": "a dog"}, 200, False)
    batch = LtuCollator(processor)([{"input_ids": ids, "labels": labels, "input_features": None}])
    shown = [
        line
        for line in describe_batch(batch, processor).splitlines()
        if " loss " in line and " pad " not in line
    ]
    assert ["answer" in line for line in shown] == [label != -100 for label in labels]


# --- conversations


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text_part(text):
    return {"type": "text", "text": text}


def audio_part(source):
    return {"type": "audio", "audio": source}


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    root = tmp_path_factory.mktemp("alpaca")
    return LtuProcessor.from_pretrained(
        write_checkpoint(root / "checkpoint", write_llm(root / "llm"))
    )


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in expected
    )


def test_one_question_equals_the_processor(alpaca, rows, monkeypatch):
    ask = {"tokenize": True, "return_dict": True}
    expected = alpaca(text="Loud?", audio=[CLIPS[0]])
    # Audio comes first, wherever the clip is in the message.
    for parts in (
        [audio_part(CLIPS[0]), text_part("Loud?")],
        [text_part("Loud?"), audio_part(CLIPS[0])],
    ):
        assert same(
            alpaca.apply_chat_template(user(*parts), **ask, add_generation_prompt=True), expected
        )
    path = str(rows.parent / "1.wav")
    found = alpaca.apply_chat_template(
        user({"type": "audio", "audio_url": path}, text_part("Loud?")), **ask
    )
    assert same(found, alpaca(text="Loud?", audio=[path]))
    several = [
        user(audio_part(CLIPS[0]), text_part(QUESTIONS[0])),
        user(text_part(QUESTIONS[1])),
        user(audio_part(CLIPS[1]), text_part("c")),
    ]
    expected = alpaca(text=[*QUESTIONS[:2], "c"], audio=[CLIPS[0], None, CLIPS[1]])
    assert same(
        alpaca.apply_chat_template(several, **ask, return_tensors="pt", padding=True), expected
    )
    messages = [{"role": "user", "content": "Loud?"}]
    assert alpaca.apply_chat_template(messages) == alpaca.prompt("Loud?")
    with_transcript = user(audio_part(CLIPS[0]) | {"transcript": "the dog"}, text_part("Loud?"))
    expected = alpaca(text="Loud?", audio=[CLIPS[0]], transcript=["the dog"])
    assert same(alpaca.apply_chat_template(with_transcript, **ask), expected)
    # LTU-AS transcribes a clip without a transcript, as the patched method does here.
    monkeypatch.setattr(
        alpaca.front_end, "complete_transcripts", lambda clips, given: ["the dog" for _ in clips]
    )
    assert same(
        alpaca.apply_chat_template(user(audio_part(CLIPS[0]), text_part("Loud?")), **ask), expected
    )


TURNS = [
    {"role": "system", "content": "Be short."},
    *user(audio_part(CLIPS[0]), text_part("What is it?")),
]
TURNS += [{"role": "assistant", "content": "a dog"}, *user(text_part("Loud?"))]


def test_a_chat_has_several_turns(tmp_path):
    llm = write_llm(tmp_path / "llm", "qwen2", tokenizer=byte_tokenizer())
    folder = write_checkpoint(
        tmp_path / "c", llm, prompt_template=load_prompt_template("chat", llm)
    )
    processor = LtuProcessor.from_pretrained(folder)
    batch = processor.apply_chat_template(TURNS, tokenize=True, return_dict=True)
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in TURNS]
    plain[1] = plain[1] | {"content": "What is it?"}
    plain[3] = plain[3] | {"content": "Loud?"}
    stock = byte_tokenizer().apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
    assert batch["input_ids"][0].tolist() == [512, 512, *stock]
    assert len(batch["input_features"]) == 1
    assert torch.equal(processor.apply_chat_template(TURNS, tokenize=True), batch["input_ids"])
    answer = LtuForConditionalGeneration.from_pretrained(folder).generate(
        **batch, max_new_tokens=3, min_new_tokens=3
    )
    assert answer.shape[1] == batch["input_ids"].shape[1] + 3
    first = user(audio_part(CLIPS[0]) | {"transcript": "the dog"}, text_part("What is it?"))
    ids = processor.apply_chat_template([first[0], *TURNS[2:]], tokenize=True)
    prompt = processor.tokenizer.decode(ids[0][2:])
    assert "is it?\n\nTranscript: the dog<|im_end|>" in prompt


IMPOSSIBLE = {
    "cannot express the turns \\['system', 'user', .*--prompt_template chat": TURNS,
    "takes one clip .* here are 2": user(
        audio_part(CLIPS[0]), audio_part(CLIPS[1]), text_part("Which?")
    ),
    "last must be the user's": TURNS[:1],
    "text and audio are possible": user({"type": "image", "image": "a.png"}),
    "audio, audio_url": user({"type": "audio"}, text_part("Loud?")),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_what_cannot_be_expressed_is_an_error(alpaca, message):
    with pytest.raises(ValueError, match=message):
        alpaca.apply_chat_template(IMPOSSIBLE[message], tokenize=True, return_dict=True)


def test_a_chat_refuses_what_it_cannot_express(alpaca, tmp_path):
    processor, _ = chat_processor(tmp_path, "spaced")
    with pytest.raises(ValueError, match="refuses the turns .*system.*: no system"):
        processor.apply_chat_template(TURNS)
    with pytest.raises(ValueError, match="in a turn of the user; here are 1, of \\['system'\\]"):
        processor.apply_chat_template(
            [{"role": "system", "content": [audio_part(CLIPS[0])]}, *user(text_part("Loud?"))]
        )
    with pytest.raises(ValueError, match="the last turn is the assistant's"):
        alpaca.apply_chat_template(user(text_part("Loud?")), add_generation_prompt=False)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="the quickstart's language model is not there")
def test_a_real_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    config = LtuConfig(
        audio_config=audio_config(),
        text_config=AutoConfig.from_pretrained(SMOLLM2),
        prompt_template=load_prompt_template("chat", SMOLLM2),
    )
    processor = LtuProcessor.from_config(config, SMOLLM2)
    assert config.eos_token_id == 2  # <|im_end|>, which is in the model's own config as well.
    question = [{"role": "user", "content": "What is it?"}]
    stock = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    assert processor.encode(processor.prompt("What is it?")) == stock
    ids, labels = processor.encode_example(
        {"instruction": "What is it?", "output": "A dog barks."}, 200, False
    )
    whole = tokenizer.apply_chat_template(
        [*question, {"role": "assistant", "content": "A dog barks."}]
    )["input_ids"]
    # The line break after the end token is not part of the example.
    assert ids == whole[:-1] and tokenizer.decode(whole[-1:]) == "\n"
    assert labels == [-100] * len(stock) + ids[len(stock) :]
