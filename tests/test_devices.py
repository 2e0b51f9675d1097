"""On a GPU: training and answering give what a CPU gives, also with the layers of the language model spread out."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers.integrations import accelerate as placing

from ltu.checkpoints.open_checkpoint import open_model
from ltu.finetune import main as finetune
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu_as import LtuAsFeatureExtractor
from tests import tiny
from tests.whisper_tiny import save_whisper

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

SPREAD = {"model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:0", "model.layers.0": "cuda:0"}
SPREAD |= {"model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    tiny.write_checkpoint(folder / "init", tiny.write_llm(folder / "llm"), tiny.LORA)
    tiny.write_rows(folder / "data", 12, without_audio=3)
    return folder


def losses(folder: Path, name: str, *flags: str) -> list[float]:
    """Losses of four steps."""
    run = folder / name
    finetune(
        f"--base_model {folder / 'init'} --data_path {folder / 'data' / 'rows.json'} --output_dir {run} --batch_size 3 "
        "--micro_batch_size 3 --warmup_steps 1 --logging_steps 1 --learning_rate 1e-2 --num_workers 0".split()
        + list(flags)
    )
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_layers_on_two_devices_train_like_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One GPU and the CPU stand for two GPUs: same hooks, and each part computes where it lies."""
    alone = losses(folder, "alone", "--bf16", "False")
    monkeypatch.setattr(
        placing, "dispatch_model", partial(placing.dispatch_model, main_device="cpu")
    )
    with monkeypatch.context() as patch:
        seen = []

        def open_spread(
            base: str, dtype: torch.dtype, llm: str | None, device_map: str | None
        ) -> torch.nn.Module:
            assert device_map == "auto"
            seen.append(open_model(base, dtype, llm, SPREAD))
            return seen[-1]

        patch.setattr("ltu.training.model_setup.open_model", open_spread)
        spread = losses(folder, "spread", "--bf16", "False", "--device_map", "auto")
    layers = seen[0].language_model.model.layers
    assert {p.device.type for p in layers[0].parameters()} == {"cuda"}, (
        "the first layer is not on the GPU"
    )
    assert {p.device.type for p in layers[1].parameters()} == {"cpu"}, (
        "the second layer is not on the CPU"
    )
    assert spread == pytest.approx(alone, abs=1e-4)
    assert alone[-1] < alone[0]


def test_bf16_trains(folder: Path) -> None:
    found = losses(folder, "bf16", "--bf16", "True")
    assert found[-1] < found[0]


def test_whisper_features_in_fp32_are_those_of_a_cpu(tmp_path: Path) -> None:
    """On a new GPU, convolutions would have 10 bits of mantissa by default."""
    extractor = LtuAsFeatureExtractor(None, None, save_whisper(tmp_path / "w.pt"), None, "fp32")
    found = {}
    for device in ("cpu", "cuda"):
        extractor.device = device
        found[device] = extractor([tiny.clip(n, 10.0) for n in range(3)]).input_features
    assert (found["cpu"] - found["cuda"]).abs().max() < 5e-5


def test_answers_are_those_of_a_cpu(folder: Path) -> None:
    requests = [Request(f"Question {n}?", tiny.clip(n)) for n in range(5)] + [Request("No audio?")]
    texts = {
        device: [
            a.text
            for a in LtuEngine.from_pretrained(folder / "init", device)(requests, max_new_tokens=12)
        ]
        for device in ("cpu", "cuda")
    }
    assert texts["cpu"] == texts["cuda"]
