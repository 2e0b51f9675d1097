"""Tests the index of a dataset file: training from it equals training from the file.

The examples, lengths, batches and losses are the same, and an index of another file is refused.
"""

import json
import os
import pickle
import shutil

import pytest
import torch
from transformers import AutoProcessor

from ltu import index_dataset
from ltu.data.check_examples import read_examples
from ltu.data.dataset_parser import DatasetError
from ltu.files import run_command
from ltu.finetune import main as train
from ltu.training import dataset_index, open_dataset
from ltu.training.arguments import parse_args
from ltu.training.dataset_index import IndexedExamples, build_index, find_index
from ltu.training.trainer import make_trainer
from tests.tiny import LORA, training_flags, write_checkpoint, write_llm, write_rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture
def data_path(tmp_path, monkeypatch):
    """23 examples, three to a record batch, with a text that JSON can contain and UTF-8 cannot."""
    monkeypatch.setattr(dataset_index, "EXAMPLES_AT_ONCE", 3)
    path = write_rows(tmp_path, 23, without_audio=3)
    examples = json.loads(path.read_text())
    for number, example in enumerate(examples):
        example["output"] += " more" * (number * 7 % 13)
    examples[4]["instruction"] += " \ud83d </s> é"
    del examples[6]["input"]
    path.write_text(json.dumps(examples))
    return path


def flags(checkpoint, data_path, output, **more):
    """Return the arguments of `ltu.finetune` for a small run with grouping by length."""
    settings = {"save_steps": 3, "group_by_length": True, "num_epochs": 2}
    return training_flags(checkpoint, data_path, output, **settings | more)


def open_trainer(*args, **more):
    """Return the trainer of a run with `flags` of these arguments."""
    return make_trainer(*parse_args(flags(*args, **more)))


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("cutoff", [28, 40, 108])
@pytest.mark.parametrize("held_out", [0, 5])
def test_an_index_equals_the_file(checkpoint, processor, data_path, tmp_path, cutoff, held_out):
    """With a cutoff of 28 some examples have no answer, with 40 some answers are cut."""
    more = {"cutoff_len": cutoff, "val_set_size": held_out, "max_bad": 22}
    plain = open_trainer(checkpoint, data_path, tmp_path / "run", **more)
    build_index(data_path, processor)
    indexed = open_trainer(checkpoint, data_path, tmp_path / "run", **more)
    assert isinstance(indexed.train_dataset.examples, IndexedExamples)
    assert isinstance(plain.train_dataset.examples, list)
    assert indexed.train_dataset.lengths.tolist() == plain.train_dataset.lengths.tolist()
    assert list(indexed.micro_batches) == list(plain.micro_batches)
    pairs = [(indexed.train_dataset, plain.train_dataset)]
    if held_out:
        pairs.append((indexed.eval_dataset, plain.eval_dataset))
    for found, expected in pairs:
        assert len(found) == len(expected)
        assert found.skipped == expected.skipped
        assert found.lengths.tolist() == expected.lengths.tolist()
        for index in range(len(expected)):
            assert found[index]["input_ids"] == expected[index]["input_ids"]
            assert found.examples[index]["audio"] == expected.examples[index]["audio"]


def test_training_and_resuming_from_an_index_equals_training_from_the_file(
    checkpoint, processor, data_path, tmp_path
):
    train(flags(checkpoint, data_path, tmp_path / "plain"))
    index = build_index(data_path, processor)
    data_path.unlink()  # The index is enough.
    train(flags(checkpoint, index, tmp_path / "indexed", num_workers=1, save_total_limit=9))
    resumed = {"resume_from_checkpoint": tmp_path / "indexed" / "checkpoint-6"}
    train(flags(checkpoint, data_path, tmp_path / "resumed", **resumed))
    whole = losses(tmp_path / "plain")
    assert len(whole) == 12
    assert losses(tmp_path / "indexed") == whole
    assert losses(tmp_path / "resumed")[-6:] == pytest.approx(whole[-6:], abs=1e-6)


def test_too_many_examples_without_an_index_are_not_grouped_with_a_warning(
    checkpoint, data_path, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(open_dataset, "MAX_UNINDEXED", 22)
    trainer = open_trainer(checkpoint, data_path, tmp_path / "run")
    assert "23 examples without an index" in caplog.text
    assert f"ltu.index_dataset {data_path}" in caplog.text
    micro_batches = list(trainer.micro_batches)
    assert sorted(sum(micro_batches[:12], [])) == list(range(23))
    ungrouped = open_trainer(checkpoint, data_path, tmp_path / "run", group_by_length=False)
    assert micro_batches == list(ungrouped.micro_batches)
    cut = open_trainer(checkpoint, data_path, tmp_path / "run", train_on_inputs=False, cutoff_len=5)
    with pytest.raises(DatasetError, match="example 8: no answer is left"):
        cut.train_dataset[7]


def test_an_index_of_another_file_is_refused(processor, data_path):
    build_index(data_path, processor)
    # A copy has another time and the same bytes.
    os.utime(data_path, (1, 1))
    assert len(find_index(data_path)) == 23
    data_path.write_text(data_path.read_text().replace("more", "less", 1))
    message = "is not the file that .*rows.json.arrow was made of. Index it again"
    with pytest.raises(DatasetError, match=message):
        find_index(data_path)


def test_an_index_for_another_template_is_refused(checkpoint, processor, data_path, tmp_path):
    build_index(data_path, processor)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    for name in ("config.json", "processor_config.json"):
        path = other / name
        path.write_text(path.read_text().replace("### Response:", "### A much longer response:"))
    with pytest.raises(DatasetError, match="made for another tokenizer or prompt template"):
        open_trainer(other, data_path, tmp_path / "run")


def test_an_index_for_the_other_kind_of_model_is_refused(processor, data_path, monkeypatch):
    build_index(data_path, processor)
    # Examples without `input` would differ.
    monkeypatch.setattr(processor.front_end, "transcribes", True)
    with pytest.raises(
        DatasetError,
        match="for a model without transcripts; this checkpoint is of a model with transcripts",
    ):
        find_index(data_path).check(processor)


def test_an_audio_id_that_is_not_utf8_is_refused(processor, data_path):
    data_path.write_text(data_path.read_text().replace('"7.wav"', '"caf\\udce9.wav"'))
    with pytest.raises(DatasetError, match="'caf.udce9.wav' is not UTF-8"):
        build_index(data_path, processor)


def test_resuming_in_another_order_is_refused(
    checkpoint, processor, data_path, tmp_path, monkeypatch
):
    """Half an epoch in one order and half in another would leave examples unused."""
    monkeypatch.setattr(open_dataset, "MAX_UNINDEXED", 22)
    train(flags(checkpoint, data_path, tmp_path / "run", max_steps=3))
    build_index(data_path, processor)
    with pytest.raises(ValueError, match="grouping by length: False there, True here"):
        train(flags(checkpoint, data_path, tmp_path / "run", resume_from_checkpoint="last"))
    missing = tmp_path / "nothing"
    with pytest.raises(ValueError, match="there is no such folder"):
        train(flags(checkpoint, data_path, tmp_path / "run", resume_from_checkpoint=missing))


@pytest.mark.parametrize("is_indexed", [False, True])
def test_an_example_keeps_its_number_when_examples_are_held_out(
    checkpoint, processor, data_path, tmp_path, is_indexed
):
    if is_indexed:
        build_index(data_path, processor)
    (tmp_path / "8.wav").unlink()
    trainer = open_trainer(checkpoint, data_path, tmp_path / "run", val_set_size=4)
    with pytest.raises(DatasetError, match=r"The last: example 9: .*8\.wav"):
        for dataset in (trainer.train_dataset, trainer.eval_dataset):
            for index in range(len(dataset)):
                dataset[index]


def test_a_question_that_fills_the_cutoff_is_refused(checkpoint, processor, data_path, tmp_path):
    build_index(data_path, processor)
    with pytest.raises(DatasetError, match="Example 1: no answer is left"):
        open_trainer(checkpoint, data_path, tmp_path / "run", train_on_inputs=False, cutoff_len=5)


@pytest.mark.parametrize("cut", [0, 8, 200, 3000])
def test_a_truncated_index_is_refused(processor, data_path, cut):
    index = build_index(data_path, processor)
    index.write_bytes(index.read_bytes()[:cut])
    with pytest.raises(DatasetError, match="is not a complete index"):
        find_index(data_path)


def test_invalid_examples_are_named_and_leave_no_file(processor, data_path):
    examples = json.loads(data_path.read_text())
    examples[10]["output"] = None
    examples[20]["audio_id"] = 3
    data_path.write_text(json.dumps(examples))
    with pytest.raises(
        DatasetError, match="example 11: 'output' is null.*\n.*example 21: 'audio_id' is a int"
    ):
        build_index(data_path, processor)
    assert not list(data_path.parent.glob("*.arrow*"))


def test_workers_can_be_spawned(processor, data_path):
    index = IndexedExamples(build_index(data_path, processor)).take(torch.tensor([6, 2]))
    copy = pickle.loads(pickle.dumps(index))
    examples = read_examples(data_path)
    expected = [examples[number] | {"input": ""} for number in (6, 2)]
    assert list(copy) == list(index) == expected


def test_the_command(checkpoint, data_path, capsys):
    index_dataset.main([str(data_path), "--base_model", str(checkpoint)])
    assert "rows.json.arrow: 23 examples" in capsys.readouterr().out
    missing = data_path.parent / "nothing.json"
    with pytest.raises(SystemExit, match="error: .*nothing.json is not there"):
        run_command(lambda: index_dataset.main([str(missing), "--base_model", str(checkpoint)]))
