"""Tests that training and inference from tables with clips equal those from JSON and files.

The tables are written by the library `datasets`: folders of save_to_disk, and Parquet.
"""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoProcessor

from eval import report, text_embeddings
from eval.run import find_questions
from eval.run import main as evaluate
from eval.scorer_interface import EvaluationError
from ltu import index_dataset
from ltu.data.check_examples import read_examples
from ltu.data.columns import ColumnFlags
from ltu.data.dataset_parser import DatasetError
from ltu.files import run_command
from ltu.finetune import main as train
from ltu.inference.engine import LtuEngine
from ltu.inference_batch import main as infer
from ltu.models.modeling_cavmae import CavMaeModel
from ltu.training.arguments import parse_args
from ltu.training.dataset_index import IndexedExamples, build_index, find_index
from ltu.training.trainer import make_trainer
from ltu_as.extract_whisper_feature import main as extract
from ltu_as.feature_store import FeatureStore
from tests.fake_hub import open_fake_hub
from tests.machine import PATIENCE
from tests.test_eval_questions import Stub
from tests.tiny import (
    LORA,
    start_ranks,
    training_flags,
    write_checkpoint,
    write_llm,
    write_rows,
)
from tests.whisper_tiny import write_ltu_as

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
    # Resume in the middle, from a copy of another name and time: the content is compared.
    shutil.copytree(tmp_path / "set", tmp_path / "copy", copy_function=shutil.copyfile)
    moved = [word.replace(str(tmp_path / "set"), str(tmp_path / "copy")) for word in data]
    resumed = {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-3"}
    train(flags(checkpoint, moved, tmp_path / "resumed", **resumed))
    assert losses(tmp_path / "resumed")[-3:] == losses(plain)[-3:]


@pytest.mark.slow
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


# --- LTU-AS: transcripts and stored features


def test_features_of_clips_in_a_table_are_stored_once(tmp_path, capsys):
    """Training from the feature folder equals training from the audio; a change is noticed."""
    write_ltu_as(tmp_path / "init", write_llm(tmp_path / "llm"))
    rows = write_rows(tmp_path / "rows", 4)
    dataset = as_dataset(rows).add_column("said", ["one", None, "three", None])
    dataset.save_to_disk(tmp_path / "set")
    data = ["--data_path", str(tmp_path / "set"), *COLUMNS, "--transcript_column", "said"]
    questions = [word for word in data if word not in ("--answer_column", "answer")]
    store = tmp_path / "features"
    command = [*questions, "--model", str(tmp_path / "init"), "--device", "cpu"]
    command += ["--output_dir", str(store)]
    assert extract(command) == 0
    summary = json.loads((store / "summary.json").read_text())
    assert (summary["clips"], summary["stored"]) == (4, 4)
    assert extract(command) == 0  # From here on, the times of the files are compared.
    assert "4 kept" in capsys.readouterr().out

    settings = {"num_epochs": 1, "freeze_audio_tower": True}
    train(flags(tmp_path / "init", data, tmp_path / "audio", **settings))
    train(flags(tmp_path / "init", data, tmp_path / "stored", **settings, feature_root=store))
    assert losses(tmp_path / "stored") == losses(tmp_path / "audio") != []

    # Another clip in the table has another hash; the others only have another time.
    audio = dataset["audio"][:]
    audio[2] = audio[0]
    features = dataset.cast_column("audio", AUDIO).features
    changed = Dataset.from_dict(dataset.to_dict() | {"audio": audio}, features=features)
    shutil.rmtree(tmp_path / "set")
    changed.cast_column("audio", Audio(decode=False)).save_to_disk(tmp_path / "set")
    arguments = flags(tmp_path / "init", data, tmp_path / "new", **settings, feature_root=store)
    assert "#audio[2]: the audio has changed since its features" in one_line_of(train, arguments)
    assert extract(command) == 0
    assert "1 changed" in capsys.readouterr().out
    train(arguments)

    # The original's folders name features by files; a table is none.
    original = FeatureStore.__new__(FeatureStore)
    original.folder = tmp_path
    np.savez(tmp_path / "data-00000-of-00001.npz", np.ones((1, 25, 64), np.float32))
    assert original._find_original("set/data-00000-of-00001.arrow#audio[0]") is None
    assert original._find_original("set/data-00000-of-00001.wav") is not None


# --- eval


def test_questions_of_eval_may_be_named_by_a_pattern_or_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name::test", "owner/name:clean:test", "owner/name", "set/test-*.parquet"):
        path = Path(name)
        assert find_questions(["esc50"], path, None) == {"esc50": path}
        with pytest.raises(EvaluationError, match="is one data set, for one --task"):
            find_questions(["esc50", "fma"], path, None)
    for name in ("gone", "gone.json", "./owner/gone.json"):
        with pytest.raises(EvaluationError, match=f"{Path(name)} is not there"):
            find_questions(["esc50"], Path(name), None)


def test_eval_takes_questions_from_a_table(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_save", lambda figure, path: None)
    monkeypatch.setattr(text_embeddings, "open_embedder", lambda name, folder: Stub())
    rows = write_rows(tmp_path / "rows", 5)
    genres = ["Hip-Hop", "Reggae", "Rock", "Country", "Jazz"]
    examples = json.loads(rows.read_text())
    for example, genre in zip(examples, genres, strict=True):
        example["instruction"] = "Which genre?"
        example["output"] = f"Music genre: {genre}"
        del example["input"]
    rows.write_text(json.dumps(examples))
    dataset = as_dataset(rows).remove_columns(["question", "answer"])
    dataset = dataset.add_column("genre", list(range(5)))
    names = [f"Music genre: {genre}" for genre in genres]
    dataset = dataset.cast_column("genre", ClassLabel(names=names))
    splits = {"test": dataset, "train": dataset.select([0])}
    DatasetDict(splits).save_to_disk(tmp_path / "set")

    common = ["--task", "gtzan", "--model", f"m={checkpoint}", "--device", "cpu"]
    common += ["--max_new_tokens", "6", "--cache_dir", str(tmp_path / "cache")]
    columns = ["--question", "Which genre?", "--answer_column", "genre"]
    table = ["--questions", str(tmp_path / "set"), "--split", "test", *columns]
    assert evaluate([*common, "--questions", str(rows), "--output_dir", str(tmp_path / "a")]) == 0
    assert evaluate([*common, *table, "--output_dir", str(tmp_path / "b")]) == 0
    found = []
    for name in ("a", "b"):
        result = json.loads((tmp_path / name / "report.json").read_text())["results"][0]
        predictions = json.loads((tmp_path / name / "m" / "gtzan.predictions.json").read_text())
        answers = [(entry["pred"], entry["ref"]) for entry in predictions]
        found.append((result["num_examples"], result["value"], answers))
        assert result["questions"].get("split") == (None if name == "a" else "test")
    assert found[0] == found[1] and found[0][0] == 5
    # Nothing is generated again.
    monkeypatch.setattr(LtuEngine, "from_pretrained", None)
    assert evaluate([*common, *table, "--output_dir", str(tmp_path / "b")]) == 0
    # Predictions are compared with the questions of the table.
    predictions = ["--predictions", str(tmp_path / "b" / "m" / "gtzan.predictions.json")]
    score = ["--task", "gtzan", *predictions, *table, "--output_dir", str(tmp_path / "c")]
    assert evaluate(score) == 0
    line = one_line_of(evaluate, [*score, "--split", "train"])
    assert "not in" in line
    line = one_line_of(evaluate, [*score, "--task", "gtzan", "esc50"])
    assert "is one data set, for one --task" in line


# --- data sets of the hub


def hub_rows(rows: Path) -> list[tuple[dict, bytes | None]]:
    """Return examples of a JSON file and the bytes of their clips."""
    found = []
    for example in json.loads(rows.read_text()):
        found.append((example, (rows.parent / example["audio_id"]).read_bytes()))
    return found


def test_data_sets_with_the_columns_of_the_hub(checkpoint, tmp_path):
    """ESC-50, AudioCaps and LibriSpeech as they lie on the hub, each trained for a step."""
    rows = write_rows(tmp_path / "rows", 4)
    clips = [{"bytes": content, "path": "x.wav"} for _, content in hub_rows(rows)]
    texts = [example["output"] for example, _ in hub_rows(rows)]
    numbers = list(range(4))
    tables = {
        "esc50/data/train": {
            "filename": ["1-100032-A-0.wav"] * 4, "fold": [1] * 4, "target": numbers,
            "category": texts, "esc10": [True] * 4, "src_file": numbers, "take": ["A"] * 4,
        },
        "AudioCaps/data/test": {
            "audiocap_id": numbers, "youtube_id": ["r1nicOVtvkQ"] * 4, "start_time": numbers,
            "caption": texts,
        },
        "librispeech_asr/clean/train.100/0000": {
            "file": ["374-180298-0000.flac"] * 4, "text": texts, "speaker_id": numbers,
            "chapter_id": numbers, "id": ["374-180298-0000"] * 4,
        },
    }  # fmt: skip
    commands = {
        "esc50/data": "--split train --question 'What is it?' --answer_column category",
        "AudioCaps/data": "--split test --question 'Describe it.' --answer_column caption",
        "librispeech_asr/clean": "--split train.100 --question 'What is said?' "
        "--answer_column text",
    }
    for name, columns in tables.items():
        folder = tmp_path / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        dataset = Dataset.from_dict(columns)
        shard = "" if name.startswith("libri") else "-00000-of-00001"
        table = dataset.with_format("arrow")[:].append_column(
            "audio", pyarrow.array(clips, pyarrow.struct({"bytes": "binary", "path": "string"}))
        )
        pyarrow.parquet.write_table(table, f"{folder}{shard}.parquet")
    for name, words in commands.items():
        data = ["--data_path", str(tmp_path / name), *shlex.split(words)]
        output = tmp_path / name / "run"
        train(flags(checkpoint, data, output, num_epochs=1))
        assert len(losses(output)) == 1
        split = data[3]
        columns = ColumnFlags(split, question="?", answer_column=data[-1])
        examples = read_examples(tmp_path / name, columns=columns)
        assert [example["output"] for example in examples] == texts


def test_training_and_an_index_of_a_data_set_of_the_hub(checkpoint, rows, plain, tmp_path):
    """With the real client; nothing is downloaded twice, and the index names the cached files."""
    dataset = as_dataset(rows)
    data = ["--data_path", "owner/clips", "--split", "train", *COLUMNS]
    index = tmp_path / "clips.arrow"
    words = ["owner/clips", *data[2:], "--base_model", str(checkpoint)]
    code = f"""
from ltu import finetune, index_dataset
finetune.main({flags(checkpoint, data, tmp_path / "run")!r})
index_dataset.main({[*words, "--output_path", str(index)]!r})
try:
    index_dataset.main({words!r})
except ValueError as error:
    print("ERROR", error)
"""
    with open_fake_hub() as hub:
        for number in range(2):
            file = tmp_path / f"{number}.parquet"
            dataset.shard(2, number, contiguous=True).to_parquet(file)
            path = f"data/train-{number:05}-of-00002.parquet"
            hub.dataset_files["owner/clips", "main", path] = file.read_bytes()
        found = hub.run(code, HF_HOME=str(tmp_path / "home"), CUDA_VISIBLE_DEVICES="")
        assert found.returncode == 0, found.stdout + found.stderr
        assert sorted(hub.downloads) == [f"data/train-{n:05}-of-00002.parquet" for n in range(2)]
    assert "owner/clips [train]: 12 examples, 10 with audio" in found.stdout
    assert "ERROR owner/clips [train] has no folder of its own for an index" in found.stdout
    assert losses(tmp_path / "run") == losses(plain)
    train(flags(checkpoint, index, tmp_path / "indexed"))
    assert losses(tmp_path / "indexed") == losses(plain)
