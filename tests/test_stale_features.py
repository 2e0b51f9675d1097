"""Tests that stored features of LTU-AS are not used for audio that has changed since."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import soundfile
import torch

from ltu.files import run_command
from ltu.finetune import main as finetune
from ltu.index_dataset import main as index_dataset
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu.inference_batch import main as inference_batch
from ltu_as.extract_whisper_feature import main as extract
from ltu_as.feature_store import FeatureStore, StaleFeatures
from ltu_as.pretrain_tltr import main as pretrain_tltr
from tests import tiny
from tests.whisper_tiny import write_ltu_as

RATE = 16_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Whisper, a checkpoint, four clips of 0.6 s, examples of them and features."""
    folder = tmp_path_factory.mktemp("stale")
    write_ltu_as(folder / "init", tiny.write_llm(folder / "llm"))
    rows = []
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", tiny.clip(number, 0.6), RATE)
        row = {"instruction": "What is it?", "audio_id": f"{number}.wav", "output": "a dog"}
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    store_features(folder)
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy, in which clip 2 was replaced by one of 3 s after its features were stored."""
    for path in [*made.glob("*.wav"), made / "rows.json"]:
        shutil.copy2(path, tmp_path)
    shutil.copytree(made / "features", tmp_path / "features")
    soundfile.write(tmp_path / "2.wav", tiny.clip(7, 3.0), RATE)
    return tmp_path


def store_features(folder: Path, checkpoint: Path | None = None) -> None:
    flags = f"--data_path {folder}/rows.json --output_dir {folder}/features --device cpu"
    assert extract(f"{flags} --model {checkpoint or folder / 'init'}".split()) == 0


def open_engine(made: Path, feature_root: Path | None) -> LtuEngine:
    engine = LtuEngine.from_pretrained(made / "init", device="cpu")
    if feature_root is not None:
        engine.processor.front_end.configure(feature_root=str(feature_root))
    return engine


def requests_of(folder: Path) -> list[Request]:
    return [
        Request("What is it?", str(folder / f"{number}.wav"), audio_id=f"{number}.wav")
        for number in range(4)
    ]


def test_inference_computes_stale_features_again(
    made: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning; the other clips are still read from the folder."""
    soundfile.write(root / "3.wav", tiny.clip(8, 2.0), RATE)
    from_store = open_engine(made, root / "features")
    with caplog.at_level(logging.WARNING, "ltu_as"):
        answers = from_store(requests_of(root), max_new_tokens=6)
        assert from_store(requests_of(root), max_new_tokens=6) == answers
    warnings = [
        record.getMessage() for record in caplog.records if "audio has" in record.getMessage()
    ]
    assert len(warnings) == 1
    assert "2.wav: the audio has changed" in warnings[0] or "3.wav: the" in warnings[0]
    assert "python -m ltu_as.extract_whisper_feature" in warnings[0]
    assert [answer.seconds_total for answer in answers] == [0.6, 0.6, 3.0, 2.0]
    # Of stored features, rate and channels of the sound are not known.
    assert [answer.channels for answer in answers] == [None, None, 1, 1]
    computed = open_engine(made, None)(requests_of(root), max_new_tokens=6)
    assert [answer.text for answer in answers] == [answer.text for answer in computed]
    assert [answer.transcript for answer in answers] == [answer.transcript for answer in computed]


def test_bytes_are_compared_with_the_record(made: Path, root: Path) -> None:
    engine = open_engine(made, root / "features")
    front_end = engine.processor.front_end
    assert front_end.find_stored_features((root / "1.wav").read_bytes(), "1.wav") is not None
    assert front_end.find_stored_features((root / "2.wav").read_bytes(), "2.wav") is None
    assert front_end.find_stored_features(tiny.clip(2, 0.6), "2.wav") is not None


def test_inference_batch_answers_for_the_new_sound(made: Path, root: Path) -> None:
    """Also in a second run, whose questions were answered for the old sound before."""
    old_sound = (made / "2.wav").read_bytes()
    new_sound = (root / "2.wav").read_bytes()
    common = f"--model {made}/init --device cpu --max_new_tokens 6 --data_path {root}/rows.json"
    output = root / "p.json"
    for sound, seconds in ((old_sound, 0.6), (new_sound, 3.0)):
        (root / "2.wav").write_bytes(sound)
        flags = f"{common} --output_path {output} --feature_root {root}/features"
        assert inference_batch(flags.split()) == 0
        found = json.loads(output.read_text())
        assert [row["seconds_total"] for row in found] == [0.6, 0.6, seconds, 0.6]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_refuses_stale_features(made: Path, root: Path, workers: int) -> None:
    """In one line, whatever --max_bad says, and also if a worker of the data loader finds it."""
    rows = json.loads((root / "rows.json").read_text())
    for row in rows:  # With a transcript, so that none is read before the training.
        row["input"] = ""
    (root / "rows.json").write_text(json.dumps(rows))
    flags = f"--base_model {made}/init --data_path {root}/rows.json --output_dir {root}/run"
    flags += " --batch_size 4 --micro_batch_size 2 --num_epochs 1 --bf16 False --max_bad 4"
    flags += f" --num_workers {workers} --feature_root {root}/features --warmup_steps 0"
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: finetune(flags.split()))
    line = str(caught.value)
    assert line.startswith("error: 2.wav: the audio has changed since its features were stored")
    assert f"--output_dir {root}/features" in line and "\n" not in line
    store_features(root, made / "init")
    assert finetune(flags.split()) in (0, None)
    assert (root / "run" / "model.safetensors").is_file()


def test_an_index_refuses_stale_transcripts(made: Path, root: Path) -> None:
    flags = f"{root}/rows.json --base_model {made}/init --feature_root {root}/features"
    with pytest.raises(StaleFeatures, match="2.wav: the audio has changed"):
        index_dataset(flags.split())
    assert not list(root.glob("*.arrow*"))


def test_pretraining_refuses_stale_features(root: Path) -> None:
    labels = [{"audio_id": f"{number}.wav", "labels": [str(number)]} for number in range(4)]
    (root / "labels.json").write_text(json.dumps(labels))
    flags = f"--data_path {root}/labels.json --feature_root {root}/features"
    with pytest.raises(StaleFeatures, match="2.wav: the audio has changed"):
        pretrain_tltr(f"{flags} --output_path {root}/tltr.safetensors".split())
    assert not (root / "tltr.safetensors").exists()


def test_features_without_their_sounds_stay_usable(
    made: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """For inference, training and a second extraction."""
    for path in root.glob("*.wav"):
        path.unlink()
    engine = open_engine(made, root / "features")
    answers = engine(requests_of(root), max_new_tokens=4)
    assert [answer.status for answer in answers] == ["ok"] * 4
    front_end = engine.processor.front_end
    for request in requests_of(root):
        example = {"audio": request.audio, "audio_id": request.audio_id}
        stored = FeatureStore(root / "features").read(request.audio_id)
        assert torch.equal(front_end.load_features(example), stored.features)
        assert front_end.add_transcripts([example])[0]["input"] == stored.transcript
    store_features(root, made / "init")
    assert not caplog.records


def test_equal_features_with_another_transcript_or_length_are_two_clips(
    made: Path, tmp_path: Path
) -> None:
    """The numbers that are hashed end where the transcript begins."""
    old = FeatureStore(made / "features")
    store = FeatureStore.create(tmp_path / "features", old.description)
    features = old.read("0.wav").features
    store.write("a.wav", features, "a dog", 0.6)
    store.write("b.wav", features, "a cat", 0.6)
    store.write("c.wav", features, "a cat", 0.9)
    store.write("d.wav", features, "", 0.9)
    engine = open_engine(made, tmp_path / "features")
    requests = [
        Request("What?", str(tmp_path / f"{name}.wav"), audio_id=f"{name}.wav") for name in "abcd"
    ]
    found = []
    for request in requests:
        answer = engine([request], max_new_tokens=2)[0]
        found.append((answer.transcript, answer.seconds_total))
    assert found == [("a dog", 0.6), ("a cat", 0.6), ("a cat", 0.9), ("", 0.9)]
    assert len({engine.clip_hash(request) for request in requests}) == 4
