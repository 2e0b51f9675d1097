"""Tests that commands print on any terminal, end when nobody reads, and write their files as UTF-8.

All of it is done by `ltu.files.run_command`, through which every command must go.
"""

import ast
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltu import ask
from ltu.files import replace_file, run_command, sync_and_rename
from ltu.inference.predictions_file import PredictionsFile
from tests import tiny
from tests.machine import ROOT, start_python

FOLDERS = ("ltu", "ltu_as", "eval", "data", "qa_generation", "train_scripts", "benchmarks")
# It prints nothing of its own, and ends with the status of the ranks that it starts. Importing ltu
# would take it seconds.
OTHERS = {"train_scripts/torchrun.py"}
TEXT = "Straße, 音 and 🐕"
PRINTING = "from ltu.files import run_command\nrun_command(lambda: {action})"
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def python_files() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def main_block(file: Path) -> list[ast.stmt] | None:
    """Return the statements that a module runs as a command, None if it is no command."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            return node.body
    return None


def test_every_command_goes_through_run_command():
    commands = {}
    for file in python_files():
        block = main_block(file)
        if block is not None:
            commands[file.relative_to(ROOT).as_posix()] = block
    assert len(commands) > 45
    assert {Path(name).parts[0] for name in commands} == set(FOLDERS)
    for name, block in commands.items():
        if name not in OTHERS:
            assert len(block) == 1, name
            assert ast.unparse(block[0]).startswith("run_command("), name


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8", "ascii:strict"])
def test_letters_that_a_terminal_does_not_have_are_escaped(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    action = f"(print({TEXT!r}), print({TEXT!r}, file=__import__('sys').stderr), 3)[-1]"
    process = start_python(["-c", PRINTING.format(action=action)], tmp_path, **PIPES)
    expected = TEXT.encode(encoding.partition(":")[0], "backslashreplace")
    assert [text.strip() for text in process.communicate()] == [expected, expected]
    assert process.returncode == 3


def test_an_error_names_a_file_whatever_its_name(tmp_path, monkeypatch):
    """A name need not be UTF-8; Python reads its bytes as surrogates, which no terminal has."""
    path = os.fsencode(tmp_path) + b"/stra\xdfe \xe9\x9f\xb3.json"
    words = ["-m", "data.stats", "--data_path", path, "--output_path", tmp_path / "stats.json"]
    process = start_python(words, tmp_path, **PIPES)
    output, error = process.communicate()
    assert process.returncode == 1 and not output
    assert error.startswith(b"error: ") and error.count(b"\n") == 1
    assert b"stra\\udcdfe \xe9\x9f\xb3.json" in error


def run_closed(folder: Path, action: str, *flags: str, **settings: object) -> tuple[int, bytes]:
    """Run an action whose stdout is a pipe that nobody reads; return its status and stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [*flags, "-c", PRINTING.format(action=action)]
    pipes = {"stdout": writing, "stderr": subprocess.PIPE} | settings
    process = start_python(words, folder, **pipes)
    os.close(writing)
    error = process.communicate()[1]
    return process.returncode, error


LINE = "print('a line')"
LINES = "print('a line' * 100_000)"
HELP = "__import__('argparse').ArgumentParser().parse_args(['--help'])"
FAILURE = "(print('a line'), 1)[-1]"


@pytest.mark.parametrize(
    "action, flags",
    [(LINE, []), (LINES, []), (HELP, []), (FAILURE, []), (LINE, ["-u"]), (LINES, ["-u"])],
)
def test_a_closed_pipe_ends_a_command_without_a_word(tmp_path, monkeypatch, action, flags):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert run_closed(tmp_path, action, *flags) == (141, b"")


def test_another_broken_pipe_is_an_error(tmp_path):
    action = "(_ for _ in ()).throw(BrokenPipeError(32, 'to a worker'))"
    process = start_python(["-c", PRINTING.format(action=action)], tmp_path, **PIPES)
    assert process.communicate() == (b"", b"error: [Errno 32] to a worker\n")
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_output_that_does_not_fit_on_the_disk_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with open("/dev/full", "wb") as full:
        status, error = run_closed(tmp_path, LINE, stdout=full)
    assert (status, error) == (1, b"error: [Errno 28] No space left on device\n")


def test_a_command_without_stdout_runs(monkeypatch):
    """`>&-` closes stdout; then Python's `sys.stdout` is None."""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: print("a line"))
    assert end.value.code is None


def test_the_status_of_a_command_is_its_exit_status():
    for status in (None, 0, 1, 2, "a message"):

        def leave(status: object = status) -> None:
            sys.exit(status)

        for command in (lambda status=status: status, leave):
            with pytest.raises(SystemExit) as end:
                run_command(command)
            assert end.value.code == status


def test_an_answer_is_printed_in_ascii(tmp_path, monkeypatch):
    folder = tiny.write_checkpoint(tmp_path / "model", tiny.write_llm(tmp_path / "llm"), tiny.LORA)
    flags = ["none", "What is it?", "--model", str(folder or tmp_path / "model")]
    flags += ["--device", "cpu", "--max_new_tokens", "12"]
    texts = {}
    for encoding in ("utf-8", "ascii"):
        output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as end:
            run_command(lambda: ask.main(flags))
        assert end.value.code == 0
        texts[encoding] = output.buffer.getvalue()
    # The tiny model generates bytes that are no letters.
    assert "\ufffd" in texts["utf-8"].decode()
    assert texts["ascii"] == texts["utf-8"].decode().encode("ascii", "backslashreplace")


def text_call_without_encoding(call: ast.Call) -> bool:
    """Return whether a call reads or writes text in the encoding of the terminal."""
    named = {keyword.arg for keyword in call.keywords}
    if not isinstance(call.func, ast.Attribute) or "encoding" in named:
        return False
    if call.func.attr == "read_text":
        return not call.args
    if call.func.attr == "write_text":  # The first argument may be a path of our own functions.
        return len(call.args) == 1
    is_os = ast.unparse(call.func.value) == "os"
    has_mode = bool(call.args) and isinstance(call.args[0], ast.Constant)
    return call.func.attr == "open" and not is_os and has_mode and "b" not in call.args[0].value


# One reads numbers of the kernel, the other opens a lock.
WITHOUT_TEXT = {"benchmarks/serve_load.py": 1, "ltu/inference/predictions_file.py": 1}


def test_text_files_are_utf8_whatever_the_terminal():
    found = {}
    for file in python_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and text_call_without_encoding(node):
                found.setdefault(file.relative_to(ROOT).as_posix(), []).append(node.lineno)
    assert {name: len(lines) for name, lines in found.items()} == WITHOUT_TEXT, found


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe", "link to a device"])
def test_an_output_replaces_files_only(tmp_path, kind):
    """As root, `--output_path /dev/null` would make a file of the device."""
    path = tmp_path / "out.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to(os.devnull)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    before = path.lstat()
    (tmp_path / "other").write_text("x")
    for attempt in (
        lambda: replace_file(path, b"x"),
        lambda: sync_and_rename(tmp_path / "other", path),
        PredictionsFile(path).lock,
    ):
        with pytest.raises(ValueError, match="which no file replaces. Choose another path"):
            attempt()
    assert os.path.samestat(path.lstat(), before)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"out.json", "other", "pipe"}


def test_an_output_replaces_a_file_and_a_broken_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("old")
    for name in ("file", "link", "new"):
        replace_file(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"
