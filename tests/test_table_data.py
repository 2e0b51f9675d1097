"""Tests how tables are read: which files, columns and clips, and every mistake in one line.

The library `datasets` writes the tables, and reads them again as the reference.
"""

import argparse
import io
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from ltu.data import table_clip
from ltu.data.audio import AudioError, decode_audio
from ltu.data.check_examples import read_examples
from ltu.data.columns import ColumnFlags, add_column_flags, read_column_flags
from ltu.data.dataset_io import describe_columns, hash_source, stream_examples, typed_examples
from ltu.data.dataset_parser import DatasetError
from ltu.data.dataset_source import DatasetSource, find_dataset
from ltu.data.table_clip import (
    TableClip,
    TableClipError,
    read_clip_bytes,
    record_clip,
    sha256_of_clip,
    version_of_clip,
)
from ltu.files import sha256_of
from tests.tiny import clip

STRUCT = {"bytes": Value("binary"), "path": Value("string")}
FEATURES = Features(
    {
        "audio": STRUCT,
        "text": Value("string"),
        "label": ClassLabel(names=["dog", "rain"]),
        "id": Value("int64"),
    }
)
WITH_TEXT = ColumnFlags(question="What is said?", answer_column="text")


def wav(seed: int, seconds: float = 0.1) -> bytes:
    """Return the bytes of a wav file of noise."""
    file = io.BytesIO()
    soundfile.write(file, clip(seed, seconds), 16_000, format="WAV")
    return file.getvalue()


def make_dataset(count: int = 9, first: int = 0) -> Dataset:
    """Return a data set as others have it, with the type Audio."""
    columns = {
        "audio": [
            {"bytes": wav(first + number), "path": f"{number}.wav"} for number in range(count)
        ],
        "text": [f"text {first + number}" for number in range(count)],
        "label": [number % 2 for number in range(count)],
        "id": list(range(count)),
    }
    return Dataset.from_dict(columns, features=FEATURES).cast_column("audio", Audio(decode=False))


def bytes_of(examples: list[dict], root: Path) -> list[bytes | None]:
    """Return the bytes of the clips of examples."""
    found = []
    for example in examples:
        audio_id = example["audio_id"]
        found.append(None if audio_id is None else read_clip_bytes(root / audio_id))
    return found


def assert_equals(path: Path, columns: ColumnFlags, reference: Dataset) -> None:
    """Compare what is read with what the library `datasets` reads."""
    examples = list(stream_examples(path, columns))
    root = find_dataset(path, columns.split).root
    assert [example["output"] for example in examples] == list(reference["text"])
    expected = [audio["bytes"] for audio in reference["audio"]]
    assert bytes_of(examples, root) == expected
    # In any order, and in threads.
    names = [root / example["audio_id"] for example in examples]
    order = np.random.default_rng(0).permutation(len(names)).tolist() * 3
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda number: read_clip_bytes(names[number]), order))
    assert found == [expected[number] for number in order]


# --- names of clips


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a/b.parquet#audio[3]", TableClip("a/b.parquet", "audio", 3)),
        ("a#1/b.arrow#my audio[0]", TableClip("a#1/b.arrow", "my audio", 0)),
        ("a.parquet#x[y][12]", TableClip("a.parquet", "x[y]", 12)),
        ("a\nb.parquet#audio[1]", TableClip("a\nb.parquet", "audio", 1)),
        ("a.wav", None),
        ("a#b.wav", None),
        ("a.parquet#audio[-1]", None),
        ("a.parquet#audio[1] ", None),
        ("a.parquet#[1]", None),
        ("#audio[1]", None),
        ("", None),
    ],
)
def test_names_of_clips(text, expected):
    assert TableClip.parse(text) == expected
    if expected is not None:
        assert str(expected) == text
        assert TableClip.parse(Path(text)) == expected


def test_a_clip_is_decoded_as_its_file(tmp_path):
    table = tmp_path / "c.parquet"
    make_dataset().to_parquet(table)
    (tmp_path / "2.wav").write_bytes(wav(2))
    found = decode_audio(f"{table}#audio[2]")
    expected = decode_audio(tmp_path / "2.wav")
    assert np.array_equal(found.waveform, expected.waveform)
    assert sha256_of_clip(f"{table}#audio[2]") == sha256_of(tmp_path / "2.wav")
    for name, reason, text in (
        ("c.parquet#audio[9]", "missing", "the table has 9 rows, counted from 0"),
        ("c.parquet#sound[0]", "missing", "the table has no column 'sound'"),
        ("d.parquet#audio[0]", "missing", "no such table"),
        ("c.parquet#text[0]", "unreadable", "the column 'text' has a str, no bytes"),
        ("2.wav#audio[0]", "unreadable", "is not a complete Arrow stream"),
        (".#audio[0]", "unreadable", "is a folder, not a file"),
    ):
        with pytest.raises(AudioError) as error:
            decode_audio(f"{tmp_path}/{name}")
        assert error.value.reason == reason
        assert f"{tmp_path}/{name}: " in str(error.value) and text in str(error.value)
        assert version_of_clip(f"{tmp_path}/{name}") is None or name.startswith("c.parquet#text")


def test_errors_survive_a_worker_of_a_data_loader():
    error = pickle.loads(pickle.dumps(TableClipError("missing", "no such table")))
    assert (error.reason, str(error)) == ("missing", "no such table")


def test_a_clip_that_is_a_path(tmp_path):
    """Absolute, or relative to the folder of the table; a change of the file is noticed."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.wav").write_bytes(wav(1))
    (tmp_path / "b.wav").write_bytes(wav(2))
    audio = [
        {"bytes": None, "path": "a.wav"},
        {"bytes": None, "path": str(tmp_path / "b.wav")},
        {"bytes": wav(3), "path": "gone.wav"},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"", "path": "a.wav"},
    ]
    dataset = Dataset.from_dict(
        {"audio": audio, "text": list("abcdef")},
        Features({"audio": STRUCT, "text": Value("string")}),
    )
    table = dataset.with_format("arrow")[:]
    path = tmp_path / "sub" / "t.parquet"
    pyarrow.parquet.write_table(table, path)
    examples = read_examples(path, columns=WITH_TEXT)
    assert [example["audio"] is None for example in examples] == [False] * 4 + [True, False]
    found = [read_clip_bytes(examples[number]["audio"]) for number in range(3)]
    assert found == [wav(1), wav(2), wav(3)]
    for number, text in ((3, "its bytes are null, and it has no path"), (5, r"it has 0 bytes\.")):
        with pytest.raises(AudioError, match=rf"t.parquet#audio\[{number}\]: {text}"):
            decode_audio(examples[number]["audio"])
    versions = [version_of_clip(examples[number]["audio"]) for number in range(3)]
    assert len(set(versions)) == 3
    os.utime(tmp_path / "b.wav", (1, 1))
    changed = [version_of_clip(examples[number]["audio"]) for number in range(3)]
    assert [a == b for a, b in zip(versions, changed, strict=True)] == [True, False, True]
    (tmp_path / "b.wav").unlink()
    assert version_of_clip(examples[1]["audio"]) is None
    with pytest.raises(AudioError, match=r"#audio\[1\]: no such file \(.*b.wav\)"):
        decode_audio(examples[1]["audio"])


# --- the same as the library `datasets`


def test_folders_of_save_to_disk(tmp_path):
    dataset = make_dataset()
    variants = {
        "one": dataset,
        "selected": dataset.select([7, 1, 3]),
        "filtered": dataset.filter(lambda row: row["id"] % 2),
        "sorted": dataset.sort("id", reverse=True),
        "mapped": dataset.map(lambda row: {"text": row["text"].upper()}),
    }
    for name, variant in variants.items():
        variant.save_to_disk(tmp_path / name)
        assert_equals(tmp_path / name, WITH_TEXT, load_from_disk(tmp_path / name))
    dataset.save_to_disk(tmp_path / "shards", num_shards=4)
    assert_equals(tmp_path / "shards", WITH_TEXT, load_from_disk(tmp_path / "shards"))
    DatasetDict(train=dataset, test=make_dataset(2, 5)).save_to_disk(tmp_path / "splits")
    for split in ("train", "test"):
        flags = ColumnFlags(split=split, question="What is said?", answer_column="text")
        assert_equals(tmp_path / "splits", flags, load_from_disk(tmp_path / "splits")[split])


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_parquet_of_several_row_groups(tmp_path, monkeypatch, compression):
    """Also if a row group is larger than what is in memory at once."""
    path = tmp_path / "c.parquet"
    table = make_dataset(20).with_format("arrow")[:]
    pyarrow.parquet.write_table(table, path, row_group_size=7, compression=compression)
    reference = load_dataset("parquet", data_files=str(path), split="train", cache_dir=tmp_path)
    reference = reference.cast_column("audio", Audio(decode=False))
    assert_equals(path, WITH_TEXT, reference)
    monkeypatch.setattr(table_clip, "BATCH_BYTES", 2 * len(wav(0)))
    table_clip._open_tables.tables.clear()
    assert_equals(path, WITH_TEXT, reference)


def test_several_parquet_files_are_one_data_set(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        make_dataset(4, 4 * number).to_parquet(folder / f"train-{number:05}-of-00003-0a1b.parquet")
    make_dataset(2, 50).to_parquet(folder / "validation.parquet")
    files = sorted(map(str, folder.glob("train*")))
    reference = load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "c")
    reference = reference.cast_column("audio", Audio(decode=False))
    train = ColumnFlags(split="train", question="?", answer_column="text")
    assert_equals(folder, train, reference)
    assert_equals(Path(f"{folder}/train-*"), WITH_TEXT, reference)
    for path in (folder, folder / "*.parquet"):
        with pytest.raises(DatasetError, match="has the splits train, validation; choose one with"):
            find_dataset(path)
    with pytest.raises(DatasetError, match="train, validation; --split test is none of them"):
        find_dataset(folder, "test")
    # The hub's own conversion: CONFIG/SPLIT/0000.parquet.
    (folder / "clean" / "train.100").mkdir(parents=True)
    for number in range(2):
        shutil.copy(files[number], folder / "clean" / "train.100" / f"{number:04}.parquet")
    assert len(find_dataset(folder / "clean" / "train.100").files) == 2
    assert len(find_dataset(folder / "clean", "train.100").files) == 2
    # A column that only the first file has.
    make_dataset(2).remove_columns("text").to_parquet(files[2])
    with pytest.raises(
        DatasetError, match=f"{Path(files[2]).name} has no column 'text', but train-0"
    ):
        list(stream_examples(folder, train))


@pytest.mark.parametrize("kind", ["large", "view", "dictionary", "plain"])
def test_types_of_columns(tmp_path, kind):
    """Large and view types, dictionaries, and bytes without a struct."""
    clips = [wav(number) for number in range(4)]
    texts = ["a", "b", "a", "c"]
    text = pyarrow.array(texts)
    audio = pyarrow.array(clips)
    if kind == "large":
        text = text.cast(pyarrow.large_string())
        struct = pyarrow.struct({"bytes": pyarrow.large_binary(), "path": pyarrow.large_string()})
        audio = pyarrow.array([{"bytes": clip, "path": "x"} for clip in clips], struct)
    elif kind == "view":
        text = pyarrow.array(texts, pyarrow.string_view())
        audio = pyarrow.array(clips, pyarrow.binary_view())
    elif kind == "dictionary":
        text = text.dictionary_encode()
    table = pyarrow.table({"audio": audio, "text": text})
    (tmp_path / "set").mkdir()
    with pyarrow.ipc.new_stream(tmp_path / "set" / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "set" / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    paths = [tmp_path / "set"]
    if kind != "view":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        paths.append(tmp_path / "a.parquet")
    for path in paths:
        examples = list(stream_examples(path, WITH_TEXT))
        assert [example["output"] for example in examples] == texts
        assert bytes_of(examples, tmp_path) == clips


def test_a_file_with_the_name_of_a_clip_is_a_file(tmp_path):
    names = ["a#b.wav", "a#audio[3]", "set.parquet#audio[0]"]
    make_dataset(1).to_parquet(tmp_path / "set.parquet")
    examples = []
    for number, name in enumerate(names, start=50):
        (tmp_path / name).write_bytes(wav(number))
        examples.append({"instruction": "q", "audio_id": name, "output": "a"})
    (tmp_path / "all.json").write_text(json.dumps(examples))
    for number, example in enumerate(read_examples(tmp_path / "all.json"), start=50):
        path = example["audio"]
        assert TableClip.parse(path) is None
        np.testing.assert_array_equal(
            decode_audio(path).waveform, decode_audio(wav(number)).waveform
        )
        assert record_clip(path).sha256 == sha256_of(path)


# --- columns


def test_columns_that_are_images_are_no_clips(tmp_path):
    dataset = make_dataset(2).rename_column("audio", "sound")
    images = [{"bytes": b"GIF89a", "path": None}] * 2
    features = Features({"image": STRUCT})
    pictures = Dataset.from_dict({"image": images}, features=features)
    pictures = pictures.cast_column("image", Image(decode=False))
    both = concatenate_datasets([pictures, dataset], axis=1)
    both.save_to_disk(tmp_path / "set")
    both.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "set", tmp_path / "a.parquet"):
        [first, _] = read_examples(path, columns=WITH_TEXT)
        assert first["audio_id"].endswith("#sound[0]")


def test_a_column_of_binaries_that_are_paths_is_an_error(tmp_path):
    for column in ("audio_id", "recording"):
        for value in (b"a.wav", "ü.wav".encode()):
            table = pyarrow.table({column: [value], "text": ["a"]})
            pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
            with pytest.raises(DatasetError, match=f"'{column}' is a text in a column of binaries"):
                read_examples(tmp_path / "a.parquet", columns=WITH_TEXT)
    for value in (None, wav(0), b"\xff" * 9):
        column = pyarrow.array([value, wav(1)], pyarrow.binary())
        table = pyarrow.table({"audio_id": column, "text": ["a", "b"]})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert len(read_examples(tmp_path / "a.parquet", columns=WITH_TEXT)) == 2


def test_text_that_is_not_utf_8_is_named_by_its_row(tmp_path):
    binary = pyarrow.array([b"good", b"good", b"bad\xff"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    clips = pyarrow.array([wav(number) for number in range(3)])
    pyarrow.parquet.write_table(pyarrow.table({"audio": clips, "text": text}), tmp_path / "a.pq")
    with pytest.raises(DatasetError, match=r"a.pq, row 2 \(from 0\): the value of .*'text'"):
        read_examples(tmp_path / "a.pq", columns=WITH_TEXT)


def test_columns_are_found_and_named(tmp_path):
    path = tmp_path / "set"
    dataset = make_dataset(3).rename_column("audio", "recording")
    dataset.save_to_disk(path)
    source = find_dataset(path)
    columns = ColumnFlags(question_column="text", answer_column="label")
    assert list(stream_examples(path, columns))[1] == {
        "instruction": "text 1",
        "output": "rain",
        "audio_id": "set/data-00000-of-00001.arrow#recording[1]",
    }
    assert describe_columns(source, columns) == [
        "columns: audio_id from 'recording', instruction from 'text', output from 'label'; "
        "not used: id"
    ]
    # The keys of examples are found without flags, and a fixed question goes before a column.
    names = {"text": "instruction", "label": "output"}
    path = tmp_path / "keys"
    dataset.rename_columns(names).save_to_disk(path)
    assert read_examples(path)[1]["instruction"] == "text 1"
    assert read_examples(path)[1]["output"] == "rain"
    fixed = ColumnFlags(question="What?")
    assert read_examples(path, columns=fixed)[1]["instruction"] == "What?"
    assert "not used: instruction, id" in describe_columns(find_dataset(path), fixed)[0]
    # Usual names are found too, unless a flag uses the column.
    path = tmp_path / "usual"
    dataset.rename_columns({"text": "question", "label": "answer"}).save_to_disk(path)
    assert read_examples(path)[1]["instruction"] == "text 1"
    assert read_examples(path)[1]["output"] == "rain"
    assert read_examples(path, columns=fixed)[1]["instruction"] == "What?"
    with pytest.raises(DatasetError, match="no column of questions"):
        read_examples(path, columns=ColumnFlags(answer_column="question"))
    # The labels of Parquet are in its metadata.
    dataset.to_parquet(tmp_path / "a.parquet")
    assert list(stream_examples(tmp_path / "a.parquet", columns))[1]["output"] == "rain"


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"answer_column": "caption"}, "has no column 'caption', which --answer_column names; its "
         "columns are audio, text, label, id"),
        ({"audio_column": "sound"}, "no column 'sound', which --audio_column names"),
        ({}, "no column of questions is known; the columns are audio, text, label, id. Name it "
         "with --question_column, or give one question for all with --question"),
        ({"question": "What?"}, "no column of answers is known.*--answer_column"),
        ({"question": "What?", "answer_column": "id"}, "example 1: 'output', from the column 'id', "
         "is a int, not text. Name a column of texts"),
        ({"question": "What?", "answer_column": "audio"}, "'audio', is a dict, not text"),
        ({"split": "test"}, "--split test: .* has one split only"),
    ],
)  # fmt: skip
def test_mistakes_with_columns_are_one_line(tmp_path, flags, message):
    make_dataset(3).save_to_disk(tmp_path / "set")
    with pytest.raises(DatasetError, match=message) as error:
        read_examples(tmp_path / "set", columns=ColumnFlags(**flags))
    if "example 1" not in message and "dict" not in message:
        assert "\n" not in str(error.value)


def test_other_mistakes_with_columns(tmp_path):
    with pytest.raises(ValueError, match="--question and --question_column both"):
        ColumnFlags(question="What?", question_column="text")
    dataset = make_dataset(3)
    two = dataset.add_column("audio_2", dataset["audio"])
    two = two.rename_column("audio", "audio_1")
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(DatasetError, match="several columns of clips: audio_1, audio_2. Choose"):
        read_examples(tmp_path / "two", columns=WITH_TEXT)
    dataset.remove_columns("audio").save_to_disk(tmp_path / "none")
    with pytest.raises(DatasetError, match="no column of clips is known.*--audio_column"):
        read_examples(tmp_path / "none", columns=WITH_TEXT)
    dataset.save_to_disk(tmp_path / "set")
    with pytest.raises(DatasetError, match="--audio_root has no effect: the clips of .*set are in"):
        read_examples(tmp_path / "set", tmp_path, columns=WITH_TEXT)
    dataset.add_column("texts", [["a"], ["b"], ["c"]]).save_to_disk(tmp_path / "lists")
    columns = ColumnFlags(question="What?", answer_column="texts")
    with pytest.raises(
        DatasetError, match="example 1: 'output', from the column 'texts', is a list"
    ):
        read_examples(tmp_path / "lists", columns=columns)
    missing = dataset.map(lambda row: {"text": None if row["id"] == 1 else row["text"]})
    missing.save_to_disk(tmp_path / "null")
    with pytest.raises(DatasetError, match="null, example 2: 'output', from the column 'text',"):
        read_examples(tmp_path / "null", columns=WITH_TEXT)
    labels = dataset.map(lambda row: {"label": -1 if row["id"] == 1 else row["label"]})
    labels.save_to_disk(tmp_path / "label")
    columns = ColumnFlags(question="What?", answer_column="label")
    with pytest.raises(DatasetError, match="2: 'output', from the column 'label', is null, or the"):
        read_examples(tmp_path / "label", columns=columns)


def test_names_of_keys_for_json(tmp_path):
    rows = [{"path": f"{number}.wav", "q": "What?", "a": "dog", "said": None} for number in "12"]
    columns = ColumnFlags(
        audio_column="path", question_column="q", answer_column="a", transcript_column="said"
    )
    for name in ("a.json", "a.jsonl"):
        text = json.dumps(rows)
        if name == "a.jsonl":
            text = "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text)
        assert read_examples(tmp_path / name, columns=columns)[1] == {
            "audio_id": "2.wav",
            "instruction": "What?",
            "output": "dog",
            "input": None,
            "audio": str(tmp_path / "2.wav"),
        }
    path = tmp_path / "a.json"
    source = find_dataset(path)
    assert "audio_id from 'path', instruction from 'q'" in describe_columns(source, columns)[0]
    assert describe_columns(source, ColumnFlags()) == []
    # Other keys are an error as before, and so is a key that a flag names and that is not there.
    with pytest.raises(DatasetError, match="unknown key 'said'"):
        flags = ColumnFlags(audio_column="path", question_column="q", answer_column="a")
        read_examples(path, columns=flags)
    with pytest.raises(
        DatasetError, match="a.json, example 1: no 'x', which --answer_column names"
    ):
        read_examples(path, columns=ColumnFlags(answer_column="x"))
    # Parquet of paths.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_examples(tmp_path / "a.parquet", "/root", columns=columns)
    assert found[1]["audio"] == "/root/2.wav"
    assert hash_source(source, ColumnFlags()) == sha256_of(path)
    assert hash_source(source, columns) != sha256_of(path)


def test_parquet_of_examples_is_read_as_before(tmp_path):
    """Nulls are keys that an example lacks, and a column that is not used is an error."""
    row = {"instruction": "a", "audio_id": "x.wav", "output": "b", "id": "3", "input": None}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    del row["input"]
    assert list(typed_examples(tmp_path / "a.parquet")) == [row]
    with pytest.raises(DatasetError, match="unknown key 'id'"):
        read_examples(tmp_path / "a.parquet")


def test_flags_of_argparse():
    parser = argparse.ArgumentParser()
    add_column_flags(parser)
    args = parser.parse_args(["--split", "train", "--question", "What?", "--audio_column", "a"])
    assert read_column_flags(args) == ColumnFlags("train", "a", question="What?")
    assert read_column_flags(parser.parse_args([])) == ColumnFlags()


# --- damage


def test_a_damaged_folder_is_one_line(tmp_path):
    make_dataset(9).save_to_disk(tmp_path / "set", num_shards=2)
    shard = tmp_path / "set" / "data-00001-of-00002.arrow"
    content = shard.read_bytes()

    def check(message: str) -> None:
        with pytest.raises(DatasetError, match=message) as error:
            list(stream_examples(tmp_path / "set", WITH_TEXT))
        assert "\n" not in str(error.value)

    # Cut in the end mark, behind the last record batch, within it, and in the schema.
    for size in (len(content) - 1, len(content) - 8, len(content) // 2, 30, 0):
        shard.write_bytes(content[:size])
        check("data-00001-of-00002.arrow is not a complete Arrow stream")
    shard.unlink()
    check("data-00001-of-00002.arrow is not there, but state.json names it")
    shard.write_bytes(content)
    state = tmp_path / "set" / "state.json"
    good = state.read_text()
    for text, message in (
        ("{", "state.json is damaged"),
        ("[]", "is a list, not an object"),
        ("{}", "it has no '_data_files'"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "'../x.arrow', which is no name"),
        ('{"_data_files": [3]}', "has 3, which is no name"),
        (good.replace("{", '{"_indices_data_files": [],', 1), "by an old version of `datasets`"),
    ):
        state.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(stream_examples(tmp_path / "set", WITH_TEXT))
    state.write_text(good)
    info = tmp_path / "set" / "dataset_info.json"
    described = info.read_text()
    labels = ColumnFlags(question="What?", answer_column="label")
    for text, message in (
        (described.replace('"names"', '"nothing"'), "labels of the column 'label' have no names"),
        ('{"features": [1]}', "'output', from the column 'label', is a int, not text"),
    ):
        info.write_text(text)
        with pytest.raises(DatasetError, match=message):
            read_examples(tmp_path / "set", columns=labels)
    with pytest.raises(DatasetError, match="is an index or one shard. Give the dataset file, or"):
        list(stream_examples(shard, WITH_TEXT))
    state.unlink()
    check("is a folder, but none that save_to_disk of `datasets` has written")


def test_damaged_parquet_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    make_dataset(9).to_parquet(path)
    content = path.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 12):
        path.write_bytes(content[:size])
        with pytest.raises(DatasetError, match="a.parquet: cannot be read"):
            list(stream_examples(path, WITH_TEXT))
    # What pyarrow says of such a footer ends with a line end.
    path.write_bytes(content[:-300] + b"\x0e" * 292 + content[-8:])
    with pytest.raises(DatasetError, match="a.parquet: cannot be read") as error:
        list(stream_examples(path, WITH_TEXT))
    with pytest.raises(TableClipError, match="its table cannot be read") as clip_error:
        read_clip_bytes(f"{path}#audio[0]")
    assert "\n" not in f"{error.value}{clip_error.value}"
    # An encrypted file begins and ends with other letters.
    path.write_bytes(b"PARE" + content[4:-4] + b"PARE")
    with pytest.raises(DatasetError, match="a.parquet: cannot be read .*encrypt"):
        list(stream_examples(path, WITH_TEXT))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.parquet").write_text("no table")
    with pytest.raises(DatasetError, match="a.parquet is not a Parquet file"):
        list(stream_examples(tmp_path / "set", WITH_TEXT))


def test_missing_and_empty_data_sets(tmp_path):
    make_dataset(9).select([]).to_parquet(tmp_path / "a.parquet")
    table = make_dataset(1).with_format("arrow")[:].slice(0, 0)
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    for name in ("a.parquet", "b.parquet"):
        with pytest.raises(DatasetError, match="parquet contains no examples"):
            read_examples(tmp_path / name, columns=WITH_TEXT)
    make_dataset(9).select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(DatasetError, match="none contains no examples"):
        read_examples(tmp_path / "none", columns=WITH_TEXT)
    splits = DatasetDict(train=make_dataset(1), test=make_dataset(1))
    splits.save_to_disk(tmp_path / "splits")
    for split, text in ((None, "choose one with --split"), ("dev", "--split dev is none of them")):
        with pytest.raises(DatasetError, match=f"splits has the splits train, test; {text}"):
            find_dataset(tmp_path / "splits", split)
    shutil.rmtree(tmp_path / "splits" / "test")
    with pytest.raises(DatasetError, match="test has no state.json"):
        find_dataset(tmp_path / "splits", "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="it has no .parquet files"):
        find_dataset(tmp_path / "empty")
    for path in ("gone.json", "gone-*.parquet"):
        with pytest.raises(DatasetError, match="is not there. Give a JSON list"):
            find_dataset(tmp_path / path)
    with pytest.raises(
        DatasetError, match="--split train: .*a.parquet is a file, which has no splits"
    ):
        find_dataset(tmp_path / "a.parquet", "train")


def test_short_names():
    for path, name in (("/a.json", "a.json"), ("b/a.json", "a.json"), ("a.json", "a.json")):
        path = Path(path)
        assert DatasetSource(path, (path,), "json", path.parent, str(path)).short_name == name


# --- memory


def test_large_row_groups_are_read_in_parts(tmp_path, monkeypatch):
    """The texts without the clips, and of a row group of 40 MB only a part at a time."""
    monkeypatch.setattr(table_clip, "BATCH_BYTES", 2**21)
    path = tmp_path / "a.parquet"
    struct = pyarrow.struct({"bytes": "binary", "path": "string"})
    schema = pyarrow.schema({"audio": struct, "text": "string"})
    content = os.urandom(2**18)
    # A page, here of 4 clips, is what is read at least; by default one has up to 1,024 rows.
    pages = {"write_batch_size": 4, "data_page_size": 2**20, "use_dictionary": False}
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none", **pages) as writer:
        for _ in range(2):
            audio = [{"bytes": content, "path": None}] * 160
            writer.write_table(pyarrow.table({"audio": audio, "text": ["a"] * 160}, schema))
    before = pyarrow.total_allocated_bytes()
    largest = 0
    names = []
    for example in stream_examples(path, WITH_TEXT):
        names.append(tmp_path / example["audio_id"])
        largest = max(largest, pyarrow.total_allocated_bytes() - before)
    assert len(names) == 320
    assert largest < 1e6
    for name in names[::3]:
        assert read_clip_bytes(name) == content
        largest = max(largest, pyarrow.total_allocated_bytes() - before)
    assert 1e6 < largest < 12e6
