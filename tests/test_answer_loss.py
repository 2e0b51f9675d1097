"""Tests that the loss of reference answers equals that of training on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.answer_loss import main
from ltu.checkpoints.open_checkpoint import open_model
from ltu.data.audio import load_audio
from ltu.models.processing_ltu import LtuProcessor
from tests.tiny import write_checkpoint, write_llm, write_rows

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loss")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


def training_loss(checkpoint: Path, example: dict, folder: Path) -> float:
    """Return the loss that the model itself computes of a training example, alone in its batch."""
    model = open_model(checkpoint)
    processor = LtuProcessor.from_pretrained(checkpoint)
    tokens, labels = processor.encode_example(example, 10_000, train_on_inputs=False)
    has_audio = example["audio_id"] != "empty"
    batch = processor.pad_batch([tokens], [has_audio])
    if has_audio:
        waveform = load_audio(folder / example["audio_id"])
        batch["input_features"] = processor.feature_extractor([waveform])["input_features"]
    num_before = batch["input_ids"].shape[1] - len(labels)
    labels = torch.tensor([[-100] * num_before + labels])
    with torch.no_grad():
        return model.eval()(**batch, labels=labels).loss.item()


def test_equals_the_loss_of_training(checkpoint, tmp_path, capsys):
    data_path = write_rows(tmp_path / "data", 5, without_audio=2)
    output_path = tmp_path / "losses.json"
    flags = ["--model", str(checkpoint), "--data_path", str(data_path)]
    main([*flags, "--output_path", str(output_path)])
    entries = json.loads(output_path.read_text())
    examples = json.loads(data_path.read_text())
    expected = [training_loss(checkpoint, example, data_path.parent) for example in examples]
    assert [entry["loss"] for entry in entries] == pytest.approx(expected, abs=1e-4)
    assert [entry["ref"] for entry in entries] == [example["output"] for example in examples]
    assert f"loss {np.mean(expected):.3f}" in capsys.readouterr().out


def test_a_missing_clip_is_an_error_and_writes_nothing(checkpoint, tmp_path):
    data_path = write_rows(tmp_path / "data", 2)
    (tmp_path / "data" / "1.wav").unlink()
    flags = ["--model", str(checkpoint), "--data_path", str(data_path)]
    with pytest.raises(ValueError, match="1.wav"):
        main([*flags, "--output_path", str(tmp_path / "losses.json")])
    assert not (tmp_path / "losses.json").exists()


def test_the_data_is_not_replaced(checkpoint, tmp_path, capsys):
    data_path = write_rows(tmp_path / "data", 2)
    before = data_path.read_bytes()
    flags = ["--model", str(checkpoint), "--data_path", str(data_path)]
    for output_path, reason in ((data_path, "of the questions themselves"), (tmp_path, "a folder")):
        with pytest.raises(SystemExit):
            main([*flags, "--output_path", str(output_path)])
        assert reason in capsys.readouterr().err
    assert data_path.read_bytes() == before


def test_each_dataset_file_needs_an_output(checkpoint, tmp_path, capsys):
    flags = ["--model", str(checkpoint), "--data_path", "a.json", "b.json"]
    with pytest.raises(SystemExit):
        main([*flags, "--output_path", str(tmp_path / "losses.json")])
    assert "2 dataset files, but 1 --output_path" in capsys.readouterr().err


def test_other_keys_are_refused_unless_they_are_named(checkpoint, tmp_path):
    data_path = write_rows(tmp_path / "data", 2)
    examples = json.loads(data_path.read_text())
    data_path.write_text(json.dumps([example | {"split": "test"} for example in examples]))
    output_path = tmp_path / "losses.json"
    flags = ["--model", str(checkpoint), "--data_path", str(data_path)]
    flags += ["--output_path", str(output_path)]
    with pytest.raises(ValueError, match="--ignored_keys split"):
        main(flags)
    main([*flags, "--ignored_keys", "split"])
    assert len(json.loads(output_path.read_text())) == 2
