"""Tests edge cases of curation: segments of a video, folders, killed runs, refusals, many clips."""

import errno
import fcntl
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from data import (
    combine,
    contamination_check,
    filter_unanswerable,
    remap_paths,
    sample,
    shuffle,
    stats,
)
from data.audio_ids import is_same_segment, segment, youtube
from data.audio_manifest import AudioManifest
from data.copy_clips import CheckedClip, copied_clips
from ltu.data import dataset_io
from ltu.data.dataset_io import ExampleWriter, stream_examples
from tests.machine import check_growth, run_python, start_python

VIDEO = "-_Yabcdefgh"  # 11 characters


def question(audio_id: str, dataset: str = "d") -> dict:
    return {
        "instruction": "q",
        "input": "",
        "audio_id": audio_id,
        "dataset": dataset,
        "task": "t",
        "output": "a",
    }


def write(path: Path, examples: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExampleWriter(path) as output:
        for example in examples:
            output.write(example)
    return path


def provenance(path: Path) -> dict:
    return json.loads(path.with_name(f"{path.name}.provenance.json").read_text())


# Segments of a video.


@pytest.mark.parametrize(
    "one, other, is_same",
    [
        ("Y{}_30.000_40.000.wav", "{}_000030.flac", True),  # AudioCaps, VGGSound
        ("Y{}_30.000_40.000.wav", "{}_30000", True),  # AudioSet-strong: milliseconds
        ("{}_30000_40000", "{}_30-40.wav", True),
        ("{}_1200_1210", "{}_001200", True),
        ("{}_1200_1210", "{}_1.2", False),
        ("{}_30_40", "{}_40_50", False),
        ("{}_30_40", "{}_30_35", False),
        ("Y{}_30_40", "{}", False),
        ("Y{}.flac", "/x/{}.wav", True),
        ("{}_000300", "{}_000030", False),
        ("{}_0_10000", "Y{}_0.000_10.000.wav", True),
        ("{}_0_10000", "{}_000000", True),
        ("{}_0_999", "{}_0_10", False),
    ],
)
def test_segments(one, other, is_same):
    one, other = one.format(VIDEO), other.format(VIDEO)
    assert youtube(one) == youtube(other) == VIDEO
    assert is_same_segment(one, other) == is_same_segment(other, one) == is_same
    assert segment("street.wav") is None


def run_remap_paths(
    tmp_path: Path, examples: list, files: list[str], *folders: str, flags: tuple = ()
) -> tuple[int, list]:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    source = write(tmp_path / "examples.jsonl", examples)
    target = tmp_path / "out.jsonl"
    given = [
        flag for folder in folders for flag in ("--folder", folder.replace("DIR", str(tmp_path)))
    ]
    code = remap_paths.main(
        ["--data_path", str(source), "--output_path", str(target), *given, *flags, "--relative"]
    )
    return code, [example["audio_id"] for example in stream_examples(target)]


@pytest.mark.parametrize(
    "ids, files, wanted",
    [
        (
            ["Y{}_30_40", "Y{}_50_60"],
            ["v/{}_000050.wav", "v/{}_000030.wav"],
            ["v/{}_000030.wav", "v/{}_000050.wav"],
        ),
        (["Y{}_30_40", "Y{}_50_60"], ["v/{}.wav"], ["?", "?"]),  # Either is possible.
        (["Y{}_30_40", "{}_000030"], ["v/{}.wav"], ["v/{}.wav"] * 2),  # One segment.
        (["{}", "Y{}_50_60"], ["v/{}.wav"], ["v/{}.wav", "?"]),
        (["{}"], ["v/{}_30_40.wav", "v/{}_50_60.wav"], ["?"]),
        (["{}", "Y{}_30_40"], ["v/{}_30_40.wav"], ["v/{}_30_40.wav"] * 2),
        (["{}_30_40"], ["v/{}.wav", "w/Y{}_30.0_40.0.flac"], ["w/Y{}_30.0_40.0.flac"]),
        (
            ["Y{}_30.0_40.0.wav"],
            ["v/{}_000030.wav", "w/Y{}_30.0_40.0.wav"],
            ["w/Y{}_30.0_40.0.wav"],
        ),
        (["Y{}_30_40.wav"], ["v/{}_000030.wav", "w/Y{}_30.0_40.0.wav"], ["?"]),
        (
            ["{}.wav"],
            ["v/Y{}.wav", "w/{}.wav"],
            ["?"],  # Without times, a name does not say which part of the video it is.
        ),
    ],
)
def test_segments_of_a_video_never_share_a_file(tmp_path, capsys, ids, files, wanted):
    ids, files, wanted = ([name.format(VIDEO) for name in names] for names in (ids, files, wanted))
    for order in (1, -1):
        code, found = run_remap_paths(
            tmp_path, [question(name) for name in ids[::order]], files, "DIR"
        )
        assert found == [name for name in wanted[::order] if name != "?"]
        assert code == ("?" in wanted)
        assert provenance(tmp_path / "out.jsonl")["ambiguous"] == wanted.count("?")
        assert ("ambiguous: " in capsys.readouterr().out) == ("?" in wanted)


def test_a_segment_without_file_is_missing_also_with_a_table(tmp_path):
    with pytest.raises(ValueError, match="1 of 1 examples have a clip that was not found"):
        run_remap_paths(tmp_path, [question(f"Y{VIDEO}_30_40")], [f"v/{VIDEO}_000050.wav"], "DIR")
    (tmp_path / "v/ids.csv").write_text(f"id,audio_id\n{VIDEO},{VIDEO}_000050.wav\n")
    examples = [question(f"Y{VIDEO}_30_40"), question(f"Y{VIDEO}_50_60")]
    code, found = run_remap_paths(
        tmp_path, examples, [], flags=("--table", str(tmp_path / "v/ids.csv"))
    )
    assert (code, found, provenance(tmp_path / "out.jsonl")["ambiguous"]) == (1, [], 2)


def test_folders_of_datasets_that_share_a_video(tmp_path, capsys):
    files = [f"as/Y{VIDEO}.flac", f"vgg/{VIDEO}.wav"]
    examples = [question(VIDEO, name) for name in ("as_2m", "AudioSet_20k", "vggsound_train")]
    folders = ["audioset=DIR/as", "vggsound=DIR/vgg"]
    assert run_remap_paths(tmp_path, examples, files, *folders) == (
        0,
        [files[0], files[0], files[1]],
    )
    assert run_remap_paths(tmp_path, examples, files, *folders[::-1]) == (
        0,
        [files[0], files[0], files[1]],
    )
    code, found = run_remap_paths(
        tmp_path, [*examples, question(VIDEO, "freesound")], files, *folders
    )
    assert (code, found) == (1, [files[0], files[0], files[1]])
    out = capsys.readouterr().out
    assert f"ambiguous: 1 examples (example 4: {VIDEO} (" in out
    assert all(str(tmp_path / name) in out for name in files)
    assert run_remap_paths(
        tmp_path, [question(VIDEO, "x")], files, *folders, flags=("--drop_missing",)
    ) == (0, [])
    (tmp_path / "none").mkdir()
    # VGGSound has another part of the video than AudioSet.
    with pytest.raises(ValueError, match="not found"):
        run_remap_paths(
            tmp_path, [question(VIDEO, "as_2m")], [], "audioset=DIR/none", "vggsound=DIR/vgg"
        )


# Names that are not ids.

VOX = ["vox/id1/vidA/00001.wav", "vox/id2/vidB/00001.wav"]


@pytest.mark.parametrize(
    "ids, files, wanted",
    [
        (VOX, ["x/id1/vidA/00001.wav"], ["x/id1/vidA/00001.wav", "?"]),
        (
            VOX,
            ["x/id1/vidA/00001.flac", "x/id2/vidB/00001.flac"],
            ["x/id1/vidA/00001.flac", "x/id2/vidB/00001.flac"],
        ),
        (VOX, ["00001.wav"], ["?", "?"]),
        (["1.wav", "1.flac"], ["x/1.wav"], ["x/1.wav"] * 2),
        (["a/train/1.wav", "b/train/1.wav"], ["x/a/train/1.wav"], ["x/a/train/1.wav", "?"]),
        (["/p/train/1.wav", "/q/train/1.wav"], ["x/train/1.wav"], ["x/train/1.wav"] * 2),
        (["id1/1.wav"], ["id10/1.wav", "id1/1.wav", "id1/x/1.wav"], ["id1/1.wav"]),
        (["1.wav"], ["b/1.wav", "c/1.wav"], ["?"]),
        (["far/a.wav"], ["flac/a.flac", "raw/a.wav"], ["raw/a.wav"]),
        (["flac/a.wav"], ["flac/a.flac", "raw/a.wav"], ["flac/a.flac"]),
    ],
)
def test_files_with_the_same_name_are_chosen_by_their_folders(tmp_path, ids, files, wanted):
    for order in (1, -1):
        code, found = run_remap_paths(
            tmp_path, [question(name) for name in ids[::order]], files, "DIR"
        )
        assert found == [name for name in wanted[::order] if name != "?"]
        assert code == ("?" in wanted)
        assert provenance(tmp_path / "out.jsonl")["ambiguous"] == wanted.count("?")


def test_a_folder_of_another_dataset_gives_no_certain_clip(tmp_path, capsys):
    examples = [question("fma/102/102863.wav", "fma"), question("102863.wav", "fsd50k")]
    files = ["fsd/102863.wav"]
    assert run_remap_paths(tmp_path, examples, files, "fsd50k=DIR/fsd") == (1, files)
    assert f"{tmp_path}/fsd/102863.wav, in the folder of another dataset" in capsys.readouterr().out
    files += ["fma/102/102863.wav"]
    for fma in ("DIR/fma", "fma=DIR/fma"):
        assert run_remap_paths(tmp_path, examples, files, "fsd50k=DIR/fsd", fma) == (0, files[::-1])


def test_tables_that_disagree_are_an_error_and_whole_ids_in_a_table_are_certain(tmp_path):
    tables = [tmp_path / "a/ids.csv", tmp_path / "b/ids.csv"]
    for path in tables:
        path.parent.mkdir()
        path.write_text("id,audio_id\n1.wav,1.flac\n")
    flags = [flag for path in (tables[0], *tables) for flag in ("--table", str(path))]
    with pytest.raises(ValueError, match=r"b/ids.csv, line 2: '1.wav' is .*/a/1.flac already"):
        run_remap_paths(tmp_path, [question("1.wav")], ["a/1.flac", "b/1.flac"], flags=tuple(flags))
    tables[1].write_text("id,audio_id\nx/2.wav,1.flac\ny/2.wav,1.flac\n3,1.flac\n")
    ids = ["x/2.wav", "y/2.wav", "z/3.wav"]
    code, found = run_remap_paths(
        tmp_path, [question(name) for name in ids], [], flags=tuple(flags[-2:])
    )
    assert (code, found) == (1, ["b/1.flac"] * 2)


@pytest.mark.parametrize("stem", ["00001", f"{VIDEO}", f"{VIDEO}_%d_%d", "audio/00001"])
def test_time_of_remapping_is_linear(tmp_path, monkeypatch, stem):
    """The time for clips with the same name grows with their number, not with its square."""

    def run(count: int) -> None:
        names = [f"{n}/{stem % (n, n + 1) if '%' in stem else stem}" for n in range(count)]
        walk = []
        for name in names:
            folder, base = os.path.split(name)
            walk.append((f"/disk/{folder}", [], [f"{base}.flac"]))
        monkeypatch.setattr("os.walk", lambda *_, **__: walk)
        locator = remap_paths.ClipLocator([], [], [("", tmp_path)])
        for name in names:
            locator.claim(f"/far/{name}.wav", "d")
        found = [locator.find(f"/far/{name}.wav", "d")[0] for name in names]
        assert found == [None if stem == VIDEO else f"/disk/{name}.flac" for name in names]

    monkeypatch.setattr("os.path.realpath", lambda path: path)
    check_growth(run, 1000)


# Dataset files in another folder than their clips.


def test_audio_root_is_recorded_where_relative_ids_leave_their_folder(tmp_path, capsys):
    source = write(
        tmp_path / "a/examples.jsonl",
        [question("clips/1.wav"), question("empty"), question("2.wav")],
    )
    root = str((tmp_path / "a").resolve())
    near = tmp_path / "a/near.jsonl"
    far = tmp_path / "b/far.jsonl"
    eval_file = write(tmp_path / "e.jsonl", [question("z.wav")])
    commands = {shuffle: [], combine: [], filter_unanswerable: [], sample: ["--clips", "9"]}
    for command, flags in (
        commands | {contamination_check: ["--eval_files", str(eval_file)]}
    ).items():
        for target in (near, far):
            output = "--clean_path" if command is contamination_check else "--output_path"
            assert command.main(["--data_path", str(source), output, str(target), *flags]) == 0
            assert {example["audio_id"] for example in stream_examples(target)} >= {
                "clips/1.wav",
                "2.wav",
            }
            assert provenance(target).get("audio_root") == (root if target is far else None), (
                command
            )
            assert (f"--audio_root {root}\n" in capsys.readouterr().out) == (target is far)
    # The next command copies the audio_root: its output is next to its input, not to the clips.
    shuffle.main(["--data_path", str(far), "--output_path", str(tmp_path / "b/next.jsonl")])
    assert provenance(tmp_path / "b/next.jsonl")["audio_root"] == root
    shuffle.main(["--data_path", str(far), "--output_path", str(near)])
    assert "audio_root" not in provenance(near)
    other = write(tmp_path / "b/other.jsonl", [question("3.wav")])
    combine.main(
        ["--data_path", str(far), str(other), "--output_path", str(tmp_path / "b/all.jsonl")]
    )
    assert provenance(tmp_path / "b/all.jsonl")["audio_root"] == sorted(
        [root, str((tmp_path / "b").resolve())]
    )
    assert "so no --audio_root finds all of them" in capsys.readouterr().out
    absolute = write(tmp_path / "a/absolute.jsonl", [question("/x/1.wav"), question("empty")])
    combine.main(["--data_path", str(absolute), "--output_path", str(far)])
    assert "audio_root" not in provenance(far)
    flags = ["--clips", "9", "--audio_root", str(tmp_path / "b")]
    sample.main(["--data_path", str(source), "--output_path", str(far), *flags])
    assert "audio_root" not in provenance(far)


# Killed runs.

KILLED = """
import os, signal, sys
import ltu.data.dataset_io, data.{command}
rename = ltu.data.dataset_io.sync_and_rename
def killed(unfinished, path):
    rename(unfinished, path)
    os.kill(os.getpid(), signal.SIGKILL)
ltu.data.dataset_io.sync_and_rename = killed
data.{command}.main(sys.argv[1:])
"""


@pytest.mark.parametrize("name", ["shuffle", "combine", "filter_unanswerable"])
def test_no_older_provenance_next_to_a_new_file(tmp_path, name):
    source = write(tmp_path / "a.jsonl", [question("1.wav"), question("2.wav")])
    target = tmp_path / "b.jsonl"
    command = ["--data_path", str(source), "--output_path", str(target)]
    shuffle.main(command)
    write(source, [question("3.wav")])
    found = run_python(["-c", KILLED.format(command=name), *command], tmp_path)
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert [example["audio_id"] for example in stream_examples(target)] == ["3.wav"]
    assert not target.with_name("b.jsonl.provenance.json").exists()


def test_an_error_does_not_change_the_file_and_its_provenance(tmp_path):
    source = write(tmp_path / "a.jsonl", [question("1.wav")])
    target = tmp_path / "b.jsonl"
    command = ["--data_path", str(source), "--output_path", str(target)]
    shuffle.main(command)
    before = provenance(target)
    source.write_text("{")
    with pytest.raises(ValueError, match="example 1"):
        shuffle.main(command)
    assert provenance(target) == before
    assert len(list(stream_examples(target))) == 1


HOLDING = """
import sys
from pathlib import Path
from data.temporary_files import temporary_folder
with temporary_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    Path(folder, "0_00").write_text("0" * 16 + '{"left": 1}\\n')  # As a shuffle stores an example.
    print(folder, flush=True)
    sys.stdin.read()  # Until it is killed, or the test has ended.
"""


@pytest.mark.parametrize("module", [shuffle, combine, stats])
def test_the_next_run_clears_what_a_killed_one_left_and_nothing_else(tmp_path, module):
    source = write(tmp_path / "a.jsonl", [question("1.wav")])
    target = tmp_path / "b.json"
    other = tmp_path / "c.json"
    name = "stats" if module is stats else "shuffle"
    runs = {}
    for path in (target, other):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        runs[path] = start_python(["-c", HOLDING, str(path), name], tmp_path, **pipes)
    folders = {path: Path(run.stdout.readline().strip()) for path, run in runs.items()}
    command = ["--data_path", str(source), "--output_path", str(target)]
    with pytest.raises(ValueError, match="Another run is writing .*b.json"):
        module.main(command)
    assert (folders[target] / "0_00").is_file()
    runs[target].kill()
    runs[target].wait()
    assert (folders[target] / "0_00").is_file()
    assert module.main(command) == 0
    assert not folders[target].exists()
    assert (folders[other] / "0_00").is_file()
    runs[other].kill()
    for run in runs.values():
        run.communicate()  # Waits for its end and closes its pipes.
    if module is not stats:
        assert list(stream_examples(target)) == [question("1.wav")]


@pytest.mark.parametrize("ending", [".json", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("module", [shuffle, combine, filter_unanswerable])
def test_a_run_that_writes_is_not_disturbed(tmp_path, module, ending):
    source = write(tmp_path / "a.jsonl", [question("1.wav")])
    target = tmp_path / f"b{ending}"
    command = ["--data_path", str(source), "--output_path", str(target)]
    examples = [question(f"{n}") for n in range(99)]
    with ExampleWriter(target) as writer:
        for example in examples:
            writer.write(example)
        writer._flush()
        with pytest.raises(ValueError, match=f"Another run is writing .*b{ending}"):
            module.main(command)
        writer.write(examples[0])
    assert list(stream_examples(target)) == [*examples, examples[0]]
    left = target.with_name(f"{target.name}.tmp")
    left.write_text("of a killed run")
    assert module.main(command) == 0
    assert list(stream_examples(target)) == [question("1.wav")]
    assert not left.exists()


def test_a_lock_follows_the_name_and_is_optional(tmp_path, monkeypatch):
    flock, path = fcntl.flock, tmp_path / "examples.jsonl.tmp"

    def finished_meanwhile(file, how):
        """Let the other run rename its file after this one has opened it."""
        monkeypatch.setattr(fcntl, "flock", flock)
        os.replace(path, tmp_path / "examples.jsonl")
        flock(file, how)

    path.write_text(json.dumps(question("1")) + "\n")
    monkeypatch.setattr(fcntl, "flock", finished_meanwhile)
    with ExampleWriter(tmp_path / "examples.jsonl") as output:
        assert len(list(stream_examples(tmp_path / "examples.jsonl"))) == 1
        with pytest.raises(ValueError, match="Another run"):
            ExampleWriter(tmp_path / "examples.jsonl").__enter__()
        output.write(question("2"))
        rename = dataset_io.sync_and_rename
        next_run = lambda *paths: (rename(*paths), path.write_text("of the next run"))  # noqa: E731
        monkeypatch.setattr(dataset_io, "sync_and_rename", next_run)
    assert path.read_text() == "of the next run"
    monkeypatch.setattr(dataset_io, "sync_and_rename", rename)

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    command = [
        "--data_path",
        str(tmp_path / "examples.jsonl"),
        "--output_path",
        str(tmp_path / "b.json"),
    ]
    assert shuffle.main(command) == 0
    assert list(stream_examples(tmp_path / "b.json")) == [question("2")]
    with AudioManifest(tmp_path):
        pass


def test_input_that_changes_between_the_two_readings_is_an_error(tmp_path):
    for later in (1, 3):
        counts = iter([2, later])
        examples = shuffle.shuffle_examples(
            lambda _, p=counts: [{"n": n} for n in range(next(p))], tmp_path / "b", 0, True
        )
        with pytest.raises(ValueError, match="changed while it was read"):
            list(examples)
    assert not os.listdir(tmp_path)


def test_time_of_copying_is_linear(tmp_path, monkeypatch):
    """The time for clips with equal names grows with their number, not with its square."""

    def run(count: int) -> None:
        clips = []
        for number in range(count):
            name = f"{number % 2}/{number // 2}.wav"
            clips.append(CheckedClip(name, tmp_path / name, ()))
        with copied_clips(clips, tmp_path) as new_ids:
            assert len(set(new_ids.values())) == count
            assert sum("_" in new_id for new_id in new_ids.values()) == count // 2

    monkeypatch.setattr("data.copy_clips._copy", lambda *_: None)
    check_growth(run, 4000)


# Answers that were sorted by hand.

REMAINING = """I cannot hear any dog in the clip, only traffic.
I cannot hear speech here, just wind against the microphone.
I cannot detect a human voice; the piece is instrumental.
The engine is loud enough to drown out the voices.
Yes, it is loud enough to require hearing protection.
The crowd is not loud enough for a stadium; it is probably a small club.
Enough time passes between the two knocks for someone to answer the door.
The speaker talks fast but still has enough breath to finish each sentence.
She apologises and says she is sorry for being late.
The singer repeats the word sorry in the chorus.
A recorded voice says "Sorry, the number you have dialed is not in service."
He sounds sorry but determined to leave.
The baby cannot fall asleep because of the noise.
The dog cannot see the visitor but hears the doorbell and barks.
The sound of rain cannot be missed: it lasts for the entire clip.
The alarm cannot be ignored, which is why people start to leave.
No, the two voices cannot belong to the same person: one is a child.
It is impossible to hold a conversation next to such a machine.
It is not possible to talk over this drill without shouting.
It is difficult to hear the guitar because the drums are much louder.
The speech is unclear because of heavy static.
The speech is unclear.
Unclear speech and clinking glasses suggest a crowded restaurant.
The muffled tone makes the announcement unclear to passengers.
The words are not clear, as the speaker mumbles through a mask.
There is no indication of distress; the children laugh throughout.
The recording is calm, with no indication of danger such as sirens.
There is no specific rhythm; the drops fall at random.
The bird sings without additional instruments; only its call is heard.
The laughter gives the remark more context: it was meant as a joke.
He tells the customer that breakfast is not provided on weekends.
The speaker says that no information will be released before Monday.
The caller complains that the manual does not provide the password.
They argue that it is impossible to know the future.
The man shouts 'I cannot tell you that' in an excited voice.
The hissing is not clear evidence of a leak, but the dripping that follows suggests one.
The car does not provide a smooth ride: its engine misfires.
The mood is tense, and the clock is loud enough to be the only evidence of time passing.
The microphone cannot capture the lowest notes of the organ.
I cannot make out a melody, but the beat is steady.
The whistle is clear enough to locate the referee.
The coach tells the team that there is no information about the injury yet.
The voice is unclear and distant, as if through a wall.
It is impossible to mistake this roar for anything but a jet.
A woman says "I'm sorry, I cannot help you" and hangs up.
There is not enough reverberation for a church; this is a small room.
There is no indication of a second speaker.
The man is sorry and his voice trembles.
The brakes squeal, so the train cannot be far from the platform.
The lyrics are not clear because the guitar is distorted."""
DROPPED = """It's unclear.
Unclear.
I'm not sure.
I am not sure
I'm not sure, sorry.
I don't know.
I do not know the answer.
Hard to say.
Unknown.
It's not clear.
Not enough information.
Cannot be determined.
Impossible to tell.
The reason is unclear.
The purpose of the announcement remains unclear.
It is unclear what the person is holding.
It is not clear from the recording where this takes place.
It cannot be determined from the audio clip.
Sorry, but I do not know who speaks.
I'm sorry, I can only work with text.
There is not enough information to tell.
There isn't enough context to say who won.
The speaker's age is not specified.
The location of the event is not provided.
I cannot answer this question based on the sounds alone.
I cannot hear the audio, so I am unable to describe it.
As a language model I cannot listen to recordings.
I cannot provide the name of the singer.
Without more context, the reason for the applause stays open.
Without additional information, any guess about the language would be speculation.
More context is needed to answer that.
It is difficult to determine the breed of the dog.
It is difficult to infer the speaker's intention from so short a clip.
It is impossible to say how many people are in the room.
It is not possible to identify the song from this description.
The clip gives no information about the weather.
No specific information is given about the time of day.
There is no indication of who is driving the car.
The metadata does not provide details on the model of the car.
The sounds do not provide sufficient evidence to conclude anything about the mood.
We can't infer the relationship between the speakers.
Not sure.
I’m not sure.
There isn’t enough detail to tell.
No idea.
That is unclear.
I'm not certain.
The identity of the caller is unclear.
Sorry, I can't help with that.
The language of the speaker cannot be identified.
It is difficult to say without further details.
There is insufficient information to answer; more context would help.
The question cannot be answered.
I cannot tell.
The text has no information on the gender of the speaker."""


@pytest.mark.parametrize("answers, is_dropped", [(REMAINING, False), (DROPPED, True)])
def test_refusals_by_example(answers, is_dropped):
    answers = answers.split("\n")
    assert len(set(answers)) >= 40
    assert [
        answer for answer in answers if filter_unanswerable.is_unanswerable(answer) != is_dropped
    ] == []


def test_whole_answers_are_dropped_by_the_narrow_rule_alone(tmp_path):
    source = write(
        tmp_path / "a.jsonl",
        [question("1.wav") | {"output": text} for text in ("I'm not sure.", "Rain.")],
    )
    filter_unanswerable.main(
        ["--data_path", str(source), "--output_path", str(tmp_path / "b.jsonl")]
    )
    assert [example["output"] for example in stream_examples(tmp_path / "b.jsonl")] == ["Rain."]
    assert provenance(tmp_path / "b.jsonl")["dropped"] == {"original": 0, "refusal": 1}
