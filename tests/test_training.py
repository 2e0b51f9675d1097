"""What the trainer promises: the original's steps, rates and means, ranks that agree, rows that are checked."""

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
from ltu.data.dataset_parser import RowError
from ltu.data.examples import check_audio, read_rows
from ltu.finetune import main
from ltu.training.arguments import parse_args, parse_list
from ltu.training.batch_sampler import MicroBatchSampler, batches_per_rank, total_steps
from ltu.training.dataset import QaDataset
from ltu.training.trainer import make_trainer
from tests.machine import PATIENCE
from tests.test_scripts import run_script
from tests.tiny import LORA, start_ranks, write_checkpoint, write_llm, write_rows


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), 11, without_audio=3)


def flags(start, rows, output, **more):
    defaults = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    settings = defaults | {"bf16": False, "num_workers": 0, "save_steps": 100} | more
    argv = ["--base_model", str(start), "--data_path", str(rows), "--output_dir", str(output)]
    return argv + [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def losses(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


# --- steps, rates, losses

# (rows, micro batch, accumulation, ranks, epochs, steps) of the released logs and the original README's toy runs.
RELEASED_RUNS = [
    (2_072_481, 8, 8, 4, 2, 16_190),
    (2_072_481, 6, 10, 4, 2, 17_270),
    (9_641_740, 7, 10, 4, 1, 34_434),
    (9_397_030, 4, 16, 4, 2, 73_414),
    (6_306, 4, 16, 4, 1, 24),
    (8_769, 4, 16, 4, 1, 34),
]


@pytest.mark.parametrize("rows_, micro, accumulation, ranks, epochs, steps", RELEASED_RUNS)
def test_steps_of_the_released_runs(rows_, micro, accumulation, ranks, epochs, steps):
    assert total_steps(rows_, micro, accumulation, ranks, epochs) == steps


def test_logged_epoch_of_the_released_runs():
    assert 16_000 * 8 / batches_per_rank(2_072_481, 8, 4) == 1.9763456134391502


def test_leftover_micro_batches_join_the_next_epoch(start, rows, tmp_path):
    """11 rows are 6 micro-batches (the last has 1 row) in each of 2 epochs; 4 a step make 2 * (6 // 4) = 2 steps."""
    main(flags(start, rows, tmp_path / "run", batch_size=8, num_epochs=2))
    history = losses(tmp_path / "run")
    assert [entry["step"] for entry in history] == [1, 2]
    assert [entry["learning_rate"] for entry in history] == [5e-3, 0.0]
    assert [entry["epoch"] for entry in history] == [4 / 6, 8 / 6]


@pytest.mark.parametrize("group", [False, True])
def test_loss_is_a_mean_of_micro_batch_means(start, rows, tmp_path, group):
    """Also across epochs: step 2 has micro-batches 5 and 6 of the first and 1 and 2 of the second."""
    arguments = flags(
        start, rows, tmp_path / "run", batch_size=8, num_epochs=2, group_by_length=group
    )
    trainer = make_trainer(*parse_args(arguments))
    micro = list(trainer.micro_batches)
    assert len(micro) == 12 and len(micro[5]) == 1 and sorted(sum(micro[6:], [])) == list(range(11))
    means = []
    with torch.no_grad():
        for indices in micro[:8]:
            batch = trainer.data_collator([trainer.train_dataset[index] for index in indices])
            means.append(float(trainer.model(**batch).loss))
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The first step runs at rate 0, so the second still sees the weights that the means were taken with.
    assert found == pytest.approx([sum(means[:4]) / 4, sum(means[4:]) / 4], abs=1e-5)


def test_rate_follows_the_original_schedule(start, rows, tmp_path):
    main(
        flags(
            start,
            rows,
            tmp_path / "run",
            batch_size=2,
            num_epochs=2,
            learning_rate=2e-4,
            warmup_steps=3,
        )
    )
    total = 12
    expected = [
        2e-4 * s / 3 if s < 3 else 2e-4 * (total - s) / (total - 3) for s in range(1, total + 1)
    ]
    found = [entry["learning_rate"] for entry in losses(tmp_path / "run")]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-20)


def test_resume_equals_an_uninterrupted_run(start, rows, tmp_path):
    common = {"num_epochs": 2, "save_steps": 3}
    main(flags(start, rows, tmp_path / "whole", **common))
    main(
        flags(
            start,
            rows,
            tmp_path / "again",
            **common,
            resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3",
        )
    )
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "again")
    assert [e["loss"] for e in again][-3:] == pytest.approx(
        [e["loss"] for e in whole][-3:], abs=1e-6
    )
    assert len(whole) == 6


@pytest.mark.parametrize("group", [False, True])
def test_every_row_once_an_epoch_on_any_number_of_ranks(group):
    lengths = torch.tensor([5 + index % 17 for index in range(23)]) if group else None
    one = list(MicroBatchSampler(23, 3, accumulation=4, epochs=2, lengths=lengths))
    assert sorted(index for batch in one[:8] for index in batch) == list(range(23))
    ranks = [
        list(
            MicroBatchSampler(
                23, 3, accumulation=2, epochs=2, lengths=lengths, rank=rank, world_size=2
            )
        )
        for rank in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1]) == 2 * batches_per_rank(23, 3, 2)
    seen = [index for rank in ranks for batch in rank[:4] for index in batch]
    assert set(seen) == set(range(23)) and len(seen) == 24
    assert [
        batch for pair in zip(*(rank[:3] for rank in ranks), strict=True) for batch in pair
    ] == one[:6]


@pytest.mark.parametrize("rows_", [1, 3, 40, 999, 12_345])
@pytest.mark.parametrize("accumulation", [1, 16])
def test_length_grouping_is_that_of_transformers(rows_, accumulation):
    lengths = torch.randint(1, 40, (rows_,), generator=torch.Generator().manual_seed(rows_))
    ours = MicroBatchSampler(rows_, 4, accumulation, lengths=lengths, seed=7).order(2).tolist()
    generator = torch.Generator().manual_seed(9)
    assert ours == get_length_grouped_indices(
        lengths.tolist(), max(1, 4 * accumulation // 4), generator=generator
    )


def test_two_processes_equal_one(start, tmp_path):
    """Two ranks on gloo reach the losses of one process with the same micro-batch size and doubled accumulation."""
    rows = write_rows(tmp_path / "rows", 16, without_audio=3)
    main(flags(start, rows, tmp_path / "one", batch_size=8, num_epochs=2, group_by_length=True))
    words = flags(start, rows, tmp_path / "two", batch_size=8, num_epochs=2, group_by_length=True)
    for rank in start_ranks(2, "ltu.finetune", words, tmp_path / "output"):
        rank.join(PATIENCE)
        assert rank.exitcode == 0, (tmp_path / "output.0").read_text()[-3000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 4
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], abs=2e-5)
    assert [e["grad_norm"] for e in two] == pytest.approx([e["grad_norm"] for e in one], rel=1e-3)


def test_command_of_two_machines(tmp_path):
    """What a stage script starts on each of them; `test_two_machines_meet` runs it."""
    environment = {"NNODES": "2", "RDZV_ENDPOINT": "host:29500", "EXP": str(tmp_path)}
    status, words = run_script("stage2_all_cla", tmp_path, **environment)
    launcher = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_id ltu"
    launcher += " --rdzv_backend c10d --rdzv_endpoint host:29500 -m ltu.finetune"
    assert status == 0
    assert words[: words.index("ltu.finetune") + 1] == launcher.split()


@pytest.mark.slow  # Starts four interpreters.
def test_two_machines_meet(start, tmp_path):
    """A stage script that runs on two machines at once, as `slurm.sh` starts it, ends well on both."""
    (tmp_path / "stage1_proj_cla").symlink_to(start)
    write_rows(tmp_path / "data", 16, without_audio=4).rename(tmp_path / "data" / "stage2.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "NNODES": "2",
        "NPROC": "1",
        "RDZV_ENDPOINT": endpoint,
        "PYTHON": sys.executable,
    }
    environment |= {"DATA": str(tmp_path / "data"), "EXP": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    flags = "--batch_size 8 --micro_batch_size 2 --num_epochs 1 --logging_steps 1 --bf16 False --num_workers 0"
    command = [
        "bash",
        "train_scripts/ltu/stage2_all_cla.sh",
        *flags.split(),
        "--lora_r",
        "4",
        "--lora_alpha",
        "8",
    ]
    command += ["--lora_dropout", "0"]
    machines = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=PATIENCE)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said[0][-2000:] + said[1][-2000:]
    state = json.loads((tmp_path / "stage2_all_cla" / "ltu_state.json").read_text())
    assert state["finished"] and state["total_steps"] == 2
    rates = [entry["learning_rate"] for entry in losses(tmp_path / "stage2_all_cla")]
    assert rates == pytest.approx([1e-6, 2e-6], rel=1e-12)


# --- stages


def test_stage_one_then_stage_two(tmp_path, rows):
    first = write_checkpoint(tmp_path / "init", write_llm(tmp_path / "llm"))
    main(
        flags(
            first,
            rows,
            tmp_path / "stage1",
            trainable_params="proj",
            lora_target_modules='["dummy"]',
        )
    )
    state = json.loads((tmp_path / "stage1" / "ltu_state.json").read_text())
    assert (
        state["finished"]
        and state["parent"]["name"] == "init"
        and state["parameters"]["trainable"] == 32 * 64 + 64
    )
    before, after = (
        LtuForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("init", "stage1")
    )
    changed = {
        name.split(".")[0]
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {"multi_modal_projector"} and after.config.lora is None
    main(
        flags(
            tmp_path / "stage1",
            rows,
            tmp_path / "stage2",
            lora_target_modules="[q_proj,v_proj]",
            lora_r=4,
        )
    )
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "stage2")
    assert trained.config.lora == {
        "r": 4,
        "alpha": 16,
        "dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
    }
    assert any(
        parameter.abs().max() > 0
        for name, parameter in trained.named_parameters()
        if "lora_B" in name
    )


def test_what_the_folder_says_is_not_contradicted(start, rows, tmp_path):
    with pytest.raises(ValueError, match="already has LoRA"):
        main(flags(start, rows, tmp_path / "run", lora_r=16))
    with pytest.raises(ValueError, match="template"):
        main(flags(start, rows, tmp_path / "run", prompt_template_name="vicuna"))


def test_held_out_loss_at_each_save(start, rows, tmp_path):
    main(flags(start, rows, tmp_path / "run", val_set_size=3, save_steps=1))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "eval_loss" in entry]) == 2


def test_plan_and_show_batch(start, rows, tmp_path, capsys):
    main([*flags(start, rows, tmp_path / "run"), "--plan"])
    assert "11 rows, 3 steps of 4" in capsys.readouterr().out
    main([*flags(start, rows, tmp_path / "run", train_on_inputs=False), "--show_batch"])
    shown = capsys.readouterr().out
    for kind in ("audio", "pad", "prompt", "answer"):
        assert f" {kind} " in shown
    lines = [line for line in shown.splitlines() if " prompt " in line]
    assert lines and all("loss no" in line for line in lines)
    assert not (tmp_path / "run" / "model.safetensors").exists()


# --- flags


@pytest.mark.parametrize(
    "wrong", [["--learning_rat", "1"], ["--no_such_flag"], ["--trainable_params", "everything"]]
)
def test_a_typo_stops_the_run(start, rows, tmp_path, wrong, capsys):
    with pytest.raises((SystemExit, ValueError)):
        parse_args([*flags(start, rows, tmp_path), *wrong])


def test_lists_parse_as_in_the_original():
    assert (
        parse_list("[q_proj,v_proj]") == parse_list('["q_proj", "v_proj"]') == ["q_proj", "v_proj"]
    )
    assert parse_list('["dummy"]') == parse_list("['dummy']") == ["dummy"]


# --- rows


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "row 2: no 'output'"),
        ('[{"instruction": 1, "output": "b"}]', "row 1: 'instruction' is a int"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": \n', "row 2, byte 52"),
        ('[{"instruction": "a" "output"}]', "row 1, byte 21"),
        ("[]", "no rows"),
        ('[["a"]]', "row 1, byte 1: a list"),
        ('[{"instruction": "a", "output": "b", "audio_id": 3}]', "row 1: 'audio_id' is a int"),
    ],
)
def test_a_bad_row_is_named(tmp_path, content, message):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(RowError) as error:
        read_rows(tmp_path / "rows.json")
    assert message in str(error.value) and "rows.json" in str(error.value)


def test_lists_and_lines_are_the_same(tmp_path, rows):
    parsed = json.loads(rows.read_text())
    (rows.parent / "rows.jsonl").write_text("\n".join(map(json.dumps, parsed)))
    assert read_rows(rows) == read_rows(rows.parent / "rows.jsonl")
    assert read_rows(rows)[0]["audio"] is None and read_rows(rows)[5]["audio"] == str(
        rows.parent / "5.wav"
    )


def broken_rows(tmp_path):
    rows = write_rows(tmp_path, 8)
    (tmp_path / "1.wav").write_bytes(b"not audio")
    (tmp_path / "2.wav").unlink()
    return rows


def test_unheard_clips_are_found_at_start(start, tmp_path):
    rows = broken_rows(tmp_path)
    assert {error.reason for error in check_audio(read_rows(rows)).values()} == {
        "unreadable",
        "missing",
    }
    with pytest.raises(ValueError, match="2 clips of .* cannot be heard"):
        main([*flags(start, rows, tmp_path / "run"), "--check_audio"])


def test_unheard_clips_are_skipped_counted_and_named(start, tmp_path):
    rows = broken_rows(tmp_path)
    main(flags(start, rows, tmp_path / "run", max_bad=2, num_workers=1, num_epochs=2))
    state = json.loads((tmp_path / "run" / "ltu_state.json").read_text())
    assert sorted(state["skipped"]) == ["1.wav", "2.wav"] and state["finished"]
    with pytest.raises(RowError, match="more than --max_bad 1"):
        main(flags(start, rows, tmp_path / "run2", max_bad=1))


def test_a_question_that_fills_the_cutoff_is_refused(start, rows, tmp_path):
    with pytest.raises(RowError, match="Row 1: no answer is left"):
        main(flags(start, rows, tmp_path / "run", train_on_inputs=False, cutoff_len=10))


def test_workers_can_be_spawned(start, rows, tmp_path):
    trainer = make_trainer(*parse_args(flags(start, rows, tmp_path / "run")))
    copy = pickle.loads(pickle.dumps(trainer.train_dataset))
    assert copy[5]["input_ids"] == trainer.train_dataset[5]["input_ids"]


def test_a_skipped_row_is_replaced_not_invented(tmp_path):
    rows = read_rows(broken_rows(tmp_path))
    dataset = QaDataset(
        rows, lambda row: ([1], [1]), lambda row: torch.tensor(load_audio(row["audio"])), max_bad=2
    )
    assert torch.equal(dataset[1]["input_features"], dataset[3]["input_features"])
    assert dataset.skipped == ["1.wav", "2.wav"]
    with pytest.raises(AudioError):
        dataset.load_features(dataset.rows[1])
