"""Tests metadata: the message of each source, wrong types, files that are no JSON, streaming."""

import json
import random
import tracemalloc
from collections import Counter

import pytest
from llm_server import FakeLlm, completion

from qa_generation.generate import main
from qa_generation.metadata import read_metadata, read_pairs
from qa_generation.metadata_prompts import FORMS, SOURCES, message, pitch_rank
from tests.qa_runs import (  # noqa: F401
    LONG,
    META,
    arguments,
    good,
    pairs_of,
    quick_client,
    write_json,
)


def test_sources(tmp_path):
    row = {"audio_id": "a"} | META
    texts = {name: message(source, row) for name, source in SOURCES.items()}
    assert texts["audioset_strong"] == "Sound Events: Sound of Dog (Sharp): [0.0s-1.0s]"
    events = [
        {"label": "Dog", "description": "sharp", "onset": 0, "offset": 1.2},
        {"label": "Car", "onset": 0, "offset": 9},
        {"label": "Dog", "description": "sharp", "onset": 2, "offset": 3},
    ]
    assert message(SOURCES["audioset_strong"], {"events": events, "caption": "A dog."}) == (
        "Sound Events: Dog (sharp): [0.0s-1.2s, 2.0s-3.0s]; Car: [0.0s-9.0s]; Description: A dog."
    )
    assert texts["mosei"] == (
        'Spoken words: "the rain has begun again"; Gender: male; '
        "Fundamental frequency: 130 Hz, low among all speakers, "
        "medium (120-135 Hz) among male speakers; Volume: high; Speed: slow; Emotion: sad; "
        "Sentiment: -2 (negative); Estimated age: 31 years"
    )
    of_closed_qa = {name: value for name, value in row.items() if name != "pitch_detail"} | {
        "pitch": 130.0
    }
    assert message(SOURCES["mosei"], of_closed_qa) == texts["mosei"].replace(
        "low among all speakers, ", ""
    )
    assert texts["fma"] == "Genre: Folk, Pop" and 'singing of "the rain' in texts["joint_v1"]
    assert [source.count for source in SOURCES.values()] == [10, 20, 20, 20, 10, 5, 10, 10]
    with pytest.raises(ValueError, match="no genre"):
        message(SOURCES["fma"], {"audio_id": "a"})
    for wrong in (
        {"gender": "boy"},
        {"pitch_detail": float("nan")},
        {"pitch_detail": "high"},
        {"sentiment": 4},
    ):
        with pytest.raises(ValueError, match="gender 'boy'|pitch|sentiment 4"):
            message(SOURCES["libritts"], row | wrong)


def test_pitch_ranks_by_gender():
    """The last bound is that of the gender; the original has ">240 Hz" for both."""
    assert [pitch_rank(hertz, "male") for hertz in (94.9, 95, 120, 135, 180)] == [
        "very low (<95 Hz)",
        "relatively low (95-120 Hz)",
        "medium (120-135 Hz)",
        "relatively high (135-180 Hz)",
        "very high (>180 Hz)",
    ]
    assert pitch_rank(300, "female") == "very high (>270 Hz)"


NOT_TEXT = [
    ("audioset_strong", {"caption": 5}, "caption: 5 is not text"),
    ("audioset_strong", {"caption": ["rain", 5]}, "caption"),
    ("audioset_strong", {"temporal": 5}, "temporal: 5"),
    (
        "audioset_strong",
        {"temporal": None, "events": [{"label": "Dog", "onset": "0", "offset": 1}]},
        "events: onset",
    ),
    (
        "audioset_strong",
        {"temporal": None, "events": [{"label": 7, "onset": 0, "offset": 1}]},
        "events: label: 7",
    ),
    ("audioset_strong", {"temporal": None, "events": ["Dog"]}, "events"),
    ("audioset_strong", {"input": 5}, "input: 5"),
    ("audioset_strong", {"input": {"a": 1}}, "input"),
    ("audioset_strong", {"text": ["a"]}, "text"),
    ("audioset_strong", {"dataset": 5}, "dataset: 5"),
    ("audioset_strong", {"caption": "\ud83d"}, "caption: '\\ud83d' has half a"),
    ("fma", {"genre": [1]}, "genre"),
    ("fma", {"mood": {"sad": 1}}, "mood"),
    ("mosei", {"energy": ["high"]}, "energy"),
    ("mosei", {"emotion": 3}, "emotion: 3"),
    ("mosei", {"age": "31"}, "age: '31' is not a number"),
    ("mosei", {"age": float("nan")}, "age"),
    ("mosei", {"sentiment": True}, "sentiment"),
    ("mosei", {"text": "   "}, "no text"),
    ("mosei", {"gender": 1}, "gender"),
    ("joint_v1", {"labels": ["Rain", None]}, "labels"),
    ("joint_v2", {"text": 5}, "text: 5"),
]


@pytest.mark.parametrize("source, change, complaint", NOT_TEXT)
def test_wrong_types_are_named_before_anything_is_sent(tmp_path, capsys, source, change, complaint):
    seen = []

    def answer(body: dict) -> dict:
        seen.append(capsys.readouterr().err)
        return completion(f"Somebody sings in the rain, {LONG}.\n{pairs_of(body)}")

    with FakeLlm(answer) as server:
        given = arguments(tmp_path, server.url, source=source)
        whole = {"audio_id": "a", "caption": "rain"} | META
        write_json(tmp_path / "meta.json", whole, {"audio_id": "b"} | whole | change)
        assert main(given) == 1
    assert f"meta.json, row 1: {complaint}" in seen[0] and not any("row 0" in text for text in seen)
    assert {example["audio_id"] for example in json.loads((tmp_path / "qa.json").read_text())} == {
        "a"
    }


def test_metadata_of_any_kind_is_a_message_or_named():
    rng, whole = random.Random(0), {"audio_id": "a", "caption": "rain"} | META
    event = {"label": "D", "onset": 0, "offset": 1}
    values = (
        None,
        "",
        [],
        {},
        "x",
        " ;",
        5,
        -1,
        1e300,
        float("nan"),
        10**400,
        True,
        ["a"],
        ["a", 1],
        [None],
        [""],
    )
    values += ([{}], [event], [event | {"description": 5}], "female", "\ud83d", [[["a"]]])
    outcomes = Counter()
    for _ in range(3000):
        row = whole | {
            name: rng.choice(values) for name in rng.sample([*FORMS], rng.randrange(1, 5))
        }
        for source in SOURCES.values():
            try:
                outcomes["text"] += bool(message(source, row).encode())
            except ValueError as error:  # Any other error would end a run with a traceback.
                outcomes["named"] += bool(str(error))
    assert min(outcomes.values()) > 5000


def test_fields_of_other_sources_may_be_anything():
    row = {"audio_id": "a", "caption": []} | META | {"age": "old", "genre": 5, "emotion": None}
    assert (
        message(SOURCES["audioset_strong"], row)
        == "Sound Events: Sound of Dog (Sharp): [0.0s-1.0s]"
    )


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe[", b"[" * 100_000, b'{"audio_id": "a"}\n{"audio_id"'],
    ids=["UTF-16", "deep", "half"],
)
def test_metadata_that_is_no_json(tmp_path, text):
    with FakeLlm(good) as server:
        given = arguments(tmp_path, server.url)
        (tmp_path / "meta.json").write_bytes(text)
        with pytest.raises(ValueError, match="meta.json"):
            main(given)


def test_json_lines_are_streamed(tmp_path):
    """One clip and 5,000 examples of 1 kB after blank lines; then a line that is no example."""
    path = tmp_path / "v1.jsonl"
    line = json.dumps({"audio_id": "b", "instruction": "Why is it so?", "output": "x" * 1000})
    own = json.dumps({"audio_id": "a", "instruction": "What barks?", "output": "A dog."})
    path.write_text("\n \n" + f"{line}\n" * 5_000 + own)
    tracemalloc.start()
    try:
        assert read_pairs([path], {"a": []}) == {"a": {"q what barks", "a a dog"}}
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
    path.write_text(f"\n\n{own}\n{own[:-9]}")
    with pytest.raises(ValueError, match=r"v1.jsonl, line 4, column \d+"):
        read_pairs([path], {})
    path.write_text("\ufeff\n\n[\n" + json.dumps({"audio_id": "a"} | META) + ",\n5]")
    metadata = read_metadata(path, SOURCES["fma"], "x")
    assert list(metadata.clips) == ["a"] and metadata.errors == [f"{path}, row 1: no audio_id"]
