"""Tests files that end before the length in their header, and float samples in a range of integers.

Both are answered, and each answer says so.
"""

import io
import json
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import prepare_audio, validate
from eval.scorer_interface import ANSWERED
from ltu import ask, inference_batch
from ltu.data import audio, audio_header
from ltu.data.audio import AudioError, FirstWarnings, decode_audio, load_audio
from ltu.data.check_examples import check_audio, read_examples
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import ANSWERED_STATUSES, Request
from ltu.serving.gradio_page import answer_status
from ltu_as import extract_whisper_feature
from ltu_as.convert_checkpoint import main as convert_as
from tests import tiny
from tests.test_serve import audio_part, serve, text_part
from tests.whisper_tiny import save_whisper

SECONDS = 3.0
# Format and subtype of those that promise a length.
FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_U8"),
    ("WAV", "FLOAT"),
    ("WAV", "IMA_ADPCM"),
    ("WAV", "MS_ADPCM"),
    ("WAVEX", "PCM_24"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_16"),
    ("AIFF", "PCM_16"),
    ("AIFF", "DOUBLE"),
    ("AU", "FLOAT"),
    ("MP3", "MPEG_LAYER_III"),
]


def encode(kind: str = "WAV", subtype: str = "PCM_16", channels: int = 1, **settings) -> bytes:
    """Return the bytes of a file of `SECONDS` of noise."""
    samples = np.stack([tiny.clip(seed, SECONDS) for seed in range(channels)], axis=1)
    stream = io.BytesIO()
    soundfile.write(stream, samples, 16_000, format=kind, subtype=subtype, **settings)
    return stream.getvalue()


def half_wav() -> bytes:
    """Return a wav whose header promises 3 s and that has 1.5 s."""
    data = encode()
    return data[: 44 + (len(data) - 44) // 2]


def wav_of_size(data_size: int, content: bytes) -> bytes:
    """Return a wav whose header gives its data a size."""
    data = encode()[:44]
    riff_size = min(data_size + 36, 2**32 - 1).to_bytes(4, "little")
    return data[:4] + riff_size + data[8:40] + data_size.to_bytes(4, "little") + content


@pytest.fixture
def log(monkeypatch, caplog):
    """Give the process warnings that were not given yet; return the captured log."""
    monkeypatch.setattr(audio, "_first_warnings", FirstWarnings())
    return caplog


# --- headers


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind, subtype", FORMATS)
def test_half_a_file_is_cut_short(tmp_path, kind, subtype, channels):
    data = encode(kind, subtype, channels)
    path = tmp_path / "clip"
    for source in (data, path):
        path.write_bytes(data)
        whole = decode_audio(source)
        assert whole.expected_seconds == pytest.approx(whole.seconds, abs=1e-3)
        assert whole.seconds == pytest.approx(SECONDS, abs=0.1)
        assert not whole.is_cut_short and whole.warnings == ()
    path.write_bytes(data[: len(data) // 2])
    for source in (data[: len(data) // 2], path):
        half = decode_audio(source)
        assert half.is_cut_short
        assert half.seconds == pytest.approx(SECONDS / 2, abs=0.15)
        assert half.expected_seconds == pytest.approx(SECONDS, abs=0.1)
        lengths = (
            f"promises {half.expected_seconds:.2f} s of sound, the file has {half.seconds:.2f}"
        )
        assert lengths in half.warnings[0]


def test_wav_with_chunks_around_the_audio():
    """Chunks before the audio are skipped; bytes after it are not missing audio."""
    data = encode()
    note = b"LIST" + (5).to_bytes(4, "little") + b"hello\0"  # Padded to an even length.
    before = data[:36] + note * 3 + data[36:]
    assert decode_audio(before).expected_seconds == SECONDS
    assert decode_audio(before[:-48_000]).is_cut_short
    assert not decode_audio(data + note * 3000).is_cut_short
    big_endian = encode(endian="BIG")
    assert big_endian[:4] == b"RIFX"
    assert decode_audio(big_endian[:-48_000]).is_cut_short


def test_flac_that_promises_more_than_it_has():
    data = bytearray(encode("FLAC"))
    assert decode_audio(bytes(data)).expected_seconds == SECONDS
    data[22:26] = (64_000).to_bytes(4, "big")  # The number of samples in STREAMINFO.
    assert decode_audio(bytes(data)).is_cut_short
    # A live encoder writes 0, because it cannot know the length.
    data[22:26] = bytes(4)
    assert decode_audio(bytes(data)).expected_seconds is None


def test_mp3_without_a_length_promises_nothing():
    """Without the tag of its encoder, the length of an mp3 is an estimate."""
    data = bytearray(encode("MP3", "MPEG_LAYER_III"))
    name = next(tag for tag in audio_header.XING_TAGS if tag in data[:300])
    position = data.index(name)
    tagged = b"ID3\x04\x00\x00\x00\x00\x07\x76" + bytes(1014) + data
    assert decode_audio(tagged[: len(tagged) // 2]).is_cut_short
    data[position : position + 4] = b"none"
    half = decode_audio(bytes(data[: len(data) // 2]))
    assert half.expected_seconds is None and not half.is_cut_short


@pytest.mark.parametrize("size", [2**32 - 1, 2**31 - 1, 2**31, 0x7FFFF000, 2**32 - 45])
def test_sizes_of_pipes_promise_nothing(size):
    """ffmpeg, sox and arecord write such sizes where they cannot know the length."""
    content = encode()[44:]
    clip = decode_audio(wav_of_size(size, content))
    assert clip.seconds == SECONDS and clip.expected_seconds is None and clip.warnings == ()


def test_w64_and_au_of_pipes_promise_nothing(tmp_path):
    w64 = bytearray(encode("W64"))
    size_at = w64.index(b"data\xf3\xac") + 16
    w64[16:24] = b"\xff" * 8  # As ffmpeg does.
    w64[size_at : size_at + 8] = (2**63).to_bytes(8, "little")
    au = bytearray(encode("AU"))
    au[8:12] = b"\xff" * 4
    for data in (w64, au):
        (tmp_path / "clip").write_bytes(data)
        clip = decode_audio(tmp_path / "clip")
        assert clip.seconds == SECONDS and clip.expected_seconds is None


def test_few_missing_samples_are_no_warning():
    data = encode()
    assert not decode_audio(data[:-3000]).is_cut_short  # 94 ms
    assert decode_audio(data[:-3300]).is_cut_short  # 103 ms


def test_a_data_size_of_0_is_said(tmp_path):
    content = encode()[44:]
    for rest, text in ((content, "96,000 bytes follow"), (b"", "0 bytes follow")):
        path = tmp_path / "zero.wav"
        path.write_bytes(wav_of_size(0, rest))
        for source in (path, path.read_bytes()):
            with pytest.raises(AudioError, match=f"header gives a data size of 0, and {text}"):
                decode_audio(source)
    with pytest.raises(AudioError, match="a data size of 96,000, but 2 bytes follow"):
        decode_audio(wav_of_size(96_000, b"\0\0"))


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "MP3", "FLAC"])
def test_damaged_headers_raise_audio_errors_only(kind):
    data = encode(kind, "MPEG_LAYER_III" if kind == "MP3" else "PCM_16")
    for seed in range(60):
        rng = np.random.default_rng(seed)
        damaged = bytearray(data[: rng.integers(20, 4000)])
        for position in rng.integers(0, min(120, len(damaged)), 4):
            damaged[position] = rng.choice([0, 1, 127, 255])
        with suppress(AudioError):
            decode_audio(bytes(damaged))


def test_headers_of_many_chunks_are_left(monkeypatch):
    """A file of empty chunks is not walked to its end."""
    reads = []

    def read_at(position: int, count: int) -> bytes:
        reads.append(position)
        return b"RIFF" if position == 0 else struct.pack("<4sI", b"none", 0)[:count]

    assert audio_header.read_data_size(read_at, 2**40) is None
    assert len(reads) <= audio_header.MAX_CHUNKS + 1


# --- answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, a dataset file, and its clips: whole, cut short, long and cut short, loud."""
    root = tmp_path_factory.mktemp("warnings")
    tiny.write_checkpoint(root / "tiny", tiny.write_llm(root / "llm"))
    (root / "cut.wav").write_bytes(half_wav())
    short = encode()
    (root / "short.wav").write_bytes(short[: 44 + 2 * 8000])  # 0.5 s: less than a chunk.
    loud = tiny.clip(3) * 30_000
    soundfile.write(root / "loud.wav", loud, 16_000, subtype="FLOAT")
    soundfile.write(root / "loud2.wav", loud * 0.9, 16_000, subtype="FLOAT")
    soundfile.write(root / "good.wav", tiny.clip(4), 16_000)
    names = ["good.wav", "cut.wav", "short.wav", "loud.wav", "loud2.wav"]
    rows = [{"instruction": "What?", "audio_id": name, "output": "rain"} for name in names]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def engine(folder: Path) -> LtuEngine:
    return LtuEngine.from_pretrained(folder / "tiny", device="cpu")


def test_each_answer_says_it(folder, engine, log):
    """Also an answer whose clip was encoded before; the log has the first clip of each kind."""
    names = ["good.wav", "cut.wav", "short.wav", "loud.wav", "loud2.wav", "cut.wav", "loud.wav"]
    for _ in range(2):
        requests = [Request("What is it?", folder / name) for name in names]
        answers = engine(requests, max_new_tokens=4)
        assert all(answer.answered for answer in answers)
        good, cut, short, loud, loud2, *again = answers
        assert (good.status, good.warnings) == ("ok", [])
        assert (cut.status, cut.seconds_heard, cut.seconds_total) == ("truncated_file", 0.64, 1.5)
        assert cut.warnings == [
            "The clip is cut short: its header promises 3.00 s of sound, the file has 1.50 s. What "
            "it has is used."
        ]
        assert (short.status, short.seconds_heard) == ("truncated_file", 0.5)
        assert loud.status == loud2.status == "ok"
        for answer in (loud, loud2):
            peak = float(np.abs(load_audio(folder / f"loud{'2' * (answer is loud2)}.wav")).max())
            assert f"has float samples up to {peak:.6g}, where" in answer.warnings[0]
            assert "divide them by 32768" in answer.warnings[0]
        assert [answer.warnings for answer in again] == [cut.warnings, loud.warnings]
    messages = [record.getMessage() for record in log.records if "clip" in record.getMessage()]
    assert len(messages) == 2
    assert messages[0].startswith(f"{folder}/cut.wav is cut short: its header promises 3.00 s")
    assert messages[1].startswith(f"{folder}/loud.wav has float samples up to")


def test_a_clip_that_is_loud_and_cut_has_both(engine):
    stream = io.BytesIO()
    soundfile.write(stream, tiny.clip(0, 3.0) * 1000, 16_000, format="WAV", subtype="FLOAT")
    answer = engine([Request("What?", stream.getvalue()[:-96_000])], max_new_tokens=3)[0]
    assert [warning.split()[2] for warning in answer.warnings] == ["is", "has"]


def test_too_long_a_prompt_goes_before(engine):
    answer = engine([Request("What? " * 2000, half_wav())], max_new_tokens=3)[0]
    assert answer.status == "too_long" and not answer.answered and len(answer.warnings) == 1


def test_predictions_files_have_it(folder, tmp_path, capsys):
    """Such answers count as answered, also for the evaluation."""
    flags = f"--model {folder}/tiny --data_path {folder}/rows.json --output_path {tmp_path}/p.json"
    command = [*flags.split(), "--device", "cpu", "--max_new_tokens", "3"]
    assert inference_batch.main(command) == 0
    rows = json.loads((tmp_path / "p.json").read_text())
    statuses = ["ok", "truncated_file", "truncated_file", "ok", "ok"]
    assert [row["status"] for row in rows] == statuses
    assert [len(row["warnings"]) for row in rows] == [0, 1, 1, 1, 1]
    out, err = capsys.readouterr()
    assert "ok 3, truncated_file 2" in out and "answered 5 of 5" in out
    assert "answers with `warnings`: 4. The first: The clip is cut short" in err
    assert set(ANSWERED) == {None, *ANSWERED_STATUSES}


def test_ask_prints_it(folder, capsys):
    command = f"{folder}/cut.wav What? --model {folder}/tiny --max_new_tokens 3 --device cpu"
    assert ask.main(command.split()) == 0
    assert "(warning: The clip is cut short: its header promises 3.00 s" in capsys.readouterr().err


def test_the_server_and_the_page_say_it(folder, engine):
    with serve(engine) as served:
        for name, status in (("cut", "truncated_file"), ("loud", "ok"), ("good", "ok")):
            data = (folder / f"{name}.wav").read_bytes()
            extras = served.ask(text_part(), audio_part(data, "wav")).model_extra["ltu"]
            answer = engine([Request("What?", data)], max_new_tokens=3)[0]
            assert extras["status"] == answer.status == status
            assert extras["warnings"] == answer.warnings
            assert all(warning in answer_status(answer) for warning in answer.warnings)
            assert len(answer.warnings) == (name != "good")
        assert served.metric('ltu_answers_total{status="truncated_file"}') == 1


def test_stored_features_say_it(folder, tmp_path):
    """The sound need not be there."""
    save_whisper(tmp_path / "whisper.pt")
    flags = f"--init --llm {folder}/llm --whisper {tmp_path}/whisper.pt --num_layer_heads 2"
    convert_as(f"{flags} --feature_precision fp32 --output_dir {tmp_path}/ltu_as".split())
    common = f"--data_path {folder}/rows.json --output_dir {tmp_path}/store"
    assert extract_whisper_feature.main(f"{common} --model {tmp_path}/ltu_as".split()) == 0
    engine = LtuEngine.from_pretrained(tmp_path / "ltu_as", device="cpu")
    names = ["good.wav", "cut.wav", "loud.wav"]
    requests = [Request("What?", folder / name, "") for name in names]
    from_sound = engine(requests, max_new_tokens=3)
    assert [answer.status for answer in from_sound] == ["ok", "truncated_file", "ok"]
    engine.processor.front_end.configure(feature_root=str(tmp_path / "store"))
    requests = [Request("What?", tmp_path / name, "", audio_id=name) for name in names]
    for one, other in zip(from_sound, engine(requests, max_new_tokens=3), strict=True):
        assert (one.status, one.warnings, one.text) == (other.status, other.warnings, other.text)


# --- data


def test_check_audio_counts_and_names_them(folder, log):
    assert check_audio(read_examples(folder / "rows.json")) == {}
    message = log.records[-1].getMessage()
    assert message.startswith("2 of 5 clips are cut short")
    assert f"{folder}/cut.wav: 1.50 of 3.00 s" in message
    assert f"{folder}/short.wav: 0.50 of 3.00 s" in message


@pytest.mark.parametrize("decode", [False, True])
def test_validate_counts_and_names_them(folder, tmp_path, decode):
    flags = ["--data_path", f"{folder}/rows.json", "--output_path", f"{tmp_path}/report.json"]
    assert validate.main([*flags, *["--decode"] * decode]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cut_short"] == 2 and report["wrong"] == {}
    assert report["first_cut_short"][0].startswith("cut.wav is cut short: its header promises 3.00")


def test_prepare_audio_counts_and_names_them(folder, tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("good.wav", "cut.wav"):
        (source / name).write_bytes((folder / name).read_bytes())
    run = f"--input {source} --output_dir {tmp_path}/out --workers 1".split()
    for _ in range(2):  # The second run prepares nothing, and still says it.
        assert prepare_audio.main(run) == 0
        out, err = capsys.readouterr()
        assert "with a warning: 1; see" in out
        assert "cut.wav: The clip is cut short: its header promises 3.00 s" in err
    # The prepared clip is whole.
    assert not decode_audio(tmp_path / "out" / "cut.flac").is_cut_short
