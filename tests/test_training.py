"""Tests training: the original's steps, learning rates and losses, ranks, and invalid examples."""

import json
import os
import pickle
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import get_length_grouped_indices

from ltu import LtuForConditionalGeneration
from ltu.data.audio import AudioError, load_audio
from ltu.data.check_examples import check_audio, read_examples
from ltu.data.dataset_parser import DatasetError
from ltu.files import run_command
from ltu.finetune import main
from ltu.training.arguments import parse_args, parse_list
from ltu.training.batch_sampler import MicroBatchSampler, batches_per_rank, total_steps
from ltu.training.dataset import QaDataset
from ltu.training.trainer import make_trainer
from tests.machine import PATIENCE
from tests.test_scripts import run_script
from tests.tiny import LORA, start_ranks, write_checkpoint, write_llm, write_rows
from tests.tiny import training_flags as flags


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    """A dataset file of 11 examples."""
    return write_rows(tmp_path_factory.mktemp("rows"), 11, without_audio=3)


def losses(output):
    """Return the entries of a run's log that have a training loss."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def values(entries, key):
    return [entry[key] for entry in entries]


# --- steps, learning rates, losses

# (examples, micro-batch size, accumulation, ranks, epochs, steps) of the released logs and of the
# toy runs in the original's README.
RELEASED_RUNS = [
    (2_072_481, 8, 8, 4, 2, 16_190),
    (2_072_481, 6, 10, 4, 2, 17_270),
    (9_641_740, 7, 10, 4, 1, 34_434),
    (9_397_030, 4, 16, 4, 2, 73_414),
    (6_306, 4, 16, 4, 1, 24),
    (8_769, 4, 16, 4, 1, 34),
]


@pytest.mark.parametrize(
    "count, micro_batch_size, accumulation, ranks, epochs, steps", RELEASED_RUNS
)
def test_steps_of_the_released_runs(count, micro_batch_size, accumulation, ranks, epochs, steps):
    assert total_steps(count, micro_batch_size, accumulation, ranks, epochs) == steps


def test_logged_epoch_of_the_released_runs():
    assert 16_000 * 8 / batches_per_rank(2_072_481, 8, 4) == 1.9763456134391502


def test_leftover_micro_batches_join_the_next_epoch(checkpoint, data_path, tmp_path):
    """Each of 2 epochs has 6 micro-batches, the last with 1 example: 2 * (6 // 4) = 2 steps."""
    main(flags(checkpoint, data_path, tmp_path / "run", batch_size=8, num_epochs=2))
    history = losses(tmp_path / "run")
    assert values(history, "step") == [1, 2]
    assert values(history, "learning_rate") == [5e-3, 0.0]
    assert values(history, "epoch") == [4 / 6, 8 / 6]


@pytest.mark.parametrize("group", [False, True])
def test_loss_is_a_mean_of_micro_batch_means(checkpoint, data_path, tmp_path, group):
    """Step 2 has micro-batches 5 and 6 of the first epoch, and 1 and 2 of the second."""
    arguments = flags(
        checkpoint,
        data_path,
        tmp_path / "run",
        batch_size=8,
        num_epochs=2,
        group_by_length=group,
    )
    trainer = make_trainer(*parse_args(arguments))
    sampler = trainer.micro_batches
    assert len(list(sampler)) == 8
    sampler.total_batches = 12  # Both epochs, to their ends.
    micro_batches = list(sampler)
    sampler.total_batches = 8
    assert len(micro_batches) == 12
    assert len(micro_batches[5]) == 1
    assert sorted(sum(micro_batches[6:], [])) == list(range(11))
    means = []
    with torch.no_grad():
        for indices in micro_batches[:8]:
            batch = trainer.data_collator([trainer.train_dataset[index] for index in indices])
            means.append(float(trainer.model(**batch).loss))
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The first step has a learning rate of 0, so the second step still has the initial weights.
    assert found == pytest.approx([sum(means[:4]) / 4, sum(means[4:]) / 4], abs=1e-5)


def test_learning_rate_follows_the_original_schedule(checkpoint, data_path, tmp_path):
    rate = 2e-4
    warmup = 3
    total = 12
    arguments = flags(
        checkpoint,
        data_path,
        tmp_path / "run",
        batch_size=2,
        num_epochs=2,
        learning_rate=rate,
        warmup_steps=warmup,
    )
    main(arguments)
    rising = [rate * step / warmup for step in range(1, warmup)]
    falling = [rate * (total - step) / (total - warmup) for step in range(warmup, total + 1)]
    found = values(losses(tmp_path / "run"), "learning_rate")
    assert found == pytest.approx(rising + falling, rel=1e-12, abs=1e-20)


def test_resume_equals_an_uninterrupted_run(checkpoint, data_path, tmp_path):
    common = {"num_epochs": 2, "save_steps": 3}
    main(flags(checkpoint, data_path, tmp_path / "whole", **common))
    resumed_from = tmp_path / "whole" / "checkpoint-3"
    main(
        flags(
            checkpoint,
            data_path,
            tmp_path / "resumed",
            **common,
            resume_from_checkpoint=resumed_from,
        )
    )
    whole = values(losses(tmp_path / "whole"), "loss")
    resumed = values(losses(tmp_path / "resumed"), "loss")
    assert resumed[-3:] == pytest.approx(whole[-3:], abs=1e-6)
    assert len(whole) == 6


@pytest.mark.parametrize("group", [False, True])
def test_every_example_once_an_epoch_on_any_number_of_ranks(group):
    lengths = torch.tensor([5 + index % 17 for index in range(23)]) if group else None
    one = list(MicroBatchSampler(23, 3, accumulation=4, epochs=2, lengths=lengths))
    assert sorted(sum(one[:8], [])) == list(range(23))

    ranks = []
    for rank in range(2):
        sampler = MicroBatchSampler(
            23, 3, accumulation=2, epochs=2, lengths=lengths, rank=rank, world_size=2
        )
        ranks.append(list(sampler))
    assert len(ranks[0]) == len(ranks[1]) == 2 * batches_per_rank(23, 3, 2)
    first_epoch = sum(ranks[0][:4] + ranks[1][:4], [])
    assert set(first_epoch) == set(range(23))
    assert len(first_epoch) == 24

    # The ranks take turns in the order of the micro-batches of one process.
    alternating = []
    for pair in zip(ranks[0][:3], ranks[1][:3], strict=True):
        alternating += pair
    assert alternating == one[:6]


@pytest.mark.parametrize("count", [1, 3, 40, 999, 12_345])
@pytest.mark.parametrize("accumulation", [1, 16])
def test_length_grouping_is_that_of_transformers(count, accumulation):
    lengths = torch.randint(1, 40, (count,), generator=torch.Generator().manual_seed(count))
    sampler = MicroBatchSampler(count, 4, accumulation, lengths=lengths, seed=7)
    expected = get_length_grouped_indices(
        lengths.tolist(),
        max(1, 4 * accumulation // 4),
        generator=torch.Generator().manual_seed(9),
    )
    assert sampler.order(2).tolist() == expected


def test_two_processes_equal_one(checkpoint, tmp_path):
    """Two ranks on gloo have the losses of one process with doubled accumulation."""
    data_path = write_rows(tmp_path / "rows", 16, without_audio=3)
    common = {"batch_size": 8, "num_epochs": 2, "group_by_length": True}
    main(flags(checkpoint, data_path, tmp_path / "one", **common))
    arguments = flags(checkpoint, data_path, tmp_path / "two", **common)
    for rank in start_ranks(2, "ltu.finetune", arguments, tmp_path / "output"):
        rank.join(PATIENCE)
        assert rank.exitcode == 0, (tmp_path / "output.0").read_text()[-3000:]
    one = losses(tmp_path / "one")
    two = losses(tmp_path / "two")
    assert len(one) == len(two) == 4
    assert values(two, "loss") == pytest.approx(values(one, "loss"), abs=2e-5)
    assert values(two, "grad_norm") == pytest.approx(values(one, "grad_norm"), rel=1e-3)


def test_command_of_two_machines(tmp_path):
    """A stage script starts this on each machine; `test_two_machines_meet` runs it."""
    environment = {"NNODES": "2", "RDZV_ENDPOINT": "host:29500", "EXP": str(tmp_path)}
    status, argv = run_script("stage2_all_cla", tmp_path, **environment)
    launcher = "-m train_scripts.torchrun --nnodes 2 --nproc_per_node 1 --rdzv_id ltu"
    launcher += " --rdzv_backend c10d --rdzv_endpoint host:29500 -m ltu.finetune"
    assert status == 0
    assert argv[: argv.index("ltu.finetune") + 1] == launcher.split()


@pytest.mark.slow  # Starts four interpreters.
def test_two_machines_meet(checkpoint, tmp_path):
    """A stage script that runs on two machines at once, as `slurm.sh` does, succeeds on both."""
    (tmp_path / "stage1_proj_cla").symlink_to(checkpoint)
    data_path = write_rows(tmp_path / "data", 16, without_audio=4)
    data_path.rename(tmp_path / "data" / "stage2.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "NNODES": "2",
        "NPROC": "1",
        "RDZV_ENDPOINT": endpoint,
        "PYTHON": sys.executable,
        "DATA": str(tmp_path / "data"),
        "EXP": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    command = ["bash", "train_scripts/ltu/stage2_all_cla.sh"]
    command += "--batch_size 8 --micro_batch_size 2 --num_epochs 1 --logging_steps 1".split()
    command += "--bf16 False --num_workers 0 --lora_r 4 --lora_alpha 8 --lora_dropout 0".split()
    machines = []
    for _ in range(2):
        machine = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        machines.append(machine)
    outputs = [machine.communicate(timeout=PATIENCE)[0] for machine in machines]
    statuses = [machine.returncode for machine in machines]
    assert statuses == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    state = json.loads((tmp_path / "stage2_all_cla" / "ltu_state.json").read_text())
    assert state["finished"]
    assert state["total_steps"] == 2
    rates = values(losses(tmp_path / "stage2_all_cla"), "learning_rate")
    assert rates == pytest.approx([1e-6, 2e-6], rel=1e-12)


@pytest.fixture(scope="module")
def mostly_text(tmp_path_factory):
    """A dataset file of 12 examples, of which one has audio."""
    return write_rows(tmp_path_factory.mktemp("text"), 12, without_audio=11)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_projector_training_with_micro_batches_without_audio(
    checkpoint, mostly_text, tmp_path, num_ranks
):
    """Such a micro-batch adds a gradient of zero, and the loss of one without audio stays."""
    settings = {"num_epochs": 2, "trainable_params": "proj", "warmup_steps": 0, "weight_decay": 0.1}
    arguments = flags(checkpoint, mostly_text, tmp_path / "run", **settings)
    for rank in start_ranks(num_ranks, "ltu.finetune", arguments, tmp_path / "output"):
        rank.join(PATIENCE)
        assert rank.exitcode == 0, (tmp_path / "output.0").read_text()[-3000:]
    norms = values(losses(tmp_path / "run"), "grad_norm")
    assert len(norms) == 6
    assert norms.count(0.0) == 4
    assert max(norms) > 0


def test_a_projector_cannot_be_trained_without_any_audio(checkpoint, tmp_path):
    data_path = write_rows(tmp_path / "data", 12, without_audio=12)
    settings = {"text_only": True, "trainable_params": "proj"}
    with pytest.raises(ValueError, match="--text_only trains nothing here"):
        main(flags(checkpoint, data_path, tmp_path / "run", **settings))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", "nan", "it must be a finite number"),
        ("learning_rate", "-1", "it must be at least 0"),
        ("max_grad_norm", "nan", "it must be a finite number"),
        ("max_grad_norm", "-1", "it must be at least 0"),
        ("warmup_steps", "inf", "it must be a finite number"),
        ("seed", "-1", "it must be at least 0"),
        ("seed", str(2**32), "it must be at most 4294967295"),
        ("dataloader_in_order", "False", "the order of examples is the original's"),
    ],
)
def test_flags_that_are_out_of_range(checkpoint, data_path, tmp_path, capsys, name, value, message):
    with pytest.raises(SystemExit) as exit:
        parse_args([*flags(checkpoint, data_path, tmp_path / "run"), f"--{name}", value])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert f"--{name}" in error
    assert message in error


def test_a_scheduler_that_lacks_its_settings(checkpoint, data_path, tmp_path):
    settings = {"lr_scheduler_type": "warmup_stable_decay"}
    with pytest.raises(ValueError, match="--lr_scheduler_kwargs .*num_decay_steps"):
        main(flags(checkpoint, data_path, tmp_path / "run", **settings))


# --- stages


def test_stage_one_then_stage_two(tmp_path, data_path):
    initial = write_checkpoint(tmp_path / "init", write_llm(tmp_path / "llm"))
    main(
        flags(
            initial,
            data_path,
            tmp_path / "stage1",
            trainable_params="proj",
            lora_target_modules='["dummy"]',
        )
    )
    state = json.loads((tmp_path / "stage1" / "ltu_state.json").read_text())
    assert state["finished"]
    assert state["parent"]["name"] == "init"
    assert state["parameters"]["trainable"] == 32 * 64 + 64

    before = LtuForConditionalGeneration.from_pretrained(tmp_path / "init")
    after = LtuForConditionalGeneration.from_pretrained(tmp_path / "stage1")
    assert after.config.lora is None
    changed = set()
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        if not torch.equal(old, new):
            changed.add(name.split(".")[0])
    assert changed == {"multi_modal_projector"}

    main(
        flags(
            tmp_path / "stage1",
            data_path,
            tmp_path / "stage2",
            lora_target_modules="[q_proj,v_proj]",
            lora_r=4,
        )
    )
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "stage2")
    assert trained.config.lora == {
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
    }
    largest = [
        parameter.abs().max() for name, parameter in trained.named_parameters() if "lora_B" in name
    ]
    assert any(value > 0 for value in largest)


def test_flags_that_contradict_the_checkpoint_are_refused(checkpoint, data_path, tmp_path):
    with pytest.raises(ValueError, match="already has LoRA"):
        main(flags(checkpoint, data_path, tmp_path / "run", lora_r=16))
    with pytest.raises(ValueError, match="template"):
        main(flags(checkpoint, data_path, tmp_path / "run", prompt_template_name="vicuna"))


def test_held_out_loss_at_each_save(checkpoint, data_path, tmp_path):
    main(flags(checkpoint, data_path, tmp_path / "run", val_set_size=3, save_steps=1))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "eval_loss" in entry]) == 2


def test_plan_and_show_batch(checkpoint, data_path, tmp_path, capsys):
    main([*flags(checkpoint, data_path, tmp_path / "run"), "--plan"])
    assert "examples: 11; steps: 3 of 4" in capsys.readouterr().out
    arguments = flags(checkpoint, data_path, tmp_path / "run", train_on_inputs=False)
    main([*arguments, "--show_batch"])
    shown = capsys.readouterr().out
    for kind in ("audio", "pad", "prompt", "answer"):
        assert f" {kind} " in shown
    lines = [line for line in shown.splitlines() if " prompt " in line]
    assert lines
    assert all("loss no" in line for line in lines)
    assert not (tmp_path / "run" / "model.safetensors").exists()


# --- flags


@pytest.mark.parametrize(
    "wrong", [["--learning_rat", "1"], ["--no_such_flag"], ["--trainable_params", "everything"]]
)
def test_a_typo_stops_the_run(checkpoint, data_path, tmp_path, wrong, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args([*flags(checkpoint, data_path, tmp_path), *wrong])
    assert end.value.code == 2


def test_a_stray_file_sets_no_flags(checkpoint, data_path, tmp_path, monkeypatch):
    """`HfArgumentParser` reads COMMAND.args next to the command by default."""
    (tmp_path / "finetune.args").write_text("--seed 7")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "finetune.py")])
    _, _, run = parse_args(flags(checkpoint, data_path, tmp_path))
    assert run.seed == 42


def test_lists_parse_as_in_the_original():
    expected = ["q_proj", "v_proj"]
    assert parse_list("[q_proj,v_proj]") == parse_list('["q_proj", "v_proj"]') == expected
    assert parse_list('["dummy"]') == parse_list("['dummy']") == ["dummy"]


# --- examples


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "example 2: no 'output'"),
        (
            '[{"instruction": 1, "output": "b", "audio_id": "empty"}]',
            "example 1: 'instruction' is a int",
        ),
        ('{"instruction": "a", "output": "b"}\n{"instruction": \n', "example 2, byte 52"),
        ('[{"instruction": "a" "output"}]', "example 1, byte 21"),
        ("[]", "contains no examples"),
        ('[["a"]]', "example 1, byte 1: a list"),
        ('[{"instruction": "a", "output": "b", "audio_id": 3}]', "example 1: 'audio_id' is a int"),
    ],
)
def test_an_invalid_example_is_named(tmp_path, content, message):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DatasetError) as error:
        read_examples(tmp_path / "rows.json")
    assert message in str(error.value)
    assert "rows.json" in str(error.value)


def test_a_list_and_lines_give_the_same_examples(tmp_path, data_path):
    examples = json.loads(data_path.read_text())
    lines_path = data_path.parent / "rows.jsonl"
    lines_path.write_text("\n".join(json.dumps(example) for example in examples))
    found = read_examples(data_path)
    assert found == read_examples(lines_path)
    assert found[0]["audio"] is None
    assert found[5]["audio"] == str(data_path.parent / "5.wav")


def write_broken_rows(tmp_path):
    """Write a dataset file of 8 examples, of which two have a clip that cannot be decoded."""
    data_path = write_rows(tmp_path, 8)
    (tmp_path / "1.wav").write_bytes(b"not audio")
    (tmp_path / "2.wav").unlink()
    return data_path


def test_the_error_of_a_worker_has_no_traceback(checkpoint, tmp_path):
    """A worker of the data loader sends its error with a traceback in the message."""
    data_path = write_broken_rows(tmp_path)
    arguments = flags(checkpoint, data_path, tmp_path / "run", num_workers=1)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main(arguments))
    assert end.value.code.startswith("error: Examples whose clip cannot be decoded")
    assert "Traceback" not in end.value.code


def test_undecodable_clips_are_found_at_the_start(checkpoint, tmp_path):
    data_path = write_broken_rows(tmp_path)
    errors = check_audio(read_examples(data_path)).values()
    assert {error.reason for error in errors} == {"unreadable", "missing"}
    with pytest.raises(ValueError, match="that cannot be decoded: 2, more"):
        main([*flags(checkpoint, data_path, tmp_path / "run"), "--check_audio"])


def test_undecodable_clips_are_skipped_counted_and_named(checkpoint, tmp_path):
    data_path = write_broken_rows(tmp_path)
    main(flags(checkpoint, data_path, tmp_path / "run", max_bad=2, num_workers=1, num_epochs=2))
    state = json.loads((tmp_path / "run" / "ltu_state.json").read_text())
    assert sorted(state["skipped"]) == ["1.wav", "2.wav"]
    assert state["finished"]
    with pytest.raises(DatasetError, match="more than --max_bad 1"):
        main(flags(checkpoint, data_path, tmp_path / "run2", max_bad=1))


def test_held_out_examples_that_are_skipped_are_named(checkpoint, tmp_path):
    """All six clips but two cannot be decoded, so some of the held-out ones are among them."""
    data_path = write_rows(tmp_path, 8)
    for number in range(2, 8):
        (tmp_path / f"{number}.wav").write_bytes(b"not audio")
    settings = {"max_bad": 8, "val_set_size": 3, "num_epochs": 1}
    main(flags(checkpoint, data_path, tmp_path / "run", **settings))
    state = json.loads((tmp_path / "run" / "ltu_state.json").read_text())
    assert sorted(state["skipped"]) == [f"{number}.wav" for number in range(2, 8)]


def test_a_question_that_fills_the_cutoff_is_refused(checkpoint, data_path, tmp_path):
    with pytest.raises(DatasetError, match="Example 1: no answer is left"):
        main(flags(checkpoint, data_path, tmp_path / "run", train_on_inputs=False, cutoff_len=10))


def test_workers_can_be_spawned(checkpoint, data_path, tmp_path):
    trainer = make_trainer(*parse_args(flags(checkpoint, data_path, tmp_path / "run")))
    copy = pickle.loads(pickle.dumps(trainer.train_dataset))
    assert copy[5]["input_ids"] == trainer.train_dataset[5]["input_ids"]


def test_a_skipped_example_is_replaced_not_invented(tmp_path):
    dataset = QaDataset(
        read_examples(write_broken_rows(tmp_path)),
        encode=lambda example: ([1], [1]),
        load_features=lambda example: torch.tensor(load_audio(example["audio"])),
        max_bad=2,
    )
    assert torch.equal(dataset[1]["input_features"], dataset[3]["input_features"])
    assert dataset.skipped == ["1.wav", "2.wav"]
    with pytest.raises(AudioError):
        dataset.load_features(dataset.examples[1])
