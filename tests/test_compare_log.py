"""Tests the comparison of logs with schedules: the released logs' learning rates, and our runs."""

import json
import os
from pathlib import Path

import pytest

from ltu.compare_log import main
from ltu.training.batch_sampler import batches_per_rank
from ltu.training.loss_log import Schedule, check, infer_schedule, means, own_schedule, read_log
from tests import tiny

# Learning rates in the released logs of LTU-AS, by step: the full rate, the number of steps that
# follows from the number of examples, and logged rates.
RELEASED = {
    "stage1": (
        1e-3,
        16190,
        {
            10: 1e-4,
            100: 1e-3,
            110: 0.0009993784959602238,
            5000: 0.0006954630205096333,
            16000: 1.1808576755748913e-05,
        },
    ),
    "stage2": (
        1e-4,
        17270,
        {
            10: 1e-5,
            100: 1e-4,
            110: 9.994175888177053e-05,
            1000: 9.47582993593477e-05,
            17000: 1.5725101921956901e-06,
        },
    ),
    "stage3_v1": (
        2e-4,
        34434,
        {
            10: 2e-5,
            100: 2e-4,
            5000: 0.00017145686491524438,
            34000: 2.528106250364071e-06,
        },
    ),
    "stage3_v2": (
        2e-4,
        73414,
        {
            10: 2e-5,
            110: 0.00019997272008074856,
            36000: 0.00010206508988733394,
            72000: 3.857380582153477e-06,
        },
    ),
}


def log_of(rates: dict[int, float]) -> list[dict]:
    """Return a log with these learning rates by step."""
    return [
        {"step": step, "epoch": 0.0, "learning_rate": rate, "loss": 1.0}
        for step, rate in rates.items()
    ]


@pytest.mark.parametrize("name", RELEASED)
def test_released_rates_fit_one_schedule_exactly(name: str) -> None:
    base, total, rates = RELEASED[name]
    schedule = infer_schedule(log_of(rates))
    assert (schedule.base, schedule.total) == (base, total)
    assert check(log_of(rates), schedule) == []


@pytest.mark.parametrize("step", [10, 110, 36000, 72000])
def test_a_rate_wrong_in_its_last_digits_is_found(step: int) -> None:
    _, _, rates = RELEASED["stage3_v2"]
    schedule = infer_schedule(log_of(rates))
    wrong_rates = rates | {step: rates[step] * (1 + 4e-15)}
    differences = check(log_of(wrong_rates), schedule)
    assert len(differences) == 1
    assert f"step {step}" in differences[0]


def test_means_are_of_complete_periods_only() -> None:
    log = [{"step": step, "loss": float(step)} for step in range(10, 130, 10)]
    assert means(log) == {50: 30.0, 100: 80.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps over two epochs, with 5 steps of warm-up."""
    from ltu.finetune import main as finetune

    folder = tmp_path_factory.mktemp("run")
    base = tiny.write_checkpoint(folder / "init", tiny.write_llm(folder / "llm"), tiny.LORA)
    data_path = tiny.write_rows(folder / "data", 13, without_audio=13)
    argv = ["--base_model", str(base), "--data_path", str(data_path)]
    argv += ["--output_dir", str(folder / "out")]
    argv += "--batch_size 2 --micro_batch_size 1 --num_epochs 2 --warmup_steps 5".split()
    argv += "--logging_steps 1 --learning_rate 1e-3 --bf16 False --num_workers 0".split()
    argv += ["--text_only", "True"]
    finetune(argv)
    return folder / "out"


def test_our_own_run_is_exact(run: Path, capsys: pytest.CaptureFixture) -> None:
    schedule = own_schedule(run)
    assert (schedule.base, schedule.warmup, schedule.total) == (1e-3, 5, 12)
    assert schedule.accumulation == 2
    assert main([str(run), "--output_path", str(run / "loss.png")]) == 0
    assert "exact" in capsys.readouterr().out
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_with_another_rate_or_epoch_fails(run: Path, tmp_path: Path) -> None:
    (tmp_path / "ltu_state.json").write_bytes((run / "ltu_state.json").read_bytes())
    state = json.loads((run / "trainer_state.json").read_text())
    entry = state["log_history"][6]
    for key in ("learning_rate", "epoch"):
        logged = entry[key]
        entry[key] = logged * 1.001
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        assert main([str(tmp_path)]) == 1
        entry[key] = logged
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert main([str(tmp_path)]) == 0


def test_expected_losses(run: Path) -> None:
    losses = {entry["step"]: entry["loss"] for entry in read_log(run) if "loss" in entry}
    assert main([str(run), "--expected", f"3:{losses[3] + 0.02}"]) == 0
    assert main([str(run), "--expected", f"3:{losses[3] + 0.04}"]) == 1
    assert main([str(run), "--expected", "999:1.0"]) == 1


def test_a_run_is_compared_with_a_released_state(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "trainer_state.json"
    _, _, rates = RELEASED["stage2"]
    other.write_text(json.dumps({"log_history": log_of(rates)}))
    assert main([str(run), "--with", str(other)]) == 1
    assert "NOT the same" in capsys.readouterr().out
    assert main([str(other), "--with", str(other)]) == 0


def test_an_interrupted_run_is_compared_with_its_record(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = run / "checkpoint-12"
    assert (checkpoint / "ltu_state.json").is_file()
    assert main([str(checkpoint)]) == 0
    assert "as recorded" in capsys.readouterr().out


def test_the_epoch_of_four_processes() -> None:
    """The authors' toy set: 6,306 examples, and in each step 16 micro-batches of 4 on each rank."""
    schedule = Schedule(1e-4, 100, 24, 16, batches_per_rank(6306, 4, 4))
    log = []
    for step in (10, 20):
        epoch = step * 16 / 395
        rate = 1e-4 * step / 100
        log.append({"step": step, "epoch": epoch, "learning_rate": rate, "loss": 0.6})
    assert check(log, schedule) == []
    assert [round(entry["epoch"], 2) for entry in log] == [0.41, 0.81]


def test_a_file_that_is_not_a_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a log"):
        read_log(tmp_path)
    empty = tmp_path / "nothing"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="output_dir"):
        read_log(empty)
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 3, "eval_loss": 1.0}]}')
    with pytest.raises(ValueError, match="no losses"):
        read_log(tmp_path)
    for rates in ({10: 1e-5, 20: 2e-5}, {500: 1e-4, 600: 9e-5}):
        with pytest.raises(ValueError, match="warm-up"):
            infer_schedule(log_of(rates))


@pytest.mark.parametrize(
    "name, total",
    [
        ("stage1_proj_cla", 16190),
        ("stage2_all_cla", 17270),
        ("stage3_all_mix_v1", 34434),
        ("stage3_all_mix_v2", 73414),
    ],
)
def test_released_logs(name: str, total: int) -> None:
    path = Path(os.environ.get("LTU_LOSS_LOGS", "../shared/loss_logs")) / f"ltu_as_{name}.csv"
    if not path.is_file():
        pytest.skip(f"the released logs are not at {path.parent}; set LTU_LOSS_LOGS")
    log = read_log(path)
    schedule = infer_schedule(log)
    assert schedule.total == total
    assert check(log, schedule) == []
