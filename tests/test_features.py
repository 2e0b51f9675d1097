"""Compares filterbank and log-mel with golden numbers, and tests the feature extractors."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoFeatureExtractor

from ltu.data.audio import AudioError, load_audio
from ltu.models.feature_extraction_ltu import LtuFeatureExtractor, YamnetFeatureExtractor

MEAN = -5.081
STD = 4.4849
CLIPS = ("noise3", "noise10", "noise12p5", "tone4", "silence2", "sr44k_mono", "stereo5")
# Clips whose filterbank has bins at the rounding noise of a float32 FFT; tests/golden/README.md has
# the numbers.
ILL_CONDITIONED = ("sr44k_mono", "stereo5")
NOISE = 5e-3


def waveform_of(golden: Path, clip: str) -> np.ndarray:
    if clip == "silence2":  # load_audio refuses silence, but its filterbank is defined.
        return np.zeros(32_000, np.float32)
    return load_audio(golden / "wav" / f"{clip}.wav")


def within_60_db(normalised: np.ndarray) -> np.ndarray:
    energy = np.exp(normalised.astype(np.float64) * STD + MEAN)
    return energy > 1e-6 * energy.max(axis=1, keepdims=True)


@pytest.mark.parametrize("clip", CLIPS)
def test_filterbank_equals_the_original(golden: Path, golden_report, clip: str) -> None:
    figures = np.load(golden / "fbank_ltu.npz")
    key = f"{clip}.gradio" if f"{clip}.gradio" in figures.files else f"{clip}.collator"
    summary = json.loads((golden / "fbank_ltu.json").read_text())[clip][key.split(".")[1]]
    step = 1 if clip == "noise3" else 8  # Of the golden frames.
    check_filterbank(golden, golden_report, "filterbank", clip, figures[key], summary, step)


@pytest.mark.parametrize("clip", CLIPS)
def test_every_frame_of_the_filterbank(
    golden: Path, full_golden: Path, golden_report, clip: str
) -> None:
    figures = np.load(full_golden / "fbank_ltu.npz")
    key = f"{clip}.gradio" if f"{clip}.gradio" in figures.files else f"{clip}.collator"
    summary = json.loads((full_golden / "fbank_ltu.json").read_text())[clip][key.split(".")[1]]
    check_filterbank(
        golden, golden_report, "filterbank, every frame", clip, figures[key], summary, step=1
    )


def check_filterbank(
    golden: Path, golden_report, module: str, clip: str, expected, summary: dict, step: int
) -> None:
    features = LtuFeatureExtractor()(waveform_of(golden, clip)).input_features[0].numpy()
    assert features.shape == (1024, 128) and features.dtype == np.float32
    frames = summary["real_frames"]
    error = np.abs(features[:frames:step] - expected)
    if clip in ILL_CONDITIONED:
        golden_report(module, f"{clip} within 60 dB", error[within_60_db(expected)].max(), 1e-4)
        golden_report(module, f"{clip} at the noise floor", error.max(), NOISE)
    else:
        golden_report(module, clip, error.max(), 1e-4)
    if frames < 1024:
        golden_report(
            module, f"{clip} padding", np.abs(features[frames:] - summary["tail_value"]).max(), 1e-6
        )
    golden_report(
        module, f"{clip} mean", abs(features.astype(np.float64).mean() - summary["mean"]), 1e-5
    )


@pytest.mark.parametrize("clip", ["noise3", "tone4"])
def test_log_mel_equals_an_independent_front_end(golden: Path, golden_report, clip: str) -> None:
    features = YamnetFeatureExtractor()(waveform_of(golden, clip)).input_features[0].numpy()
    assert features.shape == (1024, 64) and features.dtype == np.float32
    expected = np.load(golden / "yamnet.npz")
    golden_report(
        "log-mel (YAMNet)", clip, np.abs(features[::16] - expected[f"{clip}.log_mel"]).max(), 1e-4
    )
    if clip == "tone4":
        extractor = YamnetFeatureExtractor(loop_short_clips=False)
        padded = extractor(waveform_of(golden, clip)).input_features[0].numpy()
        error = np.abs(padded[::16] - expected["tone4.log_mel_padded"]).max()
        golden_report("log-mel (YAMNet)", "tone4 padded", error, 1e-4)
        assert np.allclose(padded[402:], np.log(0.001))


def test_short_clips_are_repeated() -> None:
    clip = np.random.default_rng(0).normal(size=1600).astype(np.float32)  # 10 frames.
    features = YamnetFeatureExtractor()(clip).input_features[0]
    assert (features[:10] - features[10:20]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "extractor", [LtuFeatureExtractor(), YamnetFeatureExtractor()], ids=["ltu", "yamnet"]
)
class TestEveryExtractor:
    def test_a_batch_equals_single_clips(self, extractor, golden: Path) -> None:
        clips = [waveform_of(golden, clip) for clip in ("noise3", "noise12p5", "tone4")]
        batch = extractor(clips).input_features
        assert batch.shape == (3, extractor.num_frames, extractor.num_mel_bins)
        for row, clip in zip(batch, clips, strict=True):
            assert (row == extractor(clip).input_features[0]).all()

    def test_audio_after_the_chunk_has_no_effect(self, extractor, golden: Path) -> None:
        clip = waveform_of(golden, "noise12p5").copy()
        clip[170_000:] = clip[170_000:][::-1]  # The mean does not change.
        before = extractor(waveform_of(golden, "noise12p5")).input_features
        assert (extractor(clip).input_features - before).abs().max() < 1e-3
        assert extractor.chunk_seconds == pytest.approx(10.24)

    @pytest.mark.parametrize(
        "samples", [400, 401, 16_000, 163_840, 164_079, 164_080, 164_081, 400_000]
    )
    def test_any_length(self, extractor, samples: int) -> None:
        clip = np.random.default_rng(samples).normal(size=samples).astype(np.float32)
        features = extractor(clip).input_features
        assert features.shape[1] == 1024 and features.isfinite().all()

    def test_saved_and_opened_by_the_auto_class(
        self, extractor, golden: Path, tmp_path: Path
    ) -> None:
        extractor.save_pretrained(tmp_path)
        opened = AutoFeatureExtractor.from_pretrained(tmp_path)
        assert type(opened) is type(extractor) and opened.to_dict() == extractor.to_dict()
        clip = waveform_of(golden, "noise3")
        assert (opened(clip).input_features == extractor(clip).input_features).all()
        by_class = type(extractor).from_pretrained(tmp_path)
        assert (by_class(clip).input_features == opened(clip).input_features).all()

    def test_numpy_on_request(self, extractor, golden: Path) -> None:
        batch = extractor(waveform_of(golden, "noise3"), return_tensors="np")
        assert isinstance(batch.input_features, np.ndarray)

    def test_refusals(self, extractor) -> None:
        with pytest.raises(ValueError, match="16000 Hz, got 44100 Hz"):
            extractor(np.zeros(16_000, np.float32), sampling_rate=44_100)
        with pytest.raises(ValueError, match="mono"):
            extractor(np.zeros((2, 16_000), np.float32))
        with pytest.raises(AudioError, match="10.0 ms"):
            extractor([np.zeros(16_000, np.float32), np.zeros(160, np.float32)])


def test_settings_survive_saving(tmp_path: Path) -> None:
    YamnetFeatureExtractor(num_frames=96, loop_short_clips=False).save_pretrained(tmp_path)
    opened = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert opened.num_frames == 96
    assert not opened.loop_short_clips
    assert opened.chunk_seconds == pytest.approx(0.96)
