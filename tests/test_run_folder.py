"""Tests that a run trains what it says, or ends with an error, and that no work is lost.

Runs are interrupted at every write of a checkpoint, killed, stopped by SIGTERM and started twice.
What is left must continue with the losses and weights of a run that was not interrupted, to the
last bit.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from random import Random

import pytest
import torch

from ltu import LtuForConditionalGeneration
from ltu.files import run_command, sha256_of
from ltu.finetune import STOPPED, main
from ltu.training.arguments import parse_args
from ltu.training.run_folder import RunFolder, find_differences, what_is_incomplete
from ltu.training.trainer import LtuTrainer, NonFiniteError, make_trainer, prepare_run
from tests.interruption import (
    damage,
    interrupt_at_save,
    is_final_save,
    is_step_4,
    limit_file_size,
    send_sigterm,
)
from tests.machine import PATIENCE, wait_until
from tests.tiny import LORA, start_command, start_ranks, write_checkpoint, write_llm, write_rows
from tests.tiny import training_flags as flags

COMMON = {"save_steps": 2, "num_epochs": 2}  # 6 steps of 4 examples, checkpoints 2, 4 and 6
FILES = ("trainer_state.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "ltu_state.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose LoRA has dropout, so that a run depends on the random state too."""
    root = tmp_path_factory.mktemp("model")
    lora = LORA | {"lora_dropout": 0.1}
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), lora)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file of 12 examples."""
    return write_rows(tmp_path_factory.mktemp("data"), 12, without_audio=3)


@pytest.fixture(scope="module")
def whole_run(checkpoint: Path, data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(flags(checkpoint, data_path, folder, **COMMON)) == 0
    return folder


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of every logged step of a run."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        (entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry
    ]


def assert_same_run(folder: Path, whole_run: Path) -> None:
    """Assert that two runs have the same losses and weights, bit by bit."""
    assert losses(folder) == losses(whole_run)
    weights = "model.safetensors"
    assert sha256_of(folder / weights) == sha256_of(whole_run / weights)
    state = json.loads((folder / "ltu_state.json").read_text())
    assert state["finished"]


# --- losses that are not finite


def test_a_loss_that_is_not_finite_ends_training(checkpoint, data_path, tmp_path):
    """Weights are finite to the end, and the error names step and examples."""
    settings = COMMON | {"learning_rate": 1e12, "save_steps": 1, "warmup_steps": 0}
    with pytest.raises(NonFiniteError) as error:
        main(flags(checkpoint, data_path, tmp_path / "run", **settings))
    message = str(error.value)
    assert re.search(
        r"Step \d of 6: the losses .* Lower --learning_rate \(now 1000000000000\.0\)", message
    )
    assert re.search(r"these examples: \d+ \((\d+\.wav|empty)\)", message)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    step = int(re.search(r"Step (\d)", message)[1])
    last_checkpoint = tmp_path / "run" / f"checkpoint-{step - 1}"
    for parameter in LtuForConditionalGeneration.from_pretrained(last_checkpoint).parameters():
        assert parameter.isfinite().all()


def test_the_example_without_a_finite_loss_is_named(checkpoint, data_path, tmp_path, monkeypatch):
    """Only the micro-batch whose loss is infinite is listed."""
    stock_loss = LtuTrainer.compute_loss
    calls = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        calls.append(inputs)
        loss = stock_loss(self, model, inputs, *args, **kwargs)
        return loss * torch.inf if len(calls) == 4 else loss

    monkeypatch.setattr(LtuTrainer, "compute_loss", compute_loss)
    arguments = flags(checkpoint, data_path, tmp_path / "run", **COMMON)
    with pytest.raises(NonFiniteError, match="Step 2 of 6") as error:
        main(arguments)
    trainer = make_trainer(*parse_args(arguments))
    expected = list(trainer.micro_batches)[3]
    listed = str(error.value).rpartition("these examples: ")[2]
    assert [int(number) for number in re.findall(r"(\d+) \(", listed)] == [i + 1 for i in expected]


def test_a_loss_that_is_not_finite_ends_all_ranks(checkpoint, data_path, tmp_path):
    settings = COMMON | {"learning_rate": 1e12, "warmup_steps": 0}
    arguments = flags(checkpoint, data_path, tmp_path / "run", **settings)
    for rank in start_ranks(2, "ltu.finetune", arguments, tmp_path / "output"):
        rank.join(PATIENCE)
        assert rank.exitcode == 1
    assert "error: Step" in (tmp_path / "output.0").read_text()
    assert "Traceback" not in (tmp_path / "output.0").read_text()
    assert not (tmp_path / "run" / "model.safetensors").exists()


# --- the sizes of a run


def test_a_batch_larger_than_the_dataset_is_refused(checkpoint, data_path, tmp_path):
    with pytest.raises(ValueError, match="--batch_size 16 is more than the 12 examples"):
        main(flags(checkpoint, data_path, tmp_path / "run", batch_size=16))


def test_the_sizes_that_are_used_are_printed(checkpoint, data_path, tmp_path, capsys):
    arguments = flags(checkpoint, data_path, tmp_path / "run", batch_size=10, micro_batch_size=4)
    main([*arguments, "--plan"])
    output = capsys.readouterr().out
    assert (
        "examples: 12; steps: 1 of 8 examples; micro-batches of a rank in a step: 2 of 4" in output
    )
    assert "--batch_size 10 is no multiple" in output
    assert "4 of 12 examples are left out in the last epoch" in output


def test_a_plan_hashes_no_weights(checkpoint, data_path, tmp_path, monkeypatch):
    """They may be 27 GB."""
    monkeypatch.setattr("ltu.training.trainer.sha256_of_weights", None)
    assert main([*flags(checkpoint, data_path, tmp_path / "run", **COMMON), "--plan"]) == 0


# --- a folder belongs to one run


def test_a_used_folder_is_refused(checkpoint, data_path, whole_run, tmp_path):
    before = sha256_of(whole_run / "model.safetensors")
    with pytest.raises(ValueError, match="holds a run .*--overwrite"):
        main(flags(checkpoint, data_path, whole_run, **COMMON, learning_rate=1e-3))
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    with pytest.raises(ValueError, match="holds a model"):
        main(flags(checkpoint, data_path, model, **COMMON))
    assert sha256_of(whole_run / "model.safetensors") == before


def test_overwrite_deletes_the_older_run(checkpoint, data_path, tmp_path, whole_run):
    """A run that overwrites another and is stopped early does not continue from the other."""
    folder = tmp_path / "run"
    settings = COMMON | {"learning_rate": 1e-3}
    main(flags(checkpoint, data_path, folder, **settings))
    arguments = flags(checkpoint, data_path, folder, **COMMON)
    interrupt_at_save(1, [*arguments, "--overwrite"], folder / "checkpoint-2" / "ltu_state.json")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    main([*arguments, "--resume_from_checkpoint", "last"])
    assert_same_run(folder, whole_run)


def test_a_checkpoint_of_an_older_run_is_skipped(
    checkpoint, data_path, tmp_path, whole_run, capsys
):
    folder = tmp_path / "run"
    arguments = flags(checkpoint, data_path, folder, **COMMON)
    interrupt_at_save(1, arguments, folder / "checkpoint-2" / "ltu_state.json")
    shutil.copytree(whole_run / "checkpoint-6", folder / "checkpoint-6")
    main([*arguments, "--resume_from_checkpoint", "last"])
    assert "checkpoint-6 is skipped: it is of an older run" in capsys.readouterr().err
    assert_same_run(folder, whole_run)


def test_a_folder_is_locked(checkpoint, data_path, tmp_path):
    arguments = flags(checkpoint, data_path, tmp_path / "run", **COMMON)
    model_args, data, run = parse_args(arguments)
    folder = RunFolder(run, prepare_run(model_args, data, run).record)
    folder.open()
    with pytest.raises(ValueError, match=r"Another run is writing .*run\."):
        main(arguments)
    folder.close()
    assert main(arguments) == 0
    assert not list((tmp_path / "run").glob("*lock*"))


def test_a_run_that_cannot_start_leaves_the_folder_as_it_was(checkpoint, data_path, tmp_path):
    """Otherwise the next attempt would need another folder."""
    with pytest.raises(ValueError, match="already has LoRA"):
        main(flags(checkpoint, data_path, tmp_path / "run", **COMMON, lora_r=16))
    assert main(flags(checkpoint, data_path, tmp_path / "run", **COMMON)) == 0


def test_a_run_does_not_delete_what_it_reads(checkpoint, data_path, tmp_path, whole_run):
    """Neither does it write its model over the one that it starts from."""
    base = tmp_path / "base"
    shutil.copytree(whole_run, base)
    before = sha256_of(base / "model.safetensors")
    language_model = ["--llm", str(checkpoint.parent / "llm"), "--overwrite"]
    for name in ("base", "link"):
        output = tmp_path / name
        if name == "link":
            output.symlink_to(base)
        with pytest.raises(ValueError, match="is also --base_model, which the run would replace"):
            main([*flags(base, data_path, output, **COMMON), *language_model])
    with pytest.raises(ValueError, match=r"--overwrite would delete .*checkpoint-6, but --base_mo"):
        main([*flags(base / "checkpoint-6", data_path, base, **COMMON), *language_model])
    assert sha256_of(base / "model.safetensors") == before


def test_overwrite_and_resume_exclude_each_other(checkpoint, data_path, tmp_path, capsys):
    arguments = flags(checkpoint, data_path, tmp_path, resume_from_checkpoint="last")
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--overwrite"])
    assert exit.value.code == 2
    assert "--overwrite would delete the run" in capsys.readouterr().err


def test_an_output_dir_that_is_a_file(checkpoint, data_path, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--output_dir .*file is no folder"):
        main(flags(checkpoint, data_path, tmp_path / "file"))


@pytest.mark.parametrize("resumed", ["", "checkpoint-4", "True"])
def test_a_checkpoint_that_is_not_there(checkpoint, data_path, tmp_path, resumed):
    """The error says what the flag takes."""
    arguments = flags(checkpoint, data_path, tmp_path / "run", resume_from_checkpoint=resumed)
    with pytest.raises(ValueError, match="no such folder.*last for the newest"):
        main(arguments)


# --- resuming another run


def changed_data(data_path: Path, folder: Path, kind: str) -> Path:
    """Write the dataset file again, in another order or with another answer."""
    examples = json.loads(data_path.read_text())
    if kind == "order":
        examples.reverse()
    else:
        examples[0]["output"] = "another answer"
    for example in examples:
        if example["audio_id"] != "empty":
            example["audio_id"] = str(data_path.parent / example["audio_id"])
    path = folder / "changed.json"
    path.write_text(json.dumps(examples))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "--seed: 42 there, 7 here"),
        ({"batch_size": 8}, "examples of a step: 4 there, 8 here"),
        ({"micro_batch_size": 1}, "--micro_batch_size: 2 there, 1 here"),
        ({"train_on_inputs": False}, "--train_on_inputs: True there, False here"),
        ({"learning_rate": 1e-3}, "--learning_rate: 0.01 there, 0.001 here"),
        ({"num_epochs": 3}, "--num_epochs: 2 there, 3 here"),
        ({"cutoff_len": 40}, "--cutoff_len: 108 there, 40 here"),
        ({"val_set_size": 2}, "--val_set_size: 0 there, 2 here"),
        ({"freeze_audio_tower": True}, "--freeze_audio_tower: False there, True here"),
        ({"weight_decay": 0.1}, "--weight_decay: 0.0 there, 0.1 here"),
        ({"data": "order"}, "the contents of --data_path"),
        ({"data": "content"}, "the contents of --data_path"),
    ],
)
@pytest.mark.parametrize("resumed", ["last", "checkpoint-4"])
def test_another_run_is_not_resumed(
    checkpoint, data_path, whole_run, tmp_path, change, message, resumed
):
    change = dict(change)
    if "data" in change:
        data_path = changed_data(data_path, tmp_path, change.pop("data"))
    output = whole_run
    if resumed != "last":
        resumed = str(whole_run / resumed)
        output = tmp_path / "run"
    settings = COMMON | change | {"resume_from_checkpoint": resumed}
    with pytest.raises(ValueError, match="is of another run") as error:
        main(flags(checkpoint, data_path, output, **settings))
    assert message in str(error.value)


def test_a_run_of_a_version_without_a_flag_had_its_default(
    checkpoint, data_path, whole_run, tmp_path
):
    """Its record lacks the flag, which must not make it the same run with any value."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    for path in [folder / "ltu_state.json", *folder.glob("checkpoint-*/ltu_state.json")]:
        record = json.loads(path.read_text())
        del record["arguments"]["projector_learning_rate"]
        path.write_text(json.dumps(record))
    settings = COMMON | {"resume_from_checkpoint": "last"}
    assert main(flags(checkpoint, data_path, folder, **settings)) == 0
    message = "--projector_learning_rate: None there, 0.001 here"
    with pytest.raises(ValueError, match=message):
        main(flags(checkpoint, data_path, folder, **settings, projector_learning_rate=1e-3))


def test_flags_that_change_neither_loss_nor_order_may_differ(
    checkpoint, data_path, tmp_path, whole_run
):
    settings = COMMON | {"save_steps": 3, "save_total_limit": 5, "num_workers": 1}
    settings |= {
        "resume_from_checkpoint": whole_run / "checkpoint-4",
        "gradient_checkpointing": True,
    }
    main(flags(checkpoint, data_path, tmp_path / "run", **settings))
    assert [loss for _, loss, _ in losses(tmp_path / "run")] == pytest.approx(
        [loss for _, loss, _ in losses(whole_run)], abs=1e-6
    )


def test_a_finished_run_is_not_trained_again(checkpoint, data_path, whole_run, capsys):
    before = sha256_of(whole_run / "ltu_state.json")
    arguments = flags(checkpoint, data_path, whole_run, **COMMON, resume_from_checkpoint="last")
    assert main(arguments) == 0
    assert "is finished" in capsys.readouterr().out
    assert sha256_of(whole_run / "ltu_state.json") == before


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["cut", "missing"])
def test_a_damaged_model_is_not_finished(
    checkpoint, data_path, tmp_path, whole_run, capsys, file, kind
):
    """Otherwise the next stage would be started from nothing."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    damage(folder / file, kind)
    arguments = flags(checkpoint, data_path, folder, **COMMON)
    with pytest.raises(ValueError, match=f"is finished, but {file}"):
        main([*arguments, "--skip_finished"])
    assert main([*arguments, "--skip_finished", "--resume_from_checkpoint", "auto"]) == 0
    assert f"is written again: {file}" in capsys.readouterr().err
    assert_same_run(folder, whole_run)


def test_settings_of_the_base_model_are_compared(checkpoint, data_path, tmp_path, stopped_run):
    """The weights alone do not tell what a model computes."""
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    config = json.loads((changed / "config.json").read_text())
    config["lora"]["lora_alpha"] = 32
    (changed / "config.json").write_text(json.dumps(config))
    arguments = flags(changed, data_path, stopped_run, **COMMON, resume_from_checkpoint="last")
    arguments += ["--llm", str(checkpoint.parent / "llm")]
    with pytest.raises(ValueError, match="the settings in --base_model"):
        main(arguments)


def run_record(checkpoint: Path, data_path: Path, folder: Path, **more: object) -> dict:
    """Return the record of a run that is not started."""
    return prepare_run(*parse_args(flags(checkpoint, data_path, folder, **more))).record


@pytest.mark.parametrize(("count", "message"), [(12, None), (10, "which the order depends: 2")])
def test_another_number_of_processes(checkpoint, tmp_path, count, message):
    """It changes the order of examples, and the number of steps, if a micro-batch is not full."""
    data_path = write_rows(tmp_path / "data", count)
    arguments = flags(checkpoint, data_path, tmp_path / "two", **COMMON)
    for rank in start_ranks(2, "ltu.finetune", arguments, tmp_path / "output"):
        rank.join(PATIENCE)
        assert rank.exitcode == 0, (tmp_path / "output.0").read_text()[-3000:]
    resumed = tmp_path / "two" / "checkpoint-4"
    settings = COMMON | {"resume_from_checkpoint": resumed}
    arguments = flags(checkpoint, data_path, tmp_path / "one", **settings)
    if message is None:
        assert main(arguments) == 0
        assert len(losses(tmp_path / "one")) == 6
    else:
        with pytest.raises(ValueError, match=message):
            main(arguments)


def test_evaluations_are_compared_if_the_run_depends_on_them(checkpoint, data_path, tmp_path):
    settings = {"val_set_size": 2, "eval_strategy": "steps"}
    best = settings | {"load_best_model_at_end": True, "save_steps": 2, "eval_steps": 2}
    other_steps = best | {"eval_steps": 1}
    plateau = settings | {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": 2}

    def differences(first: dict, second: dict) -> str:
        one = run_record(checkpoint, data_path, tmp_path, **first)
        two = run_record(checkpoint, data_path, tmp_path, **second)
        return "; ".join(find_differences(one, two))

    assert "--load_best_model_at_end" in differences(best, best | {"load_best_model_at_end": False})
    assert differences(best, other_steps) == "--eval_steps: 2 there, 1.0 here"
    assert "--eval_steps" in differences(plateau, plateau | {"eval_steps": 1})
    linear = plateau | {"lr_scheduler_type": "linear"}
    assert not differences(linear, linear | {"eval_steps": 1})
    # Flags without an effect on training.
    harmless = {
        "add_eos_token": True,
        "ignored_keys": "note",
        "prompt_template_name": "alpaca_short",
    }
    assert not differences({}, harmless)


# --- incomplete checkpoints


@pytest.fixture
def stopped_run(whole_run: Path, tmp_path: Path) -> Path:
    """A run with the complete checkpoints 4 and 6, which has not written its model."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    (folder / "model.safetensors").unlink()
    state = json.loads((folder / "ltu_state.json").read_text())
    (folder / "ltu_state.json").write_text(json.dumps(state | {"finished": False, "step": 0}))
    return folder


@pytest.mark.parametrize("kind", ["cut", "missing", "changed"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_skipped_and_named(
    checkpoint, data_path, stopped_run, whole_run, capsys, file, kind
):
    newest = stopped_run / "checkpoint-6"
    damage(newest / file, kind)
    arguments = flags(checkpoint, data_path, stopped_run, **COMMON)
    with pytest.raises(ValueError, match=rf"checkpoint-6 is not complete: .*{file}"):
        main([*arguments, "--resume_from_checkpoint", str(newest)])
    assert main([*arguments, "--resume_from_checkpoint", "last"]) == 0
    assert re.search(rf"checkpoint-6 is skipped: .*{file}", capsys.readouterr().err)
    assert_same_run(stopped_run, whole_run)


def test_without_a_complete_checkpoint(checkpoint, data_path, stopped_run, whole_run):
    """`last` is an error, `auto` starts the run again."""
    for path in stopped_run.glob("checkpoint-*/optimizer.pt"):
        damage(path, "cut")
    arguments = flags(checkpoint, data_path, stopped_run, **COMMON)
    with pytest.raises(ValueError, match="no complete checkpoint .*checkpoint-4 is skipped"):
        main([*arguments, "--resume_from_checkpoint", "last"])
    assert main([*arguments, "--resume_from_checkpoint", "auto"]) == 0
    assert_same_run(stopped_run, whole_run)


def test_all_steps_are_trained_but_the_model_is_not_written(
    checkpoint, data_path, stopped_run, whole_run
):
    """The newest checkpoint has the last step, so that nothing is left to train."""
    arguments = flags(checkpoint, data_path, stopped_run, **COMMON, resume_from_checkpoint="last")
    assert main(arguments) == 0
    assert_same_run(stopped_run, whole_run)


# --- interrupted writes


def writes_of_a_save(checkpoint: Path, data_path: Path, folder: Path) -> int:
    """Return how many writes follow on the first complete checkpoint."""
    arguments = flags(checkpoint, data_path, folder, **COMMON)
    return interrupt_at_save(10**6, arguments, folder / "checkpoint-2" / "ltu_state.json")


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_interrupted_at_a_write(checkpoint, data_path, tmp_path, whole_run, every):
    """Whichever write is the last one, the run continues as if it had not been interrupted."""
    count = writes_of_a_save(checkpoint, data_path, tmp_path / "counted")
    assert count > 40
    print(f"{count} writes")
    for number in range(1, count + 1, every):
        folder = tmp_path / str(number)
        arguments = flags(checkpoint, data_path, folder, **COMMON)
        start = folder / "checkpoint-2" / "ltu_state.json"
        assert interrupt_at_save(number, arguments, start) == number
        assert main([*arguments, "--resume_from_checkpoint", "last"]) == 0, number
        assert_same_run(folder, whole_run)


# --- disks, signals and kills


def test_a_full_disk(checkpoint, data_path, tmp_path, whole_run, monkeypatch):
    """The run ends with one line; the incomplete checkpoint does not stay on the disk."""
    folder = tmp_path / "run"
    arguments = flags(checkpoint, data_path, folder, **COMMON)
    with monkeypatch.context() as patch:
        limit_file_size(patch, "_save_checkpoint", is_step_4, 4096)
        with pytest.raises(OSError, match="checkpoint-4 cannot be written .*If the disk is full"):
            main(arguments)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert main([*arguments, "--resume_from_checkpoint", "last"]) == 0
    assert_same_run(folder, whole_run)


def test_a_full_disk_at_the_end(checkpoint, data_path, tmp_path, whole_run, monkeypatch):
    """All steps are trained: the model is written when there is space again."""
    folder = tmp_path / "run"
    arguments = flags(checkpoint, data_path, folder, **COMMON)
    with monkeypatch.context() as patch:
        limit_file_size(patch, "save_model", is_final_save, 8192)
        with pytest.raises(OSError, match="run cannot be written .*If the disk is full"):
            main(arguments)
    assert main([*arguments, "--resume_from_checkpoint", "last"]) == 0
    assert_same_run(folder, whole_run)


def test_ctrl_c_is_one_line(capsys):
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        run_command(command)
    assert exit.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_sigterm_saves_and_has_its_own_status(
    checkpoint, data_path, tmp_path, whole_run, monkeypatch, capsys
):
    """It comes in the first micro-batch of step 3, after which no checkpoint was due."""
    folder = tmp_path / "run"
    arguments = flags(checkpoint, data_path, folder, **COMMON)
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        send_sigterm(patch)
        assert main(arguments) == STOPPED == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert "SIGTERM: stopped at step 3 of 6" in capsys.readouterr().err
    assert what_is_incomplete(folder / "checkpoint-3") is None
    assert not (folder / "model.safetensors").exists()
    assert main([*arguments, "--resume_from_checkpoint", "last"]) == 0
    assert_same_run(folder, whole_run)


@pytest.mark.parametrize("moment", ["training", "evaluation"])
def test_sigterm_of_all_processes(checkpoint, data_path, tmp_path, monkeypatch, moment):
    """Slurm sends it to the workers that load audio too; these must not end the run."""
    stock_loss = LtuTrainer.compute_loss
    was_sent = []

    def compute_loss(self, model, *args, **kwargs):
        if self.state.global_step == 2 and model.training == (moment == "training"):
            workers = multiprocessing.active_children()
            if not was_sent and workers:
                pids = [str(worker.pid) for worker in workers] + [str(os.getpid())]
                # A worker takes a SIGTERM of its own parent for a regular end.
                subprocess.run(["kill", "-TERM", *pids], check=True)
                was_sent.append(pids)
                time.sleep(0.1)  # Until a worker that does not ignore it has ended.
        return stock_loss(self, model, *args, **kwargs)

    settings = COMMON | {"num_workers": 1, "val_set_size": 4, "eval_steps": 2}
    arguments = flags(checkpoint, data_path, tmp_path / "run", **settings)
    arguments += ["--dataloader_prefetch_factor", "1", "--dataloader_persistent_workers"]
    with monkeypatch.context() as patch:
        patch.setattr(LtuTrainer, "compute_loss", compute_loss)
        assert main(arguments) == STOPPED
    assert was_sent
    assert what_is_incomplete(tmp_path / "run" / "checkpoint-3") is None


def test_sigterm_of_one_rank_stops_all(checkpoint, data_path, tmp_path):
    """It has no end of its own, so that the machine's speed does not matter."""
    folder = tmp_path / "run"
    settings = {"save_steps": 1, "max_steps": 100_000, "disable_tqdm": True}
    arguments = flags(checkpoint, data_path, folder, **settings)
    ranks = start_ranks(2, "ltu.finetune", arguments, tmp_path / "output")
    wait_until((folder / "checkpoint-1" / "ltu_state.json").exists)
    ranks[1].terminate()
    for rank in ranks:
        rank.join(PATIENCE)
    assert [rank.exitcode for rank in ranks] == [STOPPED, STOPPED]
    step = int(re.search(r"stopped at step (\d+)", (tmp_path / "output.0").read_text())[1])
    assert what_is_incomplete(folder / f"checkpoint-{step}") is None


@pytest.mark.slow
def test_two_ranks_killed_at_a_write(checkpoint, data_path, tmp_path):
    """Rank 0, which writes nearly all files, is killed at every third of its writes."""

    def run(folder: Path, module: str = "ltu.finetune", **environment: str) -> list[int]:
        arguments = flags(checkpoint, data_path, folder, **COMMON, disable_tqdm=True)
        arguments += ["--resume_from_checkpoint", "auto"]
        ranks = start_ranks(2, module, arguments, tmp_path / "output", **environment)
        ranks[0].join(PATIENCE)
        if ranks[0].exitcode != 0:
            ranks[1].kill()
        ranks[1].join(PATIENCE)
        return [rank.exitcode for rank in ranks]

    whole = tmp_path / "whole"
    assert run(whole) == [0, 0]
    num_kills = 0
    for number in range(1, 60, 3):
        folder = tmp_path / str(number)
        start = folder / "checkpoint-2" / "ltu_state.json"
        killed = {"KILL_AT_WRITE": str(number), "KILL_FROM": str(start)}
        num_kills += run(folder, "tests.interruption", **killed)[0] == -signal.SIGKILL
        assert run(folder) == [0, 0], number
        assert_same_run(folder, whole)
    print(f"{num_kills} kills")
    assert num_kills > 15


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_random_kills(checkpoint, tmp_path, num_ranks):
    """A run is killed at 20 random moments, and continues after each as if it had not been."""
    data_path = write_rows(tmp_path / "data", 12, without_audio=3)
    settings = COMMON | {"num_epochs": 8, "save_steps": 1, "disable_tqdm": True}

    def start(folder: Path, *more: str) -> list:
        arguments = [*flags(checkpoint, data_path, folder, **settings), *more]
        output = tmp_path / "output"
        if num_ranks == 1:
            return [start_command("ltu.finetune", arguments, output)]
        return start_ranks(num_ranks, "ltu.finetune", arguments, output)

    def wait(ranks: list) -> list[int]:
        for rank in ranks:
            rank.join(PATIENCE)
        return [rank.exitcode for rank in ranks]

    # The first run also starts the server that forks all others, so time the second one.
    assert wait(start(tmp_path / "first")) == [0] * num_ranks
    whole = tmp_path / "whole"
    begin = time.monotonic()
    assert wait(start(whole)) == [0] * num_ranks
    seconds = time.monotonic() - begin

    random = Random(0)
    num_kills = 0
    num_runs = 0
    while num_kills < 20:
        num_runs += 1
        folder = tmp_path / f"run{num_runs}"
        while not (folder / "model.safetensors").exists():
            ranks = start(folder, "--resume_from_checkpoint", "auto")
            if num_kills < 20:
                ranks[0].join(random.uniform(0, seconds))
                for rank in ranks:
                    rank.kill()
            num_kills += wait(ranks)[0] == -signal.SIGKILL
        assert wait(start(folder, "--resume_from_checkpoint", "auto")) == [0] * num_ranks
        assert_same_run(folder, whole)
    print(f"{num_ranks} ranks: {num_kills} kills in {num_runs} runs")
