"""Tests how many processes load examples, and how long training waits for them."""

import json
import os
import time

import pytest
import torch

from ltu.finetune import main
from ltu.training import worker_count
from ltu.training.arguments import parse_args
from ltu.training.dataset import QaDataset
from ltu.training.trainer import make_trainer
from ltu.training.worker_count import choose_num_workers, count_cores, measure_seconds
from tests.tiny import training_flags as flags
from tests.tiny import write_checkpoint, write_llm, write_rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"))


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    """A dataset file of 12 examples, two of which have a clip that cannot be decoded."""
    path = write_rows(tmp_path_factory.mktemp("rows"), 12)
    (path.parent / "1.wav").write_bytes(b"not audio")
    (path.parent / "2.wav").unlink()
    return path


@pytest.fixture
def dataset(checkpoint, data_path, tmp_path) -> QaDataset:
    return make_trainer(*parse_args(flags(checkpoint, data_path, tmp_path))).train_dataset


def has_cores(monkeypatch, number: int) -> None:
    monkeypatch.setattr(worker_count, "count_cores", lambda: number)


@pytest.mark.parametrize("ranks, expected", [("1", 16), ("4", 4), ("32", 1)])
def test_cores_are_divided_among_the_ranks_of_a_node(monkeypatch, ranks, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert count_cores() == expected


# Milliseconds that an example takes, cores, workers.
@pytest.mark.parametrize(
    "milliseconds, cores, expected",
    [
        (8.2, 16, 3),  # 2.05 cores at 250 examples a second.
        (15.3, 16, 4),
        (0.1, 16, 2),  # From the encoder cache.
        (1000, 16, 15),  # One core is left to the training.
        (1000, 64, 16),
        (15.3, 3, 2),
        (15.3, 1, 1),
    ],
)
def test_workers_are_enough_for_a_gpu(dataset, monkeypatch, milliseconds, cores, expected):
    has_cores(monkeypatch, cores)
    monkeypatch.setattr(worker_count, "measure_seconds", lambda *_: milliseconds / 1000)
    choice = choose_num_workers(dataset, [0], has_accelerator=True, needs_gpu=False)
    assert choice.num_workers == expected
    assert f"an example takes {milliseconds:.1f} ms" in choice.describe()
    assert f"cores: {cores}" in choice.describe()


def test_features_on_a_gpu_need_the_process_that_trains(dataset):
    assert choose_num_workers(dataset, [0], has_accelerator=True, needs_gpu=True).num_workers == 0


@pytest.mark.parametrize("cores, expected", [(1, 1), (2, 2), (64, 2)])
def test_on_a_cpu_training_needs_the_cores(dataset, monkeypatch, cores, expected):
    has_cores(monkeypatch, cores)
    choice = choose_num_workers(dataset, [0], has_accelerator=False, needs_gpu=False)
    assert choice.num_workers == expected


def test_measuring_changes_nothing_of_the_run(dataset):
    """Examples that cannot be used are neither timed nor counted as skipped."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert measure_seconds(dataset, range(12)) > 0
    assert measure_seconds(dataset, [1, 2]) is None
    assert measure_seconds(dataset, [1, 3]) > 0
    assert not dataset.skipped
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert choose_num_workers(dataset, [1, 2], True, False).num_workers >= 1


def test_the_first_example_is_not_timed(dataset, monkeypatch):
    """It opens libraries and models."""
    loaded = []

    def load(index: int) -> dict:
        loaded.append(index)
        return {}

    ticks = iter([0, 100] + list(range(200)))
    monkeypatch.setattr(dataset, "load", load)
    monkeypatch.setattr(worker_count.time, "perf_counter", lambda: next(ticks))
    assert measure_seconds(dataset, range(100)) == 1
    assert loaded == list(range(9))


def test_auto_is_resolved_and_said(checkpoint, data_path, tmp_path, monkeypatch):
    has_cores(monkeypatch, 2)
    automatic = make_trainer(
        *parse_args(flags(checkpoint, data_path, tmp_path, num_workers="auto"))
    )
    assert automatic.args.dataloader_num_workers == 2
    assert automatic.get_train_dataloader().num_workers == 2
    [note] = automatic.notes
    assert note == "--num_workers auto: 2 (training needs the CPU itself; cores: 2)"
    given = make_trainer(*parse_args(flags(checkpoint, data_path, tmp_path, num_workers=1)))
    assert given.args.dataloader_num_workers == 1
    assert given.notes == []


@pytest.mark.parametrize("value", ["many", "-1", "1.5"])
def test_a_wrong_number_of_workers_is_one_line(checkpoint, data_path, tmp_path, capsys, value):
    arguments = flags(checkpoint, data_path, tmp_path)
    with pytest.raises(SystemExit) as end:
        parse_args([*arguments, f"--num_workers={value}"])
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --num_workers {value}: it must be")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_says_how_long_it_waited(
    checkpoint, data_path, tmp_path, monkeypatch, capsys, workers
):
    """Loading that takes longer than training shows as waiting."""
    stock_load = QaDataset.load

    def load(self: QaDataset, index: int) -> dict:
        time.sleep(0.1)
        return stock_load(self, index)

    monkeypatch.setattr(QaDataset, "load", load)
    settings = {"max_bad": 2, "num_epochs": 1, "num_workers": workers}
    main(flags(checkpoint, data_path, tmp_path / "run", **settings))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    [summary] = [entry for entry in history if "data_wait_fraction" in entry]
    assert "train_runtime" in summary and "loss" not in summary
    line = f"waiting for data: {summary['data_wait_fraction']:.2%} of the training time"
    assert line in capsys.readouterr().out
    waited = summary["data_wait_fraction"] * summary["train_runtime"]
    assert waited <= summary["train_runtime"]
    if workers == 0:  # 14 examples were tried, and no step runs meanwhile.
        assert waited >= 1.2
    else:  # At least those of the first micro-batch.
        assert waited >= 0.1
