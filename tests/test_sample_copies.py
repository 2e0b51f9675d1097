"""Tests which files `data.sample --copy_audio` copies, and what is left when it refuses."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import copy_clips, sample
from ltu.data.dataset_io import ExampleWriter, stream_examples

TONE = (np.sin(np.arange(8000) / 9) * 9999).astype(np.int16)


@pytest.fixture
def folder(tmp_path):
    """A dataset folder with two clips, next to a folder of another one with secrets."""
    for number, name in enumerate(["set/a.wav", "set/sub/b.wav", "other/c.wav"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, TONE[number:], 16_000)
    (tmp_path / "other" / "key.txt").write_text("secret")
    (tmp_path / "set" / "notes.wav").write_text("secret, and no audio at all\n" * 99)
    os.mkfifo(tmp_path / "set" / "pipe.wav")
    (tmp_path / "set" / "link.wav").symlink_to(tmp_path / "other" / "c.wav")
    (tmp_path / "set" / "elsewhere").symlink_to(tmp_path / "other")
    (tmp_path / "set" / "inside.wav").symlink_to("a.wav")
    (tmp_path / "set" / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "set" / "null.wav").symlink_to("/dev/zero")
    return tmp_path


def run(folder: Path, names: list[str], *more: str) -> list[str]:
    """Sample all clips and copy them; return the new audio_ids."""
    source = folder / "set" / "examples.json"
    with ExampleWriter(source) as output:
        for name in names:
            output.write({"instruction": "q", "audio_id": name, "output": "a"})
    target = folder / "out" / "examples.json"
    command = ["--data_path", str(source), "--output_path", str(target), "--copy_audio", *more]
    assert sample.main([*command, "--clips", "99"]) == 0
    return [example["audio_id"] for example in stream_examples(target)]


def left(folder: Path) -> list[str]:
    output = folder / "out"
    return sorted(str(path.relative_to(output)) for path in output.rglob("*"))


def refusal(folder: Path, names: list[str], *more: str) -> str:
    """Return the message of a refusal, after which there must be no file."""
    with pytest.raises(ValueError) as error:
        run(folder, names, *more)
    assert not [path for path in (folder / "out").rglob("*") if not path.is_dir()]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("/etc/passwd", "outside of"),
        ("../other/c.wav", "outside of"),
        ("sub/../../other/c.wav", "outside of"),
        ("link.wav", "outside of"),
        ("elsewhere/c.wav", "outside of"),
        ("elsewhere/key.txt", "outside of"),
        ("null.wav", "outside of"),
        ("/dev/zero", "outside of"),
        ("/proc/self/environ", "outside of"),
        ("/", "outside of"),
        ("pipe.wav", "not a regular file"),
        ("sub", "not a regular file"),
        (".", "not a regular file"),
        ("notes.wav", "not audio"),
        ("examples.json", "not audio"),
        ("missing.wav", "No such file"),
        ("loop.wav", "links"),
        ("x" * 999_999, "too long"),
        ("a\0.wav", "null"),
        ("\ud800.wav", "surrogates"),
    ],
)
def test_what_must_not_be_shared_is_refused_with_its_example(folder, name, reason):
    message = refusal(folder, ["a.wav", "a.wav", name])
    assert message.startswith(f"{folder}/set/examples.json, example 3, audio_id ")
    assert reason in message
    assert len(message) < 1000


def test_an_absolute_path_outside_is_refused_by_its_target(folder):
    message = refusal(folder, [str(folder / "other" / "c.wav")])
    assert f"'{folder}/other/c.wav' is outside of {folder}/set. Name its folder with" in message


def test_clips_below_the_root_are_copied(folder):
    names = ["a.wav", "sub/b.wav", "inside.wav", f"{folder}/set/sub/../a.wav", "sub/../a.wav"]
    new_ids = run(folder, names)
    for name, new_id in zip(names, new_ids, strict=True):
        assert (folder / "out" / new_id).read_bytes() == (folder / "set" / name).read_bytes()
        assert not (folder / "out" / new_id).is_symlink()


def test_allowed_roots_are_allowed_and_no_more(folder):
    names = [f"{folder}/other/c.wav", "link.wav", "elsewhere/c.wav"]
    empty = folder / "empty"
    empty.mkdir()
    # A root may itself be a link.
    for other in (folder / "other", folder / "set" / "elsewhere"):
        run(folder, names, "--allowed_root", str(empty), "--allowed_root", str(other))
    shutil.rmtree(folder / "out")
    # Still only audio, and only what is below one of the folders, not what begins like one.
    roots = ["--allowed_root", f"{folder}/other"]
    assert "not audio" in refusal(folder, [*names, f"{folder}/other/key.txt"], *roots)
    (folder / "other_one").mkdir()
    shutil.copy(folder / "set" / "a.wav", folder / "other_one" / "a.wav")
    assert "outside of" in refusal(folder, [f"{folder}/other_one/a.wav"], *roots)


def test_the_audio_root_replaces_the_folder_of_the_file(folder):
    assert run(folder, ["c.wav"], "--audio_root", f"{folder}/other") == ["audio/c.wav"]
    shutil.rmtree(folder / "out")
    message = refusal(folder, [f"{folder}/set/a.wav"], "--audio_root", f"{folder}/other")
    assert "outside of" in message


def test_a_root_that_does_not_exist_is_named(folder):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        run(folder, ["a.wav"], "--allowed_root", f"{folder}/nowhere")


def test_allowed_root_needs_copy_audio(folder, capsys):
    command = ["--data_path", "a.json", "--output_path", "b.json", "--clips", "1"]
    with pytest.raises(SystemExit):
        sample.main([*command, "--allowed_root", str(folder)])
    assert "no effect without --copy_audio" in capsys.readouterr().err


def test_equal_names_do_not_overwrite_each_other(folder):
    for number, name in enumerate(["p", "q", "r"]):
        (folder / "set" / name).mkdir()
        soundfile.write(folder / "set" / name / "x.wav", TONE[number * 9 :], 16_000)
    names = ["p/x.wav", "q/x.wav", "r/x.wav"]
    new_ids = run(folder, names)
    assert len(set(new_ids)) == 3
    for name, new_id in zip(names, new_ids, strict=True):
        assert (folder / "out" / new_id).read_bytes() == (folder / "set" / name).read_bytes()


def test_nothing_is_left_when_a_copy_or_the_output_fails(folder, monkeypatch):
    """The disk is full at the second clip; then a clip changes; then the output fails."""
    clips = ["a.wav", "sub/b.wav"]
    real = shutil.copyfileobj

    def copy_half(source, target):
        if source.name.endswith("b.wav"):
            target.write(source.read(100))
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(copy_clips.shutil, "copyfileobj", copy_half)
    with pytest.raises(OSError, match="No space left"):
        run(folder, clips)
    assert left(folder) == ["audio"]
    monkeypatch.undo()

    decode = copy_clips.decode_audio

    def decode_and_change(path):
        decode(path)
        if path.name == "b.wav":
            path.write_text("secret")

    monkeypatch.setattr(copy_clips, "decode_audio", decode_and_change)
    with pytest.raises(ValueError, match="b.wav changed after it was checked"):
        run(folder, clips)
    assert left(folder) == ["audio"]
    monkeypatch.undo()

    (folder / "out" / "examples.json").mkdir()
    with pytest.raises(ValueError, match="examples.json is a folder"):
        run(folder, ["a.wav"])
    assert left(folder) == ["audio", "examples.json"]


def test_files_of_an_earlier_run_stay_when_a_later_one_fails(folder):
    run(folder, ["a.wav"])
    before = left(folder)
    with pytest.raises(ValueError):
        run(folder, ["a.wav", "sub/b.wav", "/etc/passwd"])
    assert left(folder) == before
