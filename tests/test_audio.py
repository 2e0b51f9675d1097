"""Every way into `load_audio`, and every way to be refused."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ltu.audio import AudioError, load_audio

TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)  # 1 s


def refusal(source) -> AudioError:
    with pytest.raises(AudioError) as caught:
        load_audio(source)
    return caught.value


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_reads_common_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, TONE, 16_000)
    waveform = load_audio(path)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - 16_000) < 2500  # A lossy encoder pads.
    assert np.abs(np.fft.rfft(waveform[2000:14_000])).argmax() * 16_000 / 12_000 == pytest.approx(440, abs=2)
    assert np.array_equal(load_audio(str(path)), waveform)
    assert np.array_equal(load_audio(path.read_bytes()), waveform)


def test_first_channel_is_used(golden: Path) -> None:
    stereo, rate = soundfile.read(golden / "wav" / "stereo5.wav", dtype="float32")
    assert rate == 16_000
    assert np.array_equal(load_audio(golden / "wav" / "stereo5.wav"), stereo[:, 0])
    assert np.array_equal(load_audio(stereo.T), stereo[:, 0])


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000])
def test_any_rate_becomes_16_khz(rate: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    waveform = load_audio((tone, rate))
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert len(waveform) == 16_000
    assert np.abs(waveform - expected)[500:-500].max() < 2e-2


def test_integer_arrays_are_scaled_as_files(tmp_path: Path) -> None:
    samples = (TONE * 32_767).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="PCM_16")
    assert np.array_equal(load_audio(samples), load_audio(tmp_path / "a.wav"))


def test_refusals_name_source_reason_and_way_out(tmp_path: Path, golden: Path) -> None:
    junk, empty = tmp_path / "junk.wav", tmp_path / "empty.wav"
    junk.write_bytes(b"this is not sound" * 10)
    empty.write_bytes(b"")
    cases = {
        tmp_path / "none.wav": "missing",
        tmp_path: "missing",
        junk: "unreadable",
        empty: "unreadable",
        golden / "wav" / "short20ms.wav": "too_short",
        golden / "wav" / "silence2.wav": "silent",
    }
    for path, reason in cases.items():
        error = refusal(path)
        assert error.reason == reason and error.source == str(path)
        assert str(path) in str(error) and str(error).endswith(".")
    assert "20.0 ms" in str(refusal(golden / "wav" / "short20ms.wav"))


def test_bad_arrays_are_refused() -> None:
    assert refusal(np.full(16_000, np.nan, np.float32)).reason == "unreadable"
    assert refusal(np.where(np.arange(16_000) == 7, np.inf, TONE)).reason == "unreadable"
    assert refusal(np.zeros(16_000, np.float32)).reason == "silent"
    assert refusal(np.full(16_000, 0.1, np.float32)).reason == "silent"
    assert refusal(TONE[:399]).reason == "too_short"
    assert refusal(np.zeros((0, 5), np.float32)).reason == "unreadable"
    assert refusal(np.zeros(0, np.float32)).reason == "unreadable"
    assert refusal(b"").reason == "unreadable"
    assert "transpose" in str(refusal(np.stack([TONE, TONE], axis=1)))
    assert refusal((TONE, 0)).reason == "unreadable"
    with pytest.raises(TypeError, match="path, bytes"):
        load_audio(None)


def test_25_ms_is_enough() -> None:
    assert len(load_audio(TONE[:400])) == 400
    assert len(load_audio((np.repeat(TONE, 3)[:1103], 44_100))) >= 400  # 25.01 ms


def test_error_survives_a_worker_process() -> None:
    error = refusal("nowhere.wav")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.source, copy.reason, str(copy)) == (error.source, error.reason, str(error))


def test_stream_of_bytes_equals_file(golden: Path) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, TONE, 16_000, format="FLAC", subtype="PCM_16")
    assert len(load_audio(buffer.getvalue())) == 16_000
