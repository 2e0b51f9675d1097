"""Training from an index is training from the file: the same rows, lengths, batches, losses; no other file passes."""

import json
import os
import pickle
import shutil

import pytest
import torch
from transformers import AutoProcessor

from ltu import index_dataset
from ltu.data.dataset_parser import RowError
from ltu.data.examples import read_rows
from ltu.files import run_command
from ltu.finetune import main as train
from ltu.training import dataset as dataset_module
from ltu.training import dataset_index
from ltu.training.arguments import parse_args
from ltu.training.dataset_index import IndexedRows, build_index, find_index
from ltu.training.trainer import make_trainer
from tests.tiny import LORA, write_checkpoint, write_llm, write_rows


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def processor(start):
    return AutoProcessor.from_pretrained(start)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """23 rows, three to a record batch, with texts that JSON can hold and UTF-8 cannot."""
    monkeypatch.setattr(dataset_index, "ROWS_AT_ONCE", 3)
    path = write_rows(tmp_path, 23, without_audio=3)
    content = json.loads(path.read_text())
    for number, row in enumerate(content):
        row["output"] += " more" * (number * 7 % 13)
    content[4]["instruction"] += " \ud83d </s> é"
    del content[6]["input"]
    path.write_text(json.dumps(content))
    return path


def flags(start, rows, output, **more):
    settings = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    settings |= {
        "bf16": False,
        "num_workers": 0,
        "save_steps": 3,
        "group_by_length": True,
        "num_epochs": 2,
    } | more
    argv = ["--base_model", str(start), "--data_path", str(rows), "--output_dir", str(output)]
    return argv + [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("cutoff", [8, 20, 108])
@pytest.mark.parametrize("held_out", [0, 5])
def test_an_index_is_the_file(start, processor, rows, tmp_path, cutoff, held_out):
    more = {"cutoff_len": cutoff, "val_set_size": held_out}
    plain = make_trainer(*parse_args(flags(start, rows, tmp_path / "run", **more)))
    build_index(rows, processor)
    indexed = make_trainer(*parse_args(flags(start, rows, tmp_path / "run", **more)))
    assert isinstance(indexed.train_dataset.rows, IndexedRows) and isinstance(
        plain.train_dataset.rows, list
    )
    assert indexed.train_dataset.lengths.tolist() == plain.train_dataset.lengths.tolist()
    assert list(indexed.micro_batches) == list(plain.micro_batches)
    for part in ("train_dataset", "eval_dataset") if held_out else ("train_dataset",):
        ours, theirs = getattr(indexed, part), getattr(plain, part)
        assert len(ours) == len(theirs)
        for index in range(len(theirs)):
            assert ours[index]["input_ids"] == theirs[index]["input_ids"]
            assert ours.rows[index]["audio"] == theirs.rows[index]["audio"]


def test_training_and_resuming_from_an_index_equals_training_from_the_file(
    start, processor, rows, tmp_path
):
    train(flags(start, rows, tmp_path / "plain"))
    index = build_index(rows, processor)
    rows.unlink()  # The index is enough.
    train(flags(start, index, tmp_path / "indexed", num_workers=1, save_total_limit=9))
    resumed = {"resume_from_checkpoint": tmp_path / "indexed" / "checkpoint-6"}
    train(flags(start, rows, tmp_path / "again", **resumed))
    whole = losses(tmp_path / "plain")
    assert len(whole) == 12 and losses(tmp_path / "indexed") == whole
    assert losses(tmp_path / "again")[-6:] == pytest.approx(whole[-6:], abs=1e-6)


def test_too_many_rows_without_an_index_are_not_grouped_and_it_says_so(
    start, rows, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(dataset_module, "MAX_UNINDEXED", 22)
    trainer = make_trainer(*parse_args(flags(start, rows, tmp_path / "run")))
    assert "23 rows without an index" in caplog.text and f"ltu.index_dataset {rows}" in caplog.text
    assert sorted(sum(list(trainer.micro_batches)[:12], [])) == list(range(23))
    ungrouped = make_trainer(
        *parse_args(flags(start, rows, tmp_path / "run", group_by_length=False))
    )
    assert list(trainer.micro_batches) == list(ungrouped.micro_batches)
    dataset = make_trainer(
        *parse_args(flags(start, rows, tmp_path / "run", train_on_inputs=False, cutoff_len=5))
    ).train_dataset
    with pytest.raises(RowError, match="Row 8: no answer is left"):
        dataset[7]


def test_an_index_of_another_file_is_refused(processor, rows):
    build_index(rows, processor)
    os.utime(rows, (1, 1))
    assert len(find_index(rows)) == 23  # Copied or moved: another time, the same bytes.
    rows.write_text(rows.read_text().replace("more", "less", 1))
    with pytest.raises(RowError, match="is not what .*rows.json.arrow was made of. Index it again"):
        find_index(rows)


def test_an_index_for_another_template_is_refused(start, processor, rows, tmp_path):
    build_index(rows, processor)
    other = shutil.copytree(start, tmp_path / "other")
    for name in ("config.json", "processor_config.json"):
        path = other / name
        path.write_text(path.read_text().replace("### Response:", "### A much longer response:"))
    with pytest.raises(RowError, match="made for another tokenizer or prompt template"):
        make_trainer(*parse_args(flags(other, rows, tmp_path / "run")))


def test_an_index_for_the_other_kind_of_model_is_refused(processor, rows, monkeypatch):
    build_index(rows, processor)
    monkeypatch.setattr(
        processor, "transcribes", True, raising=False
    )  # Rows without `input` would differ.
    with pytest.raises(RowError, match="was made for LTU; this checkpoint is of LTU-AS"):
        find_index(rows).check(processor, 108, True)


def test_a_clip_whose_name_is_no_text_is_refused(processor, rows):
    rows.write_text(rows.read_text().replace('"7.wav"', '"caf\\udce9.wav"'))
    with pytest.raises(RowError, match="'caf.udce9.wav' is not UTF-8"):
        build_index(rows, processor)


def test_resuming_in_another_order_is_refused(start, processor, rows, tmp_path, monkeypatch):
    """Half an epoch in one order and half in another would leave rows unseen."""
    monkeypatch.setattr(dataset_module, "MAX_UNINDEXED", 22)
    train(flags(start, rows, tmp_path / "run", max_steps=3))
    build_index(rows, processor)
    with pytest.raises(ValueError, match="was trained with grouped: False, this run has True"):
        train(flags(start, rows, tmp_path / "run", resume_from_checkpoint="last"))
    with pytest.raises(ValueError, match="holds no checkpoint of a run"):
        train(flags(start, rows, tmp_path / "run", resume_from_checkpoint=tmp_path / "nothing"))


@pytest.mark.parametrize("is_indexed", [False, True])
def test_a_row_keeps_its_number_when_rows_are_held_out(
    start, processor, rows, tmp_path, is_indexed
):
    if is_indexed:
        build_index(rows, processor)
    (tmp_path / "8.wav").unlink()
    trainer = make_trainer(*parse_args(flags(start, rows, tmp_path / "run", val_set_size=4)))
    parts = [trainer.train_dataset, trainer.eval_dataset]
    with pytest.raises(RowError, match=r"The last: row 9: .*8\.wav"):
        for part in parts:
            for index in range(len(part)):
                part[index]


def test_a_question_that_fills_the_cutoff_is_refused(start, processor, rows, tmp_path):
    build_index(rows, processor)
    with pytest.raises(RowError, match="Row 1: no answer is left"):
        make_trainer(
            *parse_args(flags(start, rows, tmp_path / "run", train_on_inputs=False, cutoff_len=5))
        )


@pytest.mark.parametrize("cut", [0, 8, 200, 3000])
def test_half_an_index_is_refused(processor, rows, cut):
    index = build_index(rows, processor)
    index.write_bytes(index.read_bytes()[:cut])
    with pytest.raises(RowError, match="no whole index"):
        find_index(rows)


def test_bad_rows_are_named_and_leave_nothing(processor, rows):
    content = json.loads(rows.read_text())
    content[10]["output"], content[20]["audio_id"] = None, 3
    rows.write_text(json.dumps(content))
    with pytest.raises(RowError, match="row 11: .*null\n.*row 21: 'audio_id' is a int"):
        build_index(rows, processor)
    assert not list(rows.parent.glob("*.arrow*"))


def test_workers_can_be_spawned(processor, rows):
    index = IndexedRows(build_index(rows, processor)).take(torch.tensor([6, 2]))
    copy = pickle.loads(pickle.dumps(index))
    assert (
        list(copy) == list(index) == [read_rows(rows)[number] | {"input": ""} for number in (6, 2)]
    )


def test_the_command(start, rows, capsys):
    index_dataset.main([str(rows), "--base_model", str(start)])
    assert "rows.json.arrow: 23 rows" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: .*nothing.json is not there"):
        words = [str(rows.parent / "nothing.json"), "--base_model", str(start)]
        run_command(lambda: index_dataset.main(words))
