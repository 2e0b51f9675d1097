"""Tests folders of features, and their extraction by one or more processes."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.numpy import save

from ltu import files
from ltu.data.audio import Waveform
from ltu.files import FileRecord
from ltu_as import extract_whisper_feature
from ltu_as.feature_store import (
    ClipState,
    FeatureError,
    FeatureStore,
    StaleFeatures,
    original_name,
)
from tests.machine import PATIENCE
from tests.tiny import start_command
from tests.whisper_tiny import save_whisper

SHAPE = [4, 25, 64]
DESCRIPTION = {
    "whisper_model": "tiny.pt",
    "fingerprint": "ab" * 32,
    "feature_precision": "fp32",
    "shape": SHAPE,
}


def features(
    seed: int = 0, shape: list[int] = SHAPE, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.create(tmp_path / "store", DESCRIPTION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [SHAPE, [1, 1, 3]])
def test_read_is_what_was_written(tmp_path: Path, dtype: torch.dtype, shape: list[int]) -> None:
    store = FeatureStore.create(tmp_path, DESCRIPTION | {"shape": shape})
    content = features(shape=shape, dtype=dtype)
    content.view(-1)[:3] = torch.tensor([0.0, -1e-7, 6e4])
    store.write("a/ö clip.wav", content, "He said “no”.", 1.5)
    stored = store.read("a/ö clip.wav")
    assert torch.equal(stored.features, content) and stored.features.dtype == dtype
    assert (stored.transcript, stored.seconds) == ("He said “no”.", 1.5)
    assert store.has("a/ö clip.wav", with_transcript=True)
    # The same stem in another folder is another clip.
    store.write("b/ö clip.wav", content, None, None)
    assert store.has("b/ö clip.wav") and not store.has("b/ö clip.wav", with_transcript=True)
    assert store.read("c/ö clip.wav") is None and not store.has("c/ö clip.wav")


def test_opened_again(store: FeatureStore) -> None:
    store.write("a.wav", features(), "", 1.0)
    opened = FeatureStore(store.folder)
    assert opened.description == DESCRIPTION and opened.read("a.wav").transcript == ""
    moved = FeatureStore.create(store.folder, DESCRIPTION | {"whisper_model": "moved.pt"})
    assert moved.has("a.wav")
    with pytest.raises(FileNotFoundError, match="holds no features.*extract_whisper_feature"):
        FeatureStore(store.folder / "nothing")


def test_damage_is_found(store: FeatureStore) -> None:
    store.write("a.wav", features(), "hello", 1.0)
    path = store.path_of("a.wav")
    whole = path.read_bytes()
    for content in (b"", whole[:4], whole[:300], whole[:-1], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(FeatureError, match=f"{path.name}.*damaged.*Delete it and run"):
            store.read("a.wav")
        assert not store.has("a.wav")
    for offset in (len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 16]) + whole[offset + 1 :])
        with pytest.raises(FeatureError, match="its checksum does not fit"):
            store.read("a.wav")
    error = pickle.loads(pickle.dumps(FeatureError("p", "r", "w")))
    assert (error.path, error.reason, error.hint, str(error)) == ("p", "r", "w", "p: r. w")


def test_a_damaged_header_is_found(store: FeatureStore) -> None:
    """Whatever a byte of it becomes, it is an error with the path, or the features are right."""
    store.write("a.wav", features(), "hello", 1.0)
    path = store.path_of("a.wav")
    whole = path.read_bytes()
    start = whole.index(b"shape")
    num_damaged = 0
    for position in range(start, whole.index(b"source")):
        for character in b'0,["':
            path.write_bytes(whole[:position] + bytes([character]) + whole[position + 1 :])
            try:
                assert torch.equal(store.read("a.wav").features, features())
            except FeatureError as error:
                assert str(path) in str(error)
                num_damaged += 1
    assert num_damaged > 50


DAMAGED_DESCRIPTIONS = ["", "[]", "3", "{}", "[" * 9999]
DAMAGED_DESCRIPTIONS += [
    f'{{"features": {features}}}'
    for features in (
        "3",
        "{}",
        "null",
        '{"shape": [1], "whisper_model": "x"}',
        '{"shape": [1, 1, 1]}',
    )
]


@pytest.mark.parametrize("content", DAMAGED_DESCRIPTIONS)
def test_a_damaged_description_is_one_error(store: FeatureStore, content: str) -> None:
    (store.folder / "store.json").write_text(content)
    for attempt in (FeatureStore, lambda folder: FeatureStore.create(folder, DESCRIPTION)):
        with pytest.raises(ValueError, match="store.json is"):
            attempt(store.folder)


def test_a_pipe_is_no_file_of_features(store: FeatureStore) -> None:
    """Opening it would wait for a writer for ever."""
    path = store.path_of("a.wav")
    path.parent.mkdir()
    os.mkfifo(path)
    opener = threading.Thread(target=path.write_bytes, args=(b"",), daemon=True)
    opener.start()  # It ends the wait of a reader, so that the test fails and does not hang.
    with pytest.raises(FeatureError, match="is a pipe, not a file"):
        store.read("a.wav")
    assert store.state_of("a.wav", __file__) is ClipState.NEW and opener.is_alive()
    path.open("rb").close()
    opener.join(PATIENCE)
    with pytest.raises(ValueError, match="is a pipe, which no file replaces"):
        store.write("a.wav", features(), "", 1.0)


def test_another_model_is_refused(store: FeatureStore) -> None:
    for change, message in (
        (
            {"fingerprint": "cd" * 32, "whisper_model": "large-v1"},
            "tiny.pt.*large-v1.*abab.*there, cdcd.*now",
        ),
        ({"shape": [6, 25, 512]}, r"\[4, 25, 64\] there, \[6, 25, 512\] now"),
        ({"feature_precision": "fp16"}, "feature_precision fp32 there, fp16 now"),
        ({"computed_in": "fp32"}, "computed_in None there, fp32 now"),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}.*Choose another folder"):
            FeatureStore.create(store.folder, DESCRIPTION | change)


def test_wrong_width_names_both(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"\[4, 25, 32\] is not the store's \[4, 25, 64\]"):
        store.write("a.wav", features(shape=[4, 25, 32]), "", 1.0)
    other = FeatureStore.create(tmp_path / "other", DESCRIPTION | {"shape": [4, 25, 32]})
    other.write("a.wav", features(shape=[4, 25, 32]), "", 1.0)
    store.path_of("a.wav").parent.mkdir()
    other.path_of("a.wav").rename(store.path_of("a.wav"))
    with pytest.raises(
        FeatureError, match=r"= \[4, 25, 32\], needed are \[4, 25, 64\]. It is another Whisper's"
    ):
        store.read("a.wav")


def test_failed_clips_have_a_marker_and_no_features(store: FeatureStore) -> None:
    store.fail("a.wav", "missing", "a.wav: no such file")
    assert store.read("a.wav") is None and not store.has("a.wav")
    assert store.failures() == [
        {"audio_id": "a.wav", "reason": "missing", "detail": "a.wav: no such file"}
    ]
    store.write("a.wav", features(), "", 1.0)
    assert store.failures() == []


def test_a_store_notices_another_sound(store: FeatureStore, tmp_path: Path) -> None:
    """By size, or by hash where the time differs; a copy and a sound that is gone are no change."""
    sound = tmp_path / "a.wav"
    sound.write_bytes(b"sound one")
    store.write("a.wav", features(), "hello", 1.0, FileRecord.of(sound))

    def found(with_transcript: bool = False) -> tuple[ClipState, bool]:
        return store.state_of("a.wav", sound, with_transcript), store.is_stale("a.wav", sound)

    assert found() == (ClipState.KEPT, False)
    os.utime(sound, ns=(1, 1))
    assert found() == (ClipState.MOVED, False)
    store.renew_record("a.wav", sound)
    assert found() == (ClipState.KEPT, False)
    stored = store.read("a.wav")
    assert torch.equal(stored.features, features()) and stored[1:] == ("hello", 1.0, False, ())
    sound.write_bytes(b"sound two")  # Of the same size.
    assert found() == (ClipState.CHANGED, True)
    sound.write_bytes(b"longer sound")
    os.utime(sound, ns=(1, 1))
    assert found() == (ClipState.CHANGED, True)
    sound.write_bytes(b"")
    assert found() == (ClipState.CHANGED, True)
    assert not store.is_stale("a.wav", b"sound one") and store.is_stale("a.wav", b"sound two")
    assert store.is_stale("a.wav", b"sound") and not store.is_stale("a.wav", np.zeros(3))
    sound.unlink()
    assert found() == (ClipState.KEPT, False)
    os.mkfifo(sound)  # Neither is a file to compare with.
    assert found() == (ClipState.KEPT, False)
    assert store.state_of("b.wav", sound) is ClipState.NEW and not store.is_stale("b.wav", sound)


def test_a_copy_is_hashed_once(store: FeatureStore, tmp_path: Path, monkeypatch) -> None:
    sound = tmp_path / "a.wav"
    sound.write_bytes(b"sound one")
    store.write("a.wav", features(), "", 1.0, FileRecord.of(sound))
    hashed: list[str] = []
    sha256_of = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    assert not any(store.is_stale("a.wav", sound) for _ in range(3)) and not hashed
    os.utime(sound, ns=(2, 2))
    assert not any(store.is_stale("a.wav", sound) for _ in range(3)) and len(hashed) == 1
    # A new version with size and time of the one that was hashed.
    before = sound.stat().st_ctime_ns
    sound.write_bytes(b"sound two")
    while sound.stat().st_ctime_ns == before:  # The clock of a file system ticks in milliseconds.
        os.utime(sound, ns=(2, 2))
    assert store.is_stale("a.wav", sound) and len(hashed) == 2


def test_a_refusal_names_clip_and_command(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"one")
    store.write("a.wav", features(), "", 1.0, FileRecord.of(tmp_path / "a.wav"))
    store.check_current("a.wav", tmp_path / "a.wav")
    (tmp_path / "a.wav").write_bytes(b"another")
    with pytest.raises(StaleFeatures, match="a.wav: the audio has changed.*--output_dir") as caught:
        store.check_current("a.wav", tmp_path / "a.wav")
    command = "python -m ltu_as.extract_whisper_feature --data_path DATA --model DIR"
    assert f"{command} --output_dir {store.folder}" in str(caught.value)
    # Workers of a data loader pickle it, and make another one of its message alone.
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_original_names(golden: Path) -> None:
    names = json.loads((golden / "whisper.json").read_text())["file_names"]["training"]
    assert {path: original_name(path) for path in names} == {
        path: f"{name}.npz" for path, name in names.items()
    }


def test_original_folders_are_read(tmp_path: Path) -> None:
    content = features().half()
    np.savez_compressed(tmp_path / "b_c_d_clip.npz", content.numpy())
    np.savez_compressed(tmp_path / "e.f.npz", content.numpy() + 1)
    np.savez_compressed(tmp_path / "x_failed.npz", np.zeros((32, 25, 1280), np.float32))
    (tmp_path / "x_bad.npz").write_bytes(b"PK")
    store = FeatureStore(tmp_path)
    assert store.description == {}
    assert torch.equal(store.read("/a/b/c/d/clip.wav").features, content)
    # The original's inference_batch names a file by the stem of the clip.
    assert torch.equal(store.read("/p/q/e.f.mp3").features, content + 1)
    assert store.read("/p/q/e.f.mp3")[1:] == (None, None, False, ())
    assert store.read("x/failed.wav") is None
    assert not store.has("x/failed.wav")
    assert store.has("e.f.wav")
    with pytest.raises(FeatureError, match="x_bad.npz: no features of the original"):
        store.read("x/bad.wav")
    (tmp_path / "x_bad.npz").unlink()
    assert [(mark["audio_id"], mark["reason"]) for mark in store.failures()] == [
        ("x_failed.npz", "zeros")
    ]
    with pytest.raises(FeatureError, match=r"\[4, 25, 64\], needed are \[32, 25, 1280\]"):
        FeatureStore(tmp_path, shape=[32, 25, 1280]).read("/a/b/c/d/clip.wav")
    for write in (
        lambda: store.write("a.wav", content, "", 1.0),
        lambda: FeatureStore.create(tmp_path, DESCRIPTION),
    ):
        with pytest.raises(ValueError, match="npz files of the original, which are only read"):
            write()


# --- extraction

CLIPS = 11  # Three batches.


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_whisper(folder / "tiny.pt", n_audio_layer=1)
    rows = []
    for number in range(CLIPS):
        sound = np.random.default_rng(number).standard_normal(4000 + 900 * number) * 0.1
        soundfile.write(folder / f"clip{number}.wav", sound, 16_000)
        row = {"instruction": "What is it?", "audio_id": f"clip{number}.wav"}
        if number % 3:
            row["input"] = "words"
        rows.append(row)
    rows.append({"instruction": "No sound?", "audio_id": "empty"})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def flags(data: Path, folder: Path, *more: str) -> list[str]:
    settings = {"data_path": data / "rows.json", "output_dir": folder, "whisper": data / "tiny.pt"}
    settings |= {"feature_precision": "fp32", "batch_size": "4", "device": "cpu"}
    words = []
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    return [*words, *more]


def files_of(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def whole_folder(data: Path, tmp_path_factory) -> Path:
    """Folder of a run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert extract_whisper_feature.main(flags(data, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def whole(whole_folder: Path) -> dict[str, str]:
    """Hashes of the files of a run without interruption."""
    return files_of(whole_folder)


def start(data: Path, folder: Path, output: Path, **more) -> BaseProcess:
    return start_command("ltu_as.extract_whisper_feature", flags(data, folder), output, **more)


def test_extraction_stores_features_and_transcripts(
    data: Path, whole_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole_folder, tmp_path, dirs_exist_ok=True)
    assert len(files_of(tmp_path)) == CLIPS + 2
    store = FeatureStore(tmp_path)
    stored = [store.read(f"clip{number}.wav") for number in range(CLIPS)]
    assert all(clip.features.any() and clip.features.dtype == torch.float32 for clip in stored)
    assert [clip.transcript is not None for clip in stored] == [
        number % 3 == 0 for number in range(CLIPS)
    ]
    assert stored[4].seconds == (4000 + 900 * 4) / 16_000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    # A second run does not write a file again, but adds transcripts if they are missing.
    assert extract_whisper_feature.main(flags(data, tmp_path)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert extract_whisper_feature.main(flags(data, tmp_path, "--transcribe", "all")) == 0
    assert all(store.has(f"clip{number}.wav", with_transcript=True) for number in range(CLIPS))


def test_killed_and_run_again(data: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """One run is killed in its first batch of four clips, the next one in its second batch."""
    folder = tmp_path / "features"
    # The first file that the first run writes is the description.
    for file, stored in ((4, 2), (4, 2 + 3)):
        process = start(data, folder, tmp_path / "output", kill_at=("replace", file))
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
        assert len(list(folder.rglob("*.safetensors"))) == stored
        assert list(folder.rglob("*.tmp"))
    cut = next(folder.rglob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-100])  # As after a power cut.
    cut.with_name(f"{cut.name}.tmp").write_bytes(b"half")  # As after kill -9.
    assert extract_whisper_feature.main(flags(data, folder)) == 0
    assert files_of(folder) == whole


def test_two_processes_write_the_same_files(
    data: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    output = tmp_path / "output"
    ranks = [start(data, folder, output, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for rank in ranks:
        rank.join(PATIENCE)
        assert rank.exitcode == 0, output.read_text()
    assert files_of(folder) == whole


def test_failures_are_named_and_never_zeros(
    data: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    (data / "noise.wav").write_bytes(b"RIFF")
    rows = [
        {"instruction": "?", "audio_id": name, "input": ""}
        for name in ("clip1.wav", "noise.wav", "gone.wav")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = flags(data, tmp_path / "out", "--audio_root", str(data))
    command[1] = str(tmp_path / "rows.jsonl")
    assert extract_whisper_feature.main(command) == 1
    assert "gone.wav: no such file" in capsys.readouterr().err
    assert extract_whisper_feature.main([*command, "--max_bad", "2"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {key: summary[key] for key in ("clips", "stored", "failed", "not_done")} == {
        "clips": 3, "stored": 1, "failed": 2, "not_done": 0,
    }  # fmt: skip
    assert summary["reasons"] == {"missing": 1, "unreadable": 1}
    store = FeatureStore(tmp_path / "out")
    assert store.read("gone.wav") is None and len(list(store.folder.rglob("*.safetensors"))) == 1
    (data / "gone.wav").write_bytes((data / "clip2.wav").read_bytes())
    assert extract_whisper_feature.main([*command, "--max_bad", "1"]) == 0
    (data / "gone.wav").unlink()
    assert [mark["audio_id"] for mark in store.failures()] == ["noise.wav"]


def test_overflow_is_a_failure(data: Path, tmp_path: Path, monkeypatch) -> None:
    whisper_features = extract_whisper_feature.LtuAsFeatureExtractor.__call__

    def overflow(self, *args, **kwargs):
        batch = whisper_features(self, *args, **kwargs)
        batch.input_features[0, 0, 0, 0] = float("inf")
        return batch

    monkeypatch.setattr(extract_whisper_feature.LtuAsFeatureExtractor, "__call__", overflow)
    command = flags(data, tmp_path, "--transcribe", "none", "--max_bad", "2")
    assert extract_whisper_feature.main(command) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reasons"] == {"not_finite": 3}  # One per batch.


def test_extraction_refuses_what_does_not_fit(data: Path, whole, tmp_path: Path) -> None:
    FeatureStore.create(tmp_path, DESCRIPTION)
    with pytest.raises(ValueError, match="fingerprint abab"):
        extract_whisper_feature.main(flags(data, tmp_path))
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        rows = [{"instruction": "?", "audio_id": "clip0.wav"}]
        (tmp_path / name / "q.json").write_text(json.dumps(rows))
    paths = [str(tmp_path / "x/q.json"), str(tmp_path / "y/q.json")]
    command = flags(data, tmp_path / "out", "--data_path", *paths)
    with pytest.raises(ValueError, match="clip0.wav' is .*x/clip0.wav and .*y/clip0.wav"):
        extract_whisper_feature.main(command)
    process = start(data, tmp_path, tmp_path / "output")
    process.join(PATIENCE)
    assert process.exitcode == 1 and (tmp_path / "output").read_text().startswith("error: ")


# --- sounds that change


@pytest.fixture
def own_data(data: Path, whole_folder: Path, tmp_path: Path) -> Path:
    """A copy of the clips, with times of their own, and the features of them all."""
    for path in [*data.glob("clip*.wav"), data / "rows.json"]:
        shutil.copy2(path, tmp_path)
    shutil.copytree(whole_folder, tmp_path / "features")
    return tmp_path


def extract_again(data: Path, own_data: Path, *more: str) -> int:
    rows = ["--data_path", str(own_data / "rows.json")]
    return extract_whisper_feature.main(flags(data, own_data / "features", *rows, *more))


def test_a_replaced_clip_is_extracted_again(
    data: Path, own_data: Path, capsys: pytest.CaptureFixture
) -> None:
    """Afterwards, all files are those of a run into an empty folder."""
    before = files_of(own_data / "features")
    assert extract_again(data, own_data) == 0
    assert "11 clips were found 11 kept, 0 new, 0 changed" in capsys.readouterr().out
    assert files_of(own_data / "features") == before
    soundfile.write(own_data / "clip5.wav", np.sin(np.arange(48_000) / 9), 16_000)
    shutil.copy2(own_data / "clip1.wav", own_data / "clip0.wav")
    FeatureStore(own_data / "features").remove("clip9.wav")
    assert extract_again(data, own_data) == 0
    output = capsys.readouterr().out
    assert "11 stored, 0 failed, 0 not_done; 11 clips were found 8 kept, 1 new, 2 changed" in output
    assert FeatureStore(own_data / "features").read("clip5.wav").seconds == 3.0
    shutil.copytree(own_data / "features", own_data / "first")
    shutil.rmtree(own_data / "features")
    assert extract_again(data, own_data) == 0
    assert files_of(own_data / "features") == files_of(own_data / "first")


def test_a_moved_data_set_is_not_extracted_again(
    data: Path, own_data: Path, capsys: pytest.CaptureFixture
) -> None:
    """Only the new times are stored, once."""
    store = FeatureStore(own_data / "features")
    old = [store.read(f"clip{number}.wav") for number in range(CLIPS)]
    for number in range(CLIPS):
        os.utime(own_data / f"clip{number}.wav")
    assert extract_again(data, own_data) == 0
    assert "11 clips were found 11 kept" in capsys.readouterr().out
    for number in range(CLIPS):
        new = store.read(f"clip{number}.wav")
        assert torch.equal(new.features, old[number].features) and new[1:] == old[number][1:]
        path = own_data / f"clip{number}.wav"
        assert store.state_of(f"clip{number}.wav", path) is ClipState.KEPT


def test_a_replacement_that_cannot_be_decoded_leaves_no_features(
    data: Path, own_data: Path
) -> None:
    (own_data / "clip2.wav").write_bytes(b"RIFF")
    (own_data / "clip3.wav").unlink()
    assert extract_again(data, own_data) == 1
    store = FeatureStore(own_data / "features")
    assert [mark["audio_id"] for mark in store.failures()] == ["clip2.wav"]
    assert store.read("clip2.wav") is None
    assert store.read("clip3.wav") is not None  # Its sound is gone, not changed.
    summary = json.loads((own_data / "features" / "summary.json").read_text())
    assert (summary["stored"], summary["failed"]) == (CLIPS - 1, 1)


def test_a_store_without_records_is_read_and_renewed(
    data: Path, own_data: Path, capsys: pytest.CaptureFixture
) -> None:
    """As an earlier version wrote it. Clips whose sound is not there are kept as they are."""
    store = FeatureStore(own_data / "features")
    for number in range(CLIPS):
        name = f"clip{number}.wav"
        stored = store.read(name)
        store.write(name, stored.features, stored.transcript, stored.seconds)
        path = store.path_of(name)
        assert b', \\"source\\": null' in path.read_bytes()
        with safe_open(path, "np") as file:
            header = json.loads(file.metadata()["clip"])
            tensors = {key: file.get_tensor(key) for key in ("high", "low")}
        del header["source"]
        path.write_bytes(save(tensors, {"clip": json.dumps(header)}))
        assert torch.equal(store.read(name).features, stored.features) and store.has(name)
        assert not store.is_stale(name, own_data / name)
    (own_data / "clip10.wav").unlink()
    assert extract_again(data, own_data) == 0
    found = "11 clips were found 1 kept, 0 new, 0 changed, 10 without a record of the audio"
    assert found in capsys.readouterr().out
    assert store.state_of("clip3.wav", own_data / "clip3.wav") is ClipState.KEPT
    assert extract_again(data, own_data) == 0
    assert "11 clips were found 11 kept" in capsys.readouterr().out


def test_a_clip_that_changes_while_it_is_extracted(
    data: Path, own_data: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    """Its features are stale at once, which the command says."""
    shutil.rmtree(own_data / "features")
    decode_audio = extract_whisper_feature.decode_audio

    def decode_and_replace(path: str, **settings) -> Waveform:
        clip = decode_audio(path, **settings)
        if path.endswith("clip6.wav"):
            shutil.copy2(own_data / "clip7.wav", path)
        return clip

    monkeypatch.setattr(extract_whisper_feature, "decode_audio", decode_and_replace)
    assert extract_again(data, own_data) == 1
    assert "1 clips changed while they were extracted" in capsys.readouterr().err
    store = FeatureStore(own_data / "features")
    assert store.is_stale("clip6.wav", own_data / "clip6.wav")
