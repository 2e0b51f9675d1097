"""Tests unexpected input: metadata of wrong types, odd endpoints, other settings, interrupts."""

import json
import random
import signal
import subprocess
import time
from collections import Counter

import pytest
from llm_server import FakeLlm, completion
from test_qa_generation import LONG, META, ROOT, arguments, good, pairs_of, surroundings  # noqa: F401
from test_qa_generation_costs import read_rejects, write_rows

from qa_generation.generate import main
from qa_generation.llm import (
    GenerationStopped,
    Llm,
    LlmSettings,
    ReplyStore,
    RequestFailed,
    estimate_tokens,
)
from qa_generation.metadata_prompts import FORMS, SOURCES, message
from qa_generation.qa_json import Reject, parse_pairs
from tests.machine import PATIENCE, start_python, wait_until

HELLO = [
    {"role": "user", "content": "hello"}
]  # 9 tokens, and those of the longest reply, are reserved


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
        write_rows(tmp_path / "meta.json", whole, {"audio_id": "b"} | whole | change)
        assert main(given) == 1
    assert f"meta.json, row 1: {complaint}" in seen[0] and not any("row 0" in text for text in seen)
    assert {row["audio_id"] for row in json.loads((tmp_path / "rows.json").read_text())} == {"a"}


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


def test_an_invalid_output_is_reported_first(tmp_path):
    with FakeLlm(good) as server:
        (tmp_path / "folder").mkdir()
        for given in (
            ["--output", str(tmp_path / "folder")],
            ["--prompt", str(tmp_path / "rows.json")],
        ):
            with pytest.raises(ValueError, match="folder|rows.json"):
                main(arguments(tmp_path, server.url, *given))
        assert not server.times


def with_choice(change: dict) -> dict:
    body = completion('{"q": "What is it then?", "a": "It is a dog near the road."}')
    return body | {"choices": [body["choices"][0] | change]}


# A body, and the text, finish_reason, prompt tokens and completion tokens that are stored. None
# means that there is no reply after 3 tries.
PAID = [
    (with_choice({"message": {"content": None}}), ("", "stop", 100, 50)),
    (with_choice({"message": {"content": None, "refusal": "no"}, "finish_reason": None}),
     ("", "stop", 100, 50)),
    (with_choice({"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}, 5]}}),
     ("ab", "stop", 100, 50)),
    (with_choice({"message": {"content": "a"}, "finish_reason": 5}) | {"model": 7},
     ("a", "stop", 100, 50)),
    (with_choice({"message": {"content": "a"}})
     | {"usage": {"prompt_tokens": -9, "completion_tokens": True}}, ("a", "stop", 9, 9)),
    (with_choice({"message": {"content": "hello"}}) | {"usage": [1]}, ("hello", "stop", 9, 9)),
    (with_choice({"message": {"content": "a"}, "finish_reason": "length"}),
     ("a", "length", 100, 50)),
    (completion("") | {"choices": []}, None),
    (completion("") | {"choices": None}, None),
    ({"choices": [{"message": {"content": 5}}]}, None),
    ([], None),
]  # fmt: skip


@pytest.mark.parametrize("body, stored", PAID)
def test_odd_bodies(tmp_path, body, stored):
    with FakeLlm(lambda _: body) as server, ReplyStore(tmp_path / "s") as store:
        reply = Llm(LlmSettings("m", base_url=server.url), store).complete_all([HELLO])[0]
        if stored is None:
            # Each of the tries may have been billed.
            assert isinstance(reply, RequestFailed) and len(server.times) == 3
        else:
            found = (reply.text, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens)
            assert found == stored and len(server.times) == 1


def test_a_truncated_reply_is_never_completed(tmp_path):
    """A content filter truncates as max_tokens does."""
    for reason in ("length", "content_filter"):
        text = '{"q": "What is it then?", "a": "It is a dog near the road"'
        with FakeLlm(lambda _, text=text, reason=reason: completion(text, reason)) as server:
            given = arguments(
                tmp_path,
                server.url,
                "--replies",
                str(tmp_path / reason),
                "--max_attempts",
                "1",
                count=1,
            )
            assert main(given) == 0 and read_rejects(tmp_path) == [("clip0.wav", "cut off")]


def test_an_endless_reply_is_parsed_in_time():
    endless = '{"q": ' * 10**6
    start = time.process_time()
    for text in ("{" * 100_000, endless[:30_000]):
        pairs, rejects = parse_pairs(text)
        assert not pairs and rejects
    assert time.process_time() - start < 20  # less than 1 on a usual machine
    assert parse_pairs(endless) == ([], [Reject("too long", endless)])


@pytest.mark.parametrize("wait", ["1e400", "99999999999999", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_huge_retry_after_is_not_waited_for(tmp_path, wait):
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        server.script = [f"429 {wait}"] * 100
        start = time.monotonic()
        with pytest.raises(GenerationStopped, match="20 requests failed one after the other"):
            prompts = [[{"role": "user", "content": str(i)}] for i in range(60)]
            Llm(LlmSettings("m", base_url=server.url, concurrency=4), store).complete_all(prompts)
        assert time.monotonic() - start < 60 and len(server.times) <= 24


def test_a_page_in_the_place_of_an_endpoint_stops_early(tmp_path, capsys):
    """After three tries of 20 requests with HTML in a 200 the run stops and prints the body."""
    with FakeLlm(good) as server:
        server.script = ["HTML"] * 1000
        assert main(arguments(tmp_path, server.url)) == 1
        assert len(server.times) <= 3 * 28
    assert "no chat completion: '<html>busy'" in capsys.readouterr().err


def test_other_settings_than_those_of_the_stored_replies_are_reported(tmp_path, capsys):
    with FakeLlm(good) as server:
        given = arguments(tmp_path, server.url, count=3)
        assert main(given) == 0 and "none of the" not in capsys.readouterr().err
        assert main([*given, "--timeout", "59", "--concurrency", "2"]) == 0
        assert server.paid.total() == 3
        assert "none of the" not in capsys.readouterr().err
        for count, more in enumerate(
            (["--temperature", "0.5"], ["--model", "n"], ["--count", "7"]), 2
        ):
            assert main([*given, *more]) == 0 and server.paid.total() == 3 * count
            assert f"none of the {3 * count - 3} replies in" in capsys.readouterr().err
        # With the first settings nothing is sent.
        assert main(given) == 0 and server.paid.total() == 12
        provenance = json.loads((tmp_path / "rows.json.provenance.json").read_text())
        # The tokens are those of these examples, not of all stored replies.
        assert provenance["counts"]["prompt_tokens"] == 300


def test_metadata_that_changes_during_the_run(tmp_path):
    def answer(body: dict) -> dict:
        (tmp_path / "meta.json").unlink(missing_ok=True)
        return good(body)

    with FakeLlm(answer) as server:
        assert main(arguments(tmp_path, server.url, count=3)) == 0


RUN = """
import runpy
from asyncio.unix_events import _UnixSelectorEventLoop as Loop
remove = Loop.remove_signal_handler
def removed(loop, number):
    found = remove(loop, number)
    print("ready for the next", flush=True)
    return found
Loop.remove_signal_handler = removed
runpy.run_module("qa_generation.generate", run_name="__main__")
"""


def test_second_ctrl_c_ends_at_once_with_one_line(tmp_path):
    with FakeLlm(good, hold_after=0) as server:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = start_python(["-c", RUN, *arguments(tmp_path, server.url)], tmp_path, **pipes)
        wait_until(lambda: server.held == 8, process)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "ready for the next\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130 and "Traceback" not in errors
        assert "run it again" in errors.lower()
        with ReplyStore(tmp_path / "rows.json.replies.jsonl") as store:
            assert store.lost > 8 * 1024  # Requests in flight may be billed.
        assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "rows.json").exists()


def test_an_invalid_key_is_not_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one\nsk-two")
    with (
        pytest.raises(ValueError, match="OPENAI_API_KEY") as caught,
        ReplyStore(tmp_path / "s") as store,
    ):
        Llm(LlmSettings("m", base_url="http://127.0.0.1:9/v1"), store)
    assert "sk-" not in str(caught.value)


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


@pytest.mark.parametrize(
    "flag", ["--timeout=0", "--timeout=nan", "--count=0", "--max_tokens=0", "--min_words=-1"]
)
def test_flags_that_make_no_sense(tmp_path, flag):
    with pytest.raises(SystemExit):
        main([*arguments(tmp_path, "http://127.0.0.1:9/v1"), flag])


def test_prompts_are_not_estimated_too_low():
    """The estimates are compared with the counts of a real tokenizer (SmolLM2's, one per digit).

    The texts are times of events, English and Chinese.
    """
    events = (
        f"Sound Events: Dog: [{', '.join(f'{i / 3:.1f}s-{i / 3 + 0.2:.1f}s' for i in range(25))}]"
    )
    prompt = (ROOT / "qa_generation/prompts/sounds.txt").read_text()
    for text, tokens in (
        (events, 280),
        (prompt, 245),
        ("下雨了，狗在叫，人们在街上走。" * 10, 230),
    ):
        assert tokens <= estimate_tokens([{"role": "user", "content": text}]) <= 1.5 * tokens + 20
