"""Tests `qa_generation.generate`: failing servers, kill -9, budgets, repeated clips, outputs."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from llm_server import FAULTS, QUICK_FAULTS, FakeLlm, completion

from qa_generation.generate import main
from qa_generation.llm import ReplyStore
from qa_generation.metadata_prompts import SOURCES
from tests.machine import PATIENCE, start_python, wait_until
from tests.qa_runs import (  # noqa: F401
    LONG,
    META,
    ROOT,
    arguments,
    good,
    odd,
    pairs_of,
    quick_client,
    read_rejects,
    results,
    write_json,
)


@pytest.mark.parametrize("seed", range(2))
def test_faults_of_every_kind(tmp_path, seed, capsys):
    """The bytes are those of a server without faults.

    Every request is paid once, and a second run sends nothing.
    """
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    calm.mkdir(), rough.mkdir()
    with FakeLlm(odd) as server:
        assert main(arguments(calm, server.url)) == 0
    with FakeLlm(odd, fault_fraction=0.5, seed=seed) as server:
        server.script = list(FAULTS) if seed == 0 else []
        assert main(arguments(rough, server.url)) == 0
        assert seed or set(server.faults) == set(FAULTS)
        assert server.most_at_once <= 8
        # 2: the second `sample` of a useless reply
        assert max(server.paid.values()) <= 2 and len(server.paid) == 40
        paid = server.paid.total()
        assert main(arguments(rough, server.url)) == 0
        assert server.paid.total() == paid
    assert results(calm) == results(rough)
    counts = json.loads((rough / "qa.json.provenance.json").read_text())["counts"]
    assert (
        counts["clips"] == 40
        and counts["examples"] == len(json.loads((rough / "qa.json").read_text())) > 60
    )
    rejects = [
        json.loads(line) for line in (rough / "qa.json.rejects.jsonl").read_text().splitlines()
    ]
    assert {"empty reply", "no question and answer", "cut off"} <= {
        reject["reason"] for reject in rejects
    }
    assert sum(counts["dropped"].values()) == len(rejects)


def test_a_time_out_is_tried_again(tmp_path):
    """The bytes are those of a server that always answers in time."""
    calm, late = tmp_path / "calm", tmp_path / "late"
    calm.mkdir(), late.mkdir()
    with FakeLlm(odd) as server:
        assert main(arguments(calm, server.url, count=3)) == 0
    with FakeLlm(odd) as server:
        server.script = ["time-out"] * 2
        assert main(arguments(late, server.url, "--timeout", "0.5", count=3)) == 0
        assert server.faults == {"time-out": 2}
    assert results(calm) == results(late)


def test_kill_9_and_resume(tmp_path):
    """Replies that are on the disk are not requested again.

    The examples are those of a run that was not killed.
    """
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    rng = random.Random(5)
    with FakeLlm(good, delay=0.05) as server:
        given, store = arguments(one, server.url, count=90), one / "qa.json.replies.jsonl"
        for _ in range(2):
            goal = server.paid.total() + rng.randrange(10, 25)
            command = ["-m", "qa_generation.generate", *given]
            process = start_python(command, tmp_path, stderr=subprocess.DEVNULL)
            wait_until(lambda goal=goal: server.paid.total() >= goal, process)
            process.kill()
            process.wait()
            wait_until(lambda: not server.at_once)
            stored = {
                json.loads(line)["key"]
                for line in store.read_bytes().split(b"\n")[:-1]
                if b'"reply"' in line
            }
            # Only requests in flight may be lost.
            assert server.paid.total() - len(stored) <= 2 * 8
        before = server.paid.total()
        assert main(given) == 0
        assert server.paid.total() - before == 90 - len(stored)
        assert len(server.paid) == 90 and server.paid.total() <= 90 + 2 * 8
    with FakeLlm(good) as server:
        assert main(arguments(other, server.url, count=90)) == 0
    assert (one / "qa.json").read_bytes() == (other / "qa.json").read_bytes()


def test_kill_9_leaves_sent_tries_in_the_accounts(tmp_path, capsys):
    """The run is killed when 8 replies are stored and 8 further tries are in flight."""
    with FakeLlm(good, hold_after=8) as server:
        given = arguments(tmp_path, server.url)
        command = ["-m", "qa_generation.generate", *given]
        process = start_python(command, tmp_path, stderr=subprocess.DEVNULL)
        wait_until(lambda: server.held == 8, process)
        process.kill(), process.wait()
        with ReplyStore(tmp_path / "qa.json.replies.jsonl") as store:
            stored = len(store.offsets)
            unanswered = store.unanswered_tokens
        assert stored == 8
        assert 1200 < unanswered / 8 < 1800  # about 420 of the prompt, 1024 of the reply
        server.release()
        assert main([*given, "--token_budget", "900000"]) == 0
        assert (
            f"tokens: 6000 spent, {unanswered} reserved for tries without a reply"
            in capsys.readouterr().out
        )


def test_budget_stops_and_resumes(tmp_path, capsys):
    with FakeLlm(good) as server:
        assert main(arguments(tmp_path, server.url, "--token_budget", "5000")) == 1
        assert 0 < server.paid.total() * 150 <= 5000
        assert "token budget" in capsys.readouterr().err
        some = json.loads((tmp_path / "qa.json").read_text())
        assert len(some) == 3 * server.paid.total()
        assert main(arguments(tmp_path, server.url, "--token_budget", "50000")) == 0
        assert (
            server.paid.total() == 40 and len(json.loads((tmp_path / "qa.json").read_text())) == 120
        )


@pytest.mark.parametrize("seed", range(2))
def test_no_budget_is_exceeded_whatever_is_billed(tmp_path, seed):
    """The faults are random. This server bills each try whose outcome the client cannot know.

    Replies to all 100 clips cost 15,000 tokens: more than any of the budgets, whatever fails.
    """
    billed = ("time-out", "drop", "half a body", "not JSON", "HTML", "no choices")
    with FakeLlm(good, fault_fraction=0.5, seed=seed, faults=(*QUICK_FAULTS, "time-out")) as server:
        for budget in (5000, 9000, 14000):
            limits = ["--timeout", "0.3", "--token_budget", str(budget)]
            assert main(arguments(tmp_path, server.url, *limits, count=100)) == 1
            cost = server.paid.total() * 150 + sum(server.faults[name] for name in billed) * 1300
            with ReplyStore(tmp_path / "qa.json.replies.jsonl") as store:
                assert 0 < cost <= store.tokens + store.unanswered_tokens <= budget


def test_ctrl_c_completes_requests_in_flight(tmp_path, capsys):
    def answer(body: dict) -> dict:
        if server.paid.total() == 12:  # By now the run handles the signal.
            os.kill(os.getpid(), signal.SIGINT)
        return good(body)

    with FakeLlm(answer, delay=0.1) as server:
        assert main(arguments(tmp_path, server.url)) == 1
        assert "stopped: SIGINT" in capsys.readouterr().err
        stored = (tmp_path / "qa.json.replies.jsonl").read_bytes().count(b'"reply"')
        assert 0 < server.paid.total() == stored < 40


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
        with ReplyStore(tmp_path / "qa.json.replies.jsonl") as store:
            assert store.unanswered_tokens > 8 * 1024  # Requests in flight may be billed.
        assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "qa.json").exists()


@pytest.mark.parametrize("fault", ["401", "quota"])
def test_refused_key_stops_and_is_written_nowhere(tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    with FakeLlm(good) as server:
        server.script = ["400", *[fault] * 40]
        assert (
            main(arguments(tmp_path, server.url, "--key_from", "MY_KEY", "--concurrency", "1")) == 1
        )
        # 400 concerns only its clip.
        assert len(server.headers) == 2 and "Bearer sk-secret-123" in server.headers[0]
    printed = capsys.readouterr()
    assert "[key]" in printed.err and "sk-secret" not in printed.err + printed.out
    assert not [path for path in tmp_path.iterdir() if b"sk-secret" in path.read_bytes()]


def test_403_concerns_one_clip_where_others_were_answered(tmp_path, capsys):
    with FakeLlm(good) as server:
        server.script = ["403"] * 9
        given = arguments(tmp_path, server.url, "--concurrency", "1", count=6)
        # No request was answered, so 403 concerns all.
        assert main(given) == 1 and len(server.times) == 1
        assert "stopped: 403" in capsys.readouterr().err and not (tmp_path / "qa.json").exists()
        server.script = ["", "403", "", "403"]
        assert (
            main(given) == 1 and len(server.times) == 7 and "stopped" not in capsys.readouterr().err
        )
        assert len(json.loads((tmp_path / "qa.json").read_text())) == 4 * 3
        assert main(given) == 0 and server.paid.total() == 6  # The next run sends them again.


def test_a_page_in_the_place_of_an_endpoint_stops_early(tmp_path, capsys):
    """After three tries of 20 requests with HTML in a 200 the run stops and prints the body."""
    with FakeLlm(good) as server:
        server.script = ["HTML"] * 1000
        assert main(arguments(tmp_path, server.url)) == 1
        assert len(server.times) <= 3 * 28
    assert "no chat completion: '<html>busy'" in capsys.readouterr().err


def test_a_run_on_a_full_disk_stops_and_resumes(tmp_path):
    """With files of 20 kB at most, the stored replies stay and the reason is printed.

    The next run sends only the remaining requests.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

    with FakeLlm(good) as server:
        given = arguments(tmp_path, server.url, "--concurrency", "4", count=60)
        command = [sys.executable, "-B", "-m", "qa_generation.generate", *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
        store = tmp_path / "qa.json.replies.jsonl"
        assert done.returncode == 1 and f"stopped: {store}: File too large" in done.stderr, (
            done.stderr
        )
        assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.tmp"))
        stored = store.read_bytes()
        paid = server.paid.total()
        assert stored.endswith(b"\n") and len(stored) <= 20000
        answered = [entry for entry in map(json.loads, stored.splitlines()) if "reply" in entry]
        assert paid - 4 <= len(answered) <= paid < 60
        assert main(given) == 0 and server.paid.total() - paid == 60 - len(answered)
        assert store.read_bytes().startswith(stored)
        assert len(json.loads((tmp_path / "qa.json").read_text())) == 180


def test_dry_run_sends_nothing(tmp_path, capsys):
    with FakeLlm(good) as server:
        dry = arguments(tmp_path, server.url, "--dry_run", "--price", "1", "2", source="joint_v2")
        assert main(dry) == 0
        assert "40 clips: 80 requests" in capsys.readouterr().out
        assert not server.headers and [path.name for path in tmp_path.iterdir()] == ["meta.json"]
        assert main([flag for flag in dry if flag != "--dry_run"]) == 0
        capsys.readouterr()
        assert main(dry) == 0
        assert "0 requests to send, 80 replies already stored" in capsys.readouterr().out


ENDS = ("", ".rejects.jsonl", ".provenance.json")


def files(folder: Path) -> list[bytes]:
    return [(folder / f"qa.json{end}").read_bytes() for end in ENDS]


@pytest.mark.parametrize(
    "source, script, more, message",
    [
        ("audioset_strong", ["401"] * 3, ["--model", "typo"], "no clip has a reply"),
        ("audioset_strong", [], ["--model", "n", "--token_budget", "500"], "no clip has a reply"),
        # Three failures are too few to stop the run.
        ("audioset_strong", ["400"] * 3, ["--model", "typo"], "no clip has a reply"),
        ("fma", [], [], "no genre"),
        # A paragraph alone makes no example.
        ("joint_v2", ["", "401"], ["--concurrency", "1"], "no clip has a reply"),
    ],
)
def test_a_run_without_replies_leaves_the_examples(tmp_path, capsys, source, script, more, message):
    with FakeLlm(good) as server:
        assert main(arguments(tmp_path, server.url, count=3)) == 0
        before = files(tmp_path)
        given = arguments(tmp_path, server.url, *more, source=source, count=3)
        if source == "fma":
            (tmp_path / "meta.json").write_text(
                json.dumps([{"audio_id": "a"} | META | {"genre": None}])
            )
        server.script = script
        assert main(given) == 1
        printed = capsys.readouterr()
        assert message in printed.err and f"{tmp_path / 'qa.json'} is as it was" in printed.err
        assert files(tmp_path) == before and not list(tmp_path.glob("*.tmp"))
        assert "tokens: " in printed.out  # The cost is printed all the same.
        (tmp_path / "meta.json").write_text("[]")
        # Without metadata the dataset file is empty.
        assert main(given) == 0 and (tmp_path / "qa.json").read_text() == "[\n]\n"


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_from_metadata_to_examples(tmp_path, source, capsys):
    bodies = []

    def answer(body: dict) -> dict:
        bodies.append(body)
        is_for_paragraph = "paragraph" in body["messages"][0]["content"]
        return completion(
            f"Somebody sings in the rain, {LONG}." if is_for_paragraph else pairs_of(body)
        )

    with FakeLlm(answer) as server:
        assert main(arguments(tmp_path, server.url, source=source, count=2)) == 0
    assert not [body for body in bodies if "$" in body["messages"][0]["content"]]
    examples = json.loads((tmp_path / "qa.json").read_text())
    assert [list(example) for example in examples] == [
        ["instruction", "input", "audio_id", "dataset", "task", "output"]
    ] * len(examples)
    assert {example["task"] for example in examples} - {"joint audio and speech summarization"} == {
        "open-ended question"
    }
    assert len(examples) == (8 if source == "joint_v2" else 6)
    if source == "joint_v2":
        assert examples[0]["output"].startswith("Somebody sings") and len(bodies) == 4
        # The order of the clips is not fixed, because two clips are in flight at once.
        later = [
            body["messages"] for body in bodies if "paragraph" not in body["messages"][0]["content"]
        ]
        assert len(later) == 2 and all(
            examples[0]["output"] in messages[1]["content"] for messages in later
        )
        bodies = [body for body in bodies if body["messages"] in later]
    assert str(SOURCES[source].count) in bodies[-1]["messages"][0]["content"]


def same_and_own(body: dict) -> dict:
    """Return two pairs that every reply has, and one that depends on the request."""
    if "paragraph" in body["messages"][0]["content"]:
        return completion(f"Somebody sings in the rain, {LONG}.")
    same = [
        {"q": f"What is noted in place {i}?", "a": f"Number {i} is noted there {LONG}"}
        for i in range(2)
    ]
    return completion("\n".join([*map(json.dumps, same), pairs_of(body).split("\n")[0]]))


def test_a_repeated_clip(tmp_path, capsys):
    """The same facts are used once. Other facts give only pairs that the clip does not have."""
    first = {"audio_id": "a", "caption": "rain"} | META
    other = {"audio_id": "b", "caption": "rain"} | META
    meta = write_json(
        tmp_path / "m.json",
        first,
        other,
        first,
        first | {"caption": "wind"},
        first | {"dataset": "other"},
    )
    with FakeLlm(same_and_own) as server:
        given = arguments(tmp_path, server.url, "--input", str(meta))
        assert main(given) == 0
        # The bodies of a and b are equal, but they are two clips.
        assert server.paid.total() == 3 and len(server.paid) == 2
        examples = json.loads((tmp_path / "qa.json").read_text())
        assert [example["audio_id"] for example in examples] == ["a"] * 4 + ["b"] * 3
        assert len({(example["audio_id"], example["instruction"]) for example in examples}) == 7
        assert read_rejects(tmp_path) == [("a", "duplicate")] * 2
        counts = json.loads((tmp_path / "qa.json.provenance.json").read_text())["counts"]
        assert counts["clips"] == 2
        assert counts["repeated_metadata_rows"] == 2
        assert counts["dropped"] == {"duplicate": 2}
        assert main([*given, "--disable_filters", "duplicate"]) == 0 and server.paid.total() == 3
        assert len(json.loads((tmp_path / "qa.json").read_text())) == 9


def test_a_clip_of_another_source(tmp_path):
    """joint_v2 after joint_v1: the pairs of the first are duplicates in the second."""
    with FakeLlm(same_and_own) as server:
        assert main(arguments(tmp_path, server.url, source="joint_v1", count=2)) == 0
        earlier = (tmp_path / "qa.json").rename(tmp_path / "v1.json")
        given = arguments(
            tmp_path, server.url, "--previous_files", str(earlier), source="joint_v2", count=3
        )
        assert main(given) == 0
        examples = json.loads((tmp_path / "qa.json").read_text())
        assert [example["audio_id"] for example in examples] == [
            f"clip{i}.wav" for i in (0, 0, 1, 1, 2, 2, 2, 2)
        ]
        assert read_rejects(tmp_path) == [(f"clip{i}.wav", "duplicate") for i in (0, 0, 1, 1)]
        assert list(
            json.loads((tmp_path / "qa.json.provenance.json").read_text())["previous_files_sha256"]
        ) == [str(earlier)]


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
        provenance = json.loads((tmp_path / "qa.json.provenance.json").read_text())
        # The tokens are those of these examples, not of all stored replies.
        assert provenance["counts"]["prompt_tokens"] == 300


def test_bad_metadata_is_named_and_counted(tmp_path, capsys):
    with FakeLlm(good) as server:
        given = arguments(
            tmp_path, server.url, "--output", str(tmp_path / "qa.jsonl"), source="fma", count=3
        )
        rows = json.loads((tmp_path / "meta.json").read_text())
        del rows[1]["genre"]
        (tmp_path / "meta.json").write_text("\n".join(json.dumps(row) for row in rows))
        assert main(given) == 1
        assert "row 1: no genre" in capsys.readouterr().err
        assert main([*given, "--max_bad", "1"]) == 0 and server.paid.total() == 2
        lines = (tmp_path / "qa.jsonl").read_text().splitlines()
        assert [json.loads(line)["audio_id"] for line in lines] == ["clip0.wav"] * 3 + [
            "clip2.wav"
        ] * 3
        (tmp_path / "meta.json").write_text('[{"audio_id": ]')
        with pytest.raises(ValueError, match="line 1, column 15"):
            main(given)


def test_metadata_that_changes_during_the_run(tmp_path):
    def answer(body: dict) -> dict:
        (tmp_path / "meta.json").unlink(missing_ok=True)
        return good(body)

    with FakeLlm(answer) as server:
        assert main(arguments(tmp_path, server.url, count=3)) == 0


def test_an_invalid_output_is_reported_first(tmp_path):
    with FakeLlm(good) as server:
        (tmp_path / "folder").mkdir()
        for given in (
            ["--output", str(tmp_path / "folder")],
            ["--prompt", str(tmp_path / "qa.json")],
        ):
            with pytest.raises(ValueError, match="folder|qa.json"):
                main(arguments(tmp_path, server.url, *given))
        assert not server.times


@pytest.mark.parametrize("name", ["qa.parquet", "qa.ndjson", "qa.jsonl.gz", "qa"])
def test_an_output_of_another_form_is_refused(tmp_path, name):
    with FakeLlm(good) as server, pytest.raises(ValueError, match=rf"{name}.*\.jsonl?"):
        main(arguments(tmp_path, server.url, "--output", str(tmp_path / name), count=1))
    assert not server.times and [path.name for path in tmp_path.iterdir()] == ["meta.json"]


@pytest.mark.parametrize(
    "flag", ["--timeout=0", "--timeout=nan", "--count=0", "--max_tokens=0", "--min_words=-1"]
)
def test_flags_that_make_no_sense(tmp_path, flag):
    with pytest.raises(SystemExit):
        main([*arguments(tmp_path, "http://127.0.0.1:9/v1"), flag])
