"""Tests that what users of Audio Flamingo 3 and Qwen2-Audio type works on checkpoint folders too.

An argument of transformers' processors or of `generate` does what it does there, or it is refused.
"""

import base64
import inspect
import json
import pickle
import runpy
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import pytest
import soundfile
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    BatchFeature,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)

from ltu import LtuForConditionalGeneration, LtuProcessor
from ltu.data.audio import AudioError
from ltu.models import stock_arguments
from ltu.models.generation_ltu import COUNTING_PROCESSORS
from ltu.models.generation_ltu import REFUSED_OPTIONS as GENERATE_OPTIONS
from ltu.models.prompt_template import load_prompt_template
from ltu.models.stock_arguments import STOCK_ARGUMENTS, fetch_clip
from ltu_as import LtuAsForConditionalGeneration, LtuAsProcessor
from ltu_as.convert_checkpoint import main as convert
from tests.test_any_llm import byte_tokenizer
from tests.tiny import LORA, clip, write_checkpoint, write_llm
from tests.whisper_tiny import save_whisper

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PAGE = EXAMPLES.parent / "transformers.md"
KINDS = ("ltu", "chat", "ltu_as")
# Options of the pipeline and of generate for an answer of six tokens.
SIX = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
ASK = {"tokenize": True, "return_dict": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three checkpoints and a clip: LTU, LTU with a chat template, LTU-AS."""
    folder = tmp_path_factory.mktemp("api")
    llm = write_llm(folder / "llm")
    write_checkpoint(folder / "ltu", llm, LORA)
    chat_llm = write_llm(folder / "chat_llm", "qwen2", tokenizer=byte_tokenizer())
    template = load_prompt_template("chat", chat_llm)
    write_checkpoint(folder / "chat", chat_llm, LORA, prompt_template=template)
    save_whisper(folder / "whisper.pt")
    flags = f"--init --llm {llm} --whisper {folder}/whisper.pt --num_layer_heads 2"
    convert(f"{flags} --feature_precision fp32 --output_dir {folder}/ltu_as".split())
    soundfile.write(folder / "clip.wav", clip(1, 1.0), 16_000)
    return folder


@pytest.fixture(scope="module")
def processors(root: Path) -> dict[str, LtuProcessor]:
    return {kind: AutoProcessor.from_pretrained(root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(root: Path) -> dict[str, LtuForConditionalGeneration]:
    return {kind: AutoModelForMultimodalLM.from_pretrained(root / kind) for kind in KINDS}


def message(role: str, *parts: dict | str) -> dict:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": role, "content": content}


def question(text: str, **audio: Any) -> dict:
    parts = [{"type": "audio", **audio}] if audio else []
    return message("user", *parts, text)


def same(found: BatchFeature, expected: BatchFeature) -> bool:
    return list(found) == list(expected) and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


# --- classes


AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_auto_classes_open_a_folder(root: Path, auto_class: type) -> None:
    assert type(auto_class.from_pretrained(root / "ltu")) is LtuForConditionalGeneration
    assert type(auto_class.from_pretrained(root / "ltu_as")) is LtuAsForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(root / "ltu_as")) is LtuAsProcessor


# --- the pipeline


def expected_answer(
    models: dict, processors: dict, kind: str, conversation: list[dict], **options: Any
) -> str:
    """Return what the model generates for a conversation, without the pipeline."""
    inputs = processors[kind].apply_chat_template(conversation, **ASK, **options)
    output = models[kind].generate(**inputs, **SIX)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return processors[kind].decode(new_tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_answers_as_the_model_does(
    root: Path, models: dict, processors: dict, kind: str
) -> None:
    pipe = pipeline("any-to-any", model=str(root / kind))
    path = str(root / "clip.wav")
    samples = clip(1, 1.0)
    conversations = [
        [question("What is it?", path=path)],
        [question("What is it?", url=path)],
        [question("Is it loud, and why?", audio=samples)],
        [question("Name an animal.")],
    ]
    alone = [expected_answer(models, processors, kind, each) for each in conversations]
    assert len(set(alone)) > 1
    for conversation, answer in zip(conversations, alone, strict=True):
        result = pipe(text=conversation, return_full_text=False, generate_kwargs=SIX)
        assert result[0]["generated_text"] == answer
    results = pipe(text=conversations, return_full_text=False, generate_kwargs=SIX)
    assert [result[0]["generated_text"] for result in results] == alone
    whole = pipe(text=conversations[0], generate_kwargs=SIX)[0]["generated_text"]
    assert whole == [*conversations[0], {"role": "assistant", "content": alone[0]}]


def test_the_pipeline_takes_objects_and_options(root: Path, models: dict, processors: dict) -> None:
    pipe = pipeline("any-to-any", model=models["ltu"], processor=processors["ltu"])
    conversation = [question("What is it?", path=str(root / "clip.wav"))]
    answer = expected_answer(models, processors, "ltu", conversation)
    short = pipe(
        text=conversation,
        max_new_tokens=2,
        return_full_text=False,
        generate_kwargs={"min_new_tokens": 2, "do_sample": False},
    )
    assert answer.startswith(short[0]["generated_text"].rstrip("\ufffd"))
    # Not a chat: a question and a clip.
    result = pipe(
        text="What is it?",
        audio=str(root / "clip.wav"),
        return_full_text=False,
        generate_kwargs=SIX,
    )
    assert result[0]["generated_text"] == answer
    tokens = pipe(text=conversation, return_tensors=True, generate_kwargs=SIX)
    new_tokens = tokens[0]["generated_token_ids"][-6:]
    assert processors["ltu"].decode(new_tokens, skip_special_tokens=True) == answer
    # The beginning of an answer is continued.
    begun = [*conversation, message("assistant", "a dog")]
    result = pipe(text=begun, generate_kwargs=SIX)[0]["generated_text"]
    new_text = expected_answer(models, processors, "ltu", begun, continue_final_message=True)
    assert result[-1]["content"][-1]["text"] == f"a dog{new_text}"


def test_the_pipeline_pads_on_the_side_of_the_audio(
    root: Path, models: dict, processors: dict
) -> None:
    """In batches the pipeline pads by itself, and never between a prompt and its answer."""
    pipe = pipeline("any-to-any", model=str(root / "ltu"))
    conversations = [
        [question("What is it?", path=str(root / "clip.wav"))],
        [question("Is it loud, and if so, why do you think so?", audio=clip(2))],
    ]
    ask = partial(pipe, text=conversations, return_full_text=False, generate_kwargs=SIX)
    with pytest.raises(ValueError, match="without pad_token cannot do batching"):
        ask(batch_size=2)
    pipe.tokenizer.pad_token_id = 0
    with pytest.raises(ValueError, match="don't agree on padding side left != right"):
        ask(batch_size=2)
    pipe.feature_extractor.padding_side = "left"
    results = ask(batch_size=2)
    expected = [expected_answer(models, processors, "ltu", each) for each in conversations]
    assert [result[0]["generated_text"] for result in results] == expected
    assert all(processor.tokenizer.padding_side == "left" for processor in processors.values())


# --- clips


@pytest.fixture
def address(root: Path) -> Iterator[str]:
    """Address of a server that has the folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_clip_has_many_forms(root: Path, processors: dict, address: str) -> None:
    processor = processors["ltu"]
    path = root / "clip.wav"
    samples = soundfile.read(path, dtype="float32")[0]
    data = base64.b64encode(path.read_bytes()).decode()
    expected = processor(text="Loud?", audio=str(path))
    sources = (
        {"path": path},
        {"url": f"{address}/clip.wav"},
        {"audio_url": f"{address}/clip.wav"},
        {"audio": path.read_bytes()},
        {"audio": samples},
        {"audio": torch.tensor(samples)},
        {"base64": data},
        {"url": f"data:audio/wav;base64,{data}"},
    )
    for source in sources:
        found = processor.apply_chat_template([question("Loud?", **source)], **ASK)
        assert same(found, expected), list(source)
    with pytest.raises(ValueError, match="cannot be fetched .*404"):
        processor(text="Loud?", audio=f"{address}/other.wav")
    with pytest.raises(ValueError, match="cannot be fetched"):
        processor(text="Loud?", audio="http://127.0.0.1:1/clip.wav")
    with pytest.raises(ValueError, match="is no base64"):
        processor.apply_chat_template([question("Loud?", base64="?")], **ASK)
    with pytest.raises(ValueError, match="holds audio, path, but one clip"):
        processor.apply_chat_template([question("Loud?", audio=samples, path=path)], **ASK)


@pytest.fixture
def raw_address() -> Iterator[tuple[str, list[bytes]]]:
    """Address of a server that sends the given pieces, 50 ms apart."""
    pieces: list[bytes] = []

    class Send(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            with suppress(OSError):  # The client may have left.
                for piece in pieces:
                    self.request.sendall(piece)
                    time.sleep(0.05)

    with ThreadingTCPServer(("127.0.0.1", 0), Send) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/clip.wav", pieces
        server.shutdown()


def test_a_part_of_a_clip_is_no_clip(
    root: Path, raw_address: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a file could be decoded too."""
    url, pieces = raw_address
    data = (root / "clip.wav").read_bytes()
    header = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data)
    pieces[:] = [header, data]
    assert fetch_clip(url) == data
    pieces[:] = [header, data[:20_000]]
    with pytest.raises(AudioError, match="broke after 20,000 bytes.* Check the address"):
        fetch_clip(url)
    # A server that sends a byte now and then.
    monkeypatch.setattr(stock_arguments, "MAX_FETCH_SECONDS", 0.1)
    pieces[:] = [header, *([b"x"] * 20)]
    with pytest.raises(AudioError, match="bytes in 0 seconds"):
        fetch_clip(url)
    pieces[:] = [b"HTTP/1.1 302 Found\r\nLocation: file:///etc/hostname\r\n\r\n"]
    with pytest.raises(AudioError, match="not allowed"):
        fetch_clip(url)
    monkeypatch.setattr(stock_arguments, "MAX_FETCHED", 1000)
    pieces[:] = [header, data]
    with pytest.raises(AudioError, match="1,000 bytes or more"):
        fetch_clip(url)


def test_an_array_has_a_sampling_rate(processors: dict) -> None:
    processor = processors["ltu"]
    samples = clip(1, 1.0)
    expected = processor(text="Loud?", audio=[(samples, 8000)])
    for options in ({"sampling_rate": 8000}, {"audio_kwargs": {"sampling_rate": 8000}}):
        assert same(processor(text="Loud?", audio=samples, **options), expected)
        conversation = [question("Loud?", audio=samples)]
        found = processor.apply_chat_template(conversation, **ASK, processor_kwargs=options)
        assert same(found, expected)
    assert not same(processor(text="Loud?", audio=samples), expected)


# --- arguments of the processor


ACCEPTED = {
    "padding": (True, "longest", None),
    "truncation": (False, None),
    "add_special_tokens": (True,),
    "padding_side": ("left",),
    "return_attention_mask": (True,),
    "load_audio_backend": ("auto",),
    "sanitize_control_tokens": (True,),
    "text_kwargs": ({}, {"padding": True}),
    "images": (None,),
    "max_length": (None,),
}
REFUSED = {
    "padding": ("max_length", 8),
    "truncation": (True, "longest_first"),
    "max_length": (64,),
    "pad_to_multiple_of": (8,),
    "padding_side": ("right",),
    "add_special_tokens": (False,),
    "return_attention_mask": (False,),
    "return_offsets_mapping": (True,),
    "return_mm_token_type_ids": (True,),
    "images": (["a.png"],),
    "videos": (["a.mp4"],),
    "load_audio_backend": ("torchcodec",),
    "sanitize_control_tokens": (False,),
    "text_kwargs": ({"truncation": True},),
    "audio_kwargs": ({"padding_side": "right"}, {"sampling_rate": "16k"}),
    "common_kwargs": ({"return_tensors": "np"},),
    "audios": ([clip(1)],),
    "enable_thinking": (False,),
}
REFUSED_IN_CHATS = {
    "chat_template": ("{{ messages }}",),
    "tools": ([{}],),
    "documents": ([{}],),
    "load_audio_from_video": (True,),
    "continue_final_message": ("content",),
    "add_generation_prompt": (False,),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_accepted_argument_changes_nothing(processors: dict, name: str) -> None:
    processor = processors["ltu"]
    texts = ["What is it?", "Loud?"]
    clips = [clip(1), clip(2)]
    conversations = [
        [question(text, audio=sound)] for text, sound in zip(texts, clips, strict=True)
    ]
    expected = processor(text=texts, audio=clips)
    for value in ACCEPTED[name]:
        given = {name: value}
        assert same(processor(text=texts, audio=clips, **given), expected)
        assert same(processor.apply_chat_template(conversations, **ASK, **given), expected)
        found = processor.apply_chat_template(conversations, **ASK, processor_kwargs=given)
        assert same(found, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_argument_is_named(processors: dict, name: str) -> None:
    processor = processors["ltu"]
    for value in REFUSED[name]:
        # The error names the argument inside of a group.
        named = next(iter(value)) if isinstance(value, dict) else name
        for ask in (
            lambda given: processor(text="Loud?", audio=clip(1), **given),
            lambda given: processor.apply_chat_template([question("Loud?")], **ASK, **given),
            lambda given: processor.apply_chat_template(
                [question("Loud?")], **ASK, processor_kwargs=given
            ),
        ):
            with pytest.raises(ValueError, match=rf"\b{named}\b") as error:
                ask({name: value})
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["np", "jax"])
def test_tensors_are_those_of_torch(processors: dict, value: str) -> None:
    with pytest.raises(ValueError, match="return_tensors"):
        processors["ltu"](text="Loud?", return_tensors=value)
    with pytest.raises(ValueError, match="return_tensors"):
        processors["ltu"].apply_chat_template([question("Loud?")], **ASK, return_tensors=value)
    for same_thing in (None, "auto", "pt"):
        processors["ltu"].apply_chat_template([question("?")], **ASK, return_tensors=same_thing)


@pytest.mark.parametrize("name", REFUSED_IN_CHATS)
def test_a_refused_argument_of_chats_is_named(processors: dict, name: str) -> None:
    for value in REFUSED_IN_CHATS[name]:
        with pytest.raises(ValueError, match=rf"\b{name}\b") as error:
            processors["chat"].apply_chat_template([question("Loud?")], **{name: value})
        assert "\n" not in str(error.value)


def test_rows_of_one_length_need_no_padding(processors: dict) -> None:
    processor = processors["ltu"]
    expected = processor(text="Loud?", audio=clip(1))
    assert same(processor(text="Loud?", audio=clip(1), padding=False), expected)
    with pytest.raises(ValueError, match="padding=False"):
        processor(text=["Loud?", "What is it?"], padding=False)


@pytest.mark.parametrize(
    "text", [None, [], [["Loud?"]], [1], b"Loud?"], ids=["none", "empty", "list", "int", "bytes"]
)
def test_a_text_is_a_text(processors: dict, text: Any) -> None:
    with pytest.raises(ValueError, match="^text is "):
        processors["ltu"](text=text)


@pytest.mark.parametrize("text", ["<sound>\nLoud?", "<|audio_bos|><|AUDIO|>Loud?", "[AUDIO] Loud?"])
def test_a_placeholder_of_another_model_is_no_text(processors: dict, text: str) -> None:
    with pytest.raises(ValueError, match="a placeholder of other models") as error:
        processors["ltu"](text=text, audio=clip(1))
    assert "\n" not in str(error.value)
    # About HTML, without a clip.
    processors["ltu"](text="<audio> plays a sound. What is <video>?")
    processors["ltu"](text="Is <audio> loud?", audio=clip(1))


@pytest.mark.parametrize("conversation", [[], [[]], ["Loud?"], [{"content": "Loud?"}]])
def test_a_conversation_has_messages(processors: dict, conversation: list) -> None:
    with pytest.raises(ValueError, match="no messages|an object with role and content"):
        processors["ltu"].apply_chat_template(conversation, tokenize=True)


@pytest.mark.parametrize("kind", KINDS)
def test_model_input_names_are_what_is_returned(processors: dict, kind: str) -> None:
    batch = processors[kind](text="Loud?", audio=clip(1))
    assert processors[kind].model_input_names == list(batch)


# --- rendered prompts


@pytest.mark.parametrize("kind", KINDS)
def test_a_rendered_prompt_is_tokenized_as_it_is(processors: dict, kind: str) -> None:
    """As users of Qwen2-Audio do: render first, then tokenize with the clips."""
    processor = processors[kind]
    placeholder = {"type": "audio"}
    conversations = [
        [question("What is it?", audio=clip(1))],
        [question("Name an animal.")],
        [question("Is it loud?", audio=clip(2))],
    ]
    expected = processor.apply_chat_template(conversations, **ASK)
    without_clips = [
        [message("user", placeholder, "What is it?")],
        conversations[1],
        [message("user", placeholder, "Is it loud?")],
    ]
    for rendered in (conversations, without_clips):
        texts = processor.apply_chat_template(rendered, add_generation_prompt=True, tokenize=False)
        for clips in ([clip(1), clip(2)], [clip(1), None, clip(2)]):
            found = processor(text=texts, audio=clips, return_tensors="pt", padding=True)
            assert same(found, expected)
        # A text survives what a data loader does with it.
        assert same(processor(text=pickle.loads(pickle.dumps(texts)), audio=clips), expected)
    texts = processor.apply_chat_template(conversations)
    assert same(processor(text=texts), expected)
    one = processor.apply_chat_template(conversations[0])
    assert one == processor.prompt("What is it?")
    assert same(processor(text=one, audio=clip(1)), processor(text="What is it?", audio=clip(1)))
    with pytest.raises(ValueError, match="2 parts of type audio, but audio has 1"):
        processor(text=texts, audio=[clip(1)])
    missing = processor.apply_chat_template(without_clips)
    with pytest.raises(ValueError, match="holds no clip"):
        processor(text=missing)
    with pytest.raises(ValueError, match="here are 1, of .*nothing"):
        processor.apply_chat_template(without_clips, **ASK)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_never_rendered_twice(processors: dict, kind: str) -> None:
    processor = processors[kind]
    answered = [question("Loud?"), message("assistant", "a dog")]
    part = question("Loud?")["content"][0] | {"text": "Loud?"}
    with_transcript = {"type": "audio", "audio": clip(1), "transcript": "the dog"}
    texts = [
        processor.apply_chat_template([question("Loud?")]),
        processor.apply_chat_template(answered),
        processor.apply_chat_template([{"role": "user", "content": [with_transcript, part]}]),
    ]
    if kind == "chat":
        system = {"role": "system", "content": "Be short."}
        texts.append(processor.apply_chat_template([system, question("Loud?")]))
    for text in texts:
        for copied in (str(text)[:], f"{text} ", text.strip()):
            assert type(copied) is str
            with pytest.raises(ValueError, match="is a rendered prompt") as error:
                processor(text=copied, audio=clip(1))
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is a rendered prompt"):
        processor(text=[texts[0], "Loud?"])
    # Questions about prompts are questions.
    for text in ("### Instruction:", "<|im_start|>", "### Response:\n", "<s>", "</s>", " "):
        processor(text=text)


# --- answers of a conversation


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_conversation_is_a_training_example(processors: dict, kind: str) -> None:
    processor = processors[kind]
    texts = [("What is it?", "a dog"), ("Is it loud, and why?", "rain"), ("Loud?", "")]
    conversations = []
    for number, (asked, answer) in enumerate(texts):
        audio = {"audio": clip(number), "transcript": "bell"}
        user = question(asked, **audio)
        conversations.append([user, {"role": "assistant", "content": answer}])
    for options in ({}, {"add_generation_prompt": False}):
        batch = processor.apply_chat_template(
            conversations,
            **ASK,
            **options,
            return_assistant_tokens_mask=True,
            processor_kwargs={"output_labels": True},
        )
        length = batch["input_ids"].shape[1]
        for row, (asked, answer) in enumerate(texts):
            example = {"instruction": asked, "input": "bell", "output": answer}
            tokens, labels = processor.encode_example(example, 1000, train_on_inputs=False)
            start = length - len(tokens)
            assert batch["input_ids"][row, start:].tolist() == tokens
            is_answer = [int(label != -100) for label in labels]
            assert batch["assistant_masks"][row].tolist() == [0] * start + is_answer
            num_bos = len(processor.bos_ids) if tokens[:1] == processor.bos_ids else 0
            expected = [-100] * (start + num_bos) + tokens[num_bos:]
            assert batch["labels"][row].tolist() == expected
    rendered = processor.apply_chat_template(conversations)
    again = processor(text=rendered, output_labels=True)
    del batch["assistant_masks"]
    assert same(again, batch)


def test_the_mask_has_each_answer_of_a_chat(processors: dict) -> None:
    processor = processors["chat"]
    conversation = [
        {"role": "system", "content": "Be short."},
        question("What is it?", audio=clip(1)),
        {"role": "assistant", "content": "a dog"},
        question("Is it loud?"),
        {"role": "assistant", "content": "very"},
    ]
    options = ASK | {"return_assistant_tokens_mask": True}
    batch = processor.apply_chat_template(conversation, **options)
    mask = batch["assistant_masks"][0].bool()
    assert processor.decode(batch["input_ids"][0][mask]) == "a dog<|im_end|>very<|im_end|>"
    # A question about earlier answers: its prompt has answers too.
    batch = processor.apply_chat_template(conversation[:-1], **options)
    mask = batch["assistant_masks"][0].bool()
    assert processor.decode(batch["input_ids"][0][mask]) == "a dog<|im_end|>"
    with pytest.raises(ValueError, match="needs tokenize=True and return_dict=True"):
        processor.apply_chat_template(conversation, return_assistant_tokens_mask=True)
    with pytest.raises(ValueError, match="cannot be combined"):
        processor.apply_chat_template(conversation, **options, continue_final_message=True)


# Like Qwen3's: reasoning is only in front of the last answer.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)


def test_answers_that_a_template_rewrites_have_no_mask(processors: dict) -> None:
    stock = processors["chat"]
    template = stock.prompt_template | {"chat_template": FORGETFUL}
    processor = LtuProcessor(
        stock.feature_extractor, stock.tokenizer, 2, stock.audio_token_id, template
    )
    options = ASK | {"return_assistant_tokens_mask": True}
    answer = {"role": "assistant", "content": "a dog"}
    batch = processor.apply_chat_template([question("Loud?"), answer], **options)
    mask = batch["assistant_masks"][0].bool()
    assert processor.decode(batch["input_ids"][0][mask]) == "a dog<|im_end|>"
    with pytest.raises(ValueError, match="in another way if turns follow"):
        processor.apply_chat_template([question("Loud?"), answer] * 2, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_continued(processors: dict, kind: str) -> None:
    processor = processors[kind]
    user = question("Loud?", audio=clip(1), transcript="")
    begun = [user, {"role": "assistant", "content": "a dog"}]
    options = ASK | {"continue_final_message": True}
    found = processor.apply_chat_template(begun, **options)["input_ids"][0].tolist()
    whole = processor.apply_chat_template(begun, **ASK)["input_ids"][0].tolist()
    end_id = processor.render([{"role": "user", "content": "Loud?"}]).end_id
    assert found == whole[:-1] and whole[-1] == end_id
    text = processor.apply_chat_template(begun, continue_final_message=True)
    assert text.endswith("a dog")
    for refused in ([user], []):
        with pytest.raises(ValueError):
            processor.apply_chat_template(refused, **options)
    with pytest.raises(ValueError, match="cannot be combined"):
        processor.apply_chat_template(begun, **options, add_generation_prompt=True)
    with pytest.raises(ValueError, match="the last must be the user's"):
        processor.apply_chat_template(begun, **ASK, add_generation_prompt=True)


# --- decoding


@pytest.mark.parametrize("kind", KINDS)
def test_whole_sequences_are_decoded(models: dict, processors: dict, kind: str) -> None:
    processor = processors[kind]
    batch = processor(text=["What is it?", "Is it loud?"], audio=[clip(1), clip(2)])
    output = models[kind].generate(**batch, **SIX)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    length = batch["input_ids"].shape[1]
    prompts = processor.batch_decode(output[:, :length], **options)
    answers = processor.batch_decode(output[:, length:], **options)
    whole = processor.batch_decode(output, **options)
    names = {"chat": "user\nWhat is it?\nassistant\n"}
    plain_prompt = names.get(kind, "### Instruction:\nWhat is it?\n\n### Response:\n")
    assert prompts[0] == plain_prompt or kind == "ltu_as"
    for row in range(2):
        assert whole[row].startswith(prompts[row])
        # sentencepiece drops the space before the first word of a text.
        assert whole[row].removeprefix(prompts[row]).lstrip() == answers[row].lstrip()
    for tokens in (output, output.tolist(), output.numpy()):
        assert processor.decode(tokens, **options) == whole
        assert processor.decode(tokens[0], **options) == whole[0]
    with_control = processor.batch_decode(output)
    assert all(text not in ("", prompt) for text, prompt in zip(with_control, whole, strict=True))
    # What the stock method takes: scalars of libraries, options by position, a single sequence.
    text = processor.decode(output[0], True)
    assert text == processor.decode(output[0], skip_special_tokens=True)
    assert processor.decode(list(output[0]), True) == text
    assert processor.decode(list(output[0].numpy()), True) == text
    assert processor.batch_decode(output[0], True) == [text]
    assert processor.batch_decode([]) == []
    # The tokenizer may have a token of this number that the language model does not know.
    extractor, template = processor.feature_extractor, processor.prompt_template
    smaller = type(processor)(extractor, processor.tokenizer, 2, 270, template)
    assert processor.decode([270]) and smaller.decode([270, 270]) == ""


def test_a_broken_byte_does_not_change_the_prompt(processors: dict) -> None:
    """The prompt ends with a byte token, the line break; tokenizers decodes bytes in runs."""
    processor = processors["ltu"]
    tokenizer = processor.tokenizer
    prompt = processor.encode(processor.prompt("Loud?"))
    wrong = tokenizer.convert_tokens_to_ids("<0xC3>")
    text = processor.decode([*prompt, wrong], skip_special_tokens=True)
    assert text == processor.prompt("Loud?") + "\ufffd"


# --- generate


class Ban(LogitsProcessor):
    """A processor of a user: one token is impossible."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 68] = -torch.inf
        return scores


SAMPLED = {"do_sample": True, "temperature": 1.5}
# Options whose results are those of the language model, given the embeddings of the prompt.
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": SAMPLED | {"top_p": 0.9, "top_k": 40},
    "min_p": SAMPLED | {"min_p": 0.05},
    "typical_p": SAMPLED | {"typical_p": 0.5},
    "several": SAMPLED | {"num_return_sequences": 3},
    "sampled beams": SAMPLED | {"num_beams": 2},
    "static cache": {"cache_implementation": "static"},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "no cache": {"use_cache": False},
    "bad words": {"bad_words_ids": [[68], [152, 44]]},
    "bias": {"sequence_bias": {(68,): -50.0, (152, 44): 9.0}},
    "suppressed": {"suppress_tokens": [68, 10], "begin_suppress_tokens": [5]},
    "forced end": {"forced_eos_token_id": 2},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda row, tokens: list(range(100, 300))},
    "length penalty": {"exponential_decay_length_penalty": (3, 1.1)},
    "renormalized": {"renormalize_logits": True, "num_beams": 2},
    "low memory": {"low_memory": True},
    "processor of the user": {"logits_processor": LogitsProcessorList([Ban()])},
    "length": {"max_length": 40, "max_new_tokens": None, "min_new_tokens": None},
    "time": {"max_time": 1000.0},
}


def both(
    model: LtuForConditionalGeneration, batch: BatchFeature, options: dict[str, Any], with_ids: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the new tokens of the model, and those of its language model.

    Args:
        with_ids: whether the language model gets the tokens of the prompt too, with a token that is
            never generated in place of placeholders.
    """
    embeds = model._embed(batch["input_ids"], batch["input_features"])
    length = batch["input_ids"].shape[1]
    inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    if with_ids:
        is_audio = batch["input_ids"] == model.config.audio_token_id
        inputs["input_ids"] = batch["input_ids"].masked_fill(is_audio, 0)
    found = []
    for generate, given in ((model.generate, batch), (model.language_model.generate, inputs)):
        torch.manual_seed(0)
        output = generate(**given, **options)
        has_prompt = output.shape[1] > length or with_ids
        found.append(output[:, length:] if has_prompt else output)
    return found[0], found[1]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_does_what_it_does_for_the_language_model(
    models: dict, processors: dict, name: str
) -> None:
    texts = ["What is it?", "Is it loud, or not, and why?"]
    batch = processors["ltu"](text=texts, audio=[clip(1), clip(2)])
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False} | OPTIONS[name]
    options = {key: value for key, value in options.items() if value is not None}
    found, expected = both(models["ltu"], batch, options, with_ids=False)
    assert torch.equal(found, expected)
    if name in ("bad words", "bias", "suppressed", "allowed tokens", "processor of the user"):
        greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        assert not torch.equal(found, both(models["ltu"], batch, greedy, with_ids=False)[0])


COUNTING = {
    "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2, "num_beams": 2},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("name", COUNTING)
def test_an_option_that_reads_the_prompt_reads_its_text(
    models: dict, processors: dict, name: str
) -> None:
    """A row without padding; the language model gets the tokens of the prompt too."""
    batch = processors["ltu"](text="What is it?", audio=clip(1))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False} | COUNTING[name]
    found, expected = both(models["ltu"], batch, options, with_ids=True)
    assert torch.equal(found, expected)
    without = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    if name != "no_repeat_ngram_size 2":
        assert not torch.equal(found, both(models["ltu"], batch, without, with_ids=True)[0])


@pytest.mark.parametrize("name", ["no_repeat_ngram_size", "repetition_penalty"])
def test_padding_and_placeholders_are_no_text(models: dict, processors: dict, name: str) -> None:
    """In a batch a row has the same answer as alone, whoever gives the option."""
    model = models["ltu"]
    texts = ["What is it?", "Which of the two sounds comes first, and why do you think so?"]
    clips = [clip(1), clip(2)]
    value = 1 if name == "no_repeat_ngram_size" else 100.0
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    # The token of padding is generated once, unless it counts as text.
    options["sequence_bias"] = {(0,): 50.0}
    alone = []
    for text, sound in zip(texts, clips, strict=True):
        inputs = processors["ltu"](text=text, audio=sound)
        alone.append(model.generate(**inputs, **options, **{name: value})[0, -20:].tolist())
    batch = processors["ltu"](text=texts, audio=clips)
    assert model.generate(**batch, **options, **{name: value})[:, -20:].tolist() == alone
    config = GenerationConfig(**options, **{name: value}, eos_token_id=2, pad_token_id=0)
    assert model.generate(**batch, generation_config=config)[:, -20:].tolist() == alone
    stock_class = COUNTING_PROCESSORS[name].stock_class
    given = LogitsProcessorList([stock_class(value)])
    assert model.generate(**batch, **options, logits_processor=given)[:, -20:].tolist() == alone
    if name == "no_repeat_ngram_size":
        for row, tokens in enumerate(alone):
            # No token twice, and none of the prompt.
            seen = set(batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist())
            assert len(set(tokens)) == 20 and not set(tokens) & seen
    pads = (batch["attention_mask"] == 0).sum()
    assert pads > 0


REFUSED_OPTIONS: dict[str, Any] = {
    "assistant_model": "a model",
    "assistant_early_exit": 1,
    "prompt_lookup_num_tokens": 3,
    "prefill_chunk_size": 4,
    "encoder_repetition_penalty": 1.5,
    "encoder_no_repeat_ngram_size": 2,
    "cache_implementation": "paged",
    "token_healing": True,
}


# Options of generate that were tried with audio.
TRIED_OPTIONS = set(
    """
    bad_words_ids begin_suppress_tokens bos_token_id cache_config compile_config disable_compile
    do_sample early_stopping eos_token_id epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_eos_token_id generation_config guidance_scale inputs
    length_penalty logits_processor low_memory max_cache_len max_length max_new_tokens max_time
    min_length min_new_tokens min_p negative_prompt_attention_mask negative_prompt_ids num_beams
    num_return_sequences output_attentions output_hidden_states output_logits output_scores
    pad_token_id prefix_allowed_tokens_fn remove_invalid_values renormalize_logits
    return_dict_in_generate sequence_bias stop_strings stopping_criteria streamer suppress_tokens
    synced_gpus temperature top_h top_k top_p transformers_version typical_p use_cache
    watermarking_config
    """.split()
)
# Of models with a decoder, of drafting, of continuous batching, and of code that is fetched.
UNUSED_OPTIONS = set(
    """
    decoder_start_token_id forced_bos_token_id assistant_confidence_threshold
    assistant_ensemble_weight assistant_lookbehind is_assistant max_matching_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule target_lookbehind
    continuous_batching_config constraints custom_generate diversity_penalty dola_layers
    force_words_ids num_beam_groups penalty_alpha
    """.split()
)


def test_no_option_of_generate_is_unknown() -> None:
    """An option of a new release is tried with audio, or refused."""
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    known = TRIED_OPTIONS | UNUSED_OPTIONS | GENERATE_OPTIONS.keys() | COUNTING_PROCESSORS.keys()
    assert parameters | fields <= known


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_a_refused_option_is_named(models: dict, processors: dict, name: str) -> None:
    batch = processors["ltu"](text="What is it?", audio=clip(1))
    with pytest.raises(ValueError, match=f"generate does not take {name}: ") as error:
        models["ltu"].generate(**batch, **{name: REFUSED_OPTIONS[name]}, max_new_tokens=2)
    assert "\n" not in str(error.value)
    if name != "assistant_model":
        config = GenerationConfig(**{name: REFUSED_OPTIONS[name]}, max_new_tokens=2)
        with pytest.raises(ValueError, match=f"generate does not take {name}: "):
            models["ltu"].generate(**batch, generation_config=config)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_streamed(
    models: dict, processors: dict, kind: str, capsys: pytest.CaptureFixture
) -> None:
    processor = processors[kind]
    batch = processor(text="What is it?", audio=clip(1), transcript="")
    # tokenizers decodes byte tokens in runs, so that a streamed half of a run has another text.
    has_bytes = kind != "chat"
    options = SIX | ({"suppress_tokens": list(range(3, 259))} if has_bytes else {})
    output = models[kind].generate(**batch, **options)[0, -6:]
    expected = processor.tokenizer.decode(output, skip_special_tokens=True)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    models[kind].generate(**batch, **options, streamer=streamer)
    assert "".join(streamer) == expected
    capsys.readouterr()
    # The prompt too, with its placeholders.
    models[kind].generate(**batch, **options, streamer=TextStreamer(processor.tokenizer))
    assert "What is it?" in capsys.readouterr().out


def test_a_stop_string_ends_an_answer(models: dict, processors: dict) -> None:
    processor = processors["ltu"]
    batch = processor(text=["What is it?", "Loud?"], audio=[clip(1), clip(2)])
    length = batch["input_ids"].shape[1]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 511}
    tokens = models["ltu"].generate(**batch, **options)[:, length:]
    words = [processor.tokenizer.decode(token).strip() for token in tokens[0]]
    position = next(number for number, word in enumerate(words) if number and word.isalnum())
    stopped = models["ltu"].generate(
        **batch, **options, stop_strings=[words[position]], tokenizer=processor.tokenizer
    )[:, length:]
    first = words.index(words[position])
    assert stopped[0, : first + 1].tolist() == tokens[0, : first + 1].tolist()
    assert (stopped[0, first + 1 :] == 0).all()
    # The prompt contains the string, which is no end.
    prompted = models["ltu"].generate(
        **batch, **options, stop_strings=["Response"], tokenizer=processor.tokenizer
    )
    assert torch.equal(prompted[:, length:], tokens)


def test_scores_and_a_given_cache(models: dict, processors: dict) -> None:
    model = models["ltu"]
    batch = processors["ltu"](text="What is it?", audio=clip(1))
    options = SIX | {"output_scores": True, "return_dict_in_generate": True}
    found = model.generate(**batch, **options)
    embeds = model._embed(batch["input_ids"], batch["input_features"])
    expected = model.language_model.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options
    )
    assert torch.equal(torch.stack(found.scores), torch.stack(expected.scores))
    cache = DynamicCache(config=model.config.text_config)
    assert torch.equal(model.generate(**batch, **SIX, past_key_values=cache), found.sequences)
    assert cache.get_seq_length() == found.sequences.shape[1] - 1
    from_embeds = model.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], **SIX
    )
    assert torch.equal(from_embeds, found.sequences[:, -6:])
    with pytest.raises(ValueError, match="foo"):
        model.generate(**batch, foo=3)


# --- training


def write_examples(root: Path, folder: Path) -> Path:
    """Write examples with messages, as the scripts of the docs take them."""
    examples = []
    for number, answer in enumerate(["a dog", "rain", "a bell", "a dog"]):
        path = folder / f"{number}.wav"
        soundfile.write(path, clip(number, 1.0), 16_000)
        turns = [question("What is it?", path=str(path)), message("assistant", answer)]
        examples.append({"messages": turns})
    (folder / "examples.json").write_text(json.dumps(examples))
    return folder / "examples.json"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", ["transformers", "trl"])
def test_a_folder_is_trained_with_stock_trainers(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, kind: str
) -> None:
    pytest.importorskip(library)
    examples = write_examples(root, tmp_path)
    words = ["train.py", str(root / kind), str(examples), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    script = EXAMPLES / f"train_with_{library}.py"
    names = runpy.run_path(str(script))
    trainer = names["trainer"]
    before = AutoModelForMultimodalLM.from_pretrained(root / kind)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert trainer.state.global_step >= 3
    lines = json.loads(examples.read_text())
    batch = names["collate"](lines)
    lines = [example["messages"] for example in lines]
    again = processor.apply_chat_template(lines, **ASK)
    assert torch.equal(again["input_ids"], batch["input_ids"])
    with torch.no_grad():
        assert model(**batch).loss < before(**batch).loss
        # The folder is what was trained.
        loss = trainer.model.eval()(**batch).loss
        torch.testing.assert_close(model(**batch).loss, loss, atol=0, rtol=0)
    asked = processor.apply_chat_template([turns[:1] for turns in lines], **ASK)
    output = model.generate(**asked, **SIX)
    assert output.shape[1] == asked["input_ids"].shape[1] + 6
    frozen = {name: p for name, p in before.named_parameters() if "language_model." in name}
    trained = dict(model.named_parameters())
    for name, parameter in frozen.items():
        if ".lora_" not in name and name in trained:
            assert torch.equal(trained[name], parameter), name


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_page_shows_an_example_of_25_lines(script: Path) -> None:
    text = script.read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= 25
    assert f"```python\n{text}```" in PAGE.read_text()


def test_the_page_names_what_is_refused() -> None:
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in row.replace("`", "").replace(",", " ").split()}
    assert named >= STOCK_ARGUMENTS.keys() | GENERATE_OPTIONS.keys()
