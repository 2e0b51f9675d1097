"""Tests `--encoder_cache` with TLTR, from stored features of Whisper and from audio."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch

from ltu.files import run_command
from ltu.finetune import main as finetune
from ltu_as.audio_front_end import WhisperFrontEnd
from ltu_as.extract_whisper_feature import main as extract
from ltu_as.feature_store import FeatureStore
from ltu_as.modeling_tltr import TltrModel
from tests import tiny
from tests.whisper_tiny import write_ltu_as

NUM_CLIPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Whisper, a checkpoint, four clips, five examples and stored features."""
    folder = tmp_path_factory.mktemp("ltu_as")
    write_ltu_as(folder / "init", tiny.write_llm(folder / "llm"))
    rows = [{"instruction": "Name an animal.", "input": "", "audio_id": "empty", "output": "dog"}]
    for number in range(NUM_CLIPS):
        soundfile.write(folder / f"{number}.wav", tiny.clip(number, 0.6), 16_000)
        row = {"instruction": "What is it?", "input": "", "audio_id": f"{number}.wav"}
        rows.append(row | {"output": "rain and a dog"})
    (folder / "rows.json").write_text(json.dumps(rows))
    store_features(folder)
    return folder


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of clips of each forward pass of TLTR."""
    counts: list[int] = []
    stock_forward = TltrModel.forward

    def forward(self: TltrModel, input_features: torch.Tensor, **kwargs) -> torch.Tensor:
        counts.append(len(input_features))
        return stock_forward(self, input_features, **kwargs)

    monkeypatch.setattr(TltrModel, "forward", forward)
    return counts


def store_features(folder: Path) -> None:
    flags = f"--data_path {folder}/rows.json --output_dir {folder}/features --device cpu"
    assert extract(f"{flags} --model {folder}/init".split()) == 0


def arguments(root: Path, output: Path, *flags: str) -> list[str]:
    text = f"--base_model {root}/init --data_path {root}/rows.json --output_dir {output}"
    text += " --batch_size 4 --micro_batch_size 2 --num_epochs 2 --warmup_steps 1 --bf16 False"
    text += " --learning_rate 1e-3 --num_workers 0 --logging_steps 1 --trainable_params proj"
    return [*text.split(), *flags]


def losses(root: Path, output: Path, *flags: str) -> list[float]:
    finetune(arguments(root, output, *flags))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("source", ["features", "audio"])
def test_losses_equal_those_without_a_cache(root, tmp_path, encoded, monkeypatch, source):
    flags = ["--feature_root", f"{root}/features"] if source == "features" else []
    expected = losses(root, tmp_path / "plain", *flags)
    encoded.clear()
    flags += ["--encoder_cache", str(tmp_path / "cache")]
    assert losses(root, tmp_path / "first", *flags) == pytest.approx(expected, abs=1e-6)
    assert sum(encoded) == NUM_CLIPS
    encoded.clear()

    def fail(*_: object) -> None:
        raise AssertionError("features are loaded")

    monkeypatch.setattr(WhisperFrontEnd, "extract_features", fail)
    assert losses(root, tmp_path / "second", *flags) == pytest.approx(expected, abs=1e-6)
    assert not encoded


def test_features_that_are_extracted_again_are_encoded_again(root, tmp_path, encoded):
    """Features of audio that has changed are refused before, in one line."""
    flags = ["--feature_root", f"{root}/features", "--encoder_cache", str(tmp_path / "cache")]
    losses(root, tmp_path / "first", *flags)
    old = (root / "2.wav").read_bytes()
    try:
        soundfile.write(root / "2.wav", tiny.clip(7, 0.9), 16_000)
        encoded.clear()
        with pytest.raises(SystemExit) as end:
            run_command(lambda: finetune(arguments(root, tmp_path / "second", *flags)))
        assert str(end.value.code).startswith("error: 2.wav: the audio has changed since")
        assert not encoded
        store_features(root)
        losses(root, tmp_path / "second", *flags)
        assert sum(encoded) == 1
    finally:
        (root / "2.wav").write_bytes(old)
        store_features(root)


def test_the_content_of_stored_features_counts(root, tmp_path, encoded):
    """And not that of the audio, which need not be there."""
    features = tmp_path / "features"
    shutil.copytree(root / "features", features)
    data_path = shutil.copy(root / "rows.json", tmp_path)
    flags = ["--feature_root", str(features), "--encoder_cache", str(tmp_path / "cache")]
    flags += ["--data_path", str(data_path)]
    losses(root, tmp_path / "first", *flags)
    assert sum(encoded) == NUM_CLIPS
    encoded.clear()
    store = FeatureStore(features)
    old = store.read("1.wav")
    store.write("1.wav", old.features + 1, old.transcript, old.seconds)
    losses(root, tmp_path / "second", *flags)
    assert sum(encoded) == 1
