"""Tests hundreds of malformed clips of many kinds among good ones.

Each malformed clip ends with a status; none ends with a crash or an answer. The content of a
damaged file is not known beforehand: libsndfile may decode it. Then the clip is valid, and the
waveform must be the one that `soundfile` decodes.
"""

import gzip
import io
import json
import os
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional

from ltu.data.audio import HINTS, AudioError, Downmix, decode_audio
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Answer, Request
from ltu.inference_batch import main as inference_batch
from ltu_as.convert_checkpoint import main as convert_as
from tests.tiny import write_checkpoint, write_llm
from tests.whisper_tiny import save_whisper

EACH = 20  # cases of a kind
FORMATS = {  # name -> (format, subtype) of soundfile
    "wav": ("WAV", "PCM_16"),
    "wav24": ("WAV", "PCM_24"),
    "wav_double": ("WAV", "DOUBLE"),
    "wav_u8": ("WAV", "PCM_U8"),
    "wav_alaw": ("WAV", "ALAW"),
    "w64": ("W64", "PCM_16"),
    "rf64": ("RF64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "FLOAT"),
    "caf": ("CAF", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
FOREIGN = (
    b"\x89PNG\r\n\x1a\n",
    b"PK\x03\x04",
    b"%PDF-1.7\n",
    b"\x7fELF\x02\x01",
    b"\x00\x00\x00\x20ftypM4A ",
    b"RIFF",
)


@dataclass
class Case:
    """A clip. `expected` is its status if that is certain; else the bytes `data` decide it."""

    kind: str
    source: Any
    expected: str | None = None
    data: bytes | None = None


def sound(rng: np.random.Generator, samples: int = 6000, channels: int = 1) -> np.ndarray:
    return rng.normal(0, 0.1, (samples, channels)).astype(np.float32)


def cut(rng: np.random.Generator, data: bytes, low: int, high: int) -> bytes:
    """Return the beginning of a file, of random length from `low` to below `high`."""
    return data[: int(rng.integers(low, high))]


def cut_anywhere(rng: np.random.Generator, data: bytes) -> bytes:
    return cut(rng, data, 4, len(data))


def encoded(
    rng: np.random.Generator, name: str, array: np.ndarray | None = None, rate: int | None = None
) -> bytes:
    """A file of noise, of random length, rate and channels where these are not given."""
    form, subtype = FORMATS[name]
    if array is None:
        array = sound(rng, int(rng.integers(3000, 9000)), int(rng.integers(1, 3)))
    rate = rate or int(rng.choice([8000, 16_000, 24_000, 48_000]))
    buffer = io.BytesIO()
    soundfile.write(buffer, array, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def wav(
    body: bytes,
    tag: int = 1,
    channels: int = 1,
    rate: int = 16_000,
    bits: int = 16,
    claim: int | None = None,
):
    """A wav file by hand, for what no encoder writes."""
    claim = len(body) if claim is None else claim
    width = max(1, channels * bits // 8) % 2**16
    fmt = struct.pack("<HHIIHH", tag, channels, rate, rate * width % 2**32, width, bits)
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", claim)
    return b"RIFF" + struct.pack("<I", (len(chunks) + claim) % 2**32) + chunks + body


def floats(array: np.ndarray, rate: int = 16_000) -> bytes:
    channels = 1 if array.ndim == 1 else array.shape[1]
    return wav(array.astype("<f4").tobytes(), tag=3, bits=32, channels=channels, rate=rate)


def flipped(rng: np.random.Generator, data: bytes, first: int, last: int) -> bytes:
    changed = bytearray(data)
    for position in rng.integers(first, min(last, len(data)), rng.integers(1, 12)):
        changed[position] = rng.integers(256)
    return bytes(changed)


def rarer_format_cut(rng: np.random.Generator, number: int) -> bytes:
    data = encoded(rng, ("aiff", "au", "caf", "w64", "rf64")[number % 5])
    return cut_anywhere(rng, data) if number % 4 == 0 else cut(rng, data, 4, 200)


def flac_claiming(rng: np.random.Generator) -> bytes:
    """Return a flac whose header claims 2^36 - 1 samples (terabytes); half of them are cut."""
    data = bytearray(encoded(rng, "flac"))
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    return bytes(data[: int(rng.integers(30, len(data)))] if rng.random() < 0.5 else data)


# Kinds that only their bytes define: kind -> (rng, number) -> bytes. `decoded` finds the status.
BYTES: dict[str, Callable[[np.random.Generator, int], bytes]] = {
    "text": lambda r, i: ("This is not sound. " * int(r.integers(1, 200)) + str(i)).encode(),
    "page of an error": lambda r, i: (
        f"<html><h1>{i} Not Found</h1>{'x' * int(r.integers(9, 9000))}</html>".encode()
    ),
    "nothing": lambda r, i: b"",
    "zeros": lambda r, i: bytes(int(r.integers(1, 20_000))),
    "random bytes": lambda r, i: r.bytes(int(r.integers(1, 20_000))),
    "other kind of file": lambda r, i: (
        FOREIGN[i % len(FOREIGN)] + r.bytes(int(r.integers(9, 5000)))
    ),
    "compressed wav": lambda r, i: gzip.compress(encoded(r, "wav")),
    "wav cut in its header": lambda r, i: cut(r, encoded(r, "wav"), 1, 44),
    "wav cut": lambda r, i: cut(r, encoded(r, "wav"), 44, 2000),
    "flac cut": lambda r, i: cut_anywhere(r, encoded(r, "flac")),
    "ogg cut": lambda r, i: cut_anywhere(r, encoded(r, ("ogg", "opus")[i % 2])),
    "mp3 cut": lambda r, i: cut(r, encoded(r, "mp3"), 1, 600),
    "aiff, au, caf, w64 or rf64 cut": rarer_format_cut,
    "start cut off": lambda r, i: encoded(r, list(FORMATS)[i % len(FORMATS)])[
        int(r.integers(1, 60)) :
    ],
    "wav header damaged": lambda r, i: flipped(
        r, encoded(r, ("wav", "wav24", "wav_double")[i % 3]), 0, 44
    ),
    "flac damaged": lambda r, i: flipped(r, encoded(r, "flac"), 0, 10**9 if i % 2 else 60),
    "ogg damaged": lambda r, i: flipped(
        r, encoded(r, ("ogg", "opus")[i % 2]), 0, 10**9 if i % 3 else 60
    ),
    "mp3 damaged": lambda r, i: flipped(r, encoded(r, "mp3"), 0, 40),
    "any header damaged": lambda r, i: flipped(
        r, encoded(r, list(FORMATS)[i % len(FORMATS)]), 0, 90
    ),
    "wav of nan": lambda r, i: floats(
        np.where(np.arange(6000) == r.integers(6000), np.nan, sound(r)[:, 0])
    ),
    "wav of infinity": lambda r, i: floats(
        np.where(np.arange(6000) == r.integers(6000), -np.inf, sound(r)[:, 0])
    ),
    "wav of huge values": lambda r, i: floats(sound(r) * np.float32(10.0 ** r.uniform(12, 37))),
    "doubles beyond float32": lambda r, i: encoded(r, "wav_double", sound(r).astype(float) * 1e300),
    "impossible rate": lambda r, i: wav(
        sound(r).tobytes(), rate=int((0, 1, 50, 999, 1_000_001, 4 * 10**9)[i % 6])
    ),
    "impossible channels or bits": lambda r, i: wav(
        sound(r).tobytes(),
        channels=(0, 1025, 65_535, 1, 1, 2)[i % 6],
        bits=(16, 16, 8, 0, 7, 1000)[i % 6],
    ),
    "unknown codec": lambda r, i: wav(sound(r).tobytes(), tag=int(r.integers(0x60, 0xFFFE))),
    "too short": lambda r, i: encoded(
        r, ("wav", "flac", "au")[i % 3], sound(r, int(r.integers(0, 400))), 16_000
    ),
    "silent": lambda r, i: encoded(r, "wav", np.full((6000, 1), (i % 5) / 5)),
    "near silence": lambda r, i: floats(sound(r) * np.float32(10.0 ** -r.uniform(9, 44))),
    "first channel silent": lambda r, i: floats(
        np.concatenate([np.zeros((6000, 1)), sound(r, 6000, 1 + i % 7)], 1)
    ),
    "tags without sound": lambda r, i: (
        b"ID3\x04\x00\x00\x00\x00" + bytes([0, int(r.integers(128))]) + r.bytes(i * 50)
    ),
    "wrong claims": lambda r, i: wav(
        sound(r, 300).tobytes(), claim=int((0, 1, 2**31, 2**32 - 1, 700)[i % 5])
    ),
    "flac that claims terabytes": lambda r, i: flac_claiming(r),
    "huge tags": lambda r, i: (
        b"ID3\x04\x00\x00" + bytes([0x7F] * 4) + bytes(i * 1000) + encoded(r, "mp3")
    ),
}


def oddities(folder: Path) -> list[Case]:
    """Return cases with odd file names, paths that are no files, and arrays."""
    rng = np.random.default_rng(1)
    cases = []
    os.mkfifo(folder / "pipe.wav")
    (folder / "loop.wav").symlink_to("loop.wav")
    (folder / "dangling.wav").symlink_to("nowhere.wav")
    (folder / "a\nb.wav").mkdir()
    present = folder / "there.wav"
    present.write_bytes(encoded(rng, "wav"))
    pipes = [folder / "pipe.wav", "/dev/zero", "/dev/null", "/dev/random", "/proc/kmsg"]
    cases += [Case("pipe or device", path, "unreadable") for path in pipes]
    folders = (folder, str(folder / "a\nb.wav"), "/", ".")
    cases += [Case("folder", path, "missing") for path in folders]
    undecodable = os.fsdecode(os.fsencode(folder) + b"/n\xff\xc3(.wav")
    missing = [
        "loop.wav",
        "dangling.wav",
        "there.wav/x.wav",
        "x" * 256,
        "x/" * 3000,
        "a\0b.wav",
        "\ud800.wav",
        "a\nc.wav",
        "雪.wav",
        "*.wav",
        "~/x.wav",
        "%s.wav",
        "\x1b[31mred.wav",
        "\u2028.wav",
        "there.WAV",
        "<b>.wav",
    ]
    paths = [str(folder / name) for name in missing]
    paths += ["", "http://a.b/c.wav", undecodable, f"{present} "]
    cases += [Case("no such name", path, "missing") for path in paths]
    hour = wav(b"", bits=8, rate=1000, claim=3_700_000)
    for number, seconds in enumerate((3601, 3700, 4000)):
        path = folder / f"hour{number}.wav"
        path.write_bytes(hour)
        os.truncate(path, 44 + 1000 * seconds)
        cases.append(Case("longer than an hour", path, "too_long"))
    hour_array = np.resize(sound(rng)[:, 0], 3_600_001)
    cases.append(Case("longer than an hour", (hour_array, 1000), "too_long"))
    noise = sound(rng)[:, 0]
    arrays = [
        np.full(6000, np.nan, "f4"),
        noise[:0],
        noise.reshape(-1, 1),
        noise.reshape(1, 2, -1),
        noise + 0j,
        noise > 0,
        (noise * 99).astype("u1"),
        noise.astype(object),
        noise.astype(float) * 1e300,
        np.array(["a"] * 900),
        np.zeros(900, "m8[s]"),
        noise * np.float32(1e20),
        np.array(1.0),
    ]
    cases += [Case("array", array, "unreadable") for array in arrays]
    rates = (0, -1, 1, 4e9, np.nan, np.inf, 44_100.5, "16000", None)
    cases += [Case("rate of an array", (noise, rate), "unreadable") for rate in rates]
    return cases + [
        Case("array", noise[:399], "too_short"),
        Case("array", (noise[:100], 8000), "too_short"),
        Case("array", np.zeros(6000, np.int16), "silent"),
        Case("array", np.full(6000, 0.3), "silent"),
    ]


def good_ones(folder: Path) -> list[Case]:
    rng = np.random.default_rng(2)
    cases = []
    names = [
        "plain.wav",
        "two\nlines.wav",
        "雨.wav",
        "-rf.wav",
        "x" * 250 + ".wav",
        "x",
        "a.txt",
        "n\udcff.wav",
    ]
    for number, name in enumerate([*FORMATS, *FORMATS]):
        data = encoded(rng, name)
        path = folder / (names[number] if number < len(names) else f"good{number}.{name}")
        path.write_bytes(data)
        cases.append(Case("good", (path, str(path), data)[number % 3], "ok", data))
    for data in (
        encoded(rng, "wav", sound(rng, 60_000, 8), 192_000),
        encoded(rng, "wav", sound(rng, 30_000), 44_101),
        b"ID3\x04\x00\x00\x00\x00\x07\x76" + rng.bytes(1014) + encoded(rng, "mp3"),
    ):
        cases.append(Case("good", data, "ok", data))
    return cases


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Return all cases, shuffled. Every third one that bytes define is given as bytes."""
    folder = tmp_path_factory.mktemp("clips")
    found = oddities(folder) + good_ones(folder)
    for number, (kind, make) in enumerate(BYTES.items()):
        for index in range(EACH):
            data = make(np.random.default_rng([number, index]), index)
            path = folder / f"{number}_{index}.{('wav', 'flac', 'mp3', 'ogg')[index % 4]}"
            path.write_bytes(data)
            found.append(Case(kind, data if index % 3 == 2 else path, None, data))
    return [found[index] for index in np.random.default_rng(3).permutation(len(found))]


class Stream(soundfile.SoundFile):
    """A file that soundfile reads forward only; else it seeks to the end that a header claims."""

    def seekable(self) -> bool:
        return False


def decoded(data: bytes, downmix: Downmix) -> tuple[str, np.ndarray | None]:
    """Return the status of a file's bytes, and the first channel or the mean at 16 kHz or None.

    Only soundfile and torchaudio are used.
    """
    try:
        with Stream(io.BytesIO(data)) as file:
            if soundfile.SoundFile.seekable(file):
                file.seek(0)
            rate, channels = file.samplerate, file.channels
            channels_read = file.read(2**20, dtype="float32", always_2d=True)
            with np.errstate(all="ignore"):  # Of values that are not finite.
                mean = channels_read.mean(1)
            array = np.ascontiguousarray(channels_read[:, 0]) if downmix == "first" else mean
    except (soundfile.SoundFileError, TypeError):
        return "unreadable", None
    if rate * channels > 2**22:
        return "unreadable", None
    if not 1000 <= rate <= 1_000_000 or not np.isfinite(array).all():
        return "unreadable", None
    if len(array) and abs(array).max() > 2**31:
        return "unreadable", None
    if -(-len(array) * 16_000 // rate) < 400:
        return "too_short", None
    if np.ptp(array.astype(float)) < 2**-23:
        return "silent", None
    if rate % 50 and rate != 16_000:
        return "ok", None  # torchaudio's kernel for this rate would not fit into memory.
    resampled = torchaudio.functional.resample(torch.from_numpy(array), rate, 16_000)
    return "ok", resampled.numpy()


@pytest.mark.parametrize("downmix", ["first", "mean"])
def test_waveforms_are_those_of_soundfile(cases: list[Case], downmix: Downmix) -> None:
    statuses: dict[str, Counter] = {}
    for case in cases:
        status = case.expected
        waveform = None
        if case.data is not None:
            status, waveform = decoded(case.data, downmix)
        try:
            clip = decode_audio(case.source, downmix=downmix)
            found = "ok"
            assert waveform is None or np.array_equal(clip.waveform, waveform)
            assert clip.waveform.dtype == np.float32
            assert np.isfinite(clip.waveform).all()
        except AudioError as error:
            found = error.reason
            assert str(error).isprintable()
            assert str(error).encode()
            assert str(error).endswith(HINTS[found])
        assert found == status == (case.expected or status), f"{case.kind}: {case.source!r:.300}"
        statuses.setdefault(case.kind, Counter())[found] += 1
    refused = {kind: counts.total() - counts["ok"] for kind, counts in statuses.items()}
    num_refused = sum(refused.values())
    num_kinds = sum(count > 0 for count in refused.values())
    listed = "\n".join(f"{kind}: {dict(counts)}" for kind, counts in sorted(statuses.items()))
    assert num_refused >= 500 and num_kinds >= 20, f"{num_refused} of {num_kinds} kinds\n{listed}"
    reasons = set().union(*statuses.values())
    assert reasons == {"ok", "missing", "unreadable", "too_short", "too_long", "silent"}, listed


def make_checkpoint(root: Path, kind: str) -> Path:
    llm = write_llm(root / "llm")
    if kind == "ltu":
        return write_checkpoint(root / "checkpoint", llm)
    save_whisper(root / "whisper.pt")
    flags = ["--init", "--llm", str(llm), "--whisper", str(root / "whisper.pt")]
    flags += ["--feature_precision", "fp32", "--num_layer_heads", "2"]
    convert_as([*flags, "--output_dir", str(root / "checkpoint")])
    return root / "checkpoint"


def check(case: Case, answer: Answer, downmix: Downmix = "first") -> None:
    """Check that a clip has an answer, or else the right status and reason."""
    status = case.expected or decoded(case.data, downmix)[0]
    assert answer.answered == (status == "ok"), case
    assert answer.answered or answer.status == status, case
    if answer.answered:
        assert answer.new_tokens > 0 and 0 < answer.seconds_heard <= answer.seconds_total
    else:
        assert (answer.text, answer.new_tokens, answer.seconds_heard) == ("", 0, 0.0)
        assert answer.error.isprintable() and HINTS[status] in answer.error


@pytest.mark.parametrize("kind", ["ltu", "ltu_as"])
def test_a_mixed_batch_answers_the_good_ones_only(
    cases: list[Case], kind: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path, kind)
    engine = LtuEngine.from_pretrained(checkpoint, device="cpu")
    fresh = LtuEngine.from_pretrained(checkpoint, device="cpu", cache_mb=0)
    requests = [Request("What is it?", case.source, "") for case in cases]
    answers = engine(requests, batch_size=16, max_new_tokens=4, min_new_tokens=1)
    for case, answer in zip(cases, answers, strict=True):
        check(case, answer, "mean" if kind == "ltu_as" else "first")
    good = [index for index, answer in enumerate(answers) if answer.answered]
    assert len(good) >= 31
    for index in good[::3]:
        assert fresh([requests[index]], max_new_tokens=4, min_new_tokens=1)[0] == answers[index]


def test_a_run_over_files_ends_with_a_summary(
    cases: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """`python -m ltu.inference_batch`, without the cases that are not paths."""
    checkpoint = make_checkpoint(tmp_path, "ltu")
    cases = [case for case in cases if isinstance(case.source, str | Path) and str(case.source)]
    question = {"instruction": "What is it?", "input": ""}
    examples = [question | {"audio_id": str(case.source)} for case in cases]
    (tmp_path / "examples.json").write_text(json.dumps(examples))
    command = ["--model", str(checkpoint), "--device", "cpu"]
    command += ["--data_path", f"{tmp_path}/examples.json", "--output_path", f"{tmp_path}/p.json"]
    command += ["--max_new_tokens", "4", "--batch_size", "16"]
    assert inference_batch([*command, "--max_bad", str(len(cases))]) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    entries = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert len(entries) == len(cases)
    for case, entry in zip(cases, entries, strict=True):
        assert entry["audio_id"] == str(case.source)
        fields = {key: entry[key] for key in Answer.__dataclass_fields__ if key in entry}
        check(case, Answer(entry["pred"], **fields))
    counts = Counter(entry["status"] for entry in entries)
    for status, count in counts.items():
        assert f"{status} {count}" in printed.out
