"""Static caches: equal answers, one graph for each step, few shapes; merged LoRA."""

import argparse
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

from ltu import LtuConfig, LtuForConditionalGeneration
from ltu.inference.batch_inference import BatchSettings, Ranks, make_keys
from ltu.inference.batch_invariance import check_batch
from ltu.inference.engine import LtuEngine
from ltu.inference.generation_flags import add_generation_flags, open_engine
from ltu.inference.requests import Request
from ltu.inference.static_cache import MIN_BATCHES, choose_length, count_rows
from ltu.models.generation_ltu import find_cache
from ltu.models.lora import can_merge_lora
from ltu.serve import main as serve
from tests import tiny
from tests.test_engine import mixture
from tests.whisper_tiny import write_ltu_as

QUESTION = "What is it?"
LONG_QUESTION = "Which of the two sounds comes first, and why do you think so? " * 3
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8}


class GraphCounter:
    """Counts the graphs that `torch.compile` makes, and runs them eagerly."""

    def __init__(self):
        self.count = 0

    def backend(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        self.count += 1
        return graph.forward

    def config(self) -> CompileConfig:
        """Return settings with which transformers compiles on the CPU, in whole graphs only."""
        return on_the_cpu(CompileConfig(fullgraph=True, backend=self.backend, mode=None))

    # `CompileConfig.to_dict` copies its values.
    def __deepcopy__(self, _: dict) -> "GraphCounter":
        return self


def on_the_cpu(config: CompileConfig) -> CompileConfig:
    config._compile_all_devices = True
    return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("static_cache")
    llm = tiny.write_llm(root / "llm")
    return {
        "ltu": tiny.write_checkpoint(root / "ltu", llm, tiny.LORA),
        "ltu_as": write_ltu_as(root / "ltu_as", llm),
    }


@pytest.fixture(scope="module")
def dynamic_engines(folders) -> dict[str, LtuEngine]:
    engines = {}
    for kind, folder in folders.items():
        engines[kind] = LtuEngine.from_pretrained(folder, "cpu", static_cache="off")
    return engines


@pytest.fixture(params=["ltu", "ltu_as"])
def dynamic(dynamic_engines, request) -> LtuEngine:
    return dynamic_engines[request.param]


@pytest.fixture
def ltu(dynamic_engines) -> LtuEngine:
    return dynamic_engines["ltu"]


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def static(engine: LtuEngine, config: CompileConfig | None = None) -> LtuEngine:
    """Return an engine with a static cache around the same model."""
    return LtuEngine(
        engine.model,
        engine.processor,
        folder=engine.folder,
        static_cache="on",
        compile_config=config,
    )


@contextmanager
def recorded_steps(engine: LtuEngine) -> Iterator[list[tuple[int, int]]]:
    """Yield a list that gets (rows, length of the cache) of each step."""
    assert engine.can_use_static_cache  # This check has steps of its own.
    shapes = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs["inputs_embeds"].shape[1] == 1:
            rows, _, _, length = kwargs["attention_mask"].shape
            shapes.append((rows, length))

    handle = engine.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


# --- equal answers


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_answers_are_equal(dynamic, tmp_path, backend):
    """Greedy, beams, sampling; any clips, none, several chunks, other limits and lengths."""
    requests = mixture(0, tmp_path)
    requests += [Request(LONG_QUESTION, tiny.clip(3), ""), Request("Why?"), Request("?", None, "")]
    config = backend and on_the_cpu(CompileConfig(fullgraph=True, backend=backend, mode=None))
    engine = static(dynamic, config)
    expected = dynamic(requests, 16, max_new_tokens=5)
    for batch_size in (3, 16):
        assert engine(requests, batch_size, max_new_tokens=5) == expected


@pytest.mark.slow
def test_answers_of_compiled_kernels_are_equal(ltu, tmp_path):
    requests = mixture(1, tmp_path)
    config = on_the_cpu(CompileConfig(fullgraph=True, mode="default"))
    assert static(ltu, config)(requests, 4) == ltu(requests, 4)


def test_a_stream_grows_to_the_same_answer(dynamic):
    request = Request(QUESTION, tiny.clip(3), "")
    for decoding in ({}, {"do_sample": True, "temperature": 1.3}):
        *texts, last = static(dynamic).stream(request, max_new_tokens=12, **decoding)
        assert last == dynamic([request], max_new_tokens=12, **decoding)[0]
        assert all(later.startswith(sooner) for sooner, later in pairwise([*texts, last.text]))
        assert len(texts) > 2


def test_a_cancelled_request_of_three(ltu):
    """Three requests fill up to four rows; one is cancelled, and the others are complete."""
    requests = [Request(QUESTION, tiny.clip(3)), Request("Why?"), Request("Who?")]
    calls = []

    def on_text(index: int, text: str) -> bool:
        calls.append(index)
        return index != 1 or not text

    found = dict(static(ltu).run(requests, 3, on_text=on_text, **GREEDY))
    whole = ltu(requests, 3, **GREEDY)
    assert set(calls) == {0, 1, 2}
    assert (found[0], found[2]) == (whole[0], whole[2])
    assert found[1].finish_reason == "cancelled"
    assert found[1].new_tokens < whole[1].new_tokens and whole[1].text.startswith(found[1].text)


def test_the_check_of_batches_uses_the_static_cache(ltu, monkeypatch, capsys):
    requests = [Request(LONG_QUESTION, tiny.clip(3), ""), Request("Why?"), Request("Who?")]
    engine = static(ltu)
    with recorded_steps(engine) as shapes:
        assert check_batch(engine, requests, {"max_new_tokens": 4}) == 0
    assert {length for _, length in shapes} == {128}
    assert "batched answers equal single ones\n" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_return_sequences": 2}])
def test_decoding_by_hand_and_other_modes(ltu, settings):
    """Beams, samples and no cache embed as before."""
    batch = ltu.inputs([Request(QUESTION, tiny.clip(3)), Request("Why?")])
    if "num_return_sequences" in settings:
        settings = settings | {"do_sample": True}
    torch.manual_seed(0)
    expected = ltu.model.generate(**batch, **GREEDY, **settings, pad_token_id=0)
    for more in ({"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        found = ltu.model.generate(**batch, **GREEDY, **settings, **more, pad_token_id=0)
        assert torch.equal(found, expected)


# --- the step


def test_a_step_is_one_graph_without_synchronisation(dynamic):
    """With `fullgraph`, the compiler refuses code that reads a value from the device."""
    batch = dynamic.inputs([Request(QUESTION, tiny.clip(3)), Request("Why?")])
    graphs = GraphCounter()
    settings = {"cache_implementation": "static", "max_cache_len": 128, "pad_token_id": 0}
    dynamic.model.generate(**batch, **GREEDY, **settings, compile_config=graphs.config())
    assert graphs.count == 1


def test_a_step_of_a_callers_own_loop_is_one_graph(ltu):
    batch = ltu.inputs([Request(QUESTION, tiny.clip(3))])
    model = ltu.model
    graphs = GraphCounter()
    step = torch.compile(model, fullgraph=True, backend=graphs.backend)
    mask = batch["attention_mask"]
    with torch.no_grad():
        output = model(**batch, use_cache=True)
        for number in range(1, 4):
            name, cache = find_cache(output)
            token = output.logits[:, -1:].argmax(-1)
            longer = torch.nn.functional.pad(mask, (0, number), value=1)
            output = step(token, longer, use_cache=True, **{name: cache})
    assert graphs.count >= 1
    tokens = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    assert torch.equal(tokens[0, -1], output.logits[0, -1].argmax())


def test_a_placeholder_without_its_clip_is_refused_with_a_cache_too(ltu):
    batch = ltu.inputs([Request(QUESTION, tiny.clip(3))])
    name, cache = find_cache(ltu.model(**batch, use_cache=True))
    tokens = batch["input_ids"][:, :3]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 3), value=1)
    with pytest.raises(ValueError, match="2 audio placeholders in input_ids, but 0 clips"):
        ltu.model(tokens, mask, use_cache=True, **{name: cache})


# --- shapes


def test_rows_and_lengths_are_rounded_up():
    lengths = [choose_length(count) for count in range(1, 5000)]
    powers = [128, 256, 512, 1024, 2048, 4096]
    assert set(lengths) == {*powers, *(length * 3 // 2 for length in powers)}
    for count, length in enumerate(lengths, 1):
        assert count <= length and (length == 128 or length < 1.5 * count)
    assert [count_rows(size) for size in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_a_mixed_run_has_few_shapes(ltu):
    """Prompts and answers of every length, in full batches and a rest, decode in few shapes."""
    requests = []
    for number in range(21):
        question = "What is it? " * (1 + 2 * number)
        decoding = {"max_new_tokens": 3 + number % 4}
        requests.append(Request(question, tiny.clip(number % 3), "", decoding=decoding))
    graphs = GraphCounter()
    engine = static(ltu, graphs.config())
    answers = engine(requests, 4)
    assert answers == ltu(requests, 4)
    prompts = {answer.prompt_tokens for answer in answers}
    assert len(prompts) == 21
    assert graphs.count <= 3

    engine = static(ltu)
    with recorded_steps(engine) as shapes:
        engine(requests, 4)
    lengths = [length for _, length in shapes]
    assert {rows for rows, _ in shapes} == {4}
    assert set(lengths) == {128, 192, 256}
    # A long prompt makes its own batch long, and no later one.
    with recorded_steps(engine) as shapes:
        engine(requests[:1])
    assert set(shapes) == {(1, 128)}


def test_a_warm_up_compiles_all_shapes(ltu):
    graphs = GraphCounter()
    engine = static(ltu, graphs.config())
    engine.warm_up(3, max_new_tokens=90)
    count = graphs.count
    assert count >= 1
    for size in (1, 2, 3, 4):
        requests = [Request("Why?"), Request("Who is it?"), Request("?"), Request("A dog?")]
        engine(requests[:size], size, max_new_tokens=90, min_new_tokens=4)
    assert graphs.count == count
    engine = static(ltu)
    with recorded_steps(engine) as shapes:
        engine.warm_up(3, max_new_tokens=90)
    assert set(shapes) == {(1, 128), (2, 128), (4, 128)}
    dynamic = LtuEngine(ltu.model, ltu.processor, static_cache="off")
    dynamic.warm_up(3)
    assert "can_use_static_cache" not in vars(dynamic)


def test_one_thread_generates(ltu, monkeypatch):
    """CUDA graphs belong to a thread, and each stream has a thread of its own."""
    threads = set()
    generate = ltu.model.generate

    def record(**arguments):
        threads.add(threading.get_ident())
        return generate(**arguments)

    engine, other = static(ltu), static(ltu)
    # Their checks do not compile, and run in this thread.
    assert engine.can_use_static_cache and other.can_use_static_cache
    monkeypatch.setattr(engine.model, "generate", record)
    for _ in range(3):
        list(engine.stream(Request("Why?"), max_new_tokens=3))
    other([Request("Why?")], max_new_tokens=3)
    check_batch(engine, [Request("Why?"), Request("Who?")], {"max_new_tokens": 3})
    assert len(threads) == 1 and threads != {threading.get_ident()}


def test_a_server_compiles_the_length_of_its_own_answers(folders, monkeypatch):
    lengths = []
    cache_settings = LtuEngine.cache_settings

    def record(engine: LtuEngine, num_tokens: int) -> dict:
        settings = cache_settings(engine, num_tokens)
        lengths.append(settings["max_cache_len"])
        return settings

    class Started(Exception):
        pass

    def stop(*_: object) -> None:
        raise Started

    monkeypatch.setattr(LtuEngine, "cache_settings", record)
    monkeypatch.setattr("ltu.serve.make_server", stop)
    flags = f"--model {folders['ltu']} --device cpu --port 0 --static_cache on --max_batch 1"
    with pytest.raises(Started):
        serve([*flags.split(), "--max_new_tokens", "600"])
    question = LtuEngine.from_pretrained(folders["ltu"], "cpu").inputs([Request("Why?")])
    assert lengths[-1] == choose_length(question["input_ids"].shape[1] + 600) > 512


# --- when it is used


def test_auto_needs_a_gpu_and_many_batches(ltu, monkeypatch):
    engine = LtuEngine(ltu.model, ltu.processor)
    many = MIN_BATCHES * 8
    assert engine._choose_rows(many, 8) is None
    monkeypatch.setattr(LtuForConditionalGeneration, "device", torch.device("cuda"))
    vars(engine)["can_use_static_cache"] = True  # It is cached.
    assert engine._choose_rows(many, 8) == 8
    assert engine._choose_rows(many - 7, 8) == 8
    assert engine._choose_rows(many - 8, 8) is None
    engine.static_cache = "off"
    assert engine._choose_rows(many, 8) is None


def test_a_model_without_support_gets_a_dynamic_cache_and_one_warning(ltu, caplog):
    """transformers has a static cache for Bloom, with which it fails."""
    config = AutoConfig.for_model("bloom", **(tiny.LLM | tiny.SPECIAL))
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(config)
    model = LtuForConditionalGeneration(
        LtuConfig(audio_config=tiny.audio_config(), text_config=config),
        language_model=language_model,
    )
    requests = [Request("Why?"), Request("Who is it?"), Request("What?")]
    caplog.set_level(logging.WARNING)
    engine = LtuEngine(model, ltu.processor, static_cache="on")
    answers = engine(requests, 2, **GREEDY) + engine(requests, 2, **GREEDY)
    assert answers == 2 * LtuEngine(model, ltu.processor)(requests, 2, **GREEDY)
    warnings = [text for text in caplog.messages if text.startswith("The cache is not static: ")]
    assert len(warnings) == 1


def test_settings_are_checked_before_a_model_is_opened():
    for name in ("static_cache", "merge_lora"):
        with pytest.raises(ValueError, match=f"{name} is 'yes'; there are auto, on, off"):
            LtuEngine.from_pretrained("nowhere", "cpu", **{name: "yes"})


def test_the_flags(folders):
    parser = argparse.ArgumentParser()
    add_generation_flags(parser)
    words = f"--model {folders['ltu']} --device cpu --static_cache on --merge_lora off".split()
    engine = open_engine(parser.parse_args(words))
    assert engine.static_cache == "on"
    assert engine.model.config.lora == tiny.LORA


# --- merged LoRA


def lora_names(engine: LtuEngine) -> list[str]:
    return [name for name, _ in engine.model.named_parameters() if ".lora_" in name]


def test_merged_lora_changes_nothing_but_rounding(folders, tmp_path):
    """In fp32 LoRA is merged in memory: logits, answers, hash and keys stay those of the folder."""
    engines = {}
    for choice in ("auto", "on", "off"):
        engines[choice] = LtuEngine.from_pretrained(folders["ltu"], "cpu", merge_lora=choice)
    plain = engines.pop("off")
    assert lora_names(plain)
    requests = [Request(QUESTION, tiny.clip(3), ""), Request("Why?"), Request(LONG_QUESTION)]
    batch = plain.inputs(requests)
    rows = [Request(QUESTION, None, "")]
    keys = make_keys(rows, plain, BatchSettings(), Ranks())
    for engine in engines.values():
        assert not lora_names(engine)
        with torch.no_grad():
            expected = plain.model(**batch).logits
            found = engine.model(**batch).logits
        assert (found - expected).abs().max() < 1e-5 * (expected.max() - expected.min())
        assert engine(requests, **GREEDY) == plain(requests, **GREEDY)
        assert engine.checkpoint == plain.checkpoint != ""
        assert make_keys(rows, engine, BatchSettings(), Ranks()) == keys


def test_auto_does_not_merge_where_the_product_would_be_rounded(folders):
    assert lora_names(LtuEngine.from_pretrained(folders["ltu"], "cpu", "bfloat16"))
    merged = LtuEngine.from_pretrained(folders["ltu"], "cpu", "bfloat16", merge_lora="on")
    assert not lora_names(merged)


def test_lora_on_a_tied_weight_is_left(tmp_path):
    llm = tiny.write_llm(tmp_path / "llm", tie_word_embeddings=True)
    lora = tiny.LORA | {"target_modules": ["lm_head"]}
    folder = tiny.write_checkpoint(tmp_path / "checkpoint", llm, lora)
    engine = LtuEngine.from_pretrained(folder, "cpu")
    assert lora_names(engine)
    with pytest.raises(ValueError, match="one tensor: it cannot be merged"):
        LtuEngine.from_pretrained(folder, "cpu", merge_lora="on")


def test_offloaded_weights_are_left(folders):
    """Adding to a weight on the meta device would do nothing, and LoRA would be lost."""
    engine = LtuEngine.from_pretrained(folders["ltu"], "cpu", merge_lora="off")
    num_names = len(lora_names(engine))
    engine.model.language_model.model.layers[0].to("meta")
    assert not can_merge_lora(engine.model.language_model)
    with pytest.raises(ValueError, match="offloaded, and LoRA cannot be merged"):
        engine.model.merge_lora()
    assert len(lora_names(engine)) == num_names and engine.model.config.lora
