"""Tests every command of `data/` on examples of wrong types and on files that are no dataset files.

Each of them must end with one line of error that names file and example, and must write nothing.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

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
from data.audio_ids import read_cells, read_ids
from data.provenance import audio_root_of
from ltu.data.check_examples import what_is_wrong
from ltu.data.dataset_io import KEYS, DatasetError, ExampleWriter, stream_examples, typed_examples
from ltu.data.dataset_source import find_dataset
from ltu.files import run_command

GOOD = {
    "instruction": "What?",
    "input": "",
    "audio_id": "a.wav",
    "dataset": "d",
    "task": "t",
    "output": "A dog.",
}
Arguments = Callable[[str, str], list[str]]  # (input, output) -> arguments


def in_and_out(*more: str) -> Arguments:
    return lambda source, target: ["--data_path", source, "--output_path", target, *more]


# Command -> its function and its arguments.
COMMANDS: dict[str, tuple[Callable, Arguments]] = {
    "shuffle": (shuffle.main, in_and_out()),
    "shuffle original": (shuffle.main, in_and_out("--original_shuffle")),
    "combine": (combine.main, in_and_out()),
    "combine in order": (combine.main, in_and_out("--no_shuffle")),
    "combine with a recipe": (
        combine.main,
        lambda source, target: [
            *["--recipe", "openaqa_closed", "--partial", "--original_repeats"],
            *["--data_path", f"caption={source}", "--output_path", target],
        ],
    ),
    "sample": (sample.main, in_and_out("--clips", "3")),
    "sample by dataset": (sample.main, in_and_out("--clips", "3", "--by_dataset")),
    "sample with audio": (sample.main, in_and_out("--clips", "3", "--copy_audio")),
    "filter": (filter_unanswerable.main, in_and_out()),
    "filter original": (filter_unanswerable.main, in_and_out("--rule", "original")),
    "remap": (remap_paths.main, in_and_out("--prefix", "a=b", "--drop_missing")),
    "stats": (stats.main, in_and_out()),
    "contamination, training file": (
        contamination_check.main,
        lambda source, target: [
            *["--data_path", source, "--eval_files", f"{Path(source).parent}/good.json"],
            *["--clean_path", target],
        ],
    ),
    "contamination, evaluation file": (
        contamination_check.main,
        lambda source, target: [
            *["--data_path", f"{Path(source).parent}/good.json", "--eval_files", source],
            *["--clean_path", target],
        ],
    ),
    "contamination, content": (
        contamination_check.main,
        lambda source, target: [
            *["--data_path", source, "--eval_files", f"{Path(source).parent}/none.json"],
            *["--content", "--workers", "1", "--clean_path", target],
        ],
    ),
}
WRONG = [5, False, 1.5, [], ["a.wav"], {"path": "a.wav"}, 10**30]
ODD = [None, "", "empty", "x" * 300_000, "\ud83d", "n\udcff.wav", "a\0b", "a\nb", "../../x", "/"]


@pytest.fixture(autouse=True)
def good_files(tmp_path):
    (tmp_path / "good.json").write_text(json.dumps([GOOD]))
    (tmp_path / "none.json").write_text("[]")


def run(name: str, source: Path, target: Path) -> tuple[int, str]:
    """Run a command; return its exit status and its line of error."""
    main, arguments = COMMANDS[name]
    target.parent.mkdir(exist_ok=True)
    return status_of(main, arguments(str(source), str(target)))


def status_of(main: Callable, arguments: list[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:  # Any other exception would be a traceback.
        run_command(lambda: main(arguments))
    if isinstance(end.value.code, str):
        assert end.value.code.startswith("error: ")
        assert "\n" not in end.value.code
        return 1, end.value.code.removeprefix("error: ")
    return end.value.code or 0, ""


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_type_is_one_line_with_file_and_example(tmp_path, name, key):
    source = tmp_path / "examples.jsonl"
    for value in WRONG:
        lines = [json.dumps(GOOD), "", json.dumps(GOOD | {key: value}), json.dumps(GOOD)]
        source.write_text("\n".join(lines))
        status, error = run(name, source, tmp_path / "out" / "b.json")
        assert status == 1
        kind = type(value).__name__
        assert error.startswith(f"{source}, example 2: {key!r} is a {kind}"), (value, error)
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_texts_are_no_traceback(tmp_path, name):
    source = tmp_path / "examples.jsonl"
    for value in [] if "content" in name else ODD:
        source.write_text(json.dumps(GOOD | {"audio_id": value}))
        run(name, source, tmp_path / "out" / "b.json")
    lines = []
    for key in KEYS:
        lines += [json.dumps(GOOD | {key: value}) for value in ODD if key != "audio_id"]
    source.write_text("\n".join(lines))
    run(name, source, tmp_path / "out" / "b.json")


# Content of a file -> number of the example that is wrong.
FILES = {
    "object": (b'{"examples": []}', 1),
    "object of objects": (b'{"a": {"instruction": "q"}}', 1),
    "object over several lines": (json.dumps([GOOD], indent=1)[2:-2].encode(), 1),
    "number": (b"5", 1),
    "null": (b"null", 1),
    "text": (b'"instruction"', 1),
    "list of numbers": (b"[1, 2]", 1),
    "list of null": (b"[null]", 1),
    "list of lists": (json.dumps([[GOOD]]).encode(), 1),
    "list of texts": (json.dumps([GOOD, "audio_id"]).encode(), 1),
    "empty object": (json.dumps([GOOD, {}]).encode(), 2),
    "other keys": (json.dumps([GOOD, {"audio": "a.wav", "text": "q"}]).encode(), 2),
    "not UTF-8": (json.dumps([GOOD, GOOD])[:-3].encode() + b"\xff\xc3\x28" + b'"}]', 2),
    "UTF-16": (json.dumps([GOOD]).encode("utf-16"), 1),
    "cut off": (json.dumps([GOOD, GOOD]).encode()[:-4], 2),
    "cut off line": (json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode()[:-9], 2),
    "malformed line": (json.dumps(GOOD).encode() + b"\n{'instruction': 1}\n{}", 2),
    "constant": (b'[{"audio_id": NaN}]', 1),
    "nested": (b"[" * 99_999, 1),
    "nested value": (b'[{"audio_id": ' + b"[" * 99_999, 1),
    "page of an error": (b"<html>404</html>", 1),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00", 1),
    "zeros": (bytes(999), 1),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", FILES)
def test_no_dataset_file_is_one_line_with_file_and_example(tmp_path, name, kind):
    content, number = FILES[kind]
    source = tmp_path / "examples.json"
    source.write_bytes(content)
    status, error = run(name, source, tmp_path / "out" / "b.json")
    assert status == 1
    assert error.startswith(f"{source}, example {number}"), error
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_byte_order_mark_is_no_error(tmp_path, name):
    source = tmp_path / "examples.json"
    source.write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD | {"audio_id": "b.wav"}]).encode())
    status, error = run(name, source, tmp_path / "out" / "b.json")
    # A clip that is not there is an error of these two only.
    assert status == (name in ("sample with audio", "contamination, content")), error


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_or_missing_file_is_one_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for source in ("folder", "missing.json", "x" * 300):
        source = tmp_path / source
        status, error = run(name, source, tmp_path / "out" / "b.json")
        assert status == 1
        assert str(source)[:200] in error


def random_value(chance: random.Random, depth: int = 0) -> object:
    """Return any JSON value."""
    kind = chance.randrange(9 if depth < 2 else 7)
    if kind == 7:
        return [random_value(chance, depth + 1) for _ in range(chance.randrange(3))]
    if kind == 8:
        keys = chance.sample(["label", "onset", "offset", "a", ""], chance.randrange(4))
        return {key: random_value(chance, depth + 1) for key in keys}
    texts = ["male", "4", "nan", "inf", "1e999", "{}", "{0.x}", "a; b", "\ud83d", "\0", "x" * 9999]
    numbers = [0, -1, 3, 2**63, 10**400, -0.0, 1e308, 5e-324]
    return chance.choice([None, True, "", *numbers, *texts])


@pytest.mark.parametrize("name", [name for name in COMMANDS if "content" not in name])
def test_random_examples_are_no_traceback(tmp_path, name):
    source = tmp_path / "examples.jsonl"
    for seed in range(20):
        chance = random.Random(seed)
        example = {key: random_value(chance) for key in KEYS if chance.random() < 0.8}
        example |= {chance.choice(["extra", "audio_id", ""]): random_value(chance)}
        source.write_text(json.dumps(example))
        ending = chance.choice([".json", ".jsonl.gz", ".parquet"])
        status, error = run(name, source, tmp_path / "out" / f"b{ending}")
        assert not error or str(tmp_path) in error


RECORD_KEYS = [*closed_qa.TEXT_KEYS, *closed_qa.NUMBER_KEYS, *closed_qa.LIST_KEYS, "events"]


def closed(tmp_path: Path, record: dict, *more: str) -> tuple[int, str]:
    source = tmp_path / "clips.jsonl"
    source.write_text(json.dumps(record))
    target = tmp_path / "out" / "b.json"
    return status_of(
        closed_qa.main, ["--metadata", str(source), "--output_path", str(target), *more]
    )


@pytest.mark.parametrize("key", RECORD_KEYS)
def test_closed_qa_names_the_record_with_a_wrong_type(tmp_path, key):
    for value in (True, [5], {"a": 1}, [{"label": "a"}], [{"label": [], "onset": 0, "offset": 1}]):
        record = {"audio_id": "a.wav", "labels": "Dog", "sentiment": 1, "emotion": "sad"}
        status, error = closed(tmp_path, record | {key: value})
        assert status == 1
        assert error.startswith(f"{tmp_path}/clips.jsonl, record 1 (a.wav): "), (value, error)


@pytest.mark.parametrize("audio_id", [5, True, ["a.wav"], {"a": 1}])
def test_closed_qa_names_the_record_with_a_wrong_audio_id(tmp_path, audio_id):
    (tmp_path / "ids.csv").write_text("id,audio_id\na,a.flac\n")
    for more in ([], ["--audio_ids", f"{tmp_path}/ids.csv"]):
        status, error = closed(tmp_path, {"audio_id": audio_id, "labels": "Dog"}, *more)
        assert status == 1
        assert error.startswith(f"{tmp_path}/clips.jsonl, record 1: audio_id is a "), error


def test_closed_qa_takes_any_record_without_traceback(tmp_path):
    for seed in range(300):
        chance = random.Random(seed)
        record = {key: random_value(chance) for key in RECORD_KEYS if chance.random() < 0.3}
        record["audio_id"] = "a.wav" if chance.random() < 0.9 else random_value(chance)
        status, error = closed(tmp_path, record)
        assert status == 0 or str(tmp_path) in error
        if not status:
            for example in stream_examples(tmp_path / "out" / "b.json"):
                assert what_is_wrong(example, need_output=True) is None


@pytest.mark.parametrize("flag", ["--descriptions", "--cuts"])
@pytest.mark.parametrize("content", [b"[1]", b"5", b'{"Dog": 5}', b"\xff", b"{", b"[" * 99_999])
def test_closed_qa_names_a_wrong_settings_file(tmp_path, flag, content):
    (tmp_path / "settings.json").write_bytes(content)
    record = {"audio_id": "a.wav", "labels": "Dog"}
    status, error = closed(tmp_path, record, flag, f"{tmp_path}/settings.json")
    assert status == 1
    assert error.startswith(f"{tmp_path}/settings.json: "), error


@pytest.mark.parametrize(
    "content, line",
    [
        (b"a,b\n\xff,1\n", 0),
        (b"a,b\n1," + b"x" * 200_000, 1),
        (b"\xff\xfea\x00", 0),
        (b"a,b\n" + b"1,2\n" * 9999 + b"\xff,3\n", None),
    ],
)
def test_a_malformed_table_is_named_with_its_line(tmp_path, content, line):
    path = tmp_path / "clips.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="clips.csv.*after line") as error:
        list(read_cells(path))
    assert line is None or f"after line {line}" in str(error.value)


@pytest.mark.parametrize("value", [False, 1.5, ["a"], {"a": 1}])
def test_ids_of_metadata_are_texts_or_whole_numbers(tmp_path, value):
    path = tmp_path / "clips.json"
    path.write_text(json.dumps([{"fname": 64760}, {"fname": "a"}]))
    assert list(read_ids(path)) == ["64760", "a"]
    path.write_text(json.dumps([{"fname": 64760}, {"fname": value}]))
    with pytest.raises(ValueError, match="clips.json, example 2: 'fname' is a "):
        list(read_ids(path))


@pytest.mark.parametrize("content", ["[]", "5", "{", '{"audio_root": 5}', '{"audio_root": [5]}'])
def test_a_damaged_provenance_file_is_named(tmp_path, content):
    path = tmp_path / "good.json.provenance.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        audio_root_of(tmp_path / "out" / "b.json", [find_dataset(tmp_path / "good.json")])
    assert str(error.value).startswith(str(path))


def test_training_and_data_have_the_same_rule_for_types():
    for key in KEYS:
        assert what_is_wrong(GOOD, need_output=True) is None
        for value in WRONG:
            reason = what_is_wrong(GOOD | {key: value}, need_output=True)
            assert reason.startswith(f"{key!r} is a {type(value).__name__}"), reason


def test_validate_lists_all_wrong_types(tmp_path, capsys):
    source = tmp_path / "examples.json"
    examples = []
    for key in KEYS:
        examples += [GOOD | {key: value} for value in ([], False)]
    source.write_text(json.dumps(examples))
    arguments = ["--data_path", str(source), "--no_audio", "--allow_duplicates"]
    assert status_of(validate.main, arguments) == (1, "")
    assert json.loads(capsys.readouterr().out)["wrong"]["example"] == len(examples)


def test_the_report_of_validate_is_json_on_any_terminal(tmp_path, capsys):
    """Escapes that a terminal without these letters needs are no JSON."""
    audio_ids = ["straße.wav", "音.wav", 5, ["a.wav"]]
    source = tmp_path / "examples.json"
    source.write_text(json.dumps([GOOD | {"audio_id": audio_id} for audio_id in audio_ids]))
    assert validate.main(["--data_path", str(source)]) == 1
    text = capsys.readouterr().out
    assert text.isascii()
    report = json.loads(text)
    assert "straße.wav" in report["first_errors"]["clip missing"][0]
    # Values that are no texts are wrong examples, and no clips.
    assert report["coverage"] == {"d": {"clips": 2, "usable": 0}}
    assert report["wrong"] == {"example": 2, "clip missing": 2}


@pytest.mark.parametrize("values", [[5], [["a.wav"]], [b"a.wav"], [True], [{"a": 1}]])
def test_parquet_with_columns_of_other_types(tmp_path, values):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"instruction": ["q"], "audio_id": values})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="a.parquet, example 1: 'audio_id' is a "):
        list(typed_examples(tmp_path / "a.parquet"))


def test_integers_that_fit_no_table_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="fit no table"):
        with ExampleWriter(tmp_path / "a.parquet") as output:
            output.write(GOOD | {"number": 10**30})
