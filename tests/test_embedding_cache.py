"""Tests the content hashes of clips: no two kinds of content, and no two clips, share one."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ltu.data.audio import Waveform, decode_audio
from ltu.inference.embedding_cache import hash_content
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Answer, Request
from tests import tiny

RATE = 16_000


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> LtuEngine:
    root = tmp_path_factory.mktemp("cache")
    folder = tiny.write_checkpoint(root / "ltu", tiny.write_llm(root / "llm"), tiny.LORA)
    return LtuEngine.from_pretrained(folder, device="cpu")


@pytest.fixture
def engine(opened: LtuEngine) -> LtuEngine:
    """An engine that has encoded nothing yet."""
    return LtuEngine(opened.model, opened.processor)


def facts(answer: Answer) -> tuple:
    return answer.answered, answer.sampling_rate, answer.channels, round(answer.seconds_total, 2)


def test_an_answer_states_the_facts_of_its_own_clip(engine: LtuEngine) -> None:
    """Clips of the same samples, decoded from sources with other channels and rates."""
    samples = tiny.clip(1, 1.0)
    sources = [
        Waveform(samples, 44_100, 1),
        Waveform(samples, 44_100, 2),
        Waveform(samples, 48_000, 2),
        samples,
        (samples, 44_100),
        (samples, 8_000),
        np.stack([samples, samples[::-1]]),
    ]
    expected = [
        (True, 44_100, 1, 1.0),
        (True, 44_100, 2, 1.0),
        (True, 48_000, 2, 1.0),
        (True, 16_000, 1, 1.0),
        (True, 44_100, 1, 0.36),
        (True, 8_000, 1, 2.0),
        (True, 16_000, 2, 1.0),
    ]
    requests = [Request("What?", source) for source in sources]
    for order in (requests, requests[::-1]):
        answers = [engine([request], max_new_tokens=2)[0] for request in order]
        together = engine(order, max_new_tokens=2)
        wanted = expected if order is requests else expected[::-1]
        assert [facts(answer) for answer in answers] == wanted
        assert [facts(answer) for answer in together] == wanted
    assert engine.cache.encoded == len(sources)


def test_an_array_without_a_rate_is_no_array_at_the_default_rate(engine: LtuEngine) -> None:
    """Its result does not depend on whether the other was decoded before."""
    samples = tiny.clip(1)
    requests = [Request("What?", samples), Request("What?", (samples, None))]
    assert [answer.status for answer in engine(requests, max_new_tokens=2)] == ["ok", "unreadable"]
    requests = [Request("What?", (samples, 16_000)), Request("What?", (samples, "16000"))]
    assert [answer.status for answer in engine(requests, max_new_tokens=2)] == ["ok", "unreadable"]
    assert engine.cache.encoded == 1  # 16,000 Hz is the default.


def test_no_kind_of_content_has_the_hash_of_another(tmp_path: Path) -> None:
    """A file may hold the bytes that are hashed for an array."""
    soundfile.write(tmp_path / "a.wav", tiny.clip(1), RATE)
    array = np.arange(6, dtype=np.float32)
    waveform = Waveform(array, RATE, 1)
    contents = [
        tmp_path / "a.wav",
        f"(6,) float32 {RATE}".encode() + array.tobytes(),
        b"(6,) float32 None" + array.tobytes(),
        array.tobytes(),
        array,
        (array, 8_000),
        (array, None),
        array.astype(np.float64),
        array.view(np.int32),
        array.astype(">f4"),
        array.reshape(2, 3),
        array.reshape(1, 6),
        waveform,
        replace(waveform, channels=2),
        replace(waveform, sampling_rate=8_000),
    ]
    hashes = [hash_content(content) for content in contents]
    for one, other in itertools.combinations(range(len(contents)), 2):
        assert hashes[one] != hashes[other], (contents[one], contents[other])
    # The kind is part of the hash, so that equal digests of two kinds would differ too.
    kinds = ["encoded"] * 4 + ["array"] * 8 + ["waveform"] * 3
    assert [found.partition(":")[0] for found in hashes] == kinds
    assert hash_content((tmp_path / "a.wav").read_bytes()) == hashes[0]
    assert hash_content((array, RATE)) == hash_content(array)
    assert hash_content(Waveform(array.copy(), RATE, 1)) == hash_content(waveform)


def test_a_decoded_file_has_the_facts_of_the_file(engine: LtuEngine, tmp_path: Path) -> None:
    stereo = np.stack([tiny.clip(1, 1.0), tiny.clip(2, 1.0)], 1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 48_000)
    soundfile.write(tmp_path / "mono.wav", stereo[:, 0], 48_000)
    paths = [tmp_path / "stereo.wav", tmp_path / "mono.wav"]
    requests = []
    for path in paths:
        requests.append(Request("What?", path))
        requests.append(Request("What?", path.read_bytes()))
        requests.append(Request("What?", decode_audio(path)))
    answers = engine(requests, max_new_tokens=3)
    assert [answer.channels for answer in answers] == [2, 2, 2, 1, 1, 1]
    assert len({answer.text for answer in answers}) == 1


def test_a_file_that_is_replaced_while_it_is_read(
    engine: LtuEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, and nothing is cached under the hash of the sound that it was."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tiny.clip(1), RATE)
    first = path.read_bytes()
    soundfile.write(path, tiny.clip(2), RATE)
    second = path.read_bytes()
    path.write_bytes(first)
    front_end = engine.processor.front_end
    load_clip = front_end.load_clip

    def replace_and_load(audio, *args):
        path.write_bytes(second)
        return load_clip(audio, *args)

    with monkeypatch.context() as patch:
        patch.setattr(front_end, "load_clip", replace_and_load)
        refused = engine([Request("What?", path)], max_new_tokens=3)[0]
    assert refused.status == "unreadable" and "changed while it was read" in refused.error
    fresh = LtuEngine(engine.model, engine.processor)
    for content in (first, second):
        request = Request("What?", content)
        assert engine.inputs([request])["audio_embeds"].equal(
            fresh.inputs([request])["audio_embeds"]
        )
