"""Predictions files: killed runs, equal questions, ranks, the summary, --check_batch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from ltu.inference import batch_invariance
from ltu.inference.batch_invariance import Step
from ltu.inference.engine import LtuEngine
from ltu.inference.predictions_file import PredictionsFile
from ltu.inference.requests import Request
from ltu.inference_batch import main, parse_args
from ltu.models.processing_ltu import LtuProcessor
from tests.machine import PATIENCE
from tests.tiny import (
    LORA,
    clip,
    start_command,
    start_ranks,
    write_checkpoint,
    write_llm,
    write_rows,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    llm = write_llm(tmp_path_factory.mktemp("llm") / "llm")
    return write_checkpoint(llm.parent / "checkpoint", llm, LORA)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """24 questions: some clips have two, three have no clip, two repeat an earlier one."""
    path = write_rows(tmp_path_factory.mktemp("rows"), 18, without_audio=3)
    made = json.loads(path.read_text())
    made += [made[index] | {"instruction": "And how loud?"} for index in range(3, 7)] + made[4:6]
    path.write_text(json.dumps(made))
    return path


def flags(folder: Path, rows: Path, output: Path, *more: str) -> list[str]:
    common = f"--model {folder} --data_path {rows} --output_path {output} --device cpu "
    common += "--max_new_tokens 12"
    return [*common.split(), "--batch_size", "4", *more]


def check_flags(folder: Path, rows: Path, *more: str) -> list[str]:
    """Return flags of --check_batch, which writes nothing."""
    common = f"--model {folder} --data_path {rows} --device cpu --batch_size 4 --max_new_tokens"
    return [*common.split(), "6", "--check_batch", *more]


def read(path: Path) -> list[dict]:
    """Return what must be equal: everything except wall times."""
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in json.loads(path.read_text())
    ]


def read_counts(capsys) -> list[tuple[int, int]]:
    """Return (from the partial file, generated) of each summary printed since the last call."""
    found = re.findall(r"(\d+) from the partial file; generated (\d+)", capsys.readouterr().out)
    return [(int(stored), int(new)) for stored, new in found]


@pytest.fixture(scope="module")
def reference(folder, rows, tmp_path_factory) -> Path:
    """The whole file of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("reference") / "p.json"
    assert main(flags(folder, rows, output)) == 0
    assert [path.name for path in output.parent.iterdir()] == ["p.json"]
    return output


def partials(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{output.name}.partial*.jsonl"))


def count_lines(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in partials(output))


# --- killed


class Killed(BaseException):
    pass


@pytest.mark.parametrize("decoding", [(), ("--original_decoding",)], ids=["greedy", "sampled"])
def test_killed_at_every_step_on_the_disk(folder, rows, tmp_path, monkeypatch, capsys, decoding):
    """Stopped before and after each sync, renaming and removal, in a run of two outputs; run again.

    The checkpoint is opened once for all runs, and answers are short.
    """
    engine = LtuEngine.from_pretrained(folder, device="cpu")
    monkeypatch.setattr("ltu.inference_batch.open_engine", lambda args: engine)
    made = json.loads(rows.read_text())
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, made[:5])))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, made[-2:])))
    outputs = [tmp_path / "a.json", tmp_path / "b.json"]
    more = ["--audio_root", str(rows.parent), "--max_new_tokens", "3", *decoding]
    command = flags(folder, tmp_path / "a.jsonl", outputs[0], *more)
    for name, path in (("--data_path", tmp_path / "b.jsonl"), ("--output_path", outputs[1])):
        command.insert(command.index(name) + 2, str(path))
    ticks, stop_at = 0, 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == stop_at:
            raise Killed

    def stopping(run):
        def step(*args, **kwargs):
            tick()
            result = run(*args, **kwargs)
            tick()
            return result

        return step

    monkeypatch.setattr(os, "fsync", stopping(lambda file: None))  # There is no disk to wait for.
    for owner, name in ((os, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
    assert main(command) == 0
    expected, last = [read(path) for path in outputs], ticks
    total = sum(new for _, new in read_counts(capsys))
    assert total == 7 and last > 2 * total
    for stop in range(1, last, 1 if not decoding else 7):
        for path in tmp_path.glob("?.json*"):
            if path.suffix != ".jsonl" or "partial" in path.name:
                path.unlink()
        ticks, stop_at = 0, stop
        with pytest.raises(Killed):
            main(command)
        stop_at = 0
        is_finished = all(path.exists() for path in outputs)
        done = sum(count_lines(path) for path in outputs)
        capsys.readouterr()
        assert main(command) == 0
        if not is_finished:
            assert done + sum(new for _, new in read_counts(capsys)) == total
        assert [read(path) for path in outputs] == expected
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"a.json", "b.json", "a.jsonl", "b.jsonl"}


def test_kill_9(folder, rows, tmp_path, reference, capsys):
    """A process that is killed while it writes an answer; started again, and killed again."""
    output, done = tmp_path / "p.json", 0
    words = flags(folder, rows, output, "--batch_size", "2")
    for _ in range(2):
        log = tmp_path / "log"
        process = start_command("ltu.inference_batch", words, log, kill_at=("fsync", 5))
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        assert not output.exists() and done < count_lines(output) < 22
        done = count_lines(output)
    assert main(flags(folder, rows, output)) == 0
    assert read_counts(capsys) == [(pytest.approx(done, abs=2), 22 - done)] and read(
        output
    ) == read(reference)


@pytest.fixture(scope="module")
def unfinished(folder, rows, tmp_path_factory) -> Path:
    """A folder with and_one.json, its one.json and the partial file of all answers.

    The partial file is still there because one clip is missing.
    """
    root = tmp_path_factory.mktemp("unfinished")
    made = json.loads(rows.read_text())
    made.append({"instruction": "Q", "audio_id": "not.there"})
    (root / "and_one.json").write_text(json.dumps(made))
    more = ["--audio_root", str(rows.parent)]
    assert main(flags(folder, root / "and_one.json", root / "one.json", *more)) == 1
    return root


def test_half_a_line_and_strange_lines(folder, rows, tmp_path, unfinished, reference, capsys):
    output = tmp_path / "p.json"
    lines = (unfinished / "one.json.partial.jsonl").read_bytes().splitlines(keepends=True)
    junk = [
        b"null\n",
        b"[]\n",
        b'{"key": 1}\n',
        b"\xff\x00\n",
        lines[3].replace(b'"num_chunks"', b'"unknown"'),
    ]
    partials_path = Path(f"{output}.partial.jsonl")
    partials_path.write_bytes(b"".join([*lines[:3], *junk, *lines[4:7], lines[7][:-20]]))
    assert main(flags(folder, rows, output)) == 0
    assert read_counts(capsys)[-1][1] == 22 - 6 and read(output) == read(reference)


# --- what is the same question


def test_equal_questions_are_answered_once(folder, tmp_path, capsys):
    """By content, not by name; the same name with other content is another clip."""
    for name, seed in (("a.wav", 1), ("copy.wav", 1), ("b.wav", 2)):
        soundfile.write(tmp_path / name, clip(seed), 16_000)
    questions = [
        ("What?", "a.wav"),
        ("What?", "copy.wav"),
        ("What?", "b.wav"),
        ("Why?", "a.wav"),
        ("What?", "empty"),
    ]
    questions += [("What?", "a.wav"), ("What?", "empty")]
    rows = [
        {"instruction": text, "audio_id": name, "output": f"{n}"}
        for n, (text, name) in enumerate(questions)
    ]
    rows[-2]["input"] = "someone speaks"
    rows.append({"instruction": "What?", "audio_id": "gone.wav"})  # Keeps the partial file.
    (tmp_path / "q.json").write_text(json.dumps(rows))
    command = flags(folder, tmp_path / "q.json", tmp_path / "p.json")
    assert main(command) == 1
    first = read(tmp_path / "p.json")
    assert read_counts(capsys) == [(0, 6)]
    assert [row["ref"] for row in first[:7]] == list("0123456")
    assert [row["audio_id"] for row in first] == [name for _, name in questions] + ["gone.wav"]
    assert first[0]["pred"] == first[1]["pred"] and first[4]["pred"] == first[6]["pred"]
    assert len({row["pred"] for row in first[:6]}) == 5
    soundfile.write(tmp_path / "a.wav", clip(3), 16_000)
    soundfile.write(tmp_path / "gone.wav", clip(1), 16_000)
    assert main(command) == 0
    second = read(tmp_path / "p.json")
    assert read_counts(capsys) == [(5, 3)]  # Three of the changed clip; gone.wav is what a.wav was.
    assert second[1:3] == first[1:3] and second[7]["pred"] == first[0]["pred"] != second[0]["pred"]


@pytest.mark.parametrize(
    "change", ["checkpoint", "tokens", "sampling", "seed", "dtype", "num_chunks"]
)
def test_what_changes_answers_is_generated_again(
    folder, rows, tmp_path, unfinished, capsys, change
):
    shutil.copytree(unfinished, tmp_path, dirs_exist_ok=True)
    capsys.readouterr()
    more = ["--audio_root", str(rows.parent), "--max_bad", "1"]
    if change == "checkpoint":
        other = tmp_path / "checkpoint"
        shutil.copytree(folder, other)
        write_checkpoint(other, folder.parent / "llm", LORA, seed=1)
    changes = {"tokens": "--max_new_tokens 9", "sampling": "--temperature 0.5", "seed": "--seed 1"}
    changes |= {
        "dtype": "--dtype bfloat16",
        "num_chunks": "--num_chunks all",
        "checkpoint": f"--model {tmp_path}/checkpoint",
    }
    command = flags(folder, tmp_path / "and_one.json", tmp_path / "one.json", *more)
    assert main([*command, *changes[change].split()]) == 0
    assert read_counts(capsys) == [(0, 23)]


def test_two_runs_at_once(folder, rows, tmp_path):
    """An error, also when only a later rank of the other run is left."""
    output = tmp_path / "p.json"
    for rank in (0, 1):
        other = PredictionsFile(output, rank)
        other.lock()
        with pytest.raises(ValueError, match="Another run is writing .*p.json"):
            main(flags(folder, rows, output))
        other.close()
    assert main(flags(folder, rows, output)) == 0


# --- ranks


def test_two_ranks_equal_one(folder, rows, tmp_path, reference):
    """A rank that is killed fails the run; then one process reads what two left, and two do."""
    output = tmp_path / "p.json"
    words, log = flags(folder, rows, output, "--batch_size", "1"), tmp_path / "log"
    ranks = start_ranks(2, "ltu.inference_batch", words, log, kill_last_at=("fsync", 2))
    for rank in ranks:
        rank.join(PATIENCE)
    assert ranks[0].exitcode == 1 and ranks[1].exitcode == -signal.SIGKILL
    done = count_lines(output)
    assert len(partials(output)) == 2 and not output.exists() and 2 <= done < 22
    copy = tmp_path / "copy" / "p.json"
    copy.parent.mkdir()
    for path in partials(output):
        shutil.copy(path, copy.parent)
    assert main(flags(folder, rows, output)) == 0 and read(output) == read(reference)
    for rank in start_ranks(2, "ltu.inference_batch", flags(folder, rows, copy), log):
        rank.join(PATIENCE)
        assert rank.exitcode == 0, (tmp_path / "log.0").read_text()
    assert f"generated {22 - done}," in (tmp_path / "log.0").read_text()
    assert read(copy) == read(reference) and not partials(copy)


@pytest.mark.slow  # Starts three interpreters.
def test_torchrun(folder, rows, tmp_path, reference):
    """The command of the module's documentation."""
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 -m ltu.inference_batch"
    command = [sys.executable, *launcher.split(), *flags(folder, rows, tmp_path / "p.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "generated 22," in done.stdout and read(tmp_path / "p.json") == read(reference)


def test_each_rank_has_its_gpu(folder, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    command = flags(folder, rows, tmp_path / "p.json")
    assert parse_args(command).device == "cpu"
    assert parse_args([*command, "--device", "cuda"]).device == "cuda:3"


# --- summary and exit code


def test_names_the_clips_that_cannot_be_decoded(folder, tmp_path, capsys):
    sounds = {
        "good.wav": clip(1, 0.5),
        "long.wav": clip(1, 0.8),
        "silent.wav": clip(1) * 0,
        "short.wav": clip(1, 0.02),
    }
    for name, samples in sounds.items():
        soundfile.write(tmp_path / name, samples, 16_000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF and nothing else")
    names = [
        "good.wav",
        "silent.wav",
        "empty",
        "short.wav",
        "broken.wav",
        "nowhere.wav",
        "long.wav",
    ]
    rows = [
        {"instruction": f"Question {index}?", "audio_id": name} for index, name in enumerate(names)
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    command = flags(folder, tmp_path / "q.json", tmp_path / "out" / "p.json")
    assert main([*command, "--max_bad", "3"]) == 1
    assert main([*command, "--max_bad", "4"]) == 0
    entries = json.loads((tmp_path / "out" / "p.json").read_text())
    assert [entry["prompt"] for entry in entries] == [row["instruction"] for row in rows]
    statuses = ["ok", "silent", "ok", "too_short", "unreadable", "missing", "truncated"]
    assert [entry["status"] for entry in entries] == statuses
    assert all(
        (entry["pred"] == "") == (entry["status"] not in ("ok", "truncated")) for entry in entries
    )
    long = entries[-1]
    assert (long["seconds_heard"], long["seconds_total"], long["num_chunks"]) == (0.64, 0.8, 1)
    assert (long["sampling_rate"], long["channels"], long["model"]) == (16_000, 1, "ltu")
    assert long["new_tokens"] > 0 < long["prompt_tokens"] and long["finish_reason"] in (
        "stop",
        "length",
    )
    assert (
        len(long["checkpoint"]) == 64 and long["seconds"] > 0 and entries[2]["seconds_heard"] == 0
    )
    out, errors = capsys.readouterr()
    first, second = out.split(f"{tmp_path / 'out' / 'p.json'}: ")[1:]
    for summary in (first, second):
        assert set(re.split(", ", summary.splitlines()[0])) == {
            "ok 2", "truncated 1", "silent 1", "too_short 1", "unreadable 1", "missing 1",
        }  # fmt: skip
        assert "answered 3 of 7 questions; used 1.1 of 1.3 s of audio" in summary
    assert (
        "0 from the partial file; generated 7," in first
        and "3 from the partial file; generated 4," in second
    )
    assert "nowhere.wav: no such file" in errors and "partial files stay" in errors
    assert not partials(tmp_path / "out" / "p.json")


def test_what_cannot_be_written_is_said_first(folder, rows, tmp_path, capsys):
    for output in (rows, tmp_path):
        with pytest.raises(SystemExit):
            main(flags(folder, rows, output))
        assert "--output_path" in capsys.readouterr().err


# --- --check_batch


def test_check_batch(folder, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = check_flags(folder, rows)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "16 questions" in shown and "batched answers equal" in shown
    assert main([*command, "5", "--dtype", "float16"]) == 0
    shown = capsys.readouterr().out
    assert "5 questions" in shown and "leads by 0.01 or less" in shown
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        main([*command, "--output_path", str(tmp_path / "p.json")])
    assert "--check_batch writes nothing" in capsys.readouterr().err
    stock = LtuProcessor.pad_batch

    def attend_to_padding(*args, **kwargs):
        made = stock(*args, **kwargs)
        return made | {"attention_mask": made["attention_mask"] | 1}

    monkeypatch.setattr(LtuProcessor, "pad_batch", attend_to_padding)
    for dtype in ("float32", "float16"):
        assert main([*command, "5", "--dtype", dtype]) == 1
        assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    "dtype, lead, code", [("float16", 0.009, 0), ("float16", 0.02, 1), ("float32", 0.009, 1)]
)
def test_only_near_ties_below_fp32_may_differ(folder, rows, capsys, monkeypatch, dtype, lead, code):
    """Answers made up here: the second token of every batched one is another."""

    def generate(engine, requests, decoding):
        count = len(requests)
        second = 8 if count == 1 else 9
        return [[Step(7, 5.0, 0.01), Step(second, lead, 0.01), Step(2, 5.0, 0.01)]] * count

    monkeypatch.setattr(batch_invariance, "generate", generate)
    assert main(check_flags(folder, rows, "--dtype", dtype)) == code
    row = capsys.readouterr().out.splitlines()[2].split()
    assert row[:3] == ["1", "2", str(lead)] and ("DIFFERS" if code else "tie,") in row


def test_what_rounding_may_decide(folder, rows):
    """A lead of 0.01; in bf16, which has steps larger than that, four of them."""
    engine = LtuEngine.from_pretrained(folder, device="cpu", dtype="bfloat16")
    engine.model.get_output_embeddings().weight.data.mul_(40)  # Logits in the tens.
    questions = [Request("What?"), Request("Why is it so?")]
    rows = batch_invariance.generate(engine, questions, {"max_new_tokens": 4})
    inputs = engine.inputs(questions)
    top = engine.model(**inputs).logits[:, -1].detach().topk(2).values  # (rows, 2), bfloat16
    for steps, (first, second) in zip(rows, top, strict=True):
        assert steps[0].lead == float(first) - float(second)
        step = float(torch.nextafter(first, torch.tensor(torch.inf, dtype=first.dtype)) - first)
        assert first > 8 and steps[0].near_tie == 4 * step > 0.1
    half = LtuEngine.from_pretrained(folder, device="cpu", dtype="float16")
    for steps in batch_invariance.generate(half, questions, {"max_new_tokens": 4}):
        assert [step.near_tie for step in steps] == pytest.approx([0.01] * len(steps))
