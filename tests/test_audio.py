"""Tests every kind of source of `load_audio`, and every reason to refuse one."""

import io
import os
import pickle
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional

from ltu.data import audio
from ltu.data.audio import AudioError, decode_audio, load_audio

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
    peak = np.abs(np.fft.rfft(waveform[2000:14_000])).argmax()
    assert peak * 16_000 / 12_000 == pytest.approx(440, abs=2)
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


def test_errors_name_source_reason_and_hint(tmp_path: Path, golden: Path) -> None:
    junk = tmp_path / "junk.wav"
    empty = tmp_path / "empty.wav"
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


# --- memory, and headers that are wrong


def whole(array: np.ndarray, rate: int) -> np.ndarray:
    return torchaudio.functional.resample(torch.from_numpy(array), rate, 16_000).numpy()


@pytest.mark.parametrize(
    "rate", [1000, 8000, 11_025, 44_100, 48_000, 192_000, 768_000, 12_345, 44_056]
)
def test_blocks_are_resampled_as_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int
) -> None:
    """Also where torchaudio's kernel is too large: the last two rates are resampled by phase."""
    noise = np.random.default_rng(0).normal(0, 0.1, (30_011, 3)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, rate, subtype="FLOAT")
    expected = whole(noise[:, 0].copy(), rate)
    found = decode_audio(tmp_path / "a.wav")
    assert (found.sampling_rate, found.channels) == (rate, 3)
    is_exact = rate % 1000 == 0 or rate % 11_025 == 0
    assert np.abs(found.waveform - expected).max() <= (0 if is_exact else 1e-6)
    for block in (1501, 8192):
        monkeypatch.setattr(audio, "BLOCK", block)
        for source in (tmp_path / "a.wav", (noise.T, rate)):
            in_blocks = load_audio(source)
            assert len(in_blocks) == len(expected) and np.abs(in_blocks - expected).max() < 1e-6


def test_a_rate_with_a_giant_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 44,101 Hz torchaudio would need 700 million weights, so it is not used."""
    monkeypatch.setattr(torchaudio.functional, "resample", None)
    tone = np.sin(2 * np.pi * 440 * np.arange(88_202) / 44_101).astype(np.float32)
    expected = np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000)
    found = load_audio((tone, 44_101))
    assert len(found) == 32_000 and np.abs(found - expected)[500:-500].max() < 1e-3


def test_long_files_of_many_channels_do_not_fill_the_memory(tmp_path: Path) -> None:
    """6 minutes of 8 channels at 48 kHz are 550 MB; the first channel at 16 kHz is 23 MB."""
    soundfile.write(tmp_path / "a.wav", np.zeros((1, 8)), 48_000, subtype="PCM_U8")
    data = (tmp_path / "a.wav").read_bytes()[:-8]
    size = 6 * 60 * 48_000 * 8
    (tmp_path / "a.wav").write_bytes(data[:-4] + size.to_bytes(4, "little"))
    os.truncate(tmp_path / "a.wav", len(data) + size)  # Holes: all samples are -1.
    tracemalloc.start()  # Sees numpy's memory, not torch's; but torch resamples what numpy holds.
    try:
        assert refusal(tmp_path / "a.wav").reason == "silent"
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_the_decoded_length_counts_not_the_header(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.resize(TONE, 48_000), 16_000)
    assert len(decode_audio(tmp_path / "a.wav", max_seconds=3).waveform) == 48_000
    with pytest.raises(AudioError, match="more than 2.9 s") as caught:
        decode_audio(tmp_path / "a.wav", max_seconds=2.9)
    assert caught.value.reason == "too_long"
    soundfile.write(tmp_path / "a.flac", TONE, 16_000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    # The number of samples in STREAMINFO. A live encoder writes 0: it cannot know the length.
    for samples in (0, 20_000, 2**36 - 1):
        data[21] = data[21] & 0xF0 | samples >> 32
        data[22:26] = (samples % 2**32).to_bytes(4, "big")
        assert np.array_equal(load_audio(bytes(data)), load_audio(tmp_path / "a.flac"))
    assert refusal(bytes(data[:-2000])).reason == "unreadable"


def test_late_samples_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "BLOCK", 1000)
    assert refusal(np.append(TONE, np.float32(np.nan))).reason == "unreadable"
    assert refusal(np.append(TONE, np.float32(1e20))).reason == "unreadable"
    assert len(load_audio(np.append(np.zeros(15_999, np.float32), np.float32(0.5)))) == 16_000
    assert refusal(np.append(np.zeros(15_999, np.float32), np.float32(1e-8))).reason == "silent"


def test_damaged_bytes_print_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged aiff makes libsndfile seek to before its start.

    It does so in a callback, which cannot raise an error.
    """
    buffer = io.BytesIO()
    printed = []
    soundfile.write(buffer, TONE, 16_000, format="AIFF", subtype="PCM_16")
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    for seed in range(150):
        rng = np.random.default_rng(seed)
        data = bytearray(buffer.getvalue())
        for position in rng.integers(0, 60, 8):
            data[position] = rng.integers(256)
        with suppress(AudioError):
            load_audio(bytes(data))
    assert not printed


# --- file names and paths


@contextmanager
def someone_else() -> Iterator[None]:
    """Give up the rights of root, who may read everything."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(own)


def test_permission_denied(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", TONE, 16_000)
    (tmp_path / "a.wav").chmod(0)
    with someone_else():
        error = refusal(tmp_path / "a.wav")
    assert error.reason == "unreadable" and "permission denied" in str(error)


def test_messages_can_be_printed(tmp_path: Path) -> None:
    """For any name, the message is one line that UTF-8 can encode; `source` is the name itself."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/n\xff\n\x1b[31m.wav")
    error = pickle.loads(pickle.dumps(refusal(name)))
    assert error.source == name
    assert str(error).isprintable()
    assert r"n\udcff\n\x1b[31m.wav: no such file" in str(error)
    assert str(error).encode("utf-8")
    assert len(str(refusal("x" * 100_000))) < 1000
    soundfile.write(tmp_path / "a.wav", TONE, 16_000)
    os.rename(tmp_path / "a.wav", name)
    assert len(load_audio(name)) == len(load_audio(Path(name))) == 16_000


def test_devices_and_empty_files_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    assert "device" in str(refusal("/dev/zero"))
    assert "is an empty file" in str(refusal(tmp_path / "a.wav"))


def test_a_companion_file_of_macos_does_not_matter(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.mp3", TONE, 16_000)
    expected = load_audio(tmp_path / "a.mp3")
    (tmp_path / "._a.mp3").write_bytes(b"\x00\x05\x16\x07" + bytes(500))
    assert np.array_equal(load_audio(tmp_path / "a.mp3"), expected)


def test_files_are_closed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", TONE, 16_000)
    (tmp_path / "b.wav").write_bytes(b"not sound")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        load_audio(tmp_path / "a.wav")
        refusal(tmp_path / "b.wav")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_small_file_may_not_claim_endless_values(tmp_path):
    """Eight channels at 655,350 Hz: 300 silent seconds are 100 kB, and 1.6e9 values."""
    soundfile.write(
        tmp_path / "many.flac", np.random.default_rng(0).normal(0, 0.1, (4096, 8)), 655_350
    )
    with pytest.raises(AudioError, match="8 channels at 655350 Hz") as found:
        load_audio(tmp_path / "many.flac")
    assert found.value.reason == "unreadable"


@pytest.mark.parametrize("block", [5333, audio.BLOCK])
@pytest.mark.parametrize("source", ["bytes", "file"])
def test_bytes_behind_the_audio_of_a_flac_are_ignored(tmp_path, monkeypatch, block, source):
    """Such as an ID3 tag at the end, at which the decoder of libsndfile fails."""
    monkeypatch.setattr(audio, "BLOCK", block)
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    whole = load_audio(path)
    assert len(whole) == 16_000
    for tail in (b"\0\0\0", b"TAG" + b"x" * 125, b"fLaC" * 500):
        content = path.read_bytes() + tail
        (tmp_path / "tagged.flac").write_bytes(content)
        clip = content if source == "bytes" else tmp_path / "tagged.flac"
        assert np.array_equal(load_audio(clip), whole)
