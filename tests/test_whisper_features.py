"""Compares Whisper features and transcripts with golden numbers and stock Whisper."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import whisper
from whisper.audio import log_mel_spectrogram, pad_or_trim

from ltu.data.audio import AudioError, load_audio
from ltu.data.transcripts import clean_transcript
from ltu_as import LtuAsFeatureExtractor
from ltu_as.feature_extraction_ltu_as import load_whisper
from tests.whisper_tiny import save_whisper

RATE = 16_000  # In Hz.


@pytest.fixture(scope="module")
def tiny_whisper(tmp_path_factory) -> str:
    return save_whisper(tmp_path_factory.mktemp("whisper") / "tiny.pt")


@pytest.fixture
def extractor(tiny_whisper: str) -> LtuAsFeatureExtractor:
    return LtuAsFeatureExtractor(4, 64, tiny_whisper, None, "fp32")


def noise(seconds: float, seed: int, loudness: float = 0.1) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return (loudness * samples).astype(np.float32)


@pytest.mark.parametrize("clip", ["noise10", "tone4"])
def test_features_equal_the_original(golden: Path, golden_report, extractor, clip: str) -> None:
    figures = np.load(golden / "whisper.npz")
    waveform = load_audio(golden / "wav" / f"{clip}.wav")
    features = extractor([waveform], sampling_rate=RATE).input_features
    assert features.shape == (1, 4, 25, 64) and features.dtype == torch.float32
    golden_report(
        "Whisper",
        f"{clip} pooled",
        np.abs(features[0].numpy() - figures[f"{clip}.feat"]).max(),
        1e-4,
    )
    mel = extractor.extract_features(torch.from_numpy(waveform)).numpy()
    assert mel.shape == (80, 1000)
    golden_report(
        "Whisper", f"{clip} mel", np.abs(mel[:, ::8] - figures[f"{clip}.mel"]).max(), 1e-4
    )


@pytest.mark.parametrize("clip", ["noise10", "tone4"])
def test_every_frame_of_the_mel(full_golden: Path, golden_report, extractor, clip: str) -> None:
    figures = np.load(full_golden / "whisper.npz")
    waveform = load_audio(full_golden / "wav" / f"{clip}.wav")
    mel = extractor.extract_features(torch.from_numpy(waveform)).numpy()
    golden_report(
        "Whisper, every frame", f"{clip} mel", np.abs(mel - figures[f"{clip}.mel1000"]).max(), 1e-4
    )


def test_loudest_part_after_ten_seconds_sets_the_floor(golden_report, extractor) -> None:
    """The log-mel of the whole clip differs from that of a clip that is cut first."""
    waveform = np.concatenate([noise(10, seed=0, loudness=1e-4), noise(5, seed=1, loudness=0.5)])
    whole = torch.from_numpy(waveform)
    stock = pad_or_trim(log_mel_spectrogram(whole), 1000)
    cut_first = log_mel_spectrogram(whole[: 10 * RATE])
    mel = extractor.extract_features(whole)
    golden_report("Whisper, stock", "late loud part, mel", (mel - stock).abs().max(), 1e-6)
    assert (mel - cut_first).abs().max() > 0.5
    expected = stock_features(extractor, stock)
    golden_report(
        "Whisper, stock",
        "late loud part",
        (extractor(waveform).input_features[0] - expected).abs().max(),
        1e-4,
    )
    assert (expected - stock_features(extractor, cut_first)).abs().max() > 0.1


def stock_features(extractor: LtuAsFeatureExtractor, mel: torch.Tensor) -> torch.Tensor:
    """Return the features by hooks on the stock encoder, pooled on the CPU, as in the original."""
    encoder = copy.deepcopy(load_whisper(extractor.whisper_model, "cpu", False)[0].encoder)
    encoder.positional_embedding = encoder.positional_embedding[:500]
    layers: list[np.ndarray] = []
    for block in encoder.blocks:
        block.register_forward_hook(
            lambda module, inputs, output: layers.append(output[0].detach().numpy())
        )
    encoder(mel[None])
    pooled = np.stack(layers).reshape(len(layers), 25, 20, -1).mean(2)  # (layers, 25, width)
    return torch.from_numpy(pooled)


def test_batch_equals_single(extractor) -> None:
    clips = [noise(10, 0), noise(3, 1), noise(12, 2)]
    together = extractor(clips).input_features
    alone = torch.cat([extractor(clip).input_features for clip in clips])
    assert (together - alone).abs().max() < 1e-5
    assert extractor(clips, return_tensors="np").input_features.dtype == np.float32


def test_a_short_clip_is_repeated_in_the_features_only(tiny_whisper: str, extractor) -> None:
    looping = LtuAsFeatureExtractor(4, 64, tiny_whisper, None, "fp32", loop_short_clips=True)
    looping.device = "cpu"
    short = noise(3, 1)
    repeated = np.resize(short, 160_000)
    found = looping(short).input_features
    assert torch.allclose(found, extractor(repeated).input_features, atol=1e-3)
    assert not torch.allclose(found, extractor(short).input_features, atol=1e-1)
    assert looping(noise(12, 2)).input_features.equal(extractor(noise(12, 2)).input_features)
    assert looping.transcribe([short]) == extractor.transcribe([short])
    assert looping.describe() == extractor.describe() | {"loop_short_clips": True}


def test_fewer_time_steps_are_means_of_neighbours(tiny_whisper: str, extractor) -> None:
    coarse = LtuAsFeatureExtractor(4, 64, tiny_whisper, None, "fp32")
    coarse.device = "cpu"
    coarse.num_tokens = 5
    steps = extractor(noise(10, 0)).input_features  # (1, 4, 25, 64)
    means = steps.unflatten(2, (5, 5)).mean(3)
    assert torch.allclose(coarse(noise(10, 0)).input_features, means, atol=1e-5)
    assert coarse.describe()["shape"] == [4, 5, 64]
    with pytest.raises(ValueError, match="Give a number that divides it"):
        coarse.num_tokens = 7


def test_half_precision_on_a_cpu_is_rounded_and_described(tiny_whisper: str, extractor) -> None:
    half = LtuAsFeatureExtractor(4, 64, tiny_whisper, None, "fp16")
    half.device = "cpu"
    features = half(noise(10, 0)).input_features
    assert features.dtype == torch.float16
    assert torch.equal(features, extractor(noise(10, 0)).input_features.half())
    assert half.describe() == extractor.describe() | {
        "feature_precision": "fp16",
        "computed_in": "fp32",
    }


def test_features_can_be_trained_on(extractor) -> None:
    layer = torch.nn.Linear(64, 2)
    layer(extractor(noise(1, 0)).input_features).sum().backward()
    assert layer.weight.grad is not None


def test_saved_and_opened_again_without_weights(extractor, tmp_path: Path) -> None:
    extractor.device = "cpu"
    extractor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert "_device" not in settings and settings["num_layers"] == 4
    opened = LtuAsFeatureExtractor.from_pretrained(tmp_path)
    assert opened.to_dict() == extractor.to_dict()
    assert (opened.chunk_seconds, opened.num_tokens) == (10.0, 25)
    opened.whisper_model = "/nowhere.pt"
    # Whisper is not loaded, so a missing file is no error.
    assert opened.to_dict()["whisper_model"] == "/nowhere.pt"
    assert LtuAsFeatureExtractor.shape_of(extractor.whisper_model) == (4, 64)


@dataclass
class Transcribed:
    """A Whisper, and clips with their transcripts by stock `transcribe`."""

    path: str
    clips: list[np.ndarray]
    texts: list[str]


# Sizes of a vocabulary with languages, and of one for English only. If greedy decoding is not sure,
# Whisper uses sampling, which takes six times as long.
MULTILINGUAL = 51865
ENGLISH = 51864
WHISPERS = [
    pytest.param((MULTILINGUAL, True), id="multilingual-sure"),
    pytest.param((MULTILINGUAL, False), id="multilingual-unsure", marks=pytest.mark.slow),
    pytest.param((ENGLISH, True), id="english-sure"),
    pytest.param((ENGLISH, False), id="english-unsure"),
]


@pytest.fixture(scope="module", params=WHISPERS)
def stock(request: pytest.FixtureRequest, tmp_path_factory) -> Transcribed:
    n_vocab, is_sure = request.param
    file = tmp_path_factory.mktemp("stock") / "w.pt"
    path = save_whisper(file, is_sure=is_sure, n_vocab=n_vocab, n_audio_layer=1)
    model = load_whisper(path, "cpu", False)[0]
    clips = [noise(40, 1), noise(0.5, 2)]  # Two of Whisper's chunks of 30 s, and one.
    texts = []
    for clip in clips:
        torch.manual_seed(0)
        texts.append(model.transcribe(clip, fp16=False, condition_on_previous_text=False)["text"])
    load_whisper.cache_clear()
    return Transcribed(path, clips, texts)


@pytest.mark.parametrize("batched", [True, False])
def test_transcripts_are_those_of_stock_whisper(stock: Transcribed, batched: bool) -> None:
    extractor = LtuAsFeatureExtractor(1, 64, stock.path, None, "fp32")
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    expected = [clean_transcript(text) for text in stock.texts]
    assert extractor.transcribe(stock.clips, batched) == expected
    # The random numbers of a training run do not change.
    assert torch.equal(torch.random.get_rng_state(), state)
    assert extractor.transcribe([]) == []


def test_silence_has_no_transcript(extractor, monkeypatch) -> None:
    silence = whisper.DecodingResult(
        torch.zeros(1),
        "en",
        tokens=[50257],
        text="hm",
        avg_logprob=-2,
        no_speech_prob=0.9,
        temperature=0.0,
        compression_ratio=0.5,
    )
    monkeypatch.setattr(LtuAsFeatureExtractor, "_first_chunks", lambda *args: [silence])
    assert extractor.transcribe([noise(2, 0)], batched=True) == [""]


@pytest.mark.parametrize(("rule", "expected"), [("clean", "Hello."), ("original", "Hello. ")])
def test_rule_of_transcripts(stock: Transcribed, monkeypatch, tmp_path, rule, expected) -> None:
    """The released checkpoints were trained on transcripts with the space in front of an outro."""
    extractor = LtuAsFeatureExtractor(1, 64, stock.path, None, "fp32", transcript_rule=rule)
    extractor.save_pretrained(tmp_path)
    extractor = LtuAsFeatureExtractor.from_pretrained(tmp_path)
    monkeypatch.setattr(
        whisper, "transcribe", lambda *_, **__: {"text": " Hello. Thanks for watching!"}
    )
    assert extractor.transcribe([noise(1, 0)], batched=False) == [expected]
    with pytest.raises(ValueError, match="transcript_rule is 'none'; possible: clean, original"):
        LtuAsFeatureExtractor(transcript_rule="none")


def test_missing_weights(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent.pt"), "large-v9"):
        with pytest.raises(
            FileNotFoundError,
            match=f"(?s){name}.*path of an openai-whisper .pt.*download_pretrained",
        ):
            LtuAsFeatureExtractor(whisper_model=name)(noise(1, 0))
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is no checkpoint of openai-whisper"):
        LtuAsFeatureExtractor(whisper_model=str(tmp_path / "other.pt"))(noise(1, 0))


def test_without_network_the_error_has_a_hint(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(whisper, "load_model", refuse)
    with pytest.raises(FileNotFoundError, match="(?s)large-v1.*no route.*machine with network"):
        LtuAsFeatureExtractor().describe()


def test_another_whisper_is_refused(tiny_whisper: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="has 4 layers of width 64, but 32 layers of width 1280 are needed"
    ):
        LtuAsFeatureExtractor(whisper_model=tiny_whisper).describe()
    other = save_whisper(tmp_path / "other.pt", suffix=".b")
    fingerprint = LtuAsFeatureExtractor(4, 64, other, None, "fp32").describe()["fingerprint"]
    settings = {"feature_precision": "fp32", "whisper_fingerprint": fingerprint}
    with pytest.raises(ValueError, match=f"has fingerprint .*trained with {fingerprint[:12]}"):
        LtuAsFeatureExtractor(4, 64, tiny_whisper, None, **settings).describe()


def test_what_is_no_waveform_is_refused(extractor) -> None:
    with pytest.raises(ValueError, match="must have 16000 Hz, got 44100 Hz"):
        extractor(noise(1, 0), sampling_rate=44_100)
    with pytest.raises(AudioError, match="10.0 ms of sound"):
        extractor(noise(0.01, 0))
    with pytest.raises(ValueError, match="fp16 or fp32, not 'bf16'"):
        LtuAsFeatureExtractor(feature_precision="bf16")
