"""Tests the checks of a dataset before training: keys, answers, the cutoff, audio and its range."""

import hashlib
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoProcessor

from data import validate
from eval.run import main as evaluate
from ltu.data import audio
from ltu.data.audio import AudioError, FirstWarnings, decode_audio
from ltu.data.check_examples import check_audio, meant_key, parse_ignored_keys, read_examples
from ltu.data.dataset_io import KEYS, ExampleWriter, stream_examples
from ltu.data.dataset_parser import DatasetError
from ltu.finetune import main as train
from ltu.index_dataset import main as index
from ltu.inference_batch import main as infer
from ltu.training import open_dataset
from ltu.training.arguments import parse_args
from ltu.training.dataset import ExampleEncoder, NoAnswerError
from ltu.training.dataset_index import IndexedExamples, build_index
from ltu.training.open_dataset import make_datasets
from ltu_as.extract_whisper_feature import main as extract
from tests.tiny import LORA, clip, training_flags, write_checkpoint, write_llm, write_rows

EXAMPLE = {"instruction": "What is it?", "input": "", "audio_id": "a.wav", "output": "A dog."}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checks")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


def write(path: Path, examples: list[dict]) -> Path:
    path.write_text(json.dumps(examples))
    return path


def without(key: str) -> dict:
    return {name: value for name, value in EXAMPLE.items() if name != key}


def open_datasets(processor, checkpoint, data_path, **more):
    """Return train set, held-out set and summary of a run with these flags."""
    arguments = training_flags(checkpoint, data_path, data_path.parent / "run", **more)
    _, data, run = parse_args(arguments)
    return make_datasets(data, run, processor)


# --- keys


@pytest.mark.parametrize(
    "other, key",
    [
        ("audio", "audio_id"),
        ("audio_path", "audio_id"),
        ("path", "audio_id"),
        ("wav", "audio_id"),
        ("Audio-ID", "audio_id"),
        ("audioid", "audio_id"),
        ("transcript", "input"),
        ("text", "input"),
        ("answer", "output"),
        ("response", "output"),
        ("ouput", "output"),
        ("question", "instruction"),
        ("prompt", "instruction"),
        ("split", None),
        ("id", None),
        ("voice", None),
        ("duration", None),
    ],
)
def test_the_key_that_is_meant(other, key):
    assert meant_key(other) == key


@pytest.mark.parametrize("key", ["audio_id", "output", "instruction"])
@pytest.mark.parametrize("need_output", [True, False])
def test_a_missing_key_is_an_error_with_example_number(tmp_path, key, need_output):
    path = write(tmp_path / "rows.json", [EXAMPLE, without(key)])
    if key == "output" and not need_output:
        assert len(read_examples(path, need_output=False)) == 2
        return
    with pytest.raises(DatasetError, match=rf"rows\.json, example 2: no '{key}'; it has \["):
        read_examples(path, need_output=need_output)


@pytest.mark.parametrize(
    "key, other", [("audio_id", "audio"), ("output", "answer"), ("instruction", "question")]
)
def test_a_key_under_another_name_is_named_with_the_right_one(tmp_path, key, other):
    path = write(tmp_path / "rows.json", [without(key) | {other: EXAMPLE[key]}])
    message = f"example 1: no '{key}', but '{other}'. Rename '{other}' to '{key}'."
    with pytest.raises(DatasetError) as error:
        read_examples(path)
    assert message in str(error.value)
    # An ignored key is no reason to accept that the right one is missing.
    with pytest.raises(DatasetError, match=f"no '{key}'; it has"):
        read_examples(path, ignored_keys=[other])


def test_an_unknown_key_is_an_error_unless_it_is_ignored(tmp_path):
    example = EXAMPLE | {"dataset": "d", "task": "t", "transcript": "hello", "split": "train"}
    path = write(tmp_path / "rows.json", [example])
    for need_output in (True, False):
        with pytest.raises(DatasetError) as error:
            read_examples(path, need_output=need_output)
        assert "rows.json, example 1: unknown key 'transcript'" in str(error.value)
        assert "If 'input' is meant, rename it." in str(error.value)
        assert str(error.value).endswith("--ignored_keys transcript,split")
    ignored = parse_ignored_keys("transcript, split")
    assert read_examples(path, ignored_keys=ignored)[0]["input"] == ""


def test_a_used_key_cannot_be_ignored():
    with pytest.raises(ValueError, match="--ignored_keys id,output: output is used"):
        parse_ignored_keys("id,output")


@pytest.mark.parametrize("audio_id", ["empty", None])
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_a_question_without_audio_says_so_in_every_format(tmp_path, audio_id, ending):
    path = tmp_path / f"rows{ending}"
    with ExampleWriter(path) as output:
        output.write(EXAMPLE | {"audio_id": audio_id})
    assert read_examples(path)[0]["audio"] is None
    with ExampleWriter(path) as output:
        output.write(EXAMPLE)
        output.write(without("audio_id"))
    with pytest.raises(DatasetError, match="example 2: no 'audio_id'.*\"empty\" for a question"):
        read_examples(path)


@pytest.fixture
def strange_path(tmp_path):
    """A dataset file whose examples have the key `id`."""
    path = write_rows(tmp_path, 4)
    rows = [row | {"id": number} for number, row in enumerate(json.loads(path.read_text()))]
    return write(path, rows)


def command_lines(checkpoint, path):
    """Return (command, flags) of each command that reads examples."""
    return [
        (train, [*training_flags(checkpoint, path, path.parent / "run"), "--plan"]),
        (index, [str(path), "--base_model", str(checkpoint)]),
        (
            infer,
            f"--model {checkpoint} --data_path {path} --output_path {path.parent}/p.json "
            "--device cpu --max_new_tokens 2".split(),
        ),
        (
            evaluate,
            f"--task librispeech --model {checkpoint} --questions {path} "
            f"--output_dir {path.parent}/eval --device cpu --max_new_tokens 2".split(),
        ),
        (
            extract,
            f"--whisper missing.pt --data_path {path} --output_dir {path.parent}/features".split(),
        ),
    ]


@pytest.mark.parametrize("number", range(5))
def test_every_command_refuses_unknown_keys_and_has_the_flag(checkpoint, strange_path, number):
    command, flags = command_lines(checkpoint, strange_path)[number]
    with pytest.raises(DatasetError, match=r"rows\.json, example 1: unknown key 'id'"):
        command(flags)
    flags += ["--ignored_keys", "id"]
    if command is extract:  # There is no such Whisper, which is found when examples are read.
        with pytest.raises((OSError, ValueError), match=r"missing\.pt"):
            command(flags)
    else:
        assert not command(flags)


def test_validate_counts_unknown_keys(strange_path, capsys):
    flags = ["--data_path", str(strange_path), "--no_audio"]
    assert validate.main(flags) == 1
    assert json.loads(capsys.readouterr().out)["wrong"] == {"example": 4}
    assert validate.main([*flags, "--ignored_keys", "id"]) == 0


def test_an_index_of_older_rules_is_refused(processor, tmp_path, monkeypatch):
    """It may contain examples whose clip had another key."""
    path = write_rows(tmp_path, 3)
    monkeypatch.setattr("ltu.training.dataset_index.VERSION", 1)
    built = build_index(path, processor)
    monkeypatch.undo()
    with pytest.raises(DatasetError, match="made by another version .* Build it again"):
        IndexedExamples(built)


# --- answers


@pytest.mark.parametrize("output", ["", " \n\t"])
def test_an_empty_answer_is_an_error_whatever_max_bad_is(checkpoint, tmp_path, output):
    path = write_rows(tmp_path, 4)
    rows = json.loads(path.read_text())
    rows[2]["output"] = output
    write(path, rows)
    for flags in (["--max_bad", "4"], ["--max_bad", "4", "--plan"]):
        with pytest.raises(DatasetError, match=r"rows\.json, example 3: 'output' is empty"):
            train([*training_flags(checkpoint, path, tmp_path / "run"), *flags])
    with pytest.raises(DatasetError, match="example 3: 'output' is empty"):
        index([str(path), "--base_model", str(checkpoint), "--max_bad", "4"])
    assert len(read_examples(path, need_output=False)) == 4  # Questions.


@pytest.fixture
def cut_path(tmp_path):
    """10 examples; with a cutoff of 40, example 3 and 8 have no answer, 5 and 8 are cut."""
    path = write_rows(tmp_path, 10, without_audio=1)
    rows = json.loads(path.read_text())
    for row in rows:
        row["instruction"] = "What?"
        row["output"] = "a dog"
    for number in (2, 7):
        rows[number]["instruction"] = "What is it? " + "rain " * 60
    rows[4]["output"] = "a dog " * 60
    return write(path, rows)


@pytest.mark.parametrize("train_on_inputs", [True, False])
@pytest.mark.parametrize("is_indexed", [True, False])
def test_an_answer_that_is_cut_away_is_an_error(
    checkpoint, processor, cut_path, train_on_inputs, is_indexed
):
    if is_indexed:
        build_index(cut_path, processor)
    more = {"cutoff_len": 40, "train_on_inputs": train_on_inputs}
    flags = training_flags(checkpoint, cut_path, cut_path.parent / "run", max_bad=1, **more)
    with pytest.raises(DatasetError) as error:
        train([*flags, "--plan"])
    message = str(error.value)
    assert "2 of the 10 examples of" in message
    assert "have no answer within --cutoff_len, more than --max_bad 1" in message
    assert "Example 3: no answer is left within --cutoff_len 40" in message
    assert "Example 8: no answer is left" in message
    assert "Raise --cutoff_len" in message


@pytest.mark.parametrize("train_on_inputs", [True, False])
@pytest.mark.parametrize("is_indexed", [True, False])
def test_examples_without_answer_are_skipped_counted_and_named(
    checkpoint, processor, cut_path, train_on_inputs, is_indexed, caplog
):
    if is_indexed:
        build_index(cut_path, processor)
    more = {"cutoff_len": 40, "train_on_inputs": train_on_inputs, "max_bad": 2}
    train_set, _, summary = open_datasets(processor, checkpoint, cut_path, **more)
    assert (summary.num_truncated, summary.num_without_answer) == (3, 2)
    assert "Skipped: Example 3: no answer is left" in caplog.text
    assert train_set[2]["input_ids"] == train_set[3]["input_ids"]
    assert train_set[7]["input_ids"] == train_set[8]["input_ids"]
    assert train_set.skipped == ["2.wav", "7.wav"]
    # The clip of a third example is missing: clips and answers are counted together.
    (cut_path.parent / "5.wav").unlink()
    with pytest.raises(DatasetError, match=r"--cutoff_len: 3, .* The last: example 6: .*5\.wav"):
        train_set[5]


def test_a_run_records_the_examples_without_answer(checkpoint, cut_path):
    output = cut_path.parent / "run"
    train(training_flags(checkpoint, cut_path, output, cutoff_len=40, max_bad=2))
    state = json.loads((output / "ltu_state.json").read_text())
    assert state["finished"]
    assert state["skipped"] == ["2.wav", "7.wav"]
    assert state["data"]["num_with_audio"] == 9
    assert state["data"]["sha256"] == hashlib.sha256(cut_path.read_bytes()).hexdigest()


@pytest.mark.parametrize("train_on_inputs", [True, False])
def test_too_many_examples_to_count_are_checked_when_they_are_used(
    checkpoint, processor, cut_path, train_on_inputs, monkeypatch
):
    monkeypatch.setattr(open_dataset, "MAX_UNINDEXED", 9)
    more = {"cutoff_len": 40, "train_on_inputs": train_on_inputs, "max_bad": 1}
    train_set, _, summary = open_datasets(processor, checkpoint, cut_path, **more)
    assert (summary.num_truncated, summary.num_without_answer) == (None, None)
    assert "not known without an index" in summary.describe()[1]
    assert train_set[2]["input_ids"] == train_set[3]["input_ids"]
    assert train_set.skipped == ["2.wav"]
    with pytest.raises(DatasetError, match="--cutoff_len: 2, .* example 8: no answer is left"):
        train_set[7]


def test_an_example_without_audio_is_named_by_its_number(checkpoint, processor, cut_path):
    rows = json.loads(cut_path.read_text())
    rows[0]["instruction"] = rows[2]["instruction"]
    write(cut_path, rows)
    train_set, _, _ = open_datasets(processor, checkpoint, cut_path, cutoff_len=40, max_bad=3)
    assert train_set.skipped == ["example 1", "2.wav", "7.wav"]


def test_counts_agree_with_the_tokens_at_every_cutoff(processor, tmp_path):
    """An example has an answer if and only if a label of the answer is left."""
    examples = read_examples(write_rows(tmp_path, 6))
    num_tokens, num_prompt_tokens = map(
        torch.tensor, open_dataset.count_tokens(examples, processor)
    )
    counts = open_dataset.TokenCounts(num_tokens, num_prompt_tokens)
    for cutoff in range(2, int(num_tokens.max()) + 2):
        encode = ExampleEncoder(processor, cutoff, train_on_inputs=True)
        truncated = counts.truncated(cutoff).tolist()
        for number, has_no_answer in enumerate(counts.without_answer(cutoff).tolist()):
            example = examples[number]
            tokens, labels = processor.encode_example(example, cutoff, train_on_inputs=False)
            assert has_no_answer == (max(labels) < 0)
            assert truncated[number] == (tokens[-1] != processor.tokenizer.eos_token_id)
            if has_no_answer:
                with pytest.raises(NoAnswerError):
                    encode(example)
            else:
                assert encode(example)[0] == tokens


# --- the summary


@pytest.mark.parametrize("is_indexed", [True, False])
def test_summary_of_a_dataset(checkpoint, processor, tmp_path, is_indexed):
    path = write_rows(tmp_path, 11, without_audio=3)
    rows = json.loads(path.read_text())
    rows += [rows[5] | {"instruction": "Why?"}, rows[0] | {"audio_id": None}]
    write(path, rows)
    if is_indexed:
        build_index(path, processor)
    train_set, held_out, summary = open_datasets(processor, checkpoint, path, val_set_size=4)
    assert (len(train_set), len(held_out)) == (9, 4)
    assert summary.name == "rows.json"
    assert summary.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (summary.num_examples, summary.num_with_audio, summary.num_clips) == (13, 9, 8)
    assert summary.describe() == [
        "rows.json: 13 examples, 9 with audio (8 clips), 4 without",
        "answers cut by --cutoff_len 108: 0",
    ]


def test_plan_prints_audio_and_answers_that_are_cut(checkpoint, cut_path, capsys):
    flags = training_flags(checkpoint, cut_path, cut_path.parent / "run", cutoff_len=40, max_bad=2)
    train([*flags, "--plan"])
    printed = capsys.readouterr().out
    assert "rows.json: 10 examples, 9 with audio (9 clips), 1 without\n" in printed
    expected = "answers cut by --cutoff_len 40: 3, 2 of them completely, which are skipped\n"
    assert expected in printed


@pytest.mark.parametrize("is_indexed", [True, False])
def test_a_dataset_without_audio_needs_a_flag(checkpoint, processor, tmp_path, is_indexed):
    path = write_rows(tmp_path, 4, without_audio=4)
    if is_indexed:
        build_index(path, processor)
    with pytest.raises(DatasetError, match=r"None of the 4 examples of rows\.json has audio"):
        train([*training_flags(checkpoint, path, tmp_path / "run"), "--plan"])
    _, _, summary = open_datasets(processor, checkpoint, path, text_only=True)
    assert (summary.num_with_audio, summary.num_clips) == (0, 0)


def test_text_only_is_refused_if_there_is_audio(checkpoint, processor, tmp_path):
    path = write_rows(tmp_path, 4, without_audio=3)
    with pytest.raises(DatasetError, match="--text_only True, but 1 of the 4 examples"):
        open_datasets(processor, checkpoint, path, text_only=True)


# --- files of our own commands


def test_golden_files_have_known_keys_only():
    for name in ("toy_ltu.json", "toy_ltu_as.json"):
        path = Path(__file__).parent / "golden" / name
        for example in stream_examples(path):
            assert set(example) == set(KEYS)
        assert len(read_examples(path)) == 6


# --- range of samples


@pytest.fixture
def warning(monkeypatch, caplog):
    """Give the process a warning that was not given yet; return the captured log."""
    monkeypatch.setattr(audio, "_first_warnings", FirstWarnings())
    caplog.set_level(logging.WARNING)
    return caplog


def float_wav(path: Path, scale: float) -> Path:
    samples = clip(0) / np.abs(clip(0)).max() * scale
    soundfile.write(path, samples.astype(np.float32), 16_000, subtype="FLOAT")
    return path


@pytest.mark.parametrize(
    "peak, bits, divisor",
    [(8.5, 16, 32768), (32768, 16, 32768), (8e6, 24, 8388608), (2.0**31, 32, 2147483648)],
)
@pytest.mark.parametrize("kind", ["file", "bytes", "array", "array at another rate"])
def test_integers_in_floats_are_one_warning(tmp_path, warning, kind, peak, bits, divisor):
    path = float_wav(tmp_path / "loud.wav", peak)
    samples = soundfile.read(path, dtype="float32")[0]
    sources = {
        "file": path,
        "bytes": path.read_bytes(),
        "array": samples,
        "array at another rate": (samples, 44_100),
    }
    waveform = decode_audio(sources[kind]).waveform
    decode_audio(sources[kind])
    assert len(warning.records) == 1
    message = warning.records[0].getMessage()
    assert f"has float samples up to {peak:.6g}" in message
    assert f"{bits}-bit integers stored as floats, divide them by {divisor}" in message
    if kind == "file":
        assert message.startswith(str(path))
    if kind != "array at another rate":
        assert np.array_equal(waveform, samples)


def test_samples_of_a_usual_range_are_no_warning(tmp_path, warning):
    decode_audio(float_wav(tmp_path / "clipped.wav", 3.0))
    decode_audio((clip(0) * 32767 / np.abs(clip(0)).max()).astype(np.int16))
    pcm = tmp_path / "pcm.wav"
    soundfile.write(pcm, clip(0), 16_000, subtype="PCM_16")
    decode_audio(pcm)
    assert not warning.records


def test_check_audio_warns_of_the_first_file(tmp_path, warning):
    path = write_rows(tmp_path, 4)
    for number in (1, 2):
        float_wav(tmp_path / f"{number}.wav", 30_000)
    assert check_audio(read_examples(path)) == {}
    assert [record.getMessage().split(" has ")[0] for record in warning.records] == [
        str(tmp_path / "1.wav")
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_samples_that_are_not_finite_are_an_error(tmp_path, value, subtype):
    samples = clip(0).astype(np.float64)
    samples[100] = value
    path = tmp_path / "bad.wav"
    soundfile.write(path, samples, 16_000, subtype=subtype)
    stream = io.BytesIO(path.read_bytes())
    for source in (path, stream.getvalue(), samples, samples.astype(np.float32)):
        with pytest.raises(AudioError, match="contains values that are not finite"):
            decode_audio(source)
