"""Trains a new TLTR to name the labels of clips. LTU-AS can start from it.

    python -m ltu_as.pretrain_tltr --data_path labels.json --feature_root exp/features \\
        --output_path exp/tltr.safetensors
    python -m ltu_as.convert_checkpoint --init --llm LLM --whisper FILE.pt \\
        --audio_encoder exp/tltr.safetensors --output_dir DIR

The data are a JSON list of `{"audio_id": "dog.wav", "labels": ["dog", "animals"]}`. Their features
are those of `ltu_as.extract_whisper_feature`. The file has the keys of a Whisper-AT file, and the
mean and the standard deviation of each channel of each layer, by which TLTR scales its input. The
released LTU-AS started from the TLTR of Whisper-AT, which had been trained to tag AudioSet.

One process trains it. A training that was stopped starts again.
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from ltu.files import check_output, check_regular_file, replace_file, run_command
from ltu_as.configuration_ltu_as import TltrConfig
from ltu_as.feature_store import EXTRACT, FeatureStore
from ltu_as.modeling_tltr import TltrModel
from ltu_as.tltr_file import Pretraining

MIN_VARIANCE = 1e-10  # Of a channel, so that a constant one is not divided by zero.


class LabelledFeatures(Dataset):
    """The features and labels of the clips of a dataset; features are read when they are used.

    Attributes:
        names: the labels, sorted.
        labels: 1 where a clip has a label, else 0; (clips, labels).
    """

    def __init__(self, store: FeatureStore, labels: dict[str, list[str]]):
        self.store = store
        self.audio_ids = list(labels)
        names: set[str] = set().union(*labels.values())
        self.names = sorted(names)
        index = {name: number for number, name in enumerate(self.names)}
        self.labels = torch.zeros(len(labels), len(self.names))
        for target, listed in zip(self.labels, labels.values(), strict=True):
            target[[index[name] for name in listed]] = 1

    def __len__(self) -> int:
        return len(self.audio_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        features = self.read(self.audio_ids[index]).float()
        return {"input_features": features, "labels": self.labels[index]}

    def read(self, audio_id: str) -> Tensor:
        """Return the features of a clip, (layers, time, width).

        Raises:
            ValueError: there are none, or they are not finite or of another shape than others.
        """
        stored = self.store.read(audio_id)
        if stored is None:
            raise ValueError(
                f"{self.store.folder} holds no features of {audio_id}. Make them: {EXTRACT}. Where "
                "the extraction failed, remove the clip from the labels."
            )
        if stored.features.ndim != 3 or not stored.features.isfinite().all():
            raise ValueError(
                f"{self.store.folder}: the features of {audio_id} are of shape "
                f"{tuple(stored.features.shape)}, or not finite. Extract them again."
            )
        # A folder of the original does not state the shape. The first clip does.
        self.store.shape = list(stored.features.shape)
        return stored.features

    def loss_of_frequencies(self) -> float:
        """Return the loss if the frequencies of the labels are predicted for every clip."""
        targets = self.labels / self.labels.sum(1, keepdim=True)
        return float(torch.special.entr(targets.mean(0)).sum())

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel of each layer, (layers, 1, width)."""
        count = 0  # Time steps.
        total = 0.0
        squares = 0.0
        for index in tqdm(range(len(self)), desc="mean and std", unit="clip"):
            features = self[index]["input_features"].double()  # (layers, time, width)
            total = total + features.sum(1, True)
            squares = squares + features.square().sum(1, True)
            count += features.shape[1]
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=MIN_VARIANCE)
        return mean.float(), variance.sqrt().float()


class TltrForAudioClassification(nn.Module):
    """TLTR with a classifier of the mean over time, whose keys are those of Whisper-AT."""

    def __init__(self, config: TltrConfig, num_labels: int):
        super().__init__()
        self.tltr = TltrModel(config)
        self.mlp_layer = nn.Sequential(
            nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, num_labels)
        )

    def forward(self, input_features: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Return logits, (batch, labels), and the cross entropy with the labels of a clip.

        Args:
            input_features: (batch, layers, time, width)
            labels: 1 where a clip has a label, else 0; (batch, labels). All labels of a clip have
                the same probability in the target.
        """
        logits = self.mlp_layer(self.tltr(input_features).mean(1))
        loss = F.cross_entropy(logits, labels / labels.sum(1, keepdim=True))
        return SequenceClassifierOutput(loss=loss, logits=logits)


def read_labels(path: Path) -> dict[str, list[str]]:
    """Return the labels of each clip, by its `audio_id`.

    Raises:
        ValueError: the file is no such list, or a record is invalid.
    """
    check_regular_file(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f'{path} must be a list of {{"audio_id": ..., "labels": [...]}}.')
    labels = {}
    for number, record in enumerate(records, start=1):
        where = f"{path}, record {number}"
        if not isinstance(record, dict) or not isinstance(record.get("audio_id"), str):
            raise ValueError(f"{where}: 'audio_id' must be the name of a clip.")
        names = record.get("labels")
        if not isinstance(names, list) or not names:
            raise ValueError(f"{where}: 'labels' must be a list of at least one label.")
        if not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"{where}: a label is empty or no text.")
        if record["audio_id"] in labels:
            raise ValueError(f"{where}: {record['audio_id']!r} has a record already.")
        labels[record["audio_id"]] = names
    return labels


def load_data(path: Path, feature_root: Path, audio_root: Path | None = None) -> LabelledFeatures:
    """Return the clips of a dataset.

    Raises:
        ValueError: the dataset is invalid, a clip has features of other audio, or all clips have
            the same labels.
    """
    labels = read_labels(path)
    store = FeatureStore(feature_root)
    for audio_id in labels:
        store.check_current(audio_id, (audio_root or path.parent) / audio_id)
    data = LabelledFeatures(store, labels)
    if (data.labels == data.labels[0]).all():
        raise ValueError(f"{path}: all clips have the same labels: nothing can be learned.")
    return data


def train(
    model: TltrForAudioClassification, data: LabelledFeatures, settings: TrainingArguments
) -> None:
    """Train the model.

    Raises:
        ValueError: the loss or a weight is not finite.
    """
    result = Trainer(model, settings, train_dataset=data).train()
    is_finite = all(bool(weight.isfinite().all()) for weight in model.parameters())
    check_loss(result.training_loss if is_finite else math.nan)


def check_loss(loss: float) -> None:
    """Check that the loss is finite.

    Raises:
        ValueError: it is not.
    """
    if not math.isfinite(loss):
        raise ValueError(f"TLTR is not trained: its loss is {loss}. Lower --learning_rate.")


@torch.no_grad()
def evaluate(
    model: TltrForAudioClassification, data: LabelledFeatures, batch_size: int
) -> tuple[float, float]:
    """Return the loss, and the fraction of clips whose most probable label is one of theirs."""
    model.eval()
    device = next(model.parameters()).device
    loss = 0.0
    right = 0.0
    for batch in DataLoader(data, batch_size):
        outputs = model(**{key: value.to(device) for key, value in batch.items()})
        loss += outputs.loss.item() * len(batch["labels"])
        best = outputs.logits.argmax(1, keepdim=True).cpu()
        right += batch["labels"].gather(1, best).sum().item()
    return loss / len(data), right / len(data)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data_path", type=Path, required=True, help="The labels of the clips.")
    parser.add_argument(
        "--audio_root", type=Path, help="Folder of relative audio_ids (default: that of the data)."
    )
    parser.add_argument(
        "--feature_root", type=Path, required=True, help="The folder of the features of the clips."
    )
    parser.add_argument(
        "--output_path", type=Path, required=True, help="The .safetensors file to write."
    )
    parser.add_argument(
        "--num_epochs", type=float, default=8, help="How often each clip is used (8)."
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="The number of clips of a step (32)."
    )
    parser.add_argument(
        "--learning_rate", type=float, default=3e-4, help="The highest learning rate (3e-4)."
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="The seed of the weights and of the order of clips."
    )
    released = TltrConfig()
    parser.add_argument(
        "--num_time_heads",
        type=int,
        default=released.num_time_heads,
        help="The attention heads over time; the default is that of the released TLTRs.",
    )
    parser.add_argument(
        "--num_layer_heads",
        type=int,
        default=released.num_layer_heads,
        help="The attention heads over layers; the default is that of the released TLTRs.",
    )
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Check what would else be found after the training, and create the folder of the output.

    Raises:
        OSError, ValueError: a flag is impossible, or the file cannot be written.
    """
    for name in ("num_epochs", "batch_size", "learning_rate"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} {value:g}: it must be a number above 0.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("ltu_as.pretrain_tltr runs in one process. Start it without torchrun.")
    output = args.output_path
    if output.resolve() == args.data_path.resolve():
        raise ValueError(f"--output_path {output} is also --data_path. Name another file.")
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"{output.parent} cannot be written to. Name another --output_path.")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_flags(args)
    set_seed(args.seed)
    data = load_data(args.data_path, args.feature_root, args.audio_root)
    layers, time, width = data.read(data.audio_ids[0]).shape
    config = TltrConfig(
        hidden_size=width,
        num_whisper_layers=layers,
        num_audio_tokens=time,
        num_time_heads=args.num_time_heads,
        num_layer_heads=args.num_layer_heads,
        standardize=True,
    )
    model = TltrForAudioClassification(config, len(data.names))
    model.tltr.feature_mean, model.tltr.feature_std = data.mean_and_std()
    settings = TrainingArguments(
        output_dir=str(args.output_path.parent),
        num_train_epochs=args.num_epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=0.01,
        warmup_steps=10,
        seed=args.seed,
        logging_steps=10,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    train(model, data, settings)
    loss, accuracy = evaluate(model, data, args.batch_size)
    check_loss(loss)
    loss_of_frequencies = data.loss_of_frequencies()
    if loss >= loss_of_frequencies:
        raise ValueError(
            f"TLTR has learned nothing from the features: its loss is {loss:.3f}, and that of the "
            f"frequencies of the labels {loss_of_frequencies:.3f}. Raise --num_epochs or "
            "--learning_rate, or check the labels."
        )

    state = {f"mlp_layer.{key}": value for key, value in model.mlp_layer.state_dict().items()}
    state |= model.tltr.state_dict()
    state = {key: value.cpu().contiguous() for key, value in state.items()}
    features = data.store.description | {"shape": [layers, time, width]}
    pretraining = Pretraining(data.names, args.num_time_heads, args.num_layer_heads, features)
    replace_file(args.output_path, save(state, pretraining.to_metadata()))
    print(
        f"{args.output_path}: {len(data)} clips, {len(data.names)} labels. The most probable label "
        f"is right for {accuracy:.1%} of these clips; loss {loss:.3f}, that of the frequencies of "
        f"the labels {loss_of_frequencies:.3f}."
    )


if __name__ == "__main__":
    run_command(main)
