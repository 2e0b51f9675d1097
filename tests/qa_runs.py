"""Builds the metadata, arguments and replies of test runs of `qa_generation.generate`."""

import json
import random
import re
from pathlib import Path

import pytest
from llm_server import completion

import qa_generation.llm

ROOT = Path(__file__).parent.parent
SPOKEN = {
    "gender": "male",
    "pitch_detail": 130.0,
    "pitch": "low",
    "energy": "high",
    "speed": "slow",
}
META = {
    "temporal": "Sound of Dog (Sharp): [0.0s-1.0s]",
    "text": "the rain has begun again",
    "emotion": "sad",
    "sentiment": -2,
    "age": 31.4,
    "genre": ["Folk", "Pop"],
    "labels": "Singing; Rain",
    **SPOKEN,
}
LONG = "because its pitch rises quickly and then falls again, as it does near a road"
# 9 tokens, and those of the longest reply, are reserved for it.
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def quick_client(monkeypatch):
    """In each test of a module that imports this: short waits, no proxy, no key, no endpoint."""
    monkeypatch.setattr(qa_generation.llm, "LONGEST_WAIT", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def pairs_of(body: dict) -> str:
    """Return three pairs that depend on the request alone."""
    mark = hash_of(body)
    return "\n".join(
        json.dumps({"q": f"What is noted, {mark} {i}?", "a": f"{i} {mark} {LONG}"})
        for i in range(3)
    )


def hash_of(body: dict) -> int:
    return random.Random(json.dumps(body, sort_keys=True)).randrange(10**9)


def good(body: dict) -> dict:
    return completion(pairs_of(body))


def odd(body: dict) -> dict:
    """Return a reply that is paid for, and of which not everything can be used."""
    lines = pairs_of(body).split("\n")
    texts = {
        0: ("", "stop"),
        1: ("I would rather talk about the weather.", "stop"),
        2: ("\n".join(lines)[:-30], "length"),
        3: ('{"q": "no answer"}\n' + lines[0], "stop"),
        4: ("```json\n[" + ",\n".join(lines) + "]\n```", "stop"),
        5: ("\n".join(line.replace('", "a"', '" "a"') for line in lines), "stop"),
    }
    return completion(*texts.get(hash_of(body) % 10, ("\n".join(lines), "stop")))


def write_meta(folder: Path, count: int) -> Path:
    rows = [{"audio_id": f"clip{i}.wav", "caption": f"caption {i}"} | META for i in range(count)]
    return write_json(folder / "meta.json", *rows)


def write_json(path: Path, *rows: dict) -> Path:
    path.write_text("[" + ",\n".join(json.dumps(row) for row in rows) + "]")
    return path


def arguments(
    folder: Path, url: str, *more: str, source: str = "audioset_strong", count: int = 40
) -> list[str]:
    """Return the flags of a run on the metadata of `count` clips, and further flags."""
    given = ["--source", source, "--input", str(write_meta(folder, count))]
    given += ["--output", str(folder / "qa.json")]
    given += ["--model", "m", "--base_url", url, "--timeout", "60", "--concurrency", "8"]
    return given + list(more)


def results(folder: Path) -> list[str]:
    """Return examples, rejects and provenance; the last without folder and port."""
    texts = [
        (folder / f"qa.json{end}").read_text() for end in ("", ".rejects.jsonl", ".provenance.json")
    ]
    return texts[:2] + re.sub(r"/\S*/meta.json|127.0.0.1:\d+", "", texts[2]).splitlines()


def read_rejects(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "qa.json.rejects.jsonl").read_text().splitlines()
    return [(entry["audio_id"], entry["reason"]) for entry in map(json.loads, lines)]
