"""Tests that training and inference from tables with clips equal those from JSON and files.

The tables are written by the library `datasets`: folders of save_to_disk, and Parquet.
"""

import json
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoProcessor

from ltu import index_dataset
from ltu.data.check_examples import read_examples
from ltu.data.columns import ColumnFlags
from ltu.data.dataset_parser import DatasetError
from ltu.files import run_command
from ltu.finetune import main as train
from ltu.inference_batch import main as infer
from ltu.models.modeling_cavmae import CavMaeModel
from ltu.training.arguments import parse_args
from ltu.training.dataset_index import IndexedExamples, build_index, find_index
from ltu.training.trainer import make_trainer
from tests.machine import PATIENCE
from tests.tiny import (
    LORA,
    start_ranks,
    training_flags,
    write_checkpoint,
    write_llm,
    write_rows,
)

AUDIO = {"bytes": Value("binary"), "path": Value("string")}
COLUMNS = ("--question_column", "question", "--answer_column", "answer")
NUM_EXAMPLES = 12
LAYOUTS = ["folder", "split", "parquet", "parquet folder"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON file of 12 examples, the first two without audio."""
    return write_rows(tmp_path_factory.mktemp("rows"), NUM_EXAMPLES, without_audio=2)


def as_dataset(rows: Path) -> Dataset:
    """Return the examples of a JSON file under other names, with the clips as bytes."""
    columns: dict[str, list] = {"id": [], "question": [], "audio": [], "answer": []}
    for number, example in enumerate(json.loads(rows.read_text())):
        audio = None
        if example["audio_id"] != "empty":
            path = rows.parent / example["audio_id"]
            audio = {"bytes": path.read_bytes(), "path": path.name}
        columns["id"].append(number)
        columns["question"].append(example["instruction"])
        columns["audio"].append(audio)
        columns["answer"].append(example["output"])
    features = {"id": Value("int64"), "question": Value("string"), "answer": Value("string")}
    dataset = Dataset.from_dict(columns, features=Features(features | {"audio": AUDIO}))
    return dataset.cast_column("audio", Audio(decode=False))


def write_table(rows: Path, folder: Path, layout: str) -> list[str]:
    """Write the examples as a table; return `--data_path` and the flags that it needs."""
    dataset = as_dataset(rows)
    if layout == "folder":
        dataset.save_to_disk(folder / "set", num_shards=3)
        return ["--data_path", str(folder / "set"), *COLUMNS]
    if layout == "split":
        splits = {"test": dataset.select([5, 3, 4, 2]), "train": dataset}
        DatasetDict(splits).save_to_disk(folder / "set")
        return ["--data_path", str(folder / "set"), "--split", "train", *COLUMNS]
    (folder / "set").mkdir(parents=True)
    if layout == "parquet":
        dataset.to_parquet(folder / "set" / "all.parquet", batch_size=5)
        return ["--data_path", str(folder / "set" / "all.parquet"), *COLUMNS]
    for number in range(2):
        shard = dataset.shard(2, number, contiguous=True)
        shard.to_parquet(folder / "set" / f"train-{number:05}-of-00002.parquet", batch_size=2)
    dataset.select([3]).to_parquet(folder / "set" / "test-00000-of-00001.parquet")
    return ["--data_path", str(folder / "set"), "--split", "train", *COLUMNS]


def flags(checkpoint: Path, data: list[str] | Path, output: Path, **more: object) -> list[str]:
    """Return the arguments of `ltu.finetune` for a run of 6 steps, in an order by length."""
    settings = {"group_by_length": True, "num_epochs": 2, "save_steps": 3, "save_total_limit": 9}
    if isinstance(data, Path):
        return training_flags(checkpoint, data, output, **settings | more)
    # The last value of a flag counts.
    return [*training_flags(checkpoint, Path(data[1]), output, **settings | more), *data]


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def one_line_of(command: object, arguments: list[str]) -> str:
    """Return the line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        run_command(lambda: command(arguments))
    line = str(end.value.code)
    assert "\n" not in line, line
    return line


@pytest.fixture(scope="module")
def plain(checkpoint: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from JSON and files."""
    output = tmp_path_factory.mktemp("plain") / "run"
    train(flags(checkpoint, rows, output))
    return output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_resumed_losses_equal_those_from_json(
    checkpoint, rows, plain, tmp_path, layout, capsys
):
    data = write_table(rows, tmp_path, layout)
    before = sorted(path for path in tmp_path.rglob("*"))
    train(flags(checkpoint, data, tmp_path / "run", num_workers=2))
    printed = capsys.readouterr().out
    assert "columns: audio_id from 'audio', instruction from 'question', output from" in printed
    assert "not used: id" in printed
    assert len(losses(plain)) == 6
    assert losses(tmp_path / "run") == losses(plain)
    # Nothing was written but the run itself.
    written = {
        path for path in tmp_path.rglob("*") if tmp_path / "run" not in (path, *path.parents)
    }
    assert sorted(written) == before
    # Resume in the middle, from a copy elsewhere: the content is compared, not place and time.
    shutil.copytree(tmp_path / "set", tmp_path / "copy" / "set", copy_function=shutil.copyfile)
    moved = [word.replace(str(tmp_path), str(tmp_path / "copy")) for word in data]
    resumed = {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-3"}
    train(flags(checkpoint, moved, tmp_path / "resumed", **resumed))
    assert losses(tmp_path / "resumed")[-3:] == losses(plain)[-3:]


def test_ranks_train_as_from_json(checkpoint, rows, tmp_path):
    found = []
    for name, data in (("json", rows), ("table", write_table(rows, tmp_path, "split"))):
        words = flags(checkpoint, data, tmp_path / name, max_steps=2)
        ranks = start_ranks(2, "ltu.finetune", words, tmp_path / f"{name}.log")
        for rank in ranks:
            rank.join(PATIENCE)
        assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / f"{name}.log.0").read_text()
        found.append(losses(tmp_path / name))
    assert len(found[0]) == 2
    assert found[1] == found[0]


def test_another_question_split_or_answer_is_another_run(checkpoint, rows, tmp_path):
    data = write_table(rows, tmp_path, "split")
    train(flags(checkpoint, data, tmp_path / "run", max_steps=1))
    again = {"max_steps": 1, "resume_from_checkpoint": "last"}
    for changed, text in (
        (["--split", "test"], "--split: train there, test here"),
        (["--answer_column", "question"], "--answer_column: answer there, question here"),
    ):
        line = one_line_of(train, [*flags(checkpoint, data, tmp_path / "run", **again), *changed])
        assert text in line and "contents of --data_path" in line
    # The same folder with other answers, as many bytes.
    shard = next((tmp_path / "set" / "train").glob("*.arrow"))
    content = shard.read_bytes()
    answer = json.loads(rows.read_text())[5]["output"].encode()
    assert content.count(answer)
    shard.write_bytes(content.replace(answer, answer.upper()))
    line = one_line_of(train, flags(checkpoint, data, tmp_path / "run", **again))
    assert "contents of --data_path" in line


# --- index


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_index_equals_the_table(checkpoint, rows, plain, tmp_path, layout, capsys):
    data = write_table(rows, tmp_path, layout)
    _, path, *columns = data
    index_dataset.main([path, "--base_model", str(checkpoint), *columns])
    expected = {
        "folder": "set.arrow",
        "split": "set/train.arrow",
        "parquet": "set/all.parquet.arrow",
        "parquet folder": "set/train.arrow",
    }
    index = tmp_path / expected[layout]
    assert index.is_file()
    assert "not used: id" in capsys.readouterr().out
    # The index moves with the table.
    shutil.move(tmp_path / "set", tmp_path / "moved" / "set")
    if index.parent == tmp_path:
        shutil.move(index, tmp_path / "moved")
    index = tmp_path / "moved" / expected[layout]
    data = [word.replace(str(tmp_path), str(tmp_path / "moved")) for word in data]
    trainer = make_trainer(*parse_args(flags(checkpoint, data, tmp_path / "run")))
    assert isinstance(trainer.train_dataset.examples, IndexedExamples)
    train(flags(checkpoint, data, tmp_path / "run", num_workers=1))
    assert losses(tmp_path / "run") == losses(plain)
    # The index alone is enough: it has the columns.
    train(flags(checkpoint, index, tmp_path / "indexed"))
    assert losses(tmp_path / "indexed") == losses(plain)
    assert "not used: id" in capsys.readouterr().out
    line = one_line_of(train, flags(checkpoint, index, tmp_path / "x", audio_root=tmp_path))
    assert "--audio_root has no effect" in line


def test_an_index_of_other_columns_or_another_table_is_refused(checkpoint, rows, tmp_path):
    write_table(rows, tmp_path, "folder")
    table = tmp_path / "set"
    columns = ColumnFlags(question_column="question", answer_column="answer")
    processor = AutoProcessor.from_pretrained(checkpoint)
    index = build_index(table, processor, columns=columns)
    assert len(find_index(table, columns=columns)) == NUM_EXAMPLES
    other = ColumnFlags(question="What?", answer_column="answer")
    for path in (table, index):
        with pytest.raises(DatasetError, match="--question_column 'question'.*--question 'What"):
            find_index(path, columns=other)
    shards = sorted(table.glob("*.arrow"))
    # A copy of the same content is the same table, a shard with another answer is not.
    os.utime(shards[0], (1, 1))
    os.utime(shards[1], (1, 1))
    os.utime(shards[2], (1, 1))
    assert len(find_index(table, columns=columns)) == NUM_EXAMPLES
    answer = json.loads(rows.read_text())[5]["output"].encode()
    for shard in shards:
        shard.write_bytes(shard.read_bytes().replace(answer, answer.upper()))
    with pytest.raises(DatasetError, match="set is not the folder that .*set.arrow was made of"):
        find_index(table, columns=columns)
    shards[1].unlink()
    with pytest.raises(DatasetError, match=f"{shards[1].name} is not there"):
        find_index(table, columns=columns)


# --- clips that cannot be decoded


def test_clips_that_cannot_be_decoded_are_named_and_counted(checkpoint, rows, tmp_path, caplog):
    table = as_dataset(rows).with_format("arrow")[:]
    audio = table.column("audio").to_pylist()
    audio[4] = {"bytes": None, "path": None}
    audio[7] = {"bytes": b"no audio", "path": "7.wav"}
    audio[9] = {"bytes": None, "path": "gone.wav"}
    number = table.schema.get_field_index("audio")
    table = table.set_column(number, "audio", pyarrow.array(audio, table.schema.field(number).type))
    pyarrow.parquet.write_table(table, tmp_path / "bad.parquet", row_group_size=5)
    data = ["--data_path", str(tmp_path / "bad.parquet"), *COLUMNS]

    arguments = flags(checkpoint, data, tmp_path / "run", check_audio=True)
    with pytest.raises(DatasetError) as error:
        train(arguments)
    name = f"{tmp_path}/bad.parquet#audio"
    assert f"{name}[4]: its bytes are null, and it has no path" in str(error.value)
    assert f"{name}[7]: libsndfile cannot decode it" in str(error.value)
    assert f"{name}[9]: no such file ({tmp_path}/gone.wav)" in str(error.value)
    assert "3, more than --max_bad 0" in str(error.value)

    train(flags(checkpoint, data, tmp_path / "run", max_bad=3))
    assert "bad.parquet#audio[9]: no such file" in caplog.text
    record = json.loads((tmp_path / "run" / "ltu_state.json").read_text())
    assert sorted(record["skipped"]) == [f"bad.parquet#audio[{row}]" for row in (4, 7, 9)]
    line = one_line_of(train, flags(checkpoint, data, tmp_path / "two", max_bad=2))
    assert "more than --max_bad 2" in line


def test_a_shard_that_goes_during_a_run_is_an_error_of_its_clips(checkpoint, rows, tmp_path):
    data = write_table(rows, tmp_path, "folder")
    trainer = make_trainer(*parse_args(flags(checkpoint, data, tmp_path / "run", max_bad=2)))
    shards = sorted((tmp_path / "set").glob("*.arrow"))
    dataset = trainer.train_dataset
    assert dataset[11]["input_features"] is not None
    shards[1].rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match=r"3, more than --max_bad 2.*#audio\[2\]: no such table"):
        dataset[4]
    # A shard that is replaced is opened again.
    shutil.copy(shards[0], shards[2])
    assert torch.equal(dataset.load(10)["input_features"], dataset.load(2)["input_features"])


# --- encoder cache


def test_the_encoder_cache_is_shared_with_files(checkpoint, rows, tmp_path, monkeypatch):
    """The content of a clip is the same in a file, a folder and Parquet: it is encoded once."""
    counts: list[int] = []
    stock_forward = CavMaeModel.forward

    def forward(self: CavMaeModel, input_features: torch.Tensor, **kwargs) -> torch.Tensor:
        counts.append(len(input_features))
        return stock_forward(self, input_features, **kwargs)

    monkeypatch.setattr(CavMaeModel, "forward", forward)
    more = {"freeze_audio_tower": True, "encoder_cache": tmp_path / "cache"}
    for number, layout in enumerate(["folder", "parquet"]):
        data = write_table(rows, tmp_path / layout, layout)
        train(flags(checkpoint, data, tmp_path / layout / "run", **more))
        assert sum(counts) == (NUM_EXAMPLES - 2 if number == 0 else 0)
        counts.clear()
    train(flags(checkpoint, rows, tmp_path / "json", **more))
    assert not counts
    assert losses(tmp_path / "folder" / "run") == losses(tmp_path / "json")


def test_held_out_examples_and_the_plan(checkpoint, rows, tmp_path, capsys):
    found = []
    for name, data in (("json", rows), ("table", write_table(rows, tmp_path, "folder"))):
        train(flags(checkpoint, data, tmp_path / name, val_set_size=4))
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        found.append([entry["eval_loss"] for entry in history if "eval_loss" in entry])
    assert found[0] and found[1] == found[0]
    capsys.readouterr()
    data = [
        "--data_path",
        str(tmp_path / "set"),
        "--question",
        "What?",
        "--answer_column",
        "answer",
    ]
    train([*flags(checkpoint, data, tmp_path / "plan"), "--plan"])
    printed = capsys.readouterr().out
    assert "set: 12 examples, 10 with audio (10 clips), 2 without" in printed
    assert "instruction is 'What?' (--question); not used: id, question" in printed


# --- inference


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_equal_those_from_json(checkpoint, rows, tmp_path, layout, capsys):
    common = ["--model", str(checkpoint), "--device", "cpu", "--max_new_tokens", "6"]
    infer([*common, "--data_path", str(rows), "--output_path", str(tmp_path / "json.json")])
    data = write_table(rows, tmp_path, layout)
    output = tmp_path / "table.json"
    assert infer([*common, *data, "--output_path", str(output)]) == 0
    assert "not used: id" in capsys.readouterr().out
    expected = json.loads((tmp_path / "json.json").read_text())
    found = json.loads(output.read_text())
    assert len(found) == NUM_EXAMPLES
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        audio_id = one.pop("audio_id")
        if number < 2:
            assert audio_id is None
        else:
            assert "#audio[" in audio_id and not Path(audio_id).is_absolute()
            # The name is that of the clip for everybody who reads the predictions.
            reread = tmp_path / "again.json"
            question = {"instruction": one["prompt"], "audio_id": audio_id}
            reread.write_text(json.dumps([question]))
            assert read_examples(reread, need_output=False)[0]["audio"]
        del other["audio_id"]
        for entry in (one, other):
            del entry["seconds"]
        assert one == other


def test_a_stopped_inference_continues(checkpoint, rows, tmp_path, capsys):
    """Answers of the partial file are used by the content of clips, also those from JSON."""
    common = ["--model", str(checkpoint), "--device", "cpu", "--max_new_tokens", "4"]
    damaged = json.loads(rows.read_text())
    for example in damaged:
        del example["input"]  # The table has no transcripts.
        if example["audio_id"] != "empty":
            example["audio_id"] = str(rows.parent / example["audio_id"])
    damaged[5]["audio_id"] = "gone.wav"
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    output = ["--output_path", str(tmp_path / "p.json")]
    assert infer([*common, "--data_path", str(tmp_path / "damaged.json"), *output]) == 1
    capsys.readouterr()
    assert infer([*common, *write_table(rows, tmp_path, "parquet"), *output]) == 0
    assert "11 from the partial file; generated 1" in capsys.readouterr().out


def test_labels_are_their_names(checkpoint, tmp_path, rows):
    dataset = as_dataset(rows).remove_columns(["answer"])
    dataset = dataset.add_column("target", [number % 3 for number in range(NUM_EXAMPLES)])
    dataset = dataset.cast_column("target", ClassLabel(names=["dog", "rain", "bell"]))
    dataset.save_to_disk(tmp_path / "set")
    columns = ColumnFlags(question="What is it?", answer_column="target")
    examples = read_examples(tmp_path / "set", columns=columns)
    assert [example["output"] for example in examples[:4]] == ["dog", "rain", "bell", "dog"]
