"""Tests that training and generation on a GPU equal those on a CPU.

This includes training with the layers of the language model on several devices.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers.integrations import accelerate as accelerate_integration

from ltu.checkpoints.open_checkpoint import open_model
from ltu.finetune import main as finetune
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu_as import LtuAsFeatureExtractor
from tests import tiny
from tests.whisper_tiny import save_whisper

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
    extractor = LtuAsFeatureExtractor(None, None, save_whisper(tmp_path / "w.pt"), None, "fp32")
    clips = [tiny.clip(seed, 10.0) for seed in range(3)]
    found = {}
    for device in ("cpu", "cuda"):
        extractor.device = device
        found[device] = extractor(clips).input_features
    assert (found["cpu"] - found["cuda"]).abs().max() < 5e-5


def test_answers_are_those_of_a_cpu(folder: Path) -> None:
    requests = [Request(f"Question {seed}?", tiny.clip(seed)) for seed in range(5)]
    requests.append(Request("No audio?"))
    texts = {}
    for device in ("cpu", "cuda"):
        engine = LtuEngine.from_pretrained(folder / "init", device)
        answers = engine(requests, max_new_tokens=12)
        texts[device] = [answer.text for answer in answers]
    assert texts["cpu"] == texts["cuda"]
