"""Tests that passes of any size train as micro-batches one by one do.

The reference is a run with one pass for each micro-batch, whose loss is transformers' own.
"""

import re
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from tiny import (
    LORA,
    start_ranks,
    training_flags,
    write_checkpoint,
    write_llm,
    write_rows,
)

from ltu.finetune import main
from ltu.models.configuration_ltu import IGNORED
from ltu.models.provenance import read_record
from ltu.training.arguments import parse_args
from ltu.training.batch_sampler import MicroBatchSampler
from ltu.training.forward_passes import Part, StepBatches, merge, split_micro_batch
from ltu.training.loss_log import read_log, with_loss
from ltu.training.trainer import LtuTrainer, NonFiniteError, make_trainer

PATIENCE = 300
# Steps of 5 micro-batches of 2 examples, over the ends of epochs. AdamW divides a gradient by its
# own size, also one that consists of rounding errors, so weights are compared after SGD.
COMMON = {"batch_size": 10, "num_epochs": 3, "warmup_steps": 0, "learning_rate": 1e-2}
COMMON |= {"optim": "sgd"}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    return write_checkpoint(root / "ltu", write_llm(root / "llm"), lora=LORA)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    """19 examples, of which 7 have no audio; an epoch ends with a micro-batch of one example."""
    return write_rows(tmp_path_factory.mktemp("data"), 19, without_audio=7)


def make(checkpoint, data_path, output, **more) -> LtuTrainer:
    flags = training_flags(checkpoint, data_path, output, **(COMMON | more))
    trainer = make_trainer(*parse_args(flags))
    trainer.args.save_strategy = "no"
    return trainer


def train(checkpoint, data_path, output, **more) -> LtuTrainer:
    trainer = make(checkpoint, data_path, output, **more)
    trainer.train()
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trained(trainer):
    parameters = trainer.model.named_parameters()
    return {name: p.detach().clone() for name, p in parameters if p.requires_grad}


def assert_same_training(other, one):
    """Compare losses and gradient norms to a relative 1e-6, and weights to 1e-6.

    Losses are about 7, where two neighbouring numbers of fp32 differ by 5e-7.
    """
    assert logged(other, "loss") == pytest.approx(logged(one, "loss"), rel=1e-6)
    assert logged(other, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-6)
    weights = trained(other)
    for name, value in trained(one).items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6, msg=name)


@contextmanager
def count_rows(trainer):
    """Yield a list that gets the number of rows of each pass."""
    rows = []

    def record(module, args, kwargs):
        rows.append(len(kwargs["input_ids"]))

    handle = trainer.model.register_forward_pre_hook(record, with_kwargs=True)
    yield rows
    handle.remove()


# --- equality


def positions(original: bool) -> dict:
    """Return the flags of the original's positions, with the attention that equals the original."""
    return {"original_positions": True, "attn_implementation": "eager"} if original else {}


@pytest.fixture(scope="module")
def one_by_one(checkpoint, data_path, tmp_path_factory):
    """Runs with a pass for each micro-batch, by `original_positions`."""
    folder = tmp_path_factory.mktemp("one_by_one")
    runs = {}
    for original in (False, True):
        trainer = make(checkpoint, data_path, folder / str(original), **positions(original))
        with count_rows(trainer) as rows:
            trainer.train()
        assert rows.count(2) == 27
        assert rows.count(1) == 3  # The remainders of three epochs.
        runs[original] = trainer
    return runs


@pytest.mark.parametrize(
    ("rows_per_pass", "rows"),
    [(1, [1] * 10), (4, [4, 4, 2]), (8, [6, 4]), (10, [10]), (1000, [10])],
)
@pytest.mark.parametrize("original", [False, True])
def test_passes_of_any_size(
    checkpoint, data_path, tmp_path, one_by_one, rows_per_pass, rows, original
):
    flags = {"rows_per_pass": rows_per_pass} | positions(original)
    trainer = make(checkpoint, data_path, tmp_path, **flags)
    with count_rows(trainer) as found:
        trainer.train()
    assert len(logged(trainer, "loss")) == 6
    assert_same_training(trainer, one_by_one[original])
    if not original:  # Otherwise micro-batches without audio are passes of their own.
        assert found[: len(rows)] == rows


@pytest.mark.parametrize("rows_per_pass", [1, 6])
def test_passes_with_adamw(checkpoint, data_path, tmp_path, rows_per_pass):
    one = train(checkpoint, data_path, tmp_path / "one", **ADAMW)
    other = train(checkpoint, data_path, tmp_path / "other", rows_per_pass=rows_per_pass, **ADAMW)
    assert logged(other, "loss") == pytest.approx(logged(one, "loss"), rel=1e-6)
    assert logged(other, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-6)


def test_the_default_on_a_cpu_is_a_micro_batch(checkpoint, data_path, tmp_path, one_by_one):
    trainer = train(checkpoint, data_path, tmp_path)
    assert trainer.rows_per_pass == 2
    assert logged(trainer, "loss") == logged(one_by_one[False], "loss")


@pytest.mark.parametrize("plan", ["proj", "full"])
def test_other_plans(checkpoint, data_path, tmp_path, plan):
    """With proj, micro-batches without audio give the projector no gradient."""
    flags = {"trainable_params": plan, "group_by_length": True, "train_on_inputs": False}
    one = train(checkpoint, data_path, tmp_path / "one", **flags)
    many = train(checkpoint, data_path, tmp_path / "many", rows_per_pass=6, **flags)
    assert_same_training(many, one)


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox", "gemma2"])
def test_other_language_models(data_path, tmp_path, kind):
    llm = write_llm(tmp_path / "llm", kind)
    base = write_checkpoint(tmp_path / "base", llm)
    flags = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0, "num_epochs": 1}
    one = train(base, data_path, tmp_path / "one", **flags)
    many = train(base, data_path, tmp_path / "many", rows_per_pass=10, **flags)
    assert_same_training(many, one)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("rows_per_pass", [1, 8])
def test_two_processes(checkpoint, tmp_path, rows_per_pass, original):
    """Two ranks with passes of any size have the losses of two ranks with micro-batches.

    With original positions, the ranks compute unequal numbers of passes.
    """
    data_path = write_rows(tmp_path / "rows", 22, without_audio=9)
    settings = COMMON | ADAMW | {"batch_size": 12, "num_epochs": 2, "original_positions": original}
    histories = {}
    for rows in ("auto", rows_per_pass):
        output = tmp_path / str(rows)
        flags = training_flags(checkpoint, data_path, output, rows_per_pass=rows, **settings)
        for rank in start_ranks(2, "ltu.finetune", flags, tmp_path / f"output_{rows}"):
            rank.join(PATIENCE)
            assert rank.exitcode == 0, (tmp_path / f"output_{rows}.0").read_text()[-3000:]
        histories[rows] = with_loss(read_log(output / "trainer_state.json"))
        assert read_record(output)["rows_per_pass"] == (2 if rows == "auto" else rows)
    one = histories["auto"]
    many = histories[rows_per_pass]
    assert len(one) == len(many) == 4
    for entry, expected in zip(many, one, strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert entry["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)


def test_dropout_has_the_same_distribution(data_path, tmp_path):
    """With dropout, the means over many random numbers agree, and no two runs are equal."""
    base = write_checkpoint(tmp_path / "base", write_llm(tmp_path / "llm"))
    flags = {"lora_r": 4, "lora_alpha": 64, "lora_dropout": 0.5, "learning_rate": 0}
    means = {}
    for rows in (2, 10):
        trainer = make(base, data_path, tmp_path / str(rows), rows_per_pass=rows, **flags)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        trainer.args.max_steps = 1
        losses = []
        for seed in range(12):
            torch.manual_seed(seed)
            micro_batches = trainer.micro_batches.step_batches(0)
            trainer.current_gradient_accumulation_steps = len(micro_batches)
            total = 0.0
            for indices in micro_batches:
                batch = trainer.data_collator([trainer.train_dataset[i] for i in indices])
                total += float(trainer.training_step(trainer.model, batch))
            losses.append(total)
        means[rows] = np.mean(losses), np.std(losses) / np.sqrt(len(losses)), losses
    (one, error, losses), (many, other_error, other_losses) = means[2], means[10]
    assert abs(one - many) < 4 * (error + other_error)
    assert not set(losses) & set(other_losses)


# --- single functions


def test_merging_pads_on_the_left():
    """As in the docstring of the module: the first micro-batch is one token shorter."""
    short = {
        "input_ids": torch.tensor([[9, 9, 0, 1, 2], [9, 9, 1, 2, 3]]),
        "attention_mask": torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[4, IGNORED, IGNORED, 1, 2], [IGNORED, IGNORED, 1, 2, 3]]),
        "position_ids": torch.arange(5).repeat(2, 1),
        "input_features": torch.ones(2, 3, 4),
    }
    long = {
        "input_ids": torch.tensor([[0, 0, 1, 2, 3, 4]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
        "labels": torch.tensor([[IGNORED, IGNORED, IGNORED, 2, 3, 4]]),
        "position_ids": torch.arange(6)[None],
    }
    merged = merge([Part(short, 0, 5), Part(long, 1, 3)])
    assert merged["input_ids"].tolist()[:2] == [[0, 9, 9, 0, 1, 2], [0, 9, 9, 1, 2, 3]]
    assert merged["attention_mask"].tolist()[0] == [0, 1, 1, 0, 1, 1]
    assert merged["position_ids"].tolist()[0] == [0, 0, 1, 2, 3, 4]
    # The label of the first token of a micro-batch, which nothing predicts, is removed.
    assert merged["labels"].tolist()[0] == [IGNORED] * 4 + [1, 2]
    assert short["labels"][0, 0] == 4
    assert merged["loss_tokens"].tolist() == [5, 5, 3]
    assert merged["part_rows"] == [2, 1]
    assert [len(clips) for clips in merged["input_features"]] == [2]


def test_a_part_has_the_clips_of_its_rows():
    tensors = {
        "input_ids": torch.tensor([[9, 1], [0, 1], [9, 1], [9, 1], [0, 1]]),
        "input_features": torch.arange(3)[:, None],
    }
    parts = split_micro_batch(Part(tensors, 3, 7), 2, audio_token_id=9)
    clips = [part.tensors.get("input_features") for part in parts]
    assert [part.num_rows for part in parts] == [2, 2, 1]
    assert clips[0].tolist() == [[0]]
    assert clips[1].tolist() == [[1], [2]]
    assert clips[2] is None
    assert {(part.number, part.num_labelled, part.is_whole) for part in parts} == {(3, 7, False)}


def test_clips_that_are_encoded_already():
    """Rows keep their clips, of which some are encoded, through parts and passes."""
    # Rows 0 to 3 have the clips a, B, C and d, of which those in capitals are encoded.
    mixed = {
        "input_ids": torch.tensor([[9, 1], [9, 1], [9, 1], [9, 1], [0, 1]]),
        "labels": torch.zeros(5, 2, dtype=torch.long),
        "audio_hidden_states": torch.tensor([[11], [12]]),
        "input_features": torch.tensor([[10], [13]]),
        "audio_index": torch.tensor([2, 0, 1, 3]),
    }
    plain = {
        "input_ids": torch.tensor([[9, 1]]),
        "labels": torch.zeros(1, 2, dtype=torch.long),
        "input_features": torch.tensor([[14]]),
    }

    def clips_of_rows(tensors: dict) -> list[int]:
        clips = []
        for name in ("audio_hidden_states", "input_features"):
            value = tensors.get(name, [])
            clips += torch.cat(value).flatten().tolist() if value else []
        index = tensors.get("audio_index", torch.arange(len(clips)))
        return [clips[position] for position in index.tolist()]

    parts = split_micro_batch(Part(mixed, 0, 4), 2, audio_token_id=9)
    assert clips_of_rows(merge(parts)) == [10, 11, 12, 13]
    assert clips_of_rows(merge([Part(plain, 1, 1), *parts])) == [14, 10, 11, 12, 13]
    assert clips_of_rows(merge([parts[1], parts[0]])) == [12, 13, 10, 11]
    assert clips_of_rows(merge([parts[2], Part(plain, 1, 1)])) == [14]
    assert clips_of_rows(merge([parts[2]])) == []


@pytest.mark.parametrize("rows", [1, 6])
def test_passes_of_encoded_clips(checkpoint, data_path, tmp_path, rows):
    """The outputs of a frozen audio encoder come from a cache, but for two clips of the eight."""
    flags = {"freeze_audio_tower": True, "max_steps": 4}
    one = train(checkpoint, data_path, tmp_path / "one", **flags)
    cached = make(
        checkpoint,
        data_path,
        tmp_path / "cached",
        encoder_cache=tmp_path / "cache",
        rows_per_pass=rows,
        **flags,
    )
    read = cached.train_dataset.read_encoded
    lacking = [example["audio_id"] for example in cached.train_dataset.examples[-2:]]

    def read_some(example):
        return None if example["audio_id"] in lacking else read(example)

    cached.train_dataset.read_encoded = read_some
    cached.train()
    assert_same_training(cached, one)


def test_micro_batches_are_loaded_when_they_are_needed():
    loaded = iter(range(10))
    step = StepBatches(loaded, 4)
    assert len(step) == 4
    first = iter(step)
    assert next(first) == 0
    assert next(loaded) == 1  # No more than one was taken.
    assert list(first) == [2, 3, 4]


def test_forward_returns_the_loss_of_each_row(checkpoint, data_path, tmp_path):
    """Their weighted sum is transformers' own loss, and labels of masked tokens do not count."""
    trainer = make(checkpoint, data_path, tmp_path)
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in (3, 9, 12)])
    batch["labels"][0, -3:] = IGNORED
    with torch.no_grad():
        mean = trainer.model(**batch).loss
        count = (batch["labels"][:, 1:] != IGNORED).sum()
        rows = trainer.model(**batch, loss_tokens=count.expand(3)).loss
    assert rows.shape == (3,)
    assert float(rows.sum()) == pytest.approx(float(mean), abs=1e-6)


# --- errors


@pytest.mark.parametrize("rows", [1, 6])
def test_the_micro_batch_without_a_finite_loss_is_named(
    checkpoint, data_path, tmp_path, monkeypatch, rows
):
    """Also in a pass with others, and in parts: the fourth micro-batch of the first step."""
    expected = list(make(checkpoint, data_path, tmp_path / "a").micro_batches)[3]
    stock = torch.nn.functional.cross_entropy
    trainer = make(checkpoint, data_path, tmp_path / "b", rows_per_pass=rows)
    bad_part = trainer.data_collator([trainer.train_dataset[index] for index in expected])
    bad_labels = [row[row != IGNORED].tolist() for row in bad_part["labels"]]

    def cross_entropy(logits, labels, **kwargs):
        losses = stock(logits, labels, **kwargs)
        text = labels[labels != IGNORED].tolist()
        for row in bad_labels:
            for start in range(len(text)):
                if text[start : start + len(row)] == row:
                    where = (labels != IGNORED).nonzero()[start]
                    losses = losses.index_fill(0, where, torch.inf)
        return losses

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    with pytest.raises(NonFiniteError, match="Step 1 of 6: the losses of 1 of its 5") as error:
        trainer.train()
    listed = str(error.value).rpartition("these examples: ")[2]
    assert [int(number) for number in re.findall(r"(\d+) \(", listed)] == [i + 1 for i in expected]


@pytest.mark.parametrize("value", ["0", "-4", "many", "2.5"])
def test_a_size_that_is_none(checkpoint, data_path, tmp_path, capsys, value):
    with pytest.raises(SystemExit) as end:
        main(training_flags(checkpoint, data_path, tmp_path, rows_per_pass=value))
    assert end.value.code == 2
    assert "choose auto, or a number of at least 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A checkpoint with a mixture of experts, whose router has a loss over a micro-batch."""
    root = tmp_path_factory.mktemp("mixture")
    router = {"num_local_experts": 2, "output_router_logits": True}
    llm = write_llm(root / "llm", "mixtral", **router)
    return write_checkpoint(root / "base", llm)


MIXTURE_FLAGS = {"lora_r": 4, "lora_target_modules": "[q_proj]"}


def test_a_loss_with_more_than_tokens(mixture, data_path, tmp_path):
    assert make(mixture, data_path, tmp_path / "a", **MIXTURE_FLAGS).rows_per_pass == 2
    with pytest.raises(ValueError, match="--rows_per_pass 4: the loss of this mixtral has a term"):
        make(mixture, data_path, tmp_path / "b", rows_per_pass=4, **MIXTURE_FLAGS)


def test_noise_that_depends_on_the_length(checkpoint, data_path, tmp_path):
    flags = {"neftune_noise_alpha": 5}
    assert make(checkpoint, data_path, tmp_path / "a", **flags).reason_to_keep is not None
    with pytest.raises(ValueError, match="--rows_per_pass 4: the noise of --neftune_noise_alpha"):
        make(checkpoint, data_path, tmp_path / "b", rows_per_pass=4, **flags)


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_change_weights_in_a_backward_pass(
    checkpoint, data_path, tmp_path, optimizer
):
    """Several passes, and those that are measured, would train."""
    trainer = make(checkpoint, data_path, tmp_path / "a", optim=optimizer)
    assert f"--optim {optimizer} changes the weights" in trainer.reason_to_keep
    with pytest.raises(ValueError, match=f"--rows_per_pass 1: --optim {optimizer}"):
        make(checkpoint, data_path, tmp_path / "b", rows_per_pass=1, optim=optimizer)


def test_deepspeed_has_a_pass_for_each_micro_batch(checkpoint, data_path, tmp_path, monkeypatch):
    """accelerate takes a step of DeepSpeed's optimizer after every pass of the last one."""
    trainer = make(checkpoint, data_path, tmp_path)
    assert trainer._find_reason_to_keep() is None
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    assert "DeepSpeed" in trainer._find_reason_to_keep()


# --- memory


def fail_above(limit, trainer, where, num_passing=0):
    """Let the backward pass of more rows fail, when it has added a part of the gradients.

    The first `num_passing` of them pass.
    """
    failures = []
    passed = []

    def check(module, *gradients):
        rows = len(gradients[-1][0])
        if rows > limit and len(passed) < num_passing:
            passed.append(rows)
        elif rows > limit:
            assert any(p.grad is not None for p in trainer.model.parameters())
            failures.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    layer = trainer.model.language_model.get_submodule(where)
    layer.register_full_backward_hook(check)
    return failures


@pytest.mark.parametrize(
    ("limit", "num_passing", "rows"),
    [(4, 0, 3), (1, 0, 1), (3, 1, 3)],  # The last one fails in the second pass of the step.
)
def test_a_pass_that_is_too_large(
    checkpoint, data_path, tmp_path, one_by_one, capsys, limit, num_passing, rows
):
    """The step is computed again, so that no part of a gradient or of the loss counts twice."""
    trainer = make(checkpoint, data_path, tmp_path, rows_per_pass=6)
    failures = fail_above(limit, trainer, "model.layers.0.mlp", num_passing)
    trainer.train()
    assert failures[0] == (4 if num_passing else 6)
    assert trainer.rows_per_pass == rows
    assert f"rows in a forward pass: {rows}" in capsys.readouterr().out
    assert_same_training(trainer, one_by_one[False])
    trainer.save_model()
    assert read_record(tmp_path)["rows_per_pass"] == rows


def test_a_row_that_is_too_large(checkpoint, data_path, tmp_path):
    trainer = make(checkpoint, data_path, tmp_path, rows_per_pass=4)
    fail_above(0, trainer, "model.layers.0.mlp")
    with pytest.raises(ValueError, match="not enough for a pass of 1 rows .*--plan --gpu_memory"):
        trainer.train()


def test_micro_batches_that_are_too_large_and_cannot_be_split(mixture, data_path, tmp_path):
    """Smaller passes would have another loss."""
    trainer = make(mixture, data_path, tmp_path, **MIXTURE_FLAGS)
    failures = fail_above(0, trainer, "model.layers.0.mlp")
    with pytest.raises(ValueError, match="a pass of 2 rows .*cannot be smaller: the loss of this"):
        trainer.train()
    assert failures == [2]


def test_ranks_do_not_repeat_a_step(checkpoint, data_path, tmp_path, monkeypatch):
    """Not even one that torchrun has started alone: its model is wrapped all the same."""
    trainer = make(checkpoint, data_path, tmp_path, rows_per_pass=6)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    trainer._check_repeatable(error)
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.MULTI_GPU)
    with pytest.raises(ValueError, match="not enough for a pass of 6 rows"):
        trainer._check_repeatable(error)


MIB = 2**20


@pytest.mark.parametrize(
    ("free", "rows"),
    [
        (1000, 10),  # All 5 micro-batches of a step.
        (500, 6),  # 3, so that 5 are divided into 3 and 2.
        (340, 4),
        (210, 2),
        (50, 2),  # Not even one fits; the run itself finds that out.
    ],
)
def test_the_size_is_measured_once(
    checkpoint, data_path, tmp_path, monkeypatch, one_by_one, free, rows
):
    """On a GPU that needs 100 MiB, and 50 MiB more for each row: the largest that fits.

    The measured passes train nothing. Without dropout they need no random numbers.
    """
    trainer = make(checkpoint, data_path, tmp_path)
    measured = []
    peak = partial(measured_peak, trainer, measured)
    fake_gpu(monkeypatch, free * MIB, peak)
    trainer.rows_per_pass = None
    trainer.train()
    assert trainer.rows_per_pass == rows
    # In most passes of a step, there are gradients of those before.
    assert [number for number, _ in measured[:2]] == [2, 4]
    assert all(had_gradients for _, had_gradients in measured)
    assert_same_training(trainer, one_by_one[False])


def measured_peak(trainer, measured, *device):
    rows = trainer.last_rows
    measured.append((rows, trainer.had_gradients))
    return (100 + 50 * rows) * MIB


def fake_gpu(monkeypatch, free, peak):
    """Replace the questions about memory that only a GPU answers."""
    stock = LtuTrainer._run_pass

    def run_pass(self, model, parts):
        self.last_rows = sum(part.num_rows for part in parts)
        gradients = [p.grad for p in self.model.parameters() if p.requires_grad]
        self.had_gradients = all(gradient is not None for gradient in gradients)
        lengths = {part.tensors["input_ids"].shape[1] for part in parts}
        if len(parts) > 1 and all(part is parts[0] for part in parts):
            # A measured pass has the longest text of all.
            assert max(lengths) == 2 + -(-self.longest_text // 8) * 8
        return stock(self, model, parts)

    monkeypatch.setattr(LtuTrainer, "_run_pass", run_pass)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())


def test_a_run_that_continues_keeps_the_size(checkpoint, data_path, tmp_path):
    """On a GPU, where `auto` would measure it again."""
    trainer = make(checkpoint, data_path, tmp_path, rows_per_pass=6, save_steps=2)
    trainer.args.save_strategy = "steps"
    trainer.train()
    again = make(checkpoint, data_path, tmp_path, rows_per_pass="auto")
    again.rows_per_pass = None
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.rows_per_pass == 6
    assert logged(again, "loss") == pytest.approx(logged(trainer, "loss"), abs=1e-6)


def test_order_of_examples_does_not_depend_on_passes(checkpoint, data_path, tmp_path):
    trainer = train(checkpoint, data_path, tmp_path, rows_per_pass=6)
    assert isinstance(trainer.micro_batches, MicroBatchSampler)
    assert trainer.args.gradient_accumulation_steps == 5
    assert logged(trainer, "epoch")[-2] == pytest.approx(30 / 10)
