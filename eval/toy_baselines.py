"""Predicts the held-out toy clips without a language model.

`majority` and `package` never use the audio. All drums come from one source package, so the package
alone is a strong predictor. `probe` is a ridge regression on means over time: for LTU on those of
the audio embeddings, for LTU-AS on those of Whisper's layers, before TLTR.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ltu.data.audio import load_audio
from ltu.models.feature_extraction_ltu import YamnetFeatureExtractor
from ltu.models.modeling_yamnet import YamnetModel
from ltu_as.feature_extraction_ltu_as import DOWNMIX, LtuAsFeatureExtractor

# Strengths of the ridge regression on standardized features.
STRENGTHS = (10.0, 30.0, 100.0, 300.0, 1000.0)

Clips = dict[str, dict]  # file name -> its line of the manifest


def most_frequent(values: list[str]) -> str:
    """Return the most frequent value, the first in the alphabet among equals."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _values(clips: Clips, files: list[str], key: str) -> list[str]:
    return [clips[file][key] for file in files]


def majority(clips: Clips, training: list[str], heldout: list[str], key: str) -> list[str]:
    """Predict the most frequent value of the training clips for every held-out clip.

    Args:
        key: "label" or "category".
    """
    guess = most_frequent(_values(clips, training, key))
    return [guess] * len(heldout)


def package(clips: Clips, training: list[str], heldout: list[str], key: str) -> list[str]:
    """Predict the most frequent value of the training clips of the same source package.

    Args:
        key: "label" or "category".
    """
    by_package: dict[str, list[str]] = {}
    for file in training:
        by_package.setdefault(clips[file]["package"], []).append(clips[file][key])
    guesses = []
    for file in heldout:
        values = by_package[clips[file]["package"]]
        guesses.append(most_frequent(values))
    return guesses


def probe(
    means: dict[str, np.ndarray], clips: Clips, training: list[str], heldout: list[str], key: str
) -> list[str]:
    """Predict with a linear classifier that is trained on the training clips.

    Args:
        means: Features of each clip, as `audio_encoder_means` returns them.
        key: "label" or "category".
    """
    train = np.stack([means[file] for file in training])
    test = np.stack([means[file] for file in heldout])
    return ridge_classify(train, _values(clips, training, key), test)


def ridge_classify(
    train: np.ndarray,
    classes: list[str],
    test: np.ndarray,
    strengths: tuple[float, ...] = STRENGTHS,
) -> list[str]:
    """Return the class of the largest output of a ridge regression to one-hot classes.

    Args:
        train: (clips, features) features, which are standardized here.
        classes: The class of each training clip.
        test: (test clips, features).
        strengths: Candidates. The one with which most training clips are right, each predicted
            from all others, is used; the smallest among equals.
    """
    names = np.array(sorted(set(classes)))
    targets = np.array(classes)[:, None] == names  # (clips, classes)
    mean = train.mean(0)
    deviation = train.std(0) + 1e-3
    train = (train - mean) / deviation
    test = (test - mean) / deviation
    target_mean = targets.mean(0)

    # Solve the dual problem, because there are fewer clips than features.
    most_right = -1
    for strength in strengths:
        inverse = np.linalg.inv(train @ train.T + strength * np.eye(len(train)))  # (clips, clips)
        candidate = inverse @ (targets - target_mean)  # (clips, classes)
        # What a clip would get from a regression without it; the closed form.
        left_out = targets - candidate / np.diag(inverse)[:, None]  # (clips, classes)
        num_right = int((names[left_out.argmax(1)] == classes).sum())
        if num_right > most_right:
            most_right = num_right
            weights = candidate
    outputs = test @ train.T @ weights + target_mean  # (test clips, classes)
    return names[outputs.argmax(1)].tolist()


def audio_encoder_means(files: list[Path], audio_encoder: Path) -> dict[str, np.ndarray]:
    """Return the mean over time of an encoder's output for each clip, by file name.

    Args:
        files: The clips.
        audio_encoder: The folder of a YAMNet, whose means are float64 (hidden_size,), or an
            openai-whisper `.pt` file, whose means are those of all layers, float64
            (layers * width,).
    """
    make_embedder = _embed_with_whisper if audio_encoder.suffix == ".pt" else _embed_with_yamnet
    embed = make_embedder(audio_encoder)
    means = {}
    with torch.no_grad():
        for file in tqdm(files, desc="linear probe: encoding the clips", unit="clip"):
            means[file.name] = embed(file).double().numpy()
    return means


def _embed_with_yamnet(folder: Path) -> Callable[[Path], Tensor]:
    """Return a function that embeds a clip with YAMNet, (hidden_size,)."""
    model = YamnetModel.from_pretrained(folder).eval()
    extractor = YamnetFeatureExtractor()

    def embed(file: Path) -> Tensor:
        embeddings = model(extractor(load_audio(file))["input_features"])  # (1, time, hidden_size)
        return embeddings[0].mean(0)

    return embed


def _embed_with_whisper(path: Path) -> Callable[[Path], Tensor]:
    """Return a function that embeds a clip with all layers of Whisper, (layers * width,).

    The features are those that the toy experiment stores for LTU-AS, before TLTR.
    """
    extractor = LtuAsFeatureExtractor(None, None, str(path), loop_short_clips=True)

    def embed(file: Path) -> Tensor:
        features = extractor([load_audio(file, downmix=DOWNMIX)]).input_features
        return features[0].float().mean(1).flatten()  # (layers, time, width) -> (layers * width,)

    return embed
