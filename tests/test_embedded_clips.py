"""Tests that data commands read and write tables with clips, compared with the real `datasets`.

`datasets` reads what --embed_audio wrote, and writes the folders that the commands read.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from data import (
    closed_qa,
    combine,
    contamination_check,
    filter_unanswerable,
    remap_paths,
    sample,
    shuffle,
    stats,
    validate,
)
from ltu.data import parquet_writer
from ltu.data.check_examples import read_examples
from ltu.data.dataset_io import ExampleWriter, stream_examples
from ltu.data.parquet_writer import ClipContent
from ltu.data.table_clip import read_clip_bytes
from ltu.files import sha256_of
from tests.fake_hub import open_fake_hub

TONE = (np.sin(np.arange(8000) / 9) * 9999).astype(np.int16)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Let `datasets` write its cache next to the test's files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_set(folder: Path, names: Iterable[str], first: int = 0) -> Path:
    """Write clips and examples on them, and one without audio; return the dataset file."""
    folder.mkdir(parents=True)
    with ExampleWriter(folder / "examples.json") as output:
        for number, name in enumerate(names, start=first):
            soundfile.write(folder / name, TONE[number:], 16_000)
            output.write(
                {
                    "instruction": f"question {number}?",
                    "input": "",
                    "audio_id": name,
                    "dataset": folder.name,
                    "task": "t",
                    "output": f"answer {number}",
                }
            )
        output.write(
            {"instruction": f"no clip in {folder.name}?", "audio_id": "empty", "output": "no"}
        )
    return folder / "examples.json"


def load(path: Path) -> datasets.Dataset:
    """Open a Parquet file with the real `datasets`, without decoding the clips."""
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train")
    assert isinstance(loaded.features["audio"], datasets.Audio)
    return loaded.cast_column("audio", datasets.Audio(decode=False))


def contents(examples: Iterable[dict], root: Path | None = None) -> list[tuple]:
    """Return texts and bytes of each clip, sorted: what must survive every conversion."""
    found = []
    for example in examples:
        if "audio" in example and isinstance(example["audio"], dict | None):
            content = example["audio"] and example["audio"]["bytes"]
        elif example["audio_id"] in (None, "empty"):
            content = None
        elif "#" in example["audio_id"]:
            content = read_clip_bytes(root / example["audio_id"])
        else:
            content = (root / example["audio_id"]).read_bytes()
        found.append((example["instruction"], example["output"], content))
    return sorted(found, key=lambda item: item[0])


def run(command, data_path: Path | str, output: Path, *more: str) -> Path:
    assert command.main(["--data_path", str(data_path), "--output_path", str(output), *more]) == 0
    return output


def test_round_trip_by_the_real_datasets(tmp_path):
    """JSON -> Parquet with clips -> load_dataset -> save_to_disk -> data.sample -> JSON."""
    names = ["a.wav", "b.flac", "c.wav", "d.wav"]
    source = make_set(tmp_path / "set", names)
    expected = contents(stream_examples(source), source.parent)

    embedded = run(combine, source, tmp_path / "out" / "all.parquet", "--embed_audio")
    loaded = load(embedded)
    assert contents(loaded) == expected
    assert sorted(clip["path"] for clip in loaded["audio"] if clip) == names

    loaded.save_to_disk(tmp_path / "saved" / "train", num_shards=2)
    sampled = run(
        sample, tmp_path / "saved" / "train", tmp_path / "new" / "s.json", "--clips", "99"
    )
    # The sample names clips by their tables, and the provenance says where these are.
    provenance = json.loads(Path(f"{sampled}.provenance.json").read_text())
    root = Path(provenance["audio_root"])
    assert root == tmp_path / "saved"
    without_audio = [item for item in expected if item[2] is not None]
    assert contents(stream_examples(sampled), root) == without_audio
    audio = [example["audio"] for example in read_examples(sampled, root)]
    assert all(Path(path.split("#")[0]).is_file() for path in audio)
    # Every file of the folder is an input, with its hash.
    inputs = {entry["path"]: entry["sha256"] for entry in provenance["inputs"]}
    shards = sorted((tmp_path / "saved" / "train").glob("*.arrow"))
    assert inputs == {str(shard): sha256_of(shard) for shard in shards}
    assert len(shards) == 2

    # The folder, the sample that refers to it, and Parquet with clips give the same again.
    for number, again in enumerate([tmp_path / "saved" / "train", embedded]):
        output = tmp_path / "again" / f"{number}.parquet"
        loaded = load(run(shuffle, again, output, "--embed_audio"))
        assert contents(loaded) == expected
        assert sorted(clip["path"] for clip in loaded["audio"] if clip) == names
    output = run(filter_unanswerable, sampled, tmp_path / "again" / "f.parquet", "--embed_audio")
    assert contents(load(output)) == without_audio


def test_clips_of_several_folders_with_the_same_names(tmp_path):
    """Without --embed_audio no --audio_root finds them all; with it, each has its own clip."""
    one = make_set(tmp_path / "one", ["a.wav", "b.wav"])
    two = make_set(tmp_path / "two", ["a.wav", "b.wav"], first=10)
    expected = contents(stream_examples(one), one.parent)
    expected += contents(stream_examples(two), two.parent)
    output = tmp_path / "both.parquet"
    command = ["--data_path", str(one), str(two), "--output_path", str(output), "--embed_audio"]
    assert combine.main(command) == 0
    assert contents(load(output)) == sorted(expected, key=lambda item: item[0])
    provenance = json.loads(Path(f"{output}.provenance.json").read_text())
    assert provenance["embedded_audio"] is True and "audio_root" not in provenance
    # Its clips are now named by their rows.
    names = [example["audio_id"] for example in stream_examples(output)]
    assert [name for name in names if name] == [
        f"both.parquet#audio[{row}]" for row, name in enumerate(names) if name
    ]


def test_a_command_writes_the_same_bytes_again(tmp_path):
    source = make_set(tmp_path / "set", ["a.wav", "b.wav"])
    files = [run(shuffle, source, tmp_path / f"{n}.parquet", "--embed_audio") for n in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing.wav", "No such file or directory"),
        ("pipe.wav", "is a pipe, not a file"),
        (".", "is a folder, not a file"),
        ("../secret.wav", "is outside of"),
        ("/etc/passwd", "is outside of"),
        ("link.wav", "is outside of"),
        ("../other.parquet#audio[0]", "is outside of"),
        ("loop.wav", "loop"),
        ("private.txt", "not audio that can be decoded"),
        ("set.parquet", "not audio that can be decoded"),
        ("set.parquet#audio[99]", "has 2 rows"),
        ("set.parquet#sound[0]", "has no column 'sound'"),
    ],
)
def test_what_is_no_clip_of_the_dataset_is_not_stored(tmp_path, name, reason):
    source = make_set(tmp_path / "set", ["a.wav"])
    os.mkfifo(source.parent / "pipe.wav")
    (source.parent / "loop.wav").symlink_to("loop.wav")
    (source.parent / "private.txt").write_text("a password next to the clips")
    (tmp_path / "secret.wav").write_text("secret")
    (source.parent / "link.wav").symlink_to(tmp_path / "secret.wav")
    run(shuffle, source, source.parent / "set.parquet", "--embed_audio")
    run(shuffle, source, tmp_path / "other.parquet", "--embed_audio")
    examples = [*stream_examples(source), {"instruction": "q", "audio_id": name, "output": "a"}]
    source.write_text(json.dumps(examples))

    output = tmp_path / "out" / "all.parquet"
    with pytest.raises(ValueError) as error:
        run(combine, source, output, "--embed_audio", "--no_shuffle")
    assert str(output) in str(error.value) and "example 3: audio_id" in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert list(output.parent.iterdir()) == []


def test_an_allowed_root_allows_it(tmp_path):
    one = make_set(tmp_path / "one", ["a.wav"])
    clip = tmp_path / "two" / "b.wav"
    clip.parent.mkdir()
    soundfile.write(clip, TONE, 16_000)
    one.write_text(json.dumps([{"instruction": "q", "audio_id": str(clip), "output": "a"}]))
    flags = ["--embed_audio", "--allowed_root", str(clip.parent)]
    loaded = load(run(shuffle, one, tmp_path / "all.parquet", *flags))
    assert loaded[0]["audio"] == {"bytes": clip.read_bytes(), "path": "b.wav"}


def test_only_parquet_stores_clips(tmp_path):
    source = make_set(tmp_path / "set", ["a.wav"])
    with pytest.raises(ValueError, match="only Parquet stores clips. Name the output .parquet"):
        run(shuffle, source, tmp_path / "all.jsonl", "--embed_audio")


def test_row_groups_are_small(tmp_path, monkeypatch):
    """A group ends after 100 clips, or after so many bytes: both bound the memory."""
    monkeypatch.setattr(parquet_writer, "CLIPS_AT_ONCE", 10)
    monkeypatch.setattr(parquet_writer, "CLIP_BYTES_AT_ONCE", 5000)

    def sizes(num_bytes: int) -> list[int]:
        path = tmp_path / f"{num_bytes}.parquet"
        with ExampleWriter(path, read_clip=lambda _: ClipContent(bytes(num_bytes), "a")) as output:
            for number in range(25):
                output.write({"instruction": str(number), "audio_id": "a", "output": ""})
        metadata = pyarrow.parquet.ParquetFile(path).metadata
        groups = range(metadata.num_row_groups)
        return [metadata.row_group(number).num_rows for number in groups]

    assert sizes(10) == [10, 10, 5]
    assert sizes(1000) == [5] * 5
    assert sizes(6000) == [1] * 25


def test_an_example_that_has_the_column_already(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(ValueError, match="example 1 has 'audio' already"):
        with ExampleWriter(path, read_clip=lambda _: None) as output:
            output.write({"instruction": "q", "audio_id": "a", "audio": "b"})


@pytest.fixture
def saved(tmp_path):
    """A folder of `datasets` with other names of columns: one clip of three is damaged."""
    source = make_set(tmp_path / "set", ["a.wav", "b.wav"])
    clips = [(source.parent / name).read_bytes() for name in ("a.wav", "b.wav")]
    rows = {
        "audio": [{"bytes": clip, "path": None} for clip in [*clips, b"no audio"]],
        "text": ["one", "two", "three"],
        "category": [0, 1, 0],
    }
    # Without torchcodec, `datasets` cannot encode clips, but it can cast what is encoded.
    table = datasets.Dataset.from_dict(rows)
    table = table.cast_column("audio", datasets.Audio(decode=False))
    table = table.cast_column("category", datasets.ClassLabel(names=["dog", "rain"]))
    table.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


COLUMNS = ["--question", "What is said?", "--answer_column", "text"]


def test_the_other_commands_read_a_folder(saved, tmp_path, capsys):
    report = run(stats, saved, tmp_path / "stats.json", *COLUMNS)
    counted = json.loads(report.read_text())
    assert (counted["num_examples"], counted["clips"]) == (3, 3)

    for decode in ([], ["--decode"]):
        output = tmp_path / "report.json"
        flags = ["--data_path", str(saved), "--output_path", str(output), *COLUMNS, *decode]
        assert validate.main(flags) == 1
        found = json.loads(output.read_text())
        assert found["wrong"] == {"clip unreadable": 1}
        assert found["sampling_rates"] == {"16000 Hz": 2}
        assert "#audio[2]" in found["first_errors"]["clip unreadable"][0]

    capsys.readouterr()
    flags = ["--data_path", str(saved), *COLUMNS, "--eval_files", str(tmp_path / "set")]
    flags[-1] += "/examples.json"
    # Clips of a table have no names to compare.
    assert contamination_check.main(flags) == 1
    assert "3 clips were not compared" in capsys.readouterr().out
    clean = tmp_path / "clean.parquet"
    more = ["--content", "--workers", "1", "--clean_path", str(clean), "--embed_audio"]
    assert contamination_check.main([*flags, *more]) == 1
    assert "2 of 3 examples are on 2 clips" in capsys.readouterr().out
    assert [row["audio"]["bytes"] for row in load(clean)] == [b"no audio"]


def test_closed_qa_reads_labels_and_clips(saved, tmp_path):
    output = tmp_path / "out" / "qa.json"
    tasks = ["--tasks", "cla_label", "--columns", "labels=category"]
    assert closed_qa.main(["--metadata", str(saved), "--output_path", str(output), *tasks]) == 0
    examples = list(stream_examples(output))
    assert [example["audio_id"] for example in examples] == [
        f"saved/data-00000-of-00001.arrow#audio[{row}]" for row in range(3)
    ]
    assert "dog" in examples[0]["output"] and "rain" in examples[1]["output"]
    provenance = json.loads(Path(f"{output}.provenance.json").read_text())
    assert provenance["audio_root"] == str(tmp_path)


def test_remap_paths_makes_names_in_tables_absolute(saved, tmp_path):
    output = tmp_path / "out" / "b.json"
    run(remap_paths, saved, output, *COLUMNS, "--prefix", f"={tmp_path}/")
    names = [example["audio_id"] for example in stream_examples(output)]
    assert names == [f"{saved}/data-00000-of-00001.arrow#audio[{row}]" for row in range(3)]
    run(remap_paths, output, tmp_path / "c.json", "--prefix", f"{tmp_path}/=/", "--drop_missing")
    assert list(stream_examples(tmp_path / "c.json")) == []


def test_a_dataset_of_the_hub_is_sampled(tmp_path):
    source = make_set(tmp_path / "set", ["a.wav", "b.wav", "c.wav"])
    train = run(shuffle, source, tmp_path / "train.parquet", "--embed_audio")
    code = """
from data import sample
from ltu.files import run_command
run_command(lambda: sample.main({flags!r}))
"""
    output = tmp_path / "sample.parquet"
    flags = ["--data_path", "o/name", "--output_path", str(output), "--clips", "2", "--embed_audio"]
    with open_fake_hub() as hub:
        for split in ("train", "test"):
            name = f"data/{split}-00000-of-00001.parquet"
            hub.dataset_files["o/name", "main", name] = train.read_bytes()
        refused = hub.run(code.format(flags=flags), HF_HOME=str(tmp_path / "home"))
        assert refused.returncode == 1
        assert refused.stderr == (
            "error: o/name, config default, has several splits. Choose one, as in "
            "o/name:default:SPLIT: test, train.\n"
        )
        flags += ["--split", "train"]
        done = hub.run(code.format(flags=flags), HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    found = contents(load(output))
    assert len(found) == 2
    assert set(found) <= set(contents(stream_examples(source), source.parent))
    provenance = json.loads(Path(f"{output}.provenance.json").read_text())
    [given] = provenance["inputs"]
    assert given["path"].endswith("data/train-00000-of-00001.parquet")
    assert given["sha256"] == sha256_of(train)
