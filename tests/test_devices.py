"""Tests that training and generation on a GPU equal those on a CPU.

This includes training with the layers of the language model on several devices, and what is chosen
on a GPU only: the size of a pass, compiled layers and a static cache.

    LTU_TEST_GPU=1 python -m pytest tests/test_devices.py
"""

import gc
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers.integrations import accelerate as accelerate_integration

from ltu.checkpoints.open_checkpoint import open_model
from ltu.finetune import main as finetune
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu.models.provenance import read_record
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

# A device map that puts the first layer on the GPU and the second one on the CPU.
SPREAD = {
    "model.embed_tokens": "cuda:0",
    "model.rotary_emb": "cuda:0",
    "model.layers.0": "cuda:0",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    tiny.write_checkpoint(folder / "init", tiny.write_llm(folder / "llm"), tiny.LORA)
    tiny.write_rows(folder / "data", 12, without_audio=3)
    return folder


def losses(folder: Path, name: str, *flags: str) -> list[float]:
    """Train for four steps and return the losses."""
    run = folder / name
    argv = ["--base_model", str(folder / "init")]
    argv += ["--data_path", str(folder / "data" / "rows.json")]
    argv += ["--output_dir", str(run)]
    argv += "--batch_size 3 --micro_batch_size 3 --warmup_steps 1 --logging_steps 1".split()
    argv += "--learning_rate 1e-2 --num_workers 0".split()
    finetune([*argv, *flags])
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_layers_on_two_devices_train_like_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One GPU and the CPU replace two GPUs: the hooks are the same, on two devices."""
    on_one = losses(folder, "one", "--bf16", "False")
    dispatch_model = accelerate_integration.dispatch_model
    monkeypatch.setattr(
        accelerate_integration, "dispatch_model", partial(dispatch_model, main_device="cpu")
    )
    models = []

    def open_spread(
        base: Path,
        dtype: torch.dtype,
        llm: str | None,
        device_map: str | None,
        quantization: str | None,
    ) -> torch.nn.Module:
        assert (device_map, quantization) == ("auto", None)
        model = open_model(base, dtype, llm, SPREAD)
        models.append(model)
        return model

    with monkeypatch.context() as patch:
        patch.setattr("ltu.training.model_setup.open_model", open_spread)
        on_two = losses(folder, "two", "--bf16", "False", "--device_map", "auto")
    layers = models[0].language_model.model.layers
    first_devices = {parameter.device.type for parameter in layers[0].parameters()}
    second_devices = {parameter.device.type for parameter in layers[1].parameters()}
    assert first_devices == {"cuda"}, "the first layer is not on the GPU"
    assert second_devices == {"cpu"}, "the second layer is not on the CPU"
    assert on_two == pytest.approx(on_one, abs=1e-4)
    assert on_one[-1] < on_one[0]


def test_bf16_trains(folder: Path) -> None:
    found = losses(folder, "bf16", "--bf16", "True")
    assert found[-1] < found[0]


def test_whisper_features_in_fp32_are_those_of_a_cpu(tmp_path: Path) -> None:
    """By default, convolutions on a recent GPU have a mantissa of 10 bits only."""
    pytest.importorskip("whisper")
    from ltu_as import LtuAsFeatureExtractor
    from tests.whisper_tiny import save_whisper

    extractor = LtuAsFeatureExtractor(None, None, save_whisper(tmp_path / "w.pt"), None, "fp32")
    clips = [tiny.clip(seed, 10.0) for seed in range(3)]
    found = {}
    for device in ("cpu", "cuda"):
        extractor.device = device
        found[device] = extractor(clips).input_features
    assert (found["cpu"] - found["cuda"]).abs().max() < 5e-5


def test_answers_are_those_of_a_cpu(folder: Path) -> None:
    texts = {}
    for device in ("cpu", "cuda"):
        engine = LtuEngine.from_pretrained(folder / "init", device)
        texts[device] = answer_all(engine)
    assert texts["cpu"] == texts["cuda"]


def answer_all(engine: LtuEngine) -> list[str]:
    """Return the texts of answers to questions with and without audio."""
    requests = [Request(f"Question {seed}?", tiny.clip(seed)) for seed in range(5)]
    requests.append(Request("No audio?"))
    return [answer.text for answer in engine(requests, max_new_tokens=12)]


def test_static_cache_answers_like_a_dynamic_one(folder: Path) -> None:
    texts = {}
    for static_cache in ("off", "on"):
        engine = LtuEngine.from_pretrained(folder / "init", "cuda", static_cache=static_cache)
        texts[static_cache] = answer_all(engine)
    assert engine.can_use_static_cache
    assert texts["on"] == texts["off"]


# --- passes

PASSES = "--bf16 False --batch_size 12 --micro_batch_size 2 --num_epochs 3".split()
ROUNDING = 1e-4  # Of a loss in fp32, after a few steps.


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """Convolutions compute in fp32; how they round otherwise depends on the number of rows."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def rows_per_pass(folder: Path, name: str) -> int:
    return read_record(folder / name)["rows_per_pass"]


@pytest.mark.usefixtures("exact_convolutions")
def test_the_largest_pass_trains_like_micro_batches(folder: Path) -> None:
    small = losses(folder, "small_passes", *PASSES, "--rows_per_pass", "2")
    large = losses(folder, "large_passes", *PASSES, "--rows_per_pass", "auto")
    assert rows_per_pass(folder, "small_passes") == 2
    assert rows_per_pass(folder, "large_passes") == 12
    assert len(small) == 3
    assert large == pytest.approx(small, abs=ROUNDING)


def peak_of_reserved_memory() -> int:
    """Return the peak of the bytes that torch has taken from the GPU, and begin a new peak."""
    peak = torch.cuda.max_memory_reserved()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


@pytest.mark.usefixtures("exact_convolutions")
def test_a_pass_without_memory_is_halved(folder: Path) -> None:
    rows = json.loads(tiny.write_rows(folder / "long", 64).read_text())
    for row in rows:
        row["output"] = "a dog and loud rain " * 60
    data_path = folder / "long" / "rows.json"
    data_path.write_text(json.dumps(rows))
    flags = ["--data_path", str(data_path), "--batch_size", "64", "--micro_batch_size", "2"]
    flags += "--bf16 False --cutoff_len 1000 --num_epochs 3".split()

    peak_of_reserved_memory()
    small = losses(folder, "no_halving", *flags, "--rows_per_pass", "2")
    small_peak = peak_of_reserved_memory()
    losses(folder, "enough_memory", *flags, "--rows_per_pass", "64")
    large_peak = peak_of_reserved_memory()
    assert rows_per_pass(folder, "enough_memory") == 64
    assert large_peak > 2 * small_peak

    limit = (small_peak + large_peak) / 2
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        halved = losses(folder, "halved", *flags, "--rows_per_pass", "64")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 2 <= rows_per_pass(folder, "halved") <= 32
    assert halved == pytest.approx(small, abs=ROUNDING)


# --- compiled layers, encoder cache


def test_compiled_layers_train_like_eager_ones(folder: Path) -> None:
    flags = ["--bf16", "True", "--learning_rate", "1e-3"]
    eager = losses(folder, "eager", *flags, "--compile_layers", "False")
    compiled = losses(folder, "compiled", *flags, "--compile_layers", "True")
    assert not read_record(folder / "eager")["compiled_layers"]
    assert read_record(folder / "compiled")["compiled_layers"]
    # The mantissa of bf16 has 8 bits.
    assert compiled == pytest.approx(eager, rel=2**-8)


def test_encoder_cache_trains_like_the_encoder(folder: Path) -> None:
    flags = ["--bf16", "False", "--freeze_audio_tower"]
    plain = losses(folder, "encoder", *flags)
    cache = folder / "cache"
    filled = losses(folder, "filled_cache", *flags, "--encoder_cache", str(cache))
    files = sorted(cache.rglob("*.safetensors"))
    assert files
    reused = losses(folder, "reused_cache", *flags, "--encoder_cache", str(cache))
    assert sorted(cache.rglob("*.safetensors")) == files
    assert filled == pytest.approx(plain, abs=ROUNDING)
    assert reused == filled
