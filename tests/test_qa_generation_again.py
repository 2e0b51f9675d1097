"""Tests runs without any reply, and endpoints that delay or forbid requests."""

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from llm_server import FakeLlm
from test_qa_generation import META, arguments, good, surroundings  # noqa: F401

import qa_generation.llm
from qa_generation.generate import main
from qa_generation.llm import Llm, LlmSettings, ReplyStore
from qa_generation.metadata import read_metadata, read_pairs
from qa_generation.metadata_prompts import SOURCES

ENDS = ("", ".rejects.jsonl", ".provenance.json")


def files(folder: Path) -> list[bytes]:
    return [(folder / f"rows.json{end}").read_bytes() for end in ENDS]


@pytest.mark.parametrize(
    "source, script, more, message",
    [
        ("audioset_strong", ["401"] * 3, ["--model", "typo"], "no clip was answered"),
        ("audioset_strong", [], ["--model", "n", "--token_budget", "500"], "no clip was answered"),
        # Three failures are too few to stop the run.
        ("audioset_strong", ["400"] * 3, ["--model", "typo"], "no clip was answered"),
        ("fma", [], [], "no genre"),
        # A paragraph alone makes no example.
        ("joint_v2", ["", "401"], ["--concurrency", "1"], "no clip was answered"),
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
        assert message in printed.err and f"{tmp_path / 'rows.json'} is as it was" in printed.err
        assert files(tmp_path) == before and not list(tmp_path.glob("*.tmp"))
        assert "tokens: " in printed.out  # The cost is printed all the same.
        (tmp_path / "meta.json").write_text("[]")
        # Without metadata the dataset file is empty.
        assert main(given) == 0 and (tmp_path / "rows.json").read_text() == "[\n]\n"


@pytest.mark.parametrize("wait", ["0", "-5", "Mon, 01 Jan 2024 00:00:00 GMT", "nan"])
def test_a_retry_after_of_zero_is_ignored(tmp_path, monkeypatch, wait):
    monkeypatch.setattr(qa_generation.llm, "LONGEST_WAIT", 0.2)
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        server.script = [f"429 {wait}"] * 2
        reply = Llm(LlmSettings("m", base_url=server.url), store).complete_all(
            [[{"role": "user", "content": "a"}]]
        )[0]
        assert (
            reply.text and min(later - earlier for earlier, later in pairwise(server.times)) >= 0.1
        )


def test_403_concerns_one_clip_where_others_were_answered(tmp_path, capsys):
    with FakeLlm(good) as server:
        server.script = ["403"] * 9
        given = arguments(tmp_path, server.url, "--concurrency", "1", count=6)
        # No request was answered, so 403 concerns all.
        assert main(given) == 1 and len(server.times) == 1
        assert "stopped: 403" in capsys.readouterr().err and not (tmp_path / "rows.json").exists()
        server.script = ["", "403", "", "403"]
        assert (
            main(given) == 1 and len(server.times) == 7 and "stopped" not in capsys.readouterr().err
        )
        assert len(json.loads((tmp_path / "rows.json").read_text())) == 4 * 3
        assert main(given) == 0 and server.paid.total() == 6  # The next run sends them again.


@pytest.mark.parametrize("name", ["rows.parquet", "rows.ndjson", "rows.jsonl.gz", "rows"])
def test_an_output_of_another_form_is_refused(tmp_path, name):
    with FakeLlm(good) as server, pytest.raises(ValueError, match=rf"{name}.*\.jsonl?"):
        main(arguments(tmp_path, server.url, "--output", str(tmp_path / name), count=1))
    assert not server.times and [path.name for path in tmp_path.iterdir()] == ["meta.json"]


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
    clips, bad, _ = read_metadata(path, SOURCES["fma"], "x")
    assert list(clips) == ["a"] and bad == [f"{path}, row 1: no audio_id"]
