"""Tests the pretraining of TLTR on the labels of clips, from features to a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ltu.files import run_command
from ltu_as.convert_checkpoint import main as convert
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
    """Folder of features of 48 clips and their labels.

    Channel 10 of every layer is higher in the clips of a dog than in those of a cat.
    """
    folder = tmp_path_factory.mktemp("pretrain")
    store = FeatureStore.create(folder / "features", {"shape": SHAPE, "whisper_model": "tiny"})
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


@pytest.fixture(scope="module")
def checkpoint(root: Path, tltr: Path) -> Path:
    save_whisper(root / "whisper.pt")
    tiny.write_llm(root / "llm")
    text = f"--init --llm {root}/llm --whisper {root}/whisper.pt --num_layer_heads 2"
    text += f" --audio_encoder {tltr} --feature_root {root}/features --output_dir {root}/init"
    convert(text.split())
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


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "must be a list"),
        ([{"audio_id": "0.wav"}], "record 1: 'labels' must be a list"),
        ([{"audio_id": "0.wav", "labels": "dog"}], "record 1: 'labels' must be a list"),
        ([{"labels": ["dog"]}], "record 1: 'audio_id' must be"),
        ([{"audio_id": "0.wav", "labels": ["dog"]}] * 2, "record 2: '0.wav' has a record already"),
        ([{"audio_id": f"{i}.wav", "labels": ["dog"]} for i in range(3)], "nothing can be learned"),
        ([{"audio_id": "gone.wav", "labels": ["dog"]}], "holds no features of gone.wav"),
    ],
)
def test_data_that_cannot_be_learned_from(
    records: list, message: str, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(records))
    output = tmp_path / "tltr.safetensors"
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: pretrain(flags(root, output, tmp_path / "bad.json")))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_a_training_that_diverges_writes_nothing(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "tltr.safetensors"
    text = [*flags(root, output), "--learning_rate", "1e30", "--num_epochs", "2"]
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: pretrain(text))
    assert str(caught.value).startswith("error: TLTR is not trained: its loss is")
    assert not output.exists()


def test_a_training_that_learns_nothing_writes_nothing(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "tltr.safetensors"
    text = [*flags(root, output), "--learning_rate", "1e-9", "--num_epochs", "1"]
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: pretrain(text))
    assert str(caught.value).startswith("error: TLTR has learned nothing from the features")
    assert not output.exists()


def test_a_tltr_of_another_whisper_is_refused(root: Path, tltr: Path, checkpoint: Path) -> None:
    save_whisper(root / "deeper.pt", n_audio_layer=6)
    text = f"--init --llm {root}/llm --whisper {root}/deeper.pt --num_layer_heads 2"
    text += f" --audio_encoder {tltr} --output_dir {root}/out"
    with pytest.raises(ValueError, match="a TLTR for 4 layers, but Whisper .* has 6"):
        convert(text.split())
