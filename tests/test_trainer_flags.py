"""Tests that the flags of transformers' Trainer work, or are refused with a reason."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from ltu.finetune import main
from ltu.training.arguments import REFUSED, RunArguments, parse_args
from ltu.training.loss_log import check, own_schedule, read_log
from tests.tiny import LORA, write_checkpoint, write_llm, write_rows
from tests.tiny import training_flags as flags

TRAINER_FLAGS = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flags")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"), 16, without_audio=3)


@pytest.fixture
def run(checkpoint: Path, data_path: Path, tmp_path: Path):
    """Train four steps with some flags; return the entries of the log that have a loss."""

    def train(*more: str, name: str = "run") -> list[dict]:
        folder = tmp_path / name
        assert main([*flags(checkpoint, data_path, folder, save_steps=2), *more]) == 0
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [entry for entry in history if "loss" in entry]

    return train


def losses(entries: list[dict]) -> list[float]:
    return [entry["loss"] for entry in entries]


def error_of(capsys: pytest.CaptureFixture, *more: str) -> str:
    """Return the error with which the parser ends the process."""
    required = "--base_model base --data_path data.json --output_dir run".split()
    with pytest.raises(SystemExit) as end:
        parse_args([*required, *more])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_every_flag_of_the_trainer_is_a_flag_or_refused() -> None:
    """A flag of a new release works at once."""
    ours = {field.name for field in dataclasses.fields(RunArguments) if field.init}
    assert ours >= TRAINER_FLAGS - set(REFUSED)
    assert not ours & set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_flags_say_why(capsys, name: str) -> None:
    message = error_of(capsys, f"--{name}", "1")
    assert f"--{name} is not available: {REFUSED[name]}" in message
    assert len(message.splitlines()) == 1
    assert f"--{name} is not available" in error_of(capsys, f"--{name}=1")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--nonsense", "1"], "unrecognized arguments: --nonsense 1"),
        (["--learning_rat", "1"], "unrecognized arguments: --learning_rat 1"),
        (["--optim", "nonsense"], "nonsense is not a valid OptimizerNames"),
        (["--eval_strategy", "epoch"], "--eval_strategy epoch: one loader covers all epochs"),
        (["--report_to", "nonsense"], "--report_to nonsense: not installed"),
        (
            ["--eval_strategy", "steps"],
            "--eval_... and --load_best_model_at_end need --val_set_size",
        ),
        (["--eval_steps", "5"], "need --val_set_size"),
        (["--optim_target_modules", "all-linear"], "no effect with --optim adamw_torch"),
        (["--max_steps", "-7"], "--max_steps -7: it must be at least -1"),
        (["--save_steps", "0"], "--save_steps 0.0: it must be more than 0"),
    ],
)
def test_wrong_flags_are_one_line(capsys, more: list[str], message: str) -> None:
    error = error_of(capsys, *more)
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_requeued_job_does_not_delete_its_own_work(monkeypatch) -> None:
    required = "--base_model base --data_path data.json --output_dir run --overwrite".split()
    assert parse_args(required)[2].overwrite
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not parse_args(required)[2].overwrite


def test_a_warm_up_longer_than_the_run_is_noted(checkpoint, data_path, tmp_path, capsys) -> None:
    arguments = flags(checkpoint, data_path, tmp_path / "run", warmup_steps=100)
    main([*arguments, "--plan"])
    assert "note: the warm-up of 100 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "expected"),
    [(["--bf16"], True), (["--bf16", "true"], True), (["--bf16=False"], False)],
)
def test_spellings_of_bf16(more: list[str], expected: bool) -> None:
    required = "--base_model base --data_path data.json --output_dir run".split()
    _, _, run_args = parse_args([*required, *more])
    assert run_args.bf16 is expected


@pytest.mark.parametrize(
    "more",
    [
        ["--optim", "adafactor"],
        ["--weight_decay", "10"],
        ["--adam_beta2", "0.5"],
        ["--max_grad_norm", "1e-9"],
        ["--neftune_noise_alpha", "5"],
        ["--data_seed", "7"],
        ["--lr_scheduler_type", "constant"],
    ],
    ids=lambda more: more[0],
)
def test_flags_that_change_the_losses(run, more: list[str]) -> None:
    assert losses(run(*more)) != losses(run(name="stock"))


@pytest.mark.parametrize(
    "more",
    [
        ["--gradient_checkpointing"],
        pytest.param(["--torch_compile_backend", "aot_eager"], marks=pytest.mark.slow),
        ["--full_determinism"],
        pytest.param(
            ["--dataloader_multiprocessing_context", "spawn", "--num_workers", "1"],
            marks=pytest.mark.slow,
        ),
        ["--dataloader_persistent_workers", "--num_workers", "1"],
        ["--include_num_input_tokens_seen"],
    ],
    ids=lambda more: more[0],
)
def test_flags_that_do_not_change_the_losses(run, more: list[str]) -> None:
    assert losses(run(*more)) == pytest.approx(losses(run(name="stock")), abs=1e-5)


def test_schedule_of_the_learning_rate(run) -> None:
    """The logged learning rate is the one after the step, with each schedule."""
    entries = run("--lr_scheduler_type", "cosine", "--warmup_steps", "0.25")
    rates = [entry["learning_rate"] for entry in entries]
    falling = [0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(4)]
    assert rates == pytest.approx([1e-2 * value for value in falling], abs=1e-12)


def test_the_best_weights_are_saved(run, tmp_path: Path) -> None:
    evaluation = "--val_set_size 4 --save_steps 1"
    # The highest loss is called the best one, so that it is not that of the last step.
    run(*evaluation.split(), "--load_best_model_at_end", "--greater_is_better", "True")
    folder = tmp_path / "run"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    best = max(held_out, key=held_out.get)
    assert best < max(held_out)
    state = json.loads((folder / "ltu_state.json").read_text())
    assert state["weights_of_step"] == best
    expected = load_file(folder / f"checkpoint-{best}" / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert all(found[key].equal(expected[key]) for key in expected)


def test_checkpoints(run, tmp_path: Path) -> None:
    """How many are written and kept follows the stock flags."""
    run("--save_strategy", "no", name="none")
    run("--save_steps", "0.25", "--save_total_limit", "3", name="quarters")
    names = {}
    for name in ("none", "quarters"):
        names[name] = sorted(path.name for path in (tmp_path / name).glob("checkpoint-*"))
    assert names["none"] == []
    assert names["quarters"] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def weights_of(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def test_the_projection_has_a_learning_rate_of_its_own(run, checkpoint, tmp_path: Path) -> None:
    """At 0 the projection stays as it is while LoRA is trained; at that of LoRA nothing changes."""
    run("--projector_learning_rate", "0", name="fixed")
    before, after = weights_of(checkpoint), weights_of(tmp_path / "fixed")
    changed = {key for key in before if not after[key].equal(before[key])}
    assert any(".lora_" in key for key in changed)
    assert not any(key.startswith("multi_modal_projector.") for key in changed)
    assert losses(run("--projector_learning_rate", "1e-2")) == losses(run(name="stock"))


def test_the_audio_encoder_has_a_learning_rate_of_its_own(run, checkpoint, tmp_path) -> None:
    """At 0 the encoder stays as it is while LoRA and the projection are trained."""
    run("--encoder_learning_rate", "0", "--projector_learning_rate", "1e-3", name="fixed")
    before, after = weights_of(checkpoint), weights_of(tmp_path / "fixed")
    changed = {key.split(".")[0] for key in before if not after[key].equal(before[key])}
    assert changed == {"language_model", "multi_modal_projector"}
    assert losses(run("--encoder_learning_rate", "1e-2")) == losses(run(name="stock"))


def test_a_learning_rate_of_an_encoder_that_is_not_trained(capsys) -> None:
    for more in (["--freeze_audio_tower"], ["--trainable_params", "proj"]):
        message = error_of(capsys, "--encoder_learning_rate", "1e-4", *more)
        assert "the audio encoder is not trained" in message


def test_a_higher_learning_rate_of_the_projection_follows_the_schedule(run, tmp_path) -> None:
    """Only the projection is trained; so a rate of its own is the rate of the whole run."""
    proj = ["--trainable_params", "proj"]
    own = run(*proj, "--learning_rate", "1e-9", "--projector_learning_rate", "3e-2", name="own")
    whole = run(*proj, "--learning_rate", "3e-2", name="whole")
    assert own == whole
    schedule = own_schedule(tmp_path / "own")
    assert schedule.base == 3e-2
    assert check(read_log(tmp_path / "own"), schedule) == []


def test_a_resumed_run_keeps_the_learning_rate_of_the_projection(run, tmp_path: Path) -> None:
    rate = ["--projector_learning_rate", "3e-2", "--save_steps", "2"]
    whole = run(*rate, name="whole")
    run(*rate, "--max_steps", "4", name="stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-4")
    for name in ("model.safetensors", "trainer_state.json"):
        (tmp_path / "stopped" / name).unlink()
    resumed = run(*rate, "--max_steps", "4", "--resume_from_checkpoint", "last", name="stopped")
    assert losses(resumed) == losses(whole)
    expected = weights_of(tmp_path / "whole")
    assert all(weights_of(tmp_path / "stopped")[key].equal(expected[key]) for key in expected)


def test_an_optimizer_without_groups_has_one_learning_rate(run, monkeypatch, capsys) -> None:
    """transformers' layer-wise optimizers step in hooks, and give the Trainer a dummy."""
    monkeypatch.setattr(
        Trainer, "create_optimizer", lambda *args, **kwargs: LayerWiseDummyOptimizer()
    )
    with pytest.raises(ValueError, match="which has no groups of weights"):
        run("--projector_learning_rate", "1e-3")
