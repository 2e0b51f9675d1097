"""Tests the pretraining of TLTR on the labels of clips, from features to a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from ltu.files import run_command
from ltu_as.convert_checkpoint import main as convert
from ltu_as.feature_extraction_ltu_as import LtuAsFeatureExtractor
from ltu_as.feature_store import FeatureStore
from ltu_as.pretrain_tltr import LabelledFeatures
from ltu_as.pretrain_tltr import main as pretrain
from tests import tiny
from tests.whisper_tiny import save_whisper

SHAPE = [4, 5, 64]  # (layers, time, width) of the tiny Whisper.
# A few channels of Whisper are large and constant.
OFFSET = torch.zeros(64)
OFFSET[3] = 50.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Whisper, a language model, features of 48 clips and their labels.

    Channel 10 of every layer is higher in the clips of a dog than in those of a cat.
    """
    folder = tmp_path_factory.mktemp("pretrain")
    whisper = save_whisper(folder / "whisper.pt")
    tiny.write_llm(folder / "llm")
    extractor = LtuAsFeatureExtractor(None, None, whisper, feature_precision="fp32")
    description = extractor.describe() | {"shape": SHAPE, "loop_short_clips": True}
    store = FeatureStore.create(folder / "features", description)
    generator = torch.Generator().manual_seed(0)
    records = []
    for number in range(48):
        features = torch.randn(SHAPE, generator=generator) + OFFSET
        features[..., 10] += 2 if number % 2 else -2
        store.write(f"{number}.wav", features, None, 1.0)
        labels = ["animal", "dog" if number % 2 else "cat"]
        records.append({"audio_id": f"{number}.wav", "labels": labels})
    (folder / "labels.json").write_text(json.dumps(records[:32]))
    (folder / "all.json").write_text(json.dumps(records))
    return folder


def flags(root: Path, output: Path, data: Path | None = None) -> list[str]:
    text = f"--data_path {data or root / 'labels.json'} --feature_root {root}/features"
    text += f" --output_path {output} --num_layer_heads 2 --batch_size 8 --learning_rate 3e-3"
    return text.split()


@pytest.fixture(scope="module")
def tltr(root: Path) -> Path:
    pretrain([*flags(root, root / "tltr.safetensors"), "--num_epochs", "10"])
    return root / "tltr.safetensors"


def init_flags(root: Path, output: Path, tltr: Path, whisper: str = "whisper.pt") -> list[str]:
    text = f"--init --llm {root}/llm --whisper {root}/{whisper} --output_dir {output}"
    return f"{text} --audio_encoder {tltr}".split()


@pytest.fixture(scope="module")
def checkpoint(root: Path, tltr: Path) -> Path:
    convert(init_flags(root, root / "init", tltr))
    return root / "init"


def test_the_checkpoint_has_the_trained_tltr(tltr: Path, checkpoint: Path) -> None:
    """Every tensor but the classifier, which is named among the dropped keys."""
    state = load_file(tltr)
    classifier = {key for key in state if key.startswith("mlp_layer.")}
    record = json.loads((checkpoint / "ltu_state.json").read_text())
    assert set(record["dropped_keys"]) == classifier
    assert len(classifier) == 4
    opened = AutoModelForCausalLM.from_pretrained(checkpoint).audio_tower.state_dict()
    assert set(opened) == set(state) - classifier
    assert all(torch.equal(opened[key], state[key]) for key in opened)


def test_the_checkpoint_has_the_settings_of_the_pretraining(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    assert config.audio_config.num_layer_heads == 2
    assert config.audio_config.num_time_heads == 1
    assert config.num_audio_tokens == 5
    extractor = AutoProcessor.from_pretrained(checkpoint).feature_extractor
    assert extractor.loop_short_clips
    assert extractor.feature_precision == "fp32"


def test_new_clips_are_told_apart(root: Path, tltr: Path, checkpoint: Path) -> None:
    """The classifier on the audio encoder of the checkpoint knows the label of unseen clips."""
    audio_encoder = AutoModelForCausalLM.from_pretrained(checkpoint).audio_tower.eval()
    state = load_file(tltr)
    classifier = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 3))
    classifier.load_state_dict(
        {key.removeprefix("mlp_layer."): x for key, x in state.items() if "mlp_layer" in key}
    )
    store = FeatureStore(root / "features")
    clips = torch.stack([store.read(f"{number}.wav").features for number in range(32, 48)])
    with torch.no_grad():
        logits = classifier(audio_encoder(clips).mean(1))  # Of animal, cat, dog.
    is_dog = logits[:, 2] > logits[:, 1]
    assert is_dog.tolist() == [number % 2 == 1 for number in range(32, 48)]


def test_the_input_is_standardised(root: Path, checkpoint: Path) -> None:
    """Over the training clips, each channel of each layer has mean 0 and standard deviation 1."""
    audio_encoder = AutoModelForCausalLM.from_pretrained(checkpoint).audio_tower
    store = FeatureStore(root / "features")
    clips = torch.stack([store.read(f"{number}.wav").features for number in range(32)])
    inputs: list[torch.Tensor] = []
    audio_encoder.time_tr.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    audio_encoder(clips)
    channels = inputs[0].unflatten(0, (32, 4)).transpose(0, 1)  # (layers, clips, time, width)
    channels = channels.flatten(1, 2)  # (layers, clips x time, width)
    assert torch.allclose(channels.mean(1), torch.zeros(4, 64), atol=1e-3)
    assert torch.allclose(channels.std(1, correction=0), torch.ones(4, 64), atol=1e-2)


def test_loss_of_the_frequencies_of_the_labels(root: Path) -> None:
    """As of a classifier whose logits are the logarithms of the frequencies."""
    store = FeatureStore(root / "features")
    labels = {"0.wav": ["a", "b"], "1.wav": ["a"], "2.wav": ["a"], "3.wav": ["c"]}
    data = LabelledFeatures(store, labels)
    frequencies = torch.tensor([2.5, 0.5, 1.0]) / 4  # Of a, b, c.
    targets = torch.tensor([[0.5, 0.5, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1]])
    logits = frequencies.log().expand(4, 3)
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert data.loss_of_frequencies() == pytest.approx(expected)


def test_same_seed_same_file(root: Path, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.safetensors"
        pretrain([*flags(root, path), "--num_epochs", "5", "--seed", str(seed)])
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def failed(command: Callable[[], None]) -> str:
    """Return the line with which a command ends."""
    with pytest.raises(SystemExit) as caught:
        run_command(command)
    assert str(caught.value).startswith("error: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "must be a list"),
        ([{"audio_id": "0.wav"}], "record 1: 'labels' must be a list"),
        ([{"audio_id": "0.wav", "labels": "dog"}], "record 1: 'labels' must be a list"),
        ([{"labels": ["dog"]}], "record 1: 'audio_id' must be"),
        ([{"audio_id": "0.wav", "labels": ["dog"]}] * 2, "record 2: '0.wav' has a record already"),
        ([{"audio_id": f"{i}.wav", "labels": ["dog"]} for i in range(3)], "nothing can be learned"),
        ([{"audio_id": f"{name}.wav", "labels": [name]} for name in ("0", "gone")], "of gone.wav"),
    ],
)
def test_data_that_cannot_be_learned_from(
    records: list, message: str, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(records))
    output = tmp_path / "tltr.safetensors"
    assert message in failed(lambda: pretrain(flags(root, output, tmp_path / "bad.json")))
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        # The loss of a step is not finite, and that after the last step only.
        ("--learning_rate 1e30 --num_epochs 2", "TLTR is not trained: its loss is nan"),
        ("--learning_rate 1e30 --num_epochs 2 --batch_size 64", "TLTR is not trained"),
        ("--learning_rate 1e-9 --num_epochs 1", "TLTR has learned nothing from the features"),
        ("--num_epochs 0", "--num_epochs 0: it must be"),
        ("--num_epochs inf", "--num_epochs inf: it must be"),
        ("--learning_rate nan", "--learning_rate nan: it must be"),
        ("--batch_size -1", "--batch_size -1: it must be"),
        ("--num_layer_heads 3", "hidden_size 64 does not divide by num_layer_heads 3"),
    ],
)
def test_a_training_that_fails_writes_nothing(
    more: str, message: str, root: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tltr.safetensors"
    assert message in failed(lambda: pretrain([*flags(root, output), *more.split()]))
    assert not output.exists()


def test_outputs_that_cannot_be_written_stop_first(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = root / "labels.json"
    before = labels.read_bytes()
    monkeypatch.setattr("ltu_as.pretrain_tltr.load_data", lambda *args: pytest.fail("too late"))
    assert "is also --data_path" in failed(lambda: pretrain(flags(root, labels)))
    assert labels.read_bytes() == before
    assert "is a folder" in failed(lambda: pretrain(flags(root, tmp_path)))
    failed(lambda: pretrain(flags(root, labels / "tltr.safetensors")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in failed(lambda: pretrain(flags(root, tmp_path / "tltr.safetensors")))


def test_features_that_are_not_finite_are_named(root: Path, tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "features", FeatureStore(root / "features").description)
    for number in range(3):
        features = torch.ones(SHAPE) * (float("inf") if number == 1 else number)
        store.write(f"{number}.wav", features, None, 1.0)
    records = [{"audio_id": f"{number}.wav", "labels": [str(number)]} for number in range(3)]
    (tmp_path / "labels.json").write_text(json.dumps(records))
    output = tmp_path / "tltr.safetensors"
    line = failed(lambda: pretrain(flags(tmp_path, output)))
    assert "the features of 1.wav" in line
    assert "not finite" in line


def test_a_tltr_of_another_whisper_is_refused(root: Path, tltr: Path) -> None:
    """One of other sizes, and one of the same sizes with other weights."""
    save_whisper(root / "deeper.pt", n_audio_layer=6)
    save_whisper(root / "other.pt", suffix="other")
    for name in ("deeper.pt", "other.pt"):
        with pytest.raises(ValueError, match=r"features of Whisper whisper.pt \(4 layers of width"):
            convert(init_flags(root, root / "out", tltr, name))
    with pytest.raises(ValueError, match="--num_layer_heads 4, but TLTR was trained with 2"):
        convert([*init_flags(root, root / "out", tltr), "--num_layer_heads", "4"])
    assert not (root / "out").exists()


def test_a_file_with_damaged_metadata_is_refused(root: Path, tltr: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "tltr.safetensors"
    for metadata in ("[", "{}", '{"labels": [], "num_time_heads": 1}'):
        save_file(load_file(tltr), damaged, {"pretraining": metadata})
        with pytest.raises(ValueError, match="is damaged: it does not say how TLTR was trained"):
            convert(init_flags(root, root / "out", damaged))
