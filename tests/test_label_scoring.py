"""Scores of candidates that share a prefix equal those of each alone, without a cache."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ltu.data.audio import AudioError
from ltu.inference.engine import LtuEngine
from ltu.inference.label_scoring import Candidate, LabelScore, group_candidates
from ltu.inference.requests import Request
from ltu.models.configuration_ltu import IGNORED
from ltu.models.prompt_template import load_prompt_template
from ltu_as.convert_checkpoint import main as convert_as
from tests.test_any_llm import TEMPLATES, byte_tokenizer
from tests.tiny import GOLDEN, clip, write_checkpoint, write_llm
from tests.whisper_tiny import save_whisper

QUESTION = "What is it? Rain, a dog, or a far bell that nobody rings?"
LABELS = [
    "dog",
    "dog bark",
    "rain",
    "I",
    "Male speech, man speaking",
    "dog",
    "a long answer about a bell, which rings far away, "
    "and about rain that falls on a dog who does not mind it " * 2,
    "",
    "Ünïcode 雨",
    "</s> is text",
    "<|im_end|> is text",
]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def engine_of(root: Path, kind: str) -> LtuEngine:
    """A tiny model with that language model. "sliding": every second layer has a short window."""
    if kind == "ltu_as":
        save_whisper(root / "whisper.pt")
        llm = write_llm(root / "llm")
        flags = f"--init --llm {llm} --whisper {root}/whisper.pt "
        flags += "--feature_precision fp32 --num_layer_heads 2"
        convert_as(f"{flags} --output_dir {root}/checkpoint".split())
        return LtuEngine.from_pretrained(root / "checkpoint", device="cpu")
    settings, lora = {}, None
    if kind == "sliding":
        kind, settings = (
            "gemma3_text",
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        )
    elif kind == "all_sliding":
        kind, settings = "mistral", {"sliding_window": 8}
    elif kind == "lora":
        kind, lora = "llama", LORA
    elif kind == "qwen2":
        settings = {"tokenizer": byte_tokenizer()}
    elif kind == "spaced":
        kind, settings = "llama", {"tokenizer": AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")}
        settings["tokenizer"].chat_template = TEMPLATES["spaced"]
    llm = write_llm(root / "llm", kind, **settings)
    template = load_prompt_template("chat", llm) if "tokenizer" in settings else None
    return LtuEngine.from_pretrained(
        write_checkpoint(root / "checkpoint", llm, lora, prompt_template=template)
    )


def alone(engine: LtuEngine, request: Request, texts: list[str]) -> list[LabelScore]:
    """Score each text by the training example of question and answer, whole, without a cache."""
    processor = engine.processor
    clips = []
    if request.audio is not None and request.mode != "asr_only":
        clips.append(processor.front_end.load_clip(request.audio))
    given = "" if request.mode == "audio_only" else request.transcript
    transcript = (
        processor.front_end.complete_transcripts(clips, [given])[0] if clips else given or ""
    )
    features = {"input_features": processor.front_end.extract_features(clips)} if clips else {}
    found = []
    for text in texts:
        example = {"instruction": request.question, "input": transcript, "output": text}
        ids, labels = processor.encode_example(example, 10_000, train_on_inputs=False)
        batch = processor.pad_batch([ids], [bool(clips)])
        with torch.no_grad():
            logits = engine.model(**batch, **features).logits[0].double()
        before = batch["input_ids"].shape[1] - len(ids)
        scores = torch.log_softmax(logits, -1)
        answer = [position for position, label in enumerate(labels) if label != IGNORED]
        values = [scores[before + position - 1, ids[position]].item() for position in answer]
        found.append(LabelScore(text, sum(values), len(values)))
    return found


def check(engine: LtuEngine, request: Request, **settings) -> list[LabelScore]:
    found = engine.score(request, LABELS, **settings)
    for score, expected in zip(found, alone(engine, request, LABELS), strict=True):
        assert (score.text, score.num_tokens) == (expected.text, expected.num_tokens)
        assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4), score.text
    return found


KINDS = ["llama", "lora", "gpt2", "gpt_neox", "qwen2", "spaced", "gemma", "sliding", "all_sliding"]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_each_alone(tmp_path: Path, kind: str) -> None:
    engine = engine_of(tmp_path, kind)
    with_audio = check(engine, Request(QUESTION, clip(1)))
    # The same label twice.
    assert with_audio[0].log_likelihood == pytest.approx(with_audio[5].log_likelihood, abs=1e-4)
    without_audio = check(engine, Request(QUESTION))
    if kind != "all_sliding":  # Its two layers cannot see as far back as the audio.
        assert without_audio[0].log_likelihood != pytest.approx(
            with_audio[0].log_likelihood, abs=1e-3
        )
    in_threes = engine.score(Request(QUESTION, clip(1)), LABELS, tokens_at_once=200)
    by_one = [engine.score(Request(QUESTION, clip(1)), [text])[0] for text in LABELS]
    for one, three, all_at_once in zip(by_one, in_threes, with_audio, strict=True):
        assert one.log_likelihood == pytest.approx(all_at_once.log_likelihood, abs=1e-4)
        assert three.log_likelihood == pytest.approx(all_at_once.log_likelihood, abs=1e-4)


def test_equals_each_alone_with_transcripts(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, "ltu_as")
    sound = clip(2, 1.5)
    joint = check(engine, Request(QUESTION, sound, "good morning"))
    for mode in ("audio_only", "asr_only"):
        other = check(engine, Request(QUESTION, sound, "good morning", mode=mode))
        assert other[0].log_likelihood != pytest.approx(joint[0].log_likelihood, abs=1e-3)
    assert (
        check(engine, Request(QUESTION, sound))[0].text == "dog"
    )  # Whisper writes the transcript.


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LtuEngine:
    return engine_of(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("kind", [*KINDS, "ltu_as"])
def test_answers_of_a_batch_equal_each_alone(tmp_path: Path, kind: str) -> None:
    """Rows of a batch differ in their lengths, and not all of them have audio."""
    engine = engine_of(tmp_path, kind)
    requests = [
        Request(QUESTION, clip(1)),
        Request("What?", clip(2, 1.5)),
        Request("Why is it so?"),
        Request(QUESTION, clip(1)),
    ]
    answers = ["dog", LABELS[6], "Male speech, man speaking", ""]
    found = engine.score_answers(requests, answers)
    in_pairs = engine.score_answers(requests, answers, tokens_at_once=200)
    for request, answer, *both in zip(requests, answers, found, in_pairs, strict=True):
        [expected] = alone(engine, request, [answer])
        for score in both:
            assert (score.text, score.num_tokens) == (answer, expected.num_tokens)
            assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)


@pytest.mark.parametrize("kind", ["sliding", "all_sliding"])
def test_padding_is_not_in_the_window_of_attention(tmp_path: Path, kind: str) -> None:
    """Logits of a short prompt equal those without the padding of a longer one."""
    engine = engine_of(tmp_path, kind)
    short = Request("What?", clip(1))
    with torch.no_grad():
        alone = engine.model(**engine.inputs([short])).logits[0, -1]  # (vocabulary,)
        batch = engine.model(**engine.inputs([short, Request(QUESTION, clip(2))])).logits[0, -1]
    assert batch == pytest.approx(alone, abs=1e-4)


def test_probabilities_of_all_first_tokens_sum_to_one(llama: LtuEngine) -> None:
    """Without the end, scores of one token are the distribution of the first token."""
    processor, request = llama.processor, Request(QUESTION, clip(1))
    prompt = processor.prompt(QUESTION)
    texts = [processor.tokenizer.decode([token]) for token in range(259, 512)]
    own = [
        text
        for text in texts
        if len(processor.encode(prompt + text)) == len(processor.encode(prompt)) + 1
    ]
    scores = llama.score(request, own, with_end=False)
    assert len(own) > 20 and {score.num_tokens for score in scores} == {1}
    assert 0 < np.exp([score.log_likelihood for score in scores]).sum() <= 1 + 1e-5
    with_end = llama.score(request, own[:3])
    assert all(a.log_likelihood > b.log_likelihood for a, b in zip(scores, with_end, strict=False))


def test_the_clip_is_encoded_once(llama: LtuEngine) -> None:
    before = llama.cache.encoded
    first = llama.score(Request(QUESTION, clip(9)), LABELS)
    assert (
        llama.score(Request(QUESTION, clip(9)), LABELS) == first
        and llama.cache.encoded == before + 1
    )


def test_several_chunks_are_used(llama: LtuEngine) -> None:
    one = llama.score(Request(QUESTION, clip(3, 2.0)), LABELS[:2])
    three = llama.score(Request(QUESTION, clip(3, 2.0), num_chunks=3), LABELS[:2])
    assert one[0].log_likelihood != pytest.approx(three[0].log_likelihood, abs=1e-3)


def test_tokens_that_merge_with_the_prompt_count(tmp_path: Path) -> None:
    """Behind "It is t", "he" completes a token of the prompt: its likelihood begins with that."""
    template = {
        "name": "open",
        "prompt_no_input": "{instruction} It is t",
        "prompt_input": "{instruction} {input} t",
    }
    folder = write_checkpoint(
        tmp_path / "checkpoint", write_llm(tmp_path / "llm"), prompt_template=template
    )
    engine, candidates = LtuEngine.from_pretrained(folder), ["he", "!", "", "hen a dog", "rain"]
    processor = engine.processor
    prompt, starts = processor.encode(processor.prompt(QUESTION)), []
    for score in engine.score(Request(QUESTION), candidates):
        ids = [
            *processor.encode(processor.prompt(QUESTION) + score.text),
            processor.tokenizer.eos_token_id,
        ]
        starts.append(
            next(position for position, token in enumerate(ids) if token != [*prompt, -1][position])
        )
        with torch.no_grad():
            scores = engine.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(
            scores[position - 1, ids[position]].item() for position in range(starts[-1], len(ids))
        )
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert score.num_tokens == len(ids) - starts[-1]
    assert min(starts) < max(starts) == len(prompt)


def test_what_cannot_be_scored_is_refused(llama: LtuEngine) -> None:
    with pytest.raises(ValueError, match="one or more texts"):
        llama.score(Request(QUESTION), [])
    with pytest.raises(ValueError, match="one or more texts"):
        llama.score(Request(QUESTION), "dog")
    with pytest.raises(ValueError, match="'' has no tokens"):
        llama.score(Request(QUESTION), ["dog", ""], with_end=False)
    with pytest.raises(ValueError, match="language model 2048"):
        llama.score(Request(QUESTION, clip(1)), ["dog " * 2100])
    with pytest.raises(AudioError, match="no such file"):
        llama.score(Request(QUESTION, "nowhere.wav"), ["dog"])


def test_groups_stay_in_their_budget_and_are_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(0, 60, 527).tolist()
    candidates = [Candidate(str(index), [0] * (7 + n + 1), 7) for index, n in enumerate(lengths)]
    groups = group_candidates(candidates, 7, 90, 4000)
    grouped = [int(candidate.text) for group in groups for candidate in group]
    assert sorted(grouped) == list(range(527))
    for group in groups:
        own_lengths = [lengths[int(candidate.text)] for candidate in group]
        assert len(group) * (90 + max(own_lengths)) <= 4000
        assert min(own_lengths) >= 0.75 * max(own_lengths)
    assert len(groups) < 40
    # One that is too long for the budget is alone.
    too_long = Candidate("", [0] * 5001, 0)
    assert group_candidates([too_long], 0, 90, 4000) == [[too_long]]
