"""Tests what depends on the versions of libraries: the cache of generation and its check."""

import functools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TrainingArguments

from ltu import LtuConfig, LtuForConditionalGeneration, LtuProcessor
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu.models import version_check
from ltu.models.generation_ltu import find_cache
from ltu.training.arguments import RunArguments
from tests.tiny import LORA, SPECIAL, audio_config, clip, write_checkpoint, write_llm

QUESTIONS = ["What is it?", "Which of the two sounds comes first, and why do you think so?"]
CLIPS = [clip(1), clip(2, 2.0)]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("versions")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def model(folder):
    return LtuForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch(folder):
    return LtuProcessor.from_pretrained(folder)(text=QUESTIONS, audio=CLIPS)


def generate(model, batch, **settings):
    """Return the new tokens of each row."""
    sequences = model.generate(**batch, **(GREEDY | settings))
    return sequences[:, batch["input_ids"].shape[1] :].tolist()


class ForgetfulLtu(LtuForConditionalGeneration):
    """A model that loses its cache, as ours did when a release of transformers renamed it."""

    forgetful_batch_sizes = (1, 2)

    @functools.wraps(LtuForConditionalGeneration.forward)
    def forward(self, input_ids, **kwargs):
        if len(input_ids) in self.forgetful_batch_sizes:
            for name in ("cache", "past_key_values"):
                kwargs.pop(name, None)
        return super().forward(input_ids, **kwargs)


@pytest.fixture
def untested(monkeypatch):
    """Replace the tested range by one that the installed transformers is newer than."""

    def forget_results():
        version_check.untested_versions.cache_clear()
        version_check.warn_about_untested_versions.cache_clear()

    monkeypatch.setattr(version_check, "tested_ranges", lambda: {"transformers": ">=5.0,<5.1"})
    forget_results()
    yield
    forget_results()


# --- the cache


def test_the_cache_is_passed_on_under_any_name(model, batch, monkeypatch):
    """`forward` passes on unknown arguments, so that a release may rename the cache."""
    received = {}

    def forward(**kwargs):
        received.update(kwargs)

    monkeypatch.setattr(model.language_model, "forward", forward)
    model(**batch, state_of_the_next_release="a cache")
    assert received["state_of_the_next_release"] == "a cache"


@pytest.mark.parametrize("count", [1, 2], ids=["unpadded", "padded"])
def test_cache_kinds_generate_the_same(model, folder, count):
    batch = LtuProcessor.from_pretrained(folder)(text=QUESTIONS[:count], audio=CLIPS[:count])
    expected = generate(model, batch, use_cache=False)
    assert generate(model, batch) == expected
    assert generate(model, batch, cache_implementation="static") == expected


def test_a_static_cache_around_a_loaded_language_model(folder, batch):
    """A model built around a language model knows the attention implementation of that one."""
    language_model = AutoModelForCausalLM.from_pretrained(folder.parent / "llm")
    stored = LtuConfig.from_pretrained(folder)
    config = LtuConfig(audio_config=stored.audio_config, text_config=language_model.config)
    model = LtuForConditionalGeneration(config, language_model=language_model).eval()
    assert generate(model, batch, cache_implementation="static") == generate(model, batch)


def test_tokens_after_a_cached_prompt(model, folder):
    """Generation continues a cached prompt, given the whole prompt or only its last token."""
    batch = LtuProcessor.from_pretrained(folder)(text=QUESTIONS[:1], audio=CLIPS[:1])
    tokens = batch["input_ids"]
    mask = batch["attention_mask"]
    features = batch["input_features"]

    def cache_prompt():
        """Return the name and the cache of the prompt without its last token."""
        with torch.no_grad():
            outputs = model(tokens[:, :-1], mask[:, :-1], input_features=features, use_cache=True)
        return find_cache(outputs)

    settings = {"repetition_penalty": 1.3, "num_beams": 1}
    expected = generate(model, batch, **settings)
    cache_name, cache = cache_prompt()
    inputs = {"input_ids": tokens, "attention_mask": mask, "input_features": features}
    assert generate(model, inputs | {cache_name: cache}, **settings) == expected

    _, cache = cache_prompt()
    cached = {"input_features": features, cache_name: cache}
    found = model.generate(tokens[:, -1:], mask, **cached, **GREEDY)
    assert found[0, 1:].tolist() == generate(model, batch)[0]


def test_repetition_penalty_of_a_generation_config(model, batch):
    """The penalty of the model's own config applies if the caller's config has none."""
    given = GenerationConfig(**GREEDY)
    plain = generate(model, batch)
    model.generation_config.repetition_penalty = 2.0
    try:
        expected = generate(model, batch, repetition_penalty=2.0)
        assert generate(model, batch, generation_config=given) == expected != plain
    finally:
        model.generation_config.repetition_penalty = None


@pytest.mark.parametrize("num_beams", [1, 3])
def test_inputs_embeds_as_the_prompt(model, batch, num_beams):
    expected = generate(model, batch, num_beams=num_beams)
    mask = batch["attention_mask"]
    embeds = model._embed(batch["input_ids"], batch["input_features"]).detach()
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, num_beams=num_beams)
    assert found.tolist() == expected


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_a_clip_is_encoded_once(model, batch, monkeypatch, settings):
    num_clips = []
    get_audio_features = model.get_audio_features

    def count_clips(clips, *others):
        num_clips.append(len(clips))
        return get_audio_features(clips, *others)

    monkeypatch.setattr(model, "get_audio_features", count_clips)
    generate(model, batch, **settings)
    assert num_clips == [2]


def test_clips_without_placeholders_are_refused(model, batch):
    with pytest.raises(ValueError, match="placeholders"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 64), input_features=batch["input_features"])


def test_weights_of_the_language_model_do_not_change(model, folder):
    """A model built around a loaded language model does not initialize its weights again."""
    from safetensors.torch import load_file

    stored = load_file(folder.parent / "llm" / "model.safetensors")
    state = model.language_model.state_dict()
    for name, value in stored.items():
        loaded = state.get(name, state.get(name.replace("_proj.", "_proj.base_layer.")))
        torch.testing.assert_close(loaded, value, atol=0, rtol=0)


# --- untested versions


def test_installed_versions_are_tested():
    """The environment of the tests is within the ranges of requirements.txt."""
    assert set(version_check.tested_ranges()) == set(version_check.CHECKED_LIBRARIES)
    assert version_check.untested_versions() == ()


def test_tested_versions_are_not_checked(model, batch, monkeypatch):
    monkeypatch.setattr(
        version_check, "compare_cached_logits", lambda model: pytest.fail("checked")
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Not tested")
        generate(model, batch)


def test_an_untested_version_is_one_warning(folder, batch, untested):
    with pytest.warns(UserWarning, match=r"transformers [\d.]+ \(tested: >=5.0,<5.1\)") as caught:
        for _ in range(2):
            generate(LtuForConditionalGeneration.from_pretrained(folder), batch)
    messages = [str(warning.message) for warning in caught]
    assert len([message for message in messages if "Not tested" in message]) == 1


def test_a_lost_cache_is_an_error(folder, batch, untested):
    forgetful = ForgetfulLtu.from_pretrained(folder)
    for _ in range(2):  # The second call fails too.
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="would be wrong.*<5.1"):
            version_check.warn_about_untested_versions.cache_clear()
            generate(forgetful, batch)


@pytest.mark.parametrize(
    "setting",
    [{"use_cache": False}, {"num_return_sequences": 2, "do_sample": True}, {"max_time": 1e-6}],
    ids=lambda setting: next(iter(setting)),
)
def test_the_check_has_settings_of_its_own(folder, batch, untested, setting):
    forgetful = ForgetfulLtu.from_pretrained(folder)
    model = LtuForConditionalGeneration.from_pretrained(folder)
    for changed in (forgetful, model):
        changed.generation_config.update(**setting)
        changed.train()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="would be wrong"):
        version_check.warn_about_untested_versions.cache_clear()
        version_check.check_generation(forgetful)
    version_check.check_generation(model)
    assert model.training
    assert model.audio_tower.training
    for name, value in setting.items():
        assert getattr(model.generation_config, name) == value


@pytest.mark.filterwarnings("ignore:Not tested")
def test_a_check_that_fails_is_repeated(folder, batch, untested, monkeypatch):
    model = LtuForConditionalGeneration.from_pretrained(folder)

    def run_out_of_memory(model):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as context:
        context.setattr(version_check, "compare_cached_logits", run_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            version_check.check_generation(model)
    monkeypatch.setattr(version_check, "compare_cached_logits", lambda model: 0.5)
    with pytest.raises(ValueError, match="difference 0.5 "):
        version_check.check_generation(model)


@pytest.mark.filterwarnings("ignore:Not tested")
def test_threads_wait_for_the_check_of_another_thread(folder, untested, monkeypatch):
    model = LtuForConditionalGeneration.from_pretrained(folder)
    is_running = threading.Event()
    may_end = threading.Event()

    def compare(model):
        version_check.check_generation(model)  # The calls of `generate` in the check do the same.
        is_running.set()
        assert may_end.wait(60)
        return 0.5

    monkeypatch.setattr(version_check, "compare_cached_logits", compare)
    with ThreadPoolExecutor(2) as pool:
        checks = [pool.submit(version_check.check_generation, model)]
        assert is_running.wait(60)
        checks.append(pool.submit(version_check.check_generation, model))
        may_end.set()
        for check in checks:
            assert isinstance(check.exception(), ValueError)


def test_ranges_of_other_projects_are_not_read(tmp_path, monkeypatch):
    """The folder of an installed package may have another project's pyproject.toml, or none."""
    monkeypatch.setattr(version_check, "__file__", str(tmp_path / "ltu" / "version_check.py"))
    installed = ["torch>=2.11,<2.15", "peft>=0.19", "accelerate", "transformers<6", "numpy"]
    monkeypatch.setattr(version_check, "requires", {"ltu": installed}.get)
    assert set(version_check.tested_ranges()) == set(version_check.CHECKED_LIBRARIES)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    (tmp_path / "requirements.txt").write_text("-r base.txt\n")
    assert set(version_check.tested_ranges()) == set(version_check.CHECKED_LIBRARIES)


def test_unknown_ranges_are_untested(monkeypatch, untested):
    monkeypatch.setattr(version_check, "tested_ranges", dict)
    assert len(version_check.untested_versions()) == len(version_check.CHECKED_LIBRARIES)


def test_opening_for_inference_runs_the_check(folder, monkeypatch, untested):
    monkeypatch.setattr(version_check, "compare_cached_logits", lambda model: 0.5)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="difference 0.5 "):
        LtuEngine.from_pretrained(folder, device="cpu")


def test_the_check_finds_wrong_generation(folder, model, batch):
    """The forgetful model generates other tokens, and the check finds the difference."""
    forgetful = ForgetfulLtu.from_pretrained(folder)
    assert generate(forgetful, batch) != generate(model, batch)
    for batch_sizes in [(1, 2), (1,), (2,)]:
        forgetful.forgetful_batch_sizes = batch_sizes
        assert version_check.compare_cached_logits(forgetful) > 0.1
    assert version_check.compare_cached_logits(model) < 1e-5


def test_an_engine_answers_on_an_untested_version(folder, untested):
    with pytest.warns(UserWarning, match="Not tested"):
        engine = LtuEngine.from_pretrained(folder, device="cpu")
    answers = engine([Request(QUESTIONS[0], CLIPS[0])], max_new_tokens=4)
    assert answers[0].answered


# --- language models


@pytest.mark.parametrize("model_type", version_check.TESTED_LANGUAGE_MODELS)
def test_tested_language_models(tmp_path, model_type):
    text_config = {
        "model_type": model_type,
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    }
    config = LtuConfig(audio_config=audio_config(), text_config=text_config | SPECIAL)
    torch.manual_seed(0)
    model = LtuForConditionalGeneration(config).eval()
    for parameter in model.language_model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    assert version_check.compare_cached_logits(model) < 1e-5


def test_a_language_model_that_needs_more_than_the_cache_is_refused():
    """RWKV has a state instead, which padding changes and which the wrapper does not pass on."""
    text_config = {
        "model_type": "rwkv",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
    }
    config = LtuConfig(audio_config=audio_config(), text_config=text_config)
    model = LtuForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="'rwkv' .* does not work with audio in padded batches"):
        model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2)


# --- training


@pytest.mark.parametrize("visible, used", [(0, 0), (1, 1), (4, 1)])
def test_a_process_trains_on_one_gpu(tmp_path, monkeypatch, visible, used):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: visible))
    assert RunArguments(output_dir=str(tmp_path), use_cpu=True).n_gpu == used
