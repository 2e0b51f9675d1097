"""Tests costs and stored replies: repeated clips, the budget, lost tries, full disks."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from llm_server import QUICK_FAULTS, FakeLlm, completion
from test_qa_generation import LONG, META, ROOT, arguments, good, pairs_of, surroundings  # noqa: F401

from qa_generation.generate import main
from qa_generation.llm import (
    GenerationStopped,
    Llm,
    LlmSettings,
    ReplyStore,
    RequestFailed,
    estimate_tokens,
)
from tests.machine import start_python, wait_until

HELLO = [
    {"role": "user", "content": "hello"}
]  # 9 tokens, and those of the longest reply, are reserved
REPLY = {"text": "é", "usage": {"prompt_tokens": 1, "completion_tokens": 2}}


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("[" + ",\n".join(json.dumps(row) for row in rows) + "]")
    return path


def read_rejects(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "rows.json.rejects.jsonl").read_text().splitlines()
    return [(entry["audio_id"], entry["reason"]) for entry in map(json.loads, lines)]


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
    meta = write_rows(
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
        assert server.paid.total() == 3 and len({row for row in server.paid}) == 2
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert [row["audio_id"] for row in rows] == ["a"] * 4 + ["b"] * 3
        assert len({(row["audio_id"], row["instruction"]) for row in rows}) == 7
        assert read_rejects(tmp_path) == [("a", "duplicate")] * 2
        counts = json.loads((tmp_path / "rows.json.provenance.json").read_text())["counts"]
        assert (
            counts["clips"],
            counts["metadata rows that repeat one"],
            counts["dropped: duplicate"],
        ) == (2, 2, 2)
        assert main([*given, "--keep", "duplicate"]) == 0 and server.paid.total() == 3
        assert len(json.loads((tmp_path / "rows.json").read_text())) == 9


def test_a_clip_of_another_source(tmp_path):
    """joint_v2 after joint_v1: the pairs of the first are duplicates in the second."""
    with FakeLlm(same_and_own) as server:
        assert main(arguments(tmp_path, server.url, source="joint_v1", count=2)) == 0
        earlier = (tmp_path / "rows.json").rename(tmp_path / "v1.json")
        given = arguments(
            tmp_path, server.url, "--against", str(earlier), source="joint_v2", count=3
        )
        assert main(given) == 0
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert [row["audio_id"] for row in rows] == [
            f"clip{i}.wav" for i in (0, 0, 1, 1, 2, 2, 2, 2)
        ]
        assert read_rejects(tmp_path) == [(f"clip{i}.wav", "duplicate") for i in (0, 0, 1, 1)]
        assert list(
            json.loads((tmp_path / "rows.json.provenance.json").read_text())["against_sha256"]
        ) == [str(earlier)]


@pytest.mark.parametrize(
    "extra, tokens",
    [
        ({}, 1024),
        ({"max_tokens": 50}, 50),
        ({"max_tokens": None, "max_completion_tokens": 4000}, 4000),
        ({"max_completion_tokens": 70}, 1024),
    ],
)
def test_the_maximum_cost_of_a_request_is_reserved(tmp_path, extra, tokens):
    need = estimate_tokens(HELLO) + tokens
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        with pytest.raises(GenerationStopped, match="token budget"):
            Llm(
                LlmSettings("m", base_url=server.url, extra=extra, token_budget=need - 1), store
            ).complete_all([HELLO])
        assert not server.times
        settings = LlmSettings("m", base_url=server.url, extra=extra, token_budget=need)
        assert Llm(settings, store).complete_all([HELLO])[0].text
        assert (store.tokens, store.lost) == (150, 0)


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 2},
        {"stream": True},
        {"messages": []},
        {"model": "x"},
        {"max_tokens": "9"},
        {"max_tokens": 0},
    ],
)
def test_extra_that_would_break_the_accounts(extra):
    with pytest.raises(ValueError, match=next(iter(extra))):
        LlmSettings("m", extra=extra)


def test_a_budget_needs_a_longest_reply():
    with pytest.raises(ValueError, match="max_completion_tokens"):
        LlmSettings("m", extra={"max_tokens": None}, token_budget=5000)


@pytest.mark.parametrize(
    "fault, tries", [("time-out", 4), ("drop", 4), ("half a body", 4), ("504", 4), ("HTML", 3)]
)
def test_lost_tries_count_as_reserved(tmp_path, capsys, fault, tries):
    """Four tries of 991 + 9 tokens fit the budget.

    After they are lost, no fifth is sent, in this run or the next.
    """
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        server.script = [fault] * 20
        limits = {"timeout": 0.3, "token_budget": 4000 if tries == 4 else 3999}
        settings = LlmSettings("m", base_url=server.url, max_tokens=991, concurrency=2, **limits)
        for _ in range(2):
            with pytest.raises(
                GenerationStopped, match=f"{1000 * tries} reserved for tries without a reply"
            ):
                Llm(settings, store).complete_all([HELLO, [{"role": "user", "content": "other"}]])
        assert len(server.times) == tries and (store.tokens, store.lost) == (0, 1000 * tries)
    with ReplyStore(tmp_path / "s") as store:
        assert store.lost == 1000 * tries


@pytest.mark.parametrize("fault", ["429", "500", "503", "error in a 200"])
def test_tries_that_nobody_bills_cost_nothing(tmp_path, fault):
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        server.script = [fault] * 5
        settings = LlmSettings("m", base_url=server.url, max_tokens=991, token_budget=1000)
        assert Llm(settings, store).complete_all([HELLO])[0].text
        assert (store.tokens, store.lost) == (150, 0)
        gone = LlmSettings("m", base_url="http://127.0.0.1:9/v1", tries=2)
        assert isinstance(
            Llm(gone, store).complete_all([[{"role": "user", "content": "x"}]])[0], RequestFailed
        )
        assert store.lost == 0  # No endpoint was there to bill it.


@pytest.mark.parametrize("seed", range(2))
def test_no_budget_is_exceeded_whatever_is_billed(tmp_path, seed):
    """The faults are random. This server bills each try whose outcome the client cannot know.

    Replies to all 100 clips cost 15,000 tokens: more than any of the budgets, whatever fails.
    """
    billed = ("time-out", "drop", "half a body", "not JSON", "HTML", "no choices")
    with FakeLlm(good, fault_share=0.5, seed=seed, faults=(*QUICK_FAULTS, "time-out")) as server:
        for budget in (5000, 9000, 14000):
            limits = ["--timeout", "0.3", "--token_budget", str(budget)]
            assert main(arguments(tmp_path, server.url, *limits, count=100)) == 1
            cost = server.paid.total() * 150 + sum(server.faults[name] for name in billed) * 1300
            with ReplyStore(tmp_path / "rows.json.replies.jsonl") as store:
                assert 0 < cost <= store.tokens + store.lost <= budget


def test_local_model_uses_max_new_tokens(tmp_path):
    from tiny import write_llm

    write_llm(tmp_path / "llm")
    with ReplyStore(tmp_path / "s") as store:
        settings = {
            "is_local": True,
            "extra": {"max_new_tokens": 3},
            "token_budget": estimate_tokens(HELLO) + 3,
        }
        assert (
            Llm(LlmSettings(str(tmp_path / "llm"), **settings), store)
            .complete_all([HELLO])[0]
            .completion_tokens
            < 4
        )


def test_kill_9_leaves_sent_tries_in_the_accounts(tmp_path, capsys):
    """The run is killed when 8 replies are stored and 8 further tries are in flight."""
    with FakeLlm(good, hold_after=8) as server:
        given = arguments(tmp_path, server.url)
        command = ["-m", "qa_generation.generate", *given]
        process = start_python(command, tmp_path, stderr=subprocess.DEVNULL)
        wait_until(lambda: server.held == 8, process)
        process.kill(), process.wait()
        with ReplyStore(tmp_path / "rows.json.replies.jsonl") as store:
            stored = len(store.offsets)
            lost = store.lost
        assert stored == 8 and 1200 < lost / 8 < 1800  # about 420 of the prompt, 1024 of the reply
        server.release()
        assert main([*given, "--token_budget", "900000"]) == 0
        assert (
            f"tokens: 6000 spent, {lost} reserved for tries without a reply"
            in capsys.readouterr().out
        )


class FullDisk:
    """A file that takes `room` more bytes, the last write in part, and then none."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def refuse(self, *_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(self, data) -> int:
        if not self.room:
            self.refuse()
        count = self.file.write(bytes(data)[: self.room])
        self.room -= count
        return count


def test_store_on_a_full_disk(tmp_path):
    """Half a line is removed; replies before and after it stay at their offsets."""
    path = tmp_path / "s"
    with ReplyStore(path) as store:
        store.put("aa", REPLY)
        whole = path.read_bytes()
        real, store.file = store.file, FullDisk(store.file, 20)
        with pytest.raises(OSError, match=f"{path}.*No space left|No space left.*{path}"):
            store.put("bb", REPLY)
        assert store.get("bb") is None and store.get("aa") == REPLY and path.read_bytes() == whole
        # If half a line cannot be cut off now, it is cut off before the next line.
        store.file.room = 20
        store.file.truncate = store.file.refuse
        with pytest.raises(OSError):
            store.put("bb", REPLY)
        store.file = real
        store.put("cc", REPLY | {"text": "later"})
        assert store.get("cc")["text"] == "later" and store.get("aa") == REPLY and store.tokens == 6
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 2
    with ReplyStore(path) as store:
        assert len(store.offsets) == 2 and store.get("cc")["text"] == "later"
        os.truncate(path, len(whole) + 9)
        with pytest.raises(ValueError, match=f"byte {len(whole)}: a reply is gone"):
            store.get("cc")


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
        store = tmp_path / "rows.json.replies.jsonl"
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
        assert len(json.loads((tmp_path / "rows.json").read_text())) == 180
