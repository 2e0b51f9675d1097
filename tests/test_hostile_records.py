"""Tests files that a run, a store or a download wrote, and that are damaged when they are read.

Each is refused with one line that names the file, or counts as missing where it can be made again.
A pipe in its place is not opened, because nobody may ever write to it.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from eval.report import provenance_file, read_provenance
from ltu.checkpoints.released_files import newest_checkpoint, remap_toy_paths
from ltu.models.provenance import STATE, TRAINER_STATE
from ltu.training.dataset_index import IndexedExamples
from ltu.training.loss_log import read_log
from ltu.training.run_folder import complete_checkpoint, what_is_incomplete
from ltu_as.feature_store import DamagedFeatures, FeatureStore


@contextmanager
def writer_of(pipe: Path) -> Iterator[None]:
    """End a pipe as soon as somebody reads it, so that a wrong reader fails and does not wait."""
    thread = threading.Thread(target=lambda: pipe.open("wb").close())
    thread.start()
    try:
        yield
    finally:
        descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        thread.join()
        os.close(descriptor)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_text('{"features": {"shape"'),
    "empty": Path.touch,
    "not UTF-8": lambda path: path.write_bytes(b'{"log_history": "\xff"}'),
    "a list": lambda path: path.write_text("[1, 2]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "wrong values": lambda path: path.write_text('{"features": 5, "log_history": [5]}'),
}


FEATURES = {"shape": [4, 25, 64], "whisper_model": "tiny.pt"}


def read_toy_meta(path: Path) -> None:
    remap_toy_paths(path, path.parent, path.with_name("out.json"))


def read_failures(path: Path) -> None:
    folder = path.parent.parent
    FeatureStore.create(folder, FEATURES).failures()


def read_newest(path: Path) -> None:
    (path.parent / STATE).write_text("{}")
    whole = path.parent.parent / "whole"
    whole.mkdir()
    (whole / STATE).write_text("{}")
    (whole / "config.json").write_text('{"model_type": "ltu"}')
    assert newest_checkpoint("ltu", (str(path.parent.parent),)) == whole


def read_provenance_of(path: Path) -> None:
    predictions = path.with_name("esc50.predictions.json")
    predictions.write_text("[]")
    assert provenance_file(predictions) == path
    assert read_provenance(predictions) == {}


# A file -> how it is read.
READERS: dict[str, Callable[[Path], object]] = {
    TRAINER_STATE: read_log,
    "log.csv": read_log,
    "a.json.arrow": IndexedExamples,
    "store.json": lambda path: FeatureStore(path.parent),
    "ab/clip-ab.failed": read_failures,
    "run/config.json": read_newest,
    "esc50.provenance.json": read_provenance_of,
    "toy.json": read_toy_meta,
}
# A file -> the error if it is a pipe. A file that may be missing counts as missing.
PIPES = {
    TRAINER_STATE: "is a pipe",
    "log.csv": "is a pipe",
    "a.json.arrow": "is a pipe",
    "store.json": "holds no features",
    "ab/clip-ab.failed": "is a pipe",
    "run/config.json": None,
    "esc50.provenance.json": None,
    "toy.json": "is not there",
}
# Files whose values are not used.
WITHOUT_EFFECT = ("ab/clip-ab.failed", "run/config.json", "esc50.provenance.json")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    DAMAGES[damage](path)
    if name in WITHOUT_EFFECT and damage == "wrong values":
        READERS[name](path)
        return
    with pytest.raises(ValueError) as raised:
        READERS[name](path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_not_opened(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with writer_of(path):
        if PIPES[name] is None:
            READERS[name](path)
            return
        with pytest.raises((OSError, ValueError), match=PIPES[name]):
            READERS[name](path)


@pytest.mark.parametrize("name", [TRAINER_STATE, "optimizer.pt", "rng_state.pth"])
def test_a_pipe_in_a_checkpoint_is_not_opened(tmp_path: Path, name: str) -> None:
    for file in ("scheduler.pt", "optimizer.pt", "rng_state.pth"):
        torch.save({}, tmp_path / file)
    (tmp_path / TRAINER_STATE).write_text("{}")
    (tmp_path / name).unlink()
    complete_checkpoint(tmp_path, {})
    os.mkfifo(tmp_path / name)
    with writer_of(tmp_path / name):
        assert "is a pipe" in what_is_incomplete(tmp_path)


@pytest.mark.parametrize("state", ["[]", "{", '{"files": 5}'])
def test_a_checkpoint_with_a_damaged_state_is_incomplete(tmp_path: Path, state: str) -> None:
    (tmp_path / STATE).write_text(state)
    assert "was not written to the end" in what_is_incomplete(tmp_path)


def test_features_that_are_a_pipe_are_damaged(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path, FEATURES)
    path = store.path_of("a.wav")
    path.parent.mkdir()
    os.mkfifo(path)
    with writer_of(path):
        with pytest.raises(DamagedFeatures, match="is a pipe"):
            store.read("a.wav")
        assert not store.has("a.wav")


def test_zeros_of_the_original_that_are_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b_c_d_clip.npz")
    with writer_of(tmp_path / "b_c_d_clip.npz"):
        with pytest.raises(DamagedFeatures, match="is a pipe"):
            FeatureStore(tmp_path).failures()
