"""The engine: answers do not depend on the batch, clips are encoded once; chunks; streaming."""

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from sentencepiece import SentencePieceProcessor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ltu.data.audio import load_audio
from ltu.files import sha256_of
from ltu.inference.embedding_cache import hash_content
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Answer, Request
from ltu.inference.sampling import (
    ORIGINAL_DECODING,
    BatchStreamer,
    RowSampler,
    StreamedRow,
    check_decoding,
)
from tests import tiny
from tests.tiny import GOLDEN
from tests.whisper_tiny import write_ltu_as

WORDS = "what do you see is the dog loud near or far and why say more".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine")
    llm = tiny.write_llm(root / "llm")
    return {
        "ltu": tiny.write_checkpoint(root / "ltu", llm, tiny.LORA),
        "ltu_as": write_ltu_as(root / "ltu_as", llm),
    }


@pytest.fixture(scope="module")
def models(folders) -> dict[str, LtuEngine]:
    """Opened once; what a test changes in them it must put back."""
    opened = {}
    for kind, folder in folders.items():
        opened[kind] = LtuEngine.from_pretrained(folder, device="cpu")
    return opened


@pytest.fixture
def fresh(models) -> Callable[..., LtuEngine]:
    """`fresh(kind, cache_mb=256)`: an engine that has encoded nothing yet."""

    def make(kind: str, cache_mb: float = 256) -> LtuEngine:
        opened = models[kind]
        return LtuEngine(opened.model, opened.processor, cache_mb, opened.folder)

    return make


@pytest.fixture(params=["ltu", "ltu_as"])
def engine(fresh, request) -> LtuEngine:
    return fresh(request.param)


@pytest.fixture
def ltu(fresh) -> LtuEngine:
    return fresh("ltu")


def mixture(seed: int, folder: Path) -> list[Request]:
    """Requests of every sort, about a handful of clips as paths, bytes and arrays."""
    rng = random.Random(seed)
    clips = [None, folder / "nowhere.wav"]
    for index in range(4):
        soundfile.write(
            folder / f"{seed}_{index}.wav", tiny.clip(index, rng.uniform(0.1, 2.0)), 16_000
        )
        clips += [
            str(folder / f"{seed}_{index}.wav"),
            (folder / f"{seed}_{index}.wav").read_bytes(),
        ]
    clips.append((tiny.clip(9, 1.0), 8_000))
    decoding = [
        {},
        {},
        {"num_beams": 2},
        {"do_sample": True, "temperature": 0.7},
        dict(ORIGINAL_DECODING),
    ]
    requests = []
    for number in range(14):
        sampled = {"decoding": rng.choice(decoding) | {"max_new_tokens": rng.choice([5, 5, 2])}}
        sampled["seed"] = rng.choice([None, 1, 2])
        sampled |= {
            "transcript": rng.choice(["", "a dog", "so far, so good"]),
            "num_chunks": rng.choice([1, 1, 2, 0]),
        }
        question = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        clip = clips[number] if number < 2 else rng.choice(clips)
        requests.append(
            Request(question, clip, **sampled, mode=rng.choice(["joint", "audio_only"]))
        )
    return requests


@pytest.mark.parametrize("seed", range(2))
def test_generation_is_batch_invariant(engine, tmp_path, seed):
    """Greedy, beams, sampling; any clips, none, several chunks: alone, together, shuffled."""
    requests = mixture(seed, tmp_path)
    alone = [engine([request])[0] for request in requests]
    assert {answer.status for answer in alone} >= {"ok", "missing"}
    assert (
        len({answer.text for answer in alone}) > len(alone) // 2
    )  # They are not all the same anyway.
    for batch_size in (3, 14):
        order = random.Random(batch_size).sample(range(len(requests)), len(requests))
        answers = engine([requests[index] for index in order], batch_size)
        assert answers == [alone[index] for index in order]


def test_one_encoding_for_many_questions(ltu, tmp_path):
    """By content: not by name, and not by whether it comes as a path or as bytes."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        soundfile.write(tmp_path / f"{name}.wav", tiny.clip(seed), 16_000)
    a, b, c = (str(tmp_path / f"{name}.wav") for name in "abc")
    questions = ["What?", "Why?", "Where is the dog?"]
    first = ltu([Request(question, a) for question in questions], batch_size=1, max_new_tokens=4)
    assert ltu.cache.encoded == 1
    again = ltu([Request(question, b) for question in questions], max_new_tokens=4)
    as_bytes = ltu(
        [Request(question, Path(a).read_bytes()) for question in questions], max_new_tokens=4
    )
    assert ltu.cache.encoded == 1 and again == as_bytes == first
    Path(a).write_bytes(Path(c).read_bytes())  # The same name, another clip.
    other = ltu([Request(question, a) for question in questions], max_new_tokens=4)
    assert ltu.cache.encoded == 2 and [x.text for x in other] != [x.text for x in first]
    assert ltu.clip_hash(Request("?", a)) == hash_content(c) != hash_content(b)


def test_the_cache_changes_nothing_and_keeps_to_its_size(fresh):
    clips = [tiny.clip(seed) for seed in range(6)]
    requests = [
        Request(question, clip) for question in ("What?", "Why is it so?") for clip in clips
    ]
    answers, encoded = [], []
    entry_bytes = (
        2 * tiny.LLM["hidden_size"] * 4 + 1000
    )  # bytes a clip: 2 tokens of fp32, and the entry
    for megabytes in (256, 0, 3.5 * entry_bytes / 2**20):
        engine = fresh("ltu", megabytes)
        answers.append(engine(requests, batch_size=3, max_new_tokens=6))
        engine(requests[-1:], max_new_tokens=1)
        encoded.append(engine.cache.encoded)
        assert engine.cache.size == sum(
            1000 + clip.embeds.nbytes for clip in engine.cache.entries.values()
        )
        assert engine.cache.size <= megabytes * 2**20
        assert all(clip.waveform is None for clip in engine.cache.entries.values())
    assert answers[0] == answers[1] == answers[2]
    assert encoded[0] == 6 < encoded[2] < encoded[1] and len(engine.cache.entries) == 3


def test_transcript_and_embeddings_are_cached_separately(fresh):
    """A clip whose transcript was given is not encoded again when Whisper must transcribe it."""
    clip = tiny.clip(1, 1.0)
    written = fresh("ltu_as")([Request("What?", clip)], max_new_tokens=4)[0]
    engine = fresh("ltu_as")
    requests = [Request("What?", clip, ""), Request("What?", clip, "a dog"), Request("What?", clip)]
    answers = [engine([request], max_new_tokens=4)[0] for request in requests]
    assert [answer.transcript for answer in answers] == ["", "a dog", written.transcript]
    assert engine.cache.encoded == 1 and answers[2] == written
    assert engine([Request("What?", clip)], max_new_tokens=4)[0] == written


@pytest.mark.parametrize(
    "decoding", [{}, {"do_sample": True, "temperature": 1.3}, {"num_beams": 2}]
)
def test_a_stream_grows_to_the_batchs_answer(engine, decoding):
    requests = [
        Request("What is this sound?", tiny.clip(3)),
        Request("And why?"),
        Request("Who?", b"no sound"),
    ]
    batch = engine(requests, max_new_tokens=12, **decoding)
    for request, answer in zip(requests, batch, strict=True):
        *texts, last = engine.stream(request, max_new_tokens=12, **decoding)
        assert last == answer and isinstance(last, Answer)
        assert all(later.startswith(sooner) for sooner, later in pairwise([*texts, last.text]))
        assert "num_beams" in decoding or len(texts) > 2 or not answer.answered


def test_nobody_waits_any_more(ltu):
    """A request cancelled before its batch is not encoded; a running beam search is stopped."""
    run = ltu.run(
        [Request("What?", tiny.clip(3)), Request("And why?")],
        on_text=lambda i, t: i == 1,
        max_new_tokens=3,
    )
    found = dict(run)
    assert (found[0].finish_reason, found[0].new_tokens, ltu.cache.encoded) == ("cancelled", 0, 0)
    assert found[1] == ltu([Request("And why?")], max_new_tokens=3)[0]
    calls: list[int] = []
    settings = {"num_beams": 2, "max_new_tokens": 40, "min_new_tokens": 40}
    found = dict(
        ltu.run(
            [Request("What?"), Request("Why?")],
            on_text=lambda i, t: calls.append(i) or i,
            **settings,
        )
    )
    assert calls.count(1) > 30 and found[1] == ltu([Request("Why?")], **settings)[0]
    found = dict(
        ltu.run(
            [Request("What?")], on_text=lambda i, t: len(calls.append(i) or calls) < 60, **settings
        )
    )
    assert found[0].finish_reason == "cancelled" and found[0].new_tokens < 30


def test_a_caller_that_stops_reading_cancels_the_answer(ltu):
    requests = [Request("What is this sound?", tiny.clip(3)), Request("And why?")]
    whole = ltu(requests, max_new_tokens=40, min_new_tokens=40)
    calls: list[int] = []
    settings = {"max_new_tokens": 40, "min_new_tokens": 40}
    found = dict(
        ltu.run(requests, on_text=lambda i, t: calls.append(i) or i == 1 or not t, **settings)
    )
    assert (
        found[1] == whole[1] and calls.count(0) == 2
    )  # Before its batch, and with the first text.
    assert found[0].finish_reason == "cancelled" and found[0].new_tokens == 1
    assert whole[0].text.startswith(found[0].text) and whole[0].finish_reason == "length"


def test_chunks_are_encoded_in_order(engine):
    """Embeddings of each chunk are those of its part of the clip; LTU-AS cuts the whole log-mel."""
    extractor, config = engine.processor.feature_extractor, engine.model.config
    chunk_samples = extractor.num_frames * 160
    clip = tiny.clip(5, 3.4 * chunk_samples / 16_000)
    clip[: chunk_samples // 2] *= 5.0  # The loudest part, in the first chunk only.
    for num_chunks, used in ((1, 1), (2, 2), (3, 3), (9, 4), (0, 4)):
        request = Request("What?", clip, "", num_chunks=num_chunks)
        answer = engine([request], max_new_tokens=3)[0]
        assert (answer.num_chunks, answer.status) == (used, "ok" if used == 4 else "truncated")
        assert answer.seconds_heard == pytest.approx(min(used * chunk_samples, len(clip)) / 16_000)
        inputs = engine.inputs([request])
        assert (
            inputs["input_ids"] == config.audio_token_id
        ).sum() == used * config.num_audio_tokens
    whole = engine.inputs([Request("What?", clip, "", num_chunks=0)])["audio_embeds"]
    if engine.kind == "ltu":
        parts = [
            extractor(clip[start:]).input_features for start in range(0, len(clip), chunk_samples)
        ]
    else:
        mel = extractor.extract_chunks(torch.from_numpy(clip), 4)
        lone = extractor.extract_chunks(torch.from_numpy(clip[chunk_samples:].copy()), 1)
        assert not torch.allclose(
            mel[1:2], lone, atol=1e-2
        )  # Cut first, its floor would be another.
        encoder = extractor.load_encoder()[0].encoder
        parts = [extractor._layers(encoder, mel[i : i + 1]) for i in range(4)]
    with torch.no_grad():
        expected = torch.cat([engine.model.get_audio_features(part) for part in parts])
    assert torch.allclose(whole, expected, atol=1e-5)
    assert not torch.allclose(whole[0], whole[1], atol=1e-3)


def test_the_last_chunk_may_be_short(ltu):
    """A rest of a clip under 25 ms is no chunk, and counts as used."""
    chunk_samples = ltu.processor.feature_extractor.num_frames * 160
    for extra, num_chunks in ((0, 1), (240, 1), (399, 1), (400, 2)):
        assert ltu.processor.feature_extractor.count_chunks(chunk_samples + extra) == num_chunks
        answer = ltu(
            [Request("What?", tiny.clip(1, 1.0)[: chunk_samples + extra], num_chunks=0)],
            max_new_tokens=2,
        )[0]
        assert (answer.num_chunks, answer.status) == (num_chunks, "ok")


# More tokens are demanded than fit, of which transformers warns; how the answer ends is tested.
@pytest.mark.filterwarnings("ignore:Unfeasible length constraints:UserWarning")
def test_what_does_not_fit_is_reported(ltu, monkeypatch):
    """A too long clip is used as far as it fits; a too long question has no answer."""
    monkeypatch.setattr(ltu.model.config.text_config, "max_position_embeddings", 128)
    long, short = Request("What?", tiny.clip(1, 60.0), num_chunks=0), Request("Why?", tiny.clip(2))
    endless = Request("why " * 200, tiny.clip(2))
    answers = ltu([long, short, endless], max_new_tokens=4)
    talkative = ltu(
        [short, Request("What is it?", tiny.clip(3))], max_new_tokens=400, min_new_tokens=400
    )
    assert all(
        a.prompt_tokens + a.new_tokens == 128 and a.finish_reason == "length" for a in talkative
    )
    assert [answer.status for answer in answers] == ["truncated", "ok", "too_long"]
    assert (
        120 < answers[0].prompt_tokens + 4 <= 128 < answers[2].prompt_tokens
        and "128" in answers[2].error
    )
    assert answers[1] == ltu([short], max_new_tokens=4)[0]


def test_an_answer_says_what_was_found(ltu, folders, tmp_path):
    samples = np.stack([tiny.clip(1, 1.0), tiny.clip(2, 1.0)], 1)
    soundfile.write(tmp_path / "stereo.flac", samples, 44_100)
    answer = ltu([Request("What?", tmp_path / "stereo.flac", seed=3)], max_new_tokens=4)[0]
    assert (answer.sampling_rate, answer.channels, answer.model) == (44_100, 2, "ltu")
    assert answer.seconds_total == pytest.approx(len(load_audio(tmp_path / "stereo.flac")) / 16_000)
    assert answer.seconds > 0 and answer.finish_reason == "length" and answer.new_tokens == 4
    assert answer.checkpoint == sha256_of(folders["ltu"] / "model.safetensors")
    assert answer.prompt_tokens == int(
        ltu.inputs([Request("What?", tmp_path / "stereo.flac")])["attention_mask"].sum()
    )


@pytest.mark.parametrize(
    "decoding, message",
    [
        ({"temperatur": 1.0}, "Unknown.*temperatur"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": float("nan")}, "temperature is nan; possible: above 0, at most 100"),
        ({"top_p": 1.5}, "top_p is 1.5; possible: above 0, at most 1"),
        ({"top_k": True}, "top_k is True; possible: a whole number"),
        ({"max_new_tokens": "many"}, "max_new_tokens"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1; possible: above 0"),
        ({"num_beams": 65}, "num_beams is 65; possible: a whole number from 1 to 64"),
        ({"do_sample": True, "num_beams": 3}, "Beams"),
    ],
)
def test_impossible_settings_stop_before_anything_is_generated(ltu, decoding, message):
    with pytest.raises(ValueError, match=message):
        check_decoding(decoding)
    with pytest.raises(ValueError, match=message):
        ltu([Request("What?", tiny.clip(1)), Request("What?", tiny.clip(1), decoding=decoding)])
    assert ltu.cache.encoded == 0


def test_history_needs_a_chat_template(ltu, folders, tmp_path):
    history = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A dog."}]
    with pytest.raises(ValueError, match="single questions only"):
        ltu([Request("Why?", history=history)])
    template = ltu.processor.prompt_template | {
        "chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n"
        "{% endfor %}<assistant>"
    }
    llm = folders["ltu"].parent / "llm"
    chat = LtuEngine.from_pretrained(
        tiny.write_checkpoint(tmp_path / "chat", llm, prompt_template=template), "cpu"
    )
    answer = chat([Request("Why?", tiny.clip(1), history=history)], max_new_tokens=3)[0]
    ids = chat.inputs([Request("Why?", tiny.clip(1), history=history)])["input_ids"][0].tolist()
    text = chat.processor.tokenizer.decode([token for token in ids if token < 512])
    assert text.index("Who?") < text.index("A dog.") < text.index("Why?") and answer.status == "ok"


def test_samples_follow_the_stock_distribution():
    """100,000 samples against stock probabilities; those of a row depend on its seed alone."""
    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 2
    settings = {"temperature": 0.8, "top_k": 8, "top_p": 0.9}
    stock = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(8), TopPLogitsWarper(0.9)]
    wanted = LogitsProcessorList(stock)(None, logits).softmax(-1)[0]
    rows = 1000
    sampled_settings = settings | {"do_sample": True}
    sampler = RowSampler([str(row) for row in range(rows)], [sampled_settings] * rows)
    counts = torch.zeros(12)
    for _ in range(100):
        sampled = sampler(torch.zeros(rows, 1), logits.expand(rows, -1)).argmax(-1)
        counts += torch.bincount(sampled, minlength=12)
    assert ((wanted == 0) == (counts == 0)).all()
    assert torch.allclose(counts / counts.sum(), wanted, atol=0.006)
    one = RowSampler(["a"], [sampled_settings])
    mixed = RowSampler(
        ["b", "a", "c"],
        [sampled_settings | {"temperature": 2.0}, sampled_settings, {"do_sample": False}],
    )
    ones = [int(one(torch.zeros(1, 1), logits).argmax(-1)) for _ in range(50)]
    several = [
        mixed(torch.zeros(3, 1), logits.expand(3, -1)).argmax(-1).tolist() for _ in range(50)
    ]
    assert ones == [row[1] for row in several] and len(set(ones)) > 2
    assert {row[2] for row in several} == {int(logits.argmax())} and len(
        {row[0] for row in several}
    ) > 2


def stream(tokens: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """Return the texts that are shown after each token of an answer."""
    shown: list[str] = []
    rows = [StreamedRow(len(tokens))]
    streamer = BatchStreamer(lambda row, text: shown.append(text), decode, {2}, rows)
    streamer.put(torch.zeros(1, 3))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    return shown


def test_a_wrong_byte_does_not_change_the_characters_next_to_it(ltu: LtuEngine) -> None:
    tokenizer = ltu.processor.tokenizer
    pieces = ["▁a", "<0xC3>", "<0xA9>", "<0xFF>", "<0x0A>", "▁a", "<0xE2>", "<0x82>", "▁a"]
    tokens = tokenizer.convert_tokens_to_ids(pieces)
    decode = ltu.processor.decode_answer
    whole = "aé\ufffd\n a\ufffd\ufffd a"
    assert decode(tokens) == whole
    # A language model has more tokens than its tokenizer knows; they have no text.
    assert decode([600, *tokens[:4], 600, *tokens[4:]]) == whole
    # An incomplete character is held back, and so are white space at the end and U+FFFD.
    held = ["a", "a", "aé", "aé", "aé", "aé\ufffd\n a", "aé\ufffd\n a", "aé\ufffd\n a", whole]
    assert stream(tokens, decode) == held


CHARACTERS = ["a", " ", "\n", "\0", "é", "€", "▁", "\ufeff", "\ufffd", "雨", "😀", "<0xFF>"]


def test_bytes_decode_as_with_sentencepiece(ltu: LtuEngine) -> None:
    """Random bytes, characters and their parts, between words: the text of the original's library.

    The streamed text only grows, and is the beginning of the whole text.
    """
    reference = SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer" / "tokenizer.model"))
    decode = ltu.processor.decode_answer
    rng = random.Random(0)
    first_byte = reference.piece_to_id("<0x00>")
    num_wrong = 0
    for _ in range(2000):
        tokens: list[int] = []
        for _ in range(rng.randrange(1, 9)):
            data = rng.choice(CHARACTERS).encode()
            kind = rng.randrange(4)
            if kind == 0:
                tokens.append(rng.randrange(259, reference.vocab_size()))
                continue
            if kind == 1:
                data = data[: rng.randrange(len(data) + 1)]
            elif kind == 2:
                data = rng.randbytes(rng.randrange(1, 4))
            tokens.extend(first_byte + byte for byte in data)
        expected = reference.decode(tokens).strip()
        assert decode(tokens) == expected, tokens
        num_wrong += "\ufffd" in expected
        shown = stream(tokens, decode)
        grows = all(after.startswith(before) for before, after in pairwise([*shown, expected]))
        assert grows, (tokens, shown)
    assert num_wrong > 1000


@pytest.mark.parametrize(
    "request_, settings",
    [
        (Request("?", mode="audio"), {}),
        (Request("?", num_chunks=-1), {}),
        (Request("?", num_chunks="all"), {}),
        (Request("?"), {"batch_size": 0}),
    ],
)
def test_impossible_requests(ltu, request_, settings):
    with pytest.raises(ValueError, match="mode|num_chunks|batch_size"):
        ltu([request_], **settings)


def test_an_impossible_cache(folders):
    with pytest.raises(ValueError, match="-1"):
        LtuEngine.from_pretrained(folders["ltu"], device="cpu", cache_mb=-1)


def test_half_a_character_is_no_end(ltu):
    """JSON may hold a lone surrogate, which no tokenizer takes."""
    odd, plain = ltu([Request("What \ud800?", tiny.clip(1)), Request("Why?")], max_new_tokens=4)
    assert odd == ltu([Request("What ??", tiny.clip(1))], max_new_tokens=4)[0] and plain.answered


def test_features_that_overflow_are_one_clips_failure(fresh, monkeypatch):
    clips = [tiny.clip(seed, 1.0) for seed in range(3)]
    requests = [Request("What?", clip, "") for clip in clips]
    whole = fresh("ltu_as")(requests, max_new_tokens=3)
    engine = fresh("ltu_as")
    stock = type(engine.processor.feature_extractor).__call__

    def overflowing(extractor, raw_speech, **kwargs):
        made = stock(extractor, raw_speech, **kwargs)
        for row, clip in enumerate(raw_speech):
            made["input_features"][row] *= float("inf") if np.array_equal(clip, clips[1]) else 1.0
        return made

    monkeypatch.setattr(type(engine.processor.feature_extractor), "__call__", overflowing)
    found = engine(requests, max_new_tokens=3)
    assert found[1].status == "unreadable" and "overflow" in found[1].error
    assert [found[0], found[2]] == [whole[0], whole[2]]


@pytest.mark.parametrize("setting", [{"quantization": "3bit"}, {"attention": "flash_attention_2"}])
def test_what_cannot_be_opened_says_why(folders, setting):
    with pytest.raises(ValueError, match="3bit|(?i:flash)"):
        LtuEngine.from_pretrained(folders["ltu"], device="cpu", **setting)


COMPILED = pytest.param({"compile": True}, marks=pytest.mark.slow)


@pytest.mark.parametrize("setting", [COMPILED, {"attention": "eager"}, {"device_map": "auto"}])
def test_other_ways_to_compute_give_the_same_answers(folders, setting):
    requests = [Request(question, tiny.clip(1)) for question in ("What?", "Why is it so?")]
    plain = LtuEngine.from_pretrained(folders["ltu"], device="cpu")(requests, max_new_tokens=6)
    other = LtuEngine.from_pretrained(folders["ltu"], device="cpu", **setting)(
        requests, max_new_tokens=6
    )
    assert other == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_that_does_not_multiply_in_bf16_computes_in_fp32(
    tmp_path, monkeypatch, caplog, dtype
):
    """If the dtype is not given, and the memory is large enough."""
    llm = tiny.write_llm(tmp_path / "llm", dtype=dtype)
    folder = tiny.write_checkpoint(tmp_path / "ltu", llm, tiny.LORA)

    def dtype_of(**settings) -> torch.dtype:
        engine = LtuEngine.from_pretrained(folder, device="cpu", **settings)
        assert engine([Request("What?", tiny.clip(1))], max_new_tokens=3)[0].status == "ok"
        return engine.model.get_output_embeddings().weight.dtype

    monkeypatch.setattr("ltu.inference.engine.cpu_has_bf16", lambda: False)
    assert dtype_of() == dtype_of(device_map="cpu") == torch.float32
    assert dtype_of(dtype=dtype) == dtype
    assert not caplog.records
    memory = SimpleNamespace(available=1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert dtype_of() == dtype
    assert "so the language model is slow" in caplog.text
    monkeypatch.setattr("ltu.inference.engine.cpu_has_bf16", lambda: True)
    assert dtype_of() == dtype
