"""Tests prepare_audio: conversion to 16 kHz FLAC, killed runs, and clip ids from file names."""

import csv
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import prepare_audio
from data.audio_ids import RULES, audio_id_of, key_of, read_ids, read_table, read_wanted
from data.audio_manifest import AudioManifest, ManifestEntry
from data.toy.sound_clips import AUDIO
from data.toy.speech_clips import SPEECH
from ltu.data.audio import AudioError, decode_audio, load_audio
from tests.machine import run_python, start_python, wait_until

RNG = np.random.default_rng(0)


def tone(seconds: float, rate: int, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write real and synthetic clips of several formats, and files that cannot be decoded."""
    folder = tmp_path_factory.mktemp("in")
    (folder / "sub").mkdir()
    shutil.copy(sorted(AUDIO.glob("bell_*.flac"))[0], folder / "bell.flac")
    shutil.copy(sorted(SPEECH.glob("allison_0*.flac"))[0], folder / "sub" / "speech.FLAC")
    stereo = np.stack([tone(1, 44100), 0.1 * RNG.standard_normal(44100)], axis=1)
    soundfile.write(folder / "stereo.wav", stereo, 44100)
    soundfile.write(folder / "lossy.ogg", tone(1, 22050), 22050)
    soundfile.write(folder / "sub" / "float.wav", tone(1, 16000, 1.2), 16000, subtype="FLOAT")
    soundfile.write(folder / "quiet.wav", tone(1, 16000, 2e-4), 16000, subtype="PCM_24")
    soundfile.write(folder / "huge.wav", tone(1, 16000, 30000.0), 16000, subtype="FLOAT")
    soundfile.write(folder / "bell.wav", tone(1, 16000), 16000)  # would be bell.flac too
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "short.wav", tone(0.01, 16000), 16000)
    (folder / "text.mp3").write_text("no sound")
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (folder / "._bell.wav").write_bytes(b"notes of macOS")
    (folder / "LICENSE.txt").write_text("...")
    soundfile.write(os.fsencode(folder) + b"/latin_\xe9.wav", tone(0.1, 16000), 16000)
    (folder / "gone.wav").symlink_to(folder / "not_there.wav")
    (folder / "sub" / "loop").symlink_to(folder)
    return folder


def manifest(output: Path) -> dict[str, dict]:
    return {
        entry["file"]: entry
        for entry in map(json.loads, (output / "manifest.jsonl").read_text().splitlines())
    }


def table(file: Path) -> list[dict]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_folder_is_converted(folder, tmp_path, capsys):
    assert (
        prepare_audio.main(
            ["--input", str(folder), "--output_dir", str(tmp_path / "out"), "--workers", "2"]
        )
        == 1
    )
    entries = manifest(tmp_path / "out")
    status = {file: entry["status"] for file, entry in entries.items()}
    made = [
        "bell.flac",
        "stereo.wav",
        "lossy.ogg",
        "quiet.wav",
        "sub/float.wav",
        "sub/speech.FLAC",
        "latin_\udce9.wav",
    ]
    assert status == dict.fromkeys(made, "ok") | {
        "bell.wav": "clash",
        "silent.wav": "silent",
        "short.wav": "too_short",
    } | {
        "huge.wav": "unreadable",
        "text.mp3": "unreadable",
        "film.mp4": "unreadable",
        "gone.wav": "missing",
    }
    for file, entry in entries.items():
        if entry["status"] != "ok":
            assert file.rsplit("/", 1)[-1] in entry["error"], entry
            continue
        made = tmp_path / "out" / entry["audio_id"]
        info = soundfile.info(made)
        waveform = load_audio(folder / file)
        assert (info.samplerate, info.channels, info.format) == (16000, 1, "FLAC")
        assert info.subtype == f"PCM_{entry['bits']}"
        assert entry["bits"] == (24 if file == "quiet.wav" else 16)
        assert entry["seconds"] == round(len(waveform) / 16000, 3)
        assert entry["bytes"] == made.stat().st_size
        step = 2.0 ** (1 - entry["bits"])
        assert np.abs(load_audio(made) - waveform.clip(-1, 1 - step)).max() <= step / 2 + 1e-9, file
    assert entries["sub/float.wav"]["clipped"] > 0 == entries["bell.flac"]["clipped"]
    assert (entries["stereo.wav"]["sampling_rate"], entries["stereo.wav"]["channels"]) == (44100, 2)
    flacs = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.flac")
    )
    assert [line["audio_id"] for line in table(tmp_path / "out" / "audio_ids.csv")] == flacs
    assert len(flacs) == 7
    assert "latin_%E9.flac" in flacs
    assert not list((tmp_path / "out").rglob("*.tmp"))
    printed = capsys.readouterr()
    assert "1 .txt" in printed.out
    assert "unreadable 3" in printed.out
    assert "silent.wav: every sample" in printed.err


def test_sixteen_bit_in_is_the_same_sixteen_bit_out(tmp_path):
    samples = RNG.integers(-(2**15), 2**15, 16000).astype(np.int16)
    soundfile.write(tmp_path / "in.wav", samples, 16000)
    clip = prepare_audio.convert(tmp_path / "in.wav", tmp_path / "new" / "out.flac")
    assert (soundfile.read(tmp_path / "new" / "out.flac", dtype="int16")[0] == samples).all()
    assert clip.clipped == 0
    assert clip.bits == 16


@pytest.mark.parametrize(
    "line, reason",
    [
        ("5", "it is a int, not an object"),
        ("[1, 2]", "it is a list, not an object"),
        ("null", "it is a NoneType, not an object"),
        ("no JSON", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ('{"half": ', "Expecting value"),
        ("{}", "it has no 'audio_id'"),
        ('{"audio_id": "x.flac"}', "it has no 'file'"),
        ('{"audio_id": 5, "file": "a.wav"}', "'audio_id' is a int"),
        ('{"audio_id": ["a"], "file": "a.wav"}', "'audio_id' is a list"),
        ('{"audio_id": "a", "file": "a.wav", "mine": 1}', "it has an unknown key 'mine'"),
        ('{"audio_id": "a", "file": "a.wav"}', "it is of a clip and has no 'seconds'"),
        ('{"audio_id": "a", "file": "a.wav", "status": 1}', "'status' is a int"),
        ('{"audio_id": "a", "file": "a.wav", "seconds": "1"}', "'seconds' is a str"),
    ],
)
def test_a_foreign_line_is_named(tmp_path, line, reason):
    """The file is not touched, and the lock of the folder is released."""
    with AudioManifest(tmp_path) as manifest:
        manifest.append(ManifestEntry("b.flac", "b.wav", seconds=1.0, clipped=0, bytes=9))
    content = manifest.path.read_text() + line + "\n"
    manifest.path.write_text(content)
    for _ in range(2):
        with pytest.raises(ValueError, match="manifest.jsonl, line 2: .*--output_dir") as error:
            AudioManifest(tmp_path)
        assert reason in str(error.value) and "\n" not in str(error.value)
    assert manifest.path.read_text() == content


def test_a_foreign_manifest_is_one_line_of_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", tone(0.1, 16000), 16000)
    (tmp_path / "out" / "manifest.jsonl").write_text('{"audio_id": ["a"]}\n')
    command = f"-m data.prepare_audio --input {tmp_path}/in --output_dir {tmp_path}/out"
    run = run_python(command.split(), tmp_path)
    assert run.returncode == 1
    (error,) = run.stderr.splitlines()
    assert error.startswith(f"error: {tmp_path}/out/manifest.jsonl, line 1: not a line of")


def test_a_long_clip_is_refused(tmp_path):
    soundfile.write(tmp_path / "in.wav", tone(2, 16000), 16000)
    with pytest.raises(AudioError, match="more than 1.5 s"):
        prepare_audio.convert(tmp_path / "in.wav", tmp_path / "out.flac", max_seconds=1.5)
    assert not list(tmp_path.glob("out*"))


def test_a_second_run_does_only_what_is_new(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a", "b", "c"):
        soundfile.write(source / f"{name}.wav", tone(0.1, 16000), 16000)
    run = ["--input", str(source), "--output_dir", str(output), "--workers", "1"]
    assert prepare_audio.main(run) == 0
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.flac")}
    soundfile.write(source / "b.wav", tone(0.2, 16000), 16000)
    (output / "c.flac").unlink()
    with open(output / "manifest.jsonl", "a") as file:
        file.write('{"audio_id": "half')
    assert prepare_audio.main(run) == 0
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("*.flac")}
    assert after["a.flac"] == before["a.flac"]
    assert after["b.flac"] > before["b.flac"]
    assert len(after) == 3
    assert manifest(output)["b.wav"]["seconds"] == 0.2
    assert len(manifest(output)) == 3


KILLED = """
import os, signal, sys
from data import prepare_audio
from data.audio_manifest import AudioManifest
append = AudioManifest.append
def append_and_die(manifest, entry):
    append(manifest, entry)
    if len(manifest.entries) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
AudioManifest.append = append_and_die
prepare_audio.main(sys.argv[1:])
"""


def test_kill_9_leaves_whole_clips_and_no_process(tmp_path):
    """The parent is killed after the 20th line of its manifest, whatever its workers are doing."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(60):
        soundfile.write(source / f"{number:03d}.wav", 0.1 * RNG.standard_normal(16000), 22050)
    command = ["--workers", "2", "--input", str(source), "--output_dir", str(output)]
    silent = {"start_new_session": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = start_python(["-c", KILLED, *command], tmp_path, **silent)
    assert run.wait() == -signal.SIGKILL
    try:
        wait_until(lambda: not is_alive(run.pid))
    except AssertionError:
        os.killpg(run.pid, signal.SIGKILL)
        pytest.fail("workers are alive after kill -9 of their parent")
    existing = {path.name: path.stat().st_mtime_ns for path in output.glob("*.flac")}
    done = (output / "manifest.jsonl").read_text().count("\n")
    assert done == 20 <= len(existing) <= 20 + 2 * prepare_audio.JOBS_A_WORKER
    assert all(len(load_audio(output / name)) > 11000 for name in existing)
    again = run_python(["-m", "data.prepare_audio", *command], tmp_path)
    assert again.returncode == 0, again.stderr
    assert "20 were done before" in again.stdout
    assert "Warning" not in again.stderr
    assert len(list(output.glob("*.flac"))) == len(manifest(output)) == 60
    assert not list(output.glob("*.tmp"))
    unchanged = sum(
        (output / name).stat().st_mtime_ns == changed for name, changed in existing.items()
    )
    assert unchanged == done


def is_alive(group: int) -> bool:
    """Return whether any process of a process group is alive."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def run_or_die(job: tuple[str, str], *_) -> ManifestEntry:
    """Replace `run_job`; one of the files kills its worker."""
    if job[0] == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    return ManifestEntry(audio_id=job[1], file=job[0])


def test_a_file_that_kills_its_worker_is_reported_and_the_others_are_converted(monkeypatch):
    monkeypatch.setattr(prepare_audio, "run_job", run_or_die)
    # At most four jobs are in the queue when the worker is killed. Each is then run in a process of
    # its own.
    monkeypatch.setattr(prepare_audio, "JOBS_A_WORKER", 2)
    jobs = [(name, f"{name}.flac") for name in ("a", "b", "bad", "c", *map(str, range(30)))]
    entries = list(prepare_audio.run(jobs, 2))
    assert sorted(entry.file for entry in entries) == sorted(job[0] for job in jobs)
    assert [entry.file for entry in entries if entry.status == "crash"] == ["bad"]


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with prepare_audio.AudioManifest(tmp_path), pytest.raises(ValueError, match="Another run"):
        prepare_audio.AudioManifest(tmp_path)
    with prepare_audio.AudioManifest(tmp_path):
        pass


# Names


@pytest.mark.parametrize(
    "name, rule, key",
    [
        ("abcdefghijK.wav", "audioset", "abcdefghijK"),
        ("train/YabcdefghijK.wav", "audioset", "abcdefghijK"),
        ("Yabcdefghij.flac", "audioset", "Yabcdefghij"),  # 11 characters: the Y is the id's
        ("--PJHxphWEs_30.000_40.000.flac", "audioset", "--PJHxphWEs"),
        ("Y--PJHxphWEs_30.000.wav", "audioset", "--PJHxphWEs"),
        ("b0RFKhbpFJA_30000", "audioset", "b0RFKhbpFJA"),  # segment_id of the strong labels
        ("_aaaaaaaaa__30.wav", "audioset", "_aaaaaaaaa_"),
        ("/data/x/LZq4Neh-oWU.flac", "audiocaps", "LZq4Neh-oWU"),
        ("---g-f_I2yQ_000001.mp4", "vggsound", "---g-f_I2yQ"),
        ("too_short.wav", "audioset", None),
        ("FSD50K.dev_audio/64760.wav", "fsd50k", "64760"),
        ("64760_x.wav", "fsd50k", None),
        ("1-100032-A-0.wav", "esc50", "1-100032-A-0"),
        ("100032.wav", "esc50", None),
        ("Distorted AM Radio noise.wav", "clotho", "distorted am radio noise"),
        ("Distorted_AM_Radio  noise.flac", "clotho", "distorted am radio noise"),
        ("01 A pug struggles. to breathe 1_2.wav", "clotho", "01 a pug struggles. to breathe 1 2"),
        ("sub/a.b.wav", None, "sub/a.b"),
    ],
)
def test_keys(name, rule, key):
    assert key_of(name, rule) == key
    if key:
        assert key_of(audio_id_of(name, rule), rule) == key


TABLES = {
    "audioset": (
        "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=22160, num_segs=22160\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
        'YabcdefghiK, 0.000, 10.000, "/m/09x0r"\n',
        {"--PJHxphWEs", "YabcdefghiK"},
    ),
    "vggsound": (
        "---g-f_I2yQ,1,people marching,train\n--0PQM4-hqg,30,waterfall,train\n",
        {"---g-f_I2yQ", "--0PQM4-hqg"},
    ),
    "audiocaps": (
        "audiocap_id,youtube_id,start_time,caption\n91139,r1nicOVtvkQ,130,A woman talks\n",
        {"r1nicOVtvkQ"},
    ),
    "fsd50k": ('fname,labels,mids,split\n64760,"Guitar,Music","/m/0,/m/1",train\n', {"64760"}),
    "clotho": (
        "file_name,caption_1\nDistorted AM Radio noise.wav,A radio\n",
        {"distorted am radio noise"},
    ),
    "esc50": ("filename,fold,target,category\n1-100032-A-0.wav,1,0,dog\n", {"1-100032-A-0"}),
}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_tables_of_the_data_sets_are_read(rule, tmp_path):
    text, keys = TABLES[rule]
    (tmp_path / "t.csv").write_text(text)
    assert set(read_wanted(tmp_path / "t.csv", None, rule)) == keys


def test_strong_labels_are_read(tmp_path):
    (tmp_path / "s.tsv").write_text(
        "segment_id\tstart_time_seconds\tend\tlabel\nb0RFKhbpFJA_30000\t0.0\t1\t/m/03m9d0z\n"
    )
    assert list(read_ids(tmp_path / "s.tsv")) == ["b0RFKhbpFJA_30000"]


def test_naming_and_coverage_of_a_dataset_file(tmp_path, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("YabcdefghijK_30.000.wav", "bbbbbbbbbbb.wav", "ccccccccccc.wav"):
        soundfile.write(source / name, tone(0.1, 16000), 16000)
    (source / "ddddddddddd.wav").write_text("damaged")
    (source / "notes.wav").write_text("")
    ids = [
        "/a/abcdefghijK.flac",
        "x/abcdefghijK_30.flac",
        "bbbbbbbbbbb",
        "ddddddddddd",
        "eeeeeeeeeee",
        "empty",
        None,
    ]
    examples = [
        {"instruction": "?", "input": "", "audio_id": audio_id, "output": "!"} for audio_id in ids
    ]
    (tmp_path / "examples.json").write_text(json.dumps(examples))
    run = [
        "--input",
        str(source),
        "--output_dir",
        str(output),
        "--naming",
        "audioset",
        "--workers",
        "1",
    ]
    run += ["--clip_list", str(tmp_path / "examples.json")]
    assert prepare_audio.main([*run, "--only_listed", "--max_bad", "2"]) == 0
    assert "coverage: 2 of the 4 clips" in capsys.readouterr().out
    coverage = json.loads((output / "audio_ids.csv.provenance.json").read_text())["coverage"]
    missing = {"absent": ["eeeeeeeeeee"], "unreadable": ["ddddddddddd"]}
    assert coverage == {"requested": 4, "prepared": 2, "missing": missing}
    lines = [(line["id"], line["audio_id"]) for line in table(output / "audio_ids.csv")]
    assert lines == [
        (ids[0], "abcdefghijK.flac"),
        (ids[1], "abcdefghijK.flac"),
        (ids[2], "bbbbbbbbbbb.flac"),
    ]
    entries = manifest(output)
    assert entries["notes.wav"]["status"] == "name"
    assert "not a name of audioset" in entries["notes.wav"]["error"]
    # Without --only_listed, another file is converted; two files fail.
    assert prepare_audio.main([*run, "--max_bad", "1"]) == 1
    assert len(table(output / "audio_ids.csv")) == 4
    assert decode_audio(output / "ccccccccccc.flac").sampling_rate == 16000


def test_table_of_two_columns(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("one.wav", "two.wav", "three.wav"):
        soundfile.write(source / name, tone(0.1, 16000), 16000)
    (tmp_path / "t.tsv").write_text("file\taudio_id\none.wav\tset/first.wav\ntwo.wav\tset/second\n")
    run = [
        "--input",
        str(source),
        "--output_dir",
        str(output),
        "--table",
        str(tmp_path / "t.tsv"),
        "--workers",
        "1",
    ]
    assert prepare_audio.main(run) == 1
    assert sorted(path.name for path in (output / "set").iterdir()) == ["first.flac", "second.flac"]
    assert "not in --table" in manifest(output)["three.wav"]["error"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.wav,../../x\n", "is outside of"),
        ("a.wav,/x\n", "is outside of"),
        ("a.wav\n", "line 1: 1 cells"),
        ("a.wav,x\na.wav,y\n", "twice"),
    ],
)
def test_bad_tables_stop(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "t.csv")


def test_ids_of_another_dataset_stop(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="none of its 2 ids is a name of esc50"):
        read_wanted(tmp_path / "t.csv", None, "esc50")
    with pytest.raises(ValueError, match="no column 'c'"):
        read_wanted(tmp_path / "t.csv", "c", "esc50")


def test_bad_arguments_stop(tmp_path, capsys):
    base = ["--input", str(tmp_path), "--output_dir"]
    for bad in (
        [str(tmp_path)],
        [f"{tmp_path}/o", "--only_listed"],
        [f"{tmp_path}/o", "--workers", "0"],
    ):
        with pytest.raises(SystemExit):
            prepare_audio.main([*base, *bad])
        assert bad[-1] in capsys.readouterr().err or bad == [str(tmp_path)]
    assert prepare_audio.main([*base, f"{tmp_path}/o", "--dry_run"]) == 0
    assert not (tmp_path / "o").exists()


def test_a_folder_without_audio_is_an_error(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "notes.pdf").touch()
    run = ["--input", str(source), "--output_dir", str(tmp_path / "o")]
    with pytest.raises(ValueError, match="in has no audio file to convert. Check --input"):
        prepare_audio.main(run)
    # A list that names none of the files is the same mistake.
    soundfile.write(source / "a.wav", tone(0.1, 16000), 16000)
    (tmp_path / "list.csv").write_text("id\nb\n")
    listed = ["--clip_list", str(tmp_path / "list.csv"), "--only_listed"]
    with pytest.raises(ValueError, match="no audio file to convert"):
        prepare_audio.main([*run, *listed])
    assert not (tmp_path / "o").exists()
