"""Tests curation: every format and command preserves the examples; memory is constant."""

import gzip
import json
import multiprocessing
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from benchmarks.curation import CLOSED, NUM_EXAMPLES, OPEN, random_examples
from data import (
    combine,
    contamination_check,
    filter_unanswerable,
    remap_paths,
    sample,
    shuffle,
    stats,
    validate,
)
from data.duplicate_detection import DuplicateDetector
from ltu.data.dataset_io import DatasetError, ExampleWriter, encode_line, stream_examples
from ltu.data.dataset_parser import LineSplitter, ListSplitter
from tests.machine import run_python

ENDINGS = [".json", ".jsonl", ".parquet", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst"]


def nasty_text(chance: random.Random) -> str:
    """Return text that is hard to split into examples."""
    pieces = [
        '"',
        "\\",
        "},{",
        "}, {",
        "]",
        "[",
        "{",
        "}",
        ",",
        "\n",
        "\u2028",
        "é",
        "’",
        "𝄞",
        "\x00",
        " ",
        "a",
        "]\n}",
    ]
    return "".join(chance.choices(pieces, k=chance.randint(0, 12)))


def nasty_examples(count: int, seed: int = 0) -> list[dict]:
    chance = random.Random(seed)
    keys = ("instruction", "input", "dataset", "output")
    return [
        {key: nasty_text(chance) for key in keys} | {"audio_id": f"{n % 7}.wav"}
        for n in range(count)
    ]


def write(path: Path, examples: list) -> Path:
    with ExampleWriter(path) as output:
        for example in examples:
            output.write(example)
    return path


def multiset(examples) -> Counter:
    return Counter(json.dumps(example, sort_keys=True) for example in examples)


@pytest.fixture
def small_blocks(monkeypatch):
    """Read blocks of a few bytes, so that examples cross the ends of blocks."""
    monkeypatch.setattr("ltu.data.dataset_io.BLOCK", 37)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_examples_back(tmp_path, ending):
    examples = nasty_examples(500)
    path = write(tmp_path / f"examples{ending}", examples)
    assert list(stream_examples(path)) == examples or ending == ".parquet"
    assert multiset(stream_examples(path)) == multiset(examples)
    first = path.read_bytes()
    assert write(path, examples).read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_examples(tmp_path, ending):
    assert list(stream_examples(write(tmp_path / f"examples{ending}", []))) == []


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_lists_of_other_writers(tmp_path, small_blocks, indent, ascii_only):
    examples = nasty_examples(200) + [
        {"nested": [{"a": 1}, {"b": [{"c": None}, {}]}], "large": 2**80, "real": 0.1, "yes": True}
    ]
    path = tmp_path / "examples.json"
    text = json.dumps(examples, indent=indent, ensure_ascii=ascii_only)
    path.write_text(f"\ufeff \n{text}\n\n", encoding="utf-8")
    assert list(stream_examples(path)) == examples
    lines = tmp_path / "examples.jsonl"
    lines.write_text(
        "\r\n".join(json.dumps(example, ensure_ascii=ascii_only) for example in examples) + "\n\n",
        newline="",
    )
    assert list(stream_examples(lines)) == examples


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_into_blocks_gives_the_same_examples(tmp_path, monkeypatch, seed):
    examples = nasty_examples(60, seed)
    path = tmp_path / "examples.json"
    path.write_text(json.dumps(examples, ensure_ascii=bool(seed % 2)), encoding="utf-8")
    monkeypatch.setattr("ltu.data.dataset_io.BLOCK", random.Random(seed).randint(1, 400))
    assert list(stream_examples(path)) == examples


def test_half_a_surrogate_pair_survives(tmp_path):
    path = tmp_path / "examples.json"
    examples = [{"output": "cut \ud83d"}, {"output": "whole"}]
    path.write_text(json.dumps(examples))
    assert list(stream_examples(path)) == examples
    assert list(stream_examples(write(tmp_path / "again.jsonl", examples))) == examples
    with pytest.raises(ValueError, match="examples 1 to 2 fit no table.*jsonl"):
        write(tmp_path / "again.parquet", examples)
    assert not (tmp_path / "again.parquet").exists()


@pytest.mark.parametrize(
    "examples", [[{"e": {"b": 1}}, {"e": {"c": 1}}], [{"e": []}, {"e": [[{"b": 1}]]}], [{"e": {}}]]
)
def test_parquet_refuses_nested_keys(tmp_path, examples):
    """A struct column would lose keys of later examples and add those of others."""
    with pytest.raises(ValueError, match="fit no table: 'e' has keys of its own. Write .jsonl"):
        write(tmp_path / "examples.parquet", examples)
    assert list(tmp_path.iterdir()) == []
    lists = [{"e": [[1], []]}, {"e": []}]
    assert [
        {"e": example["e"]}
        for example in stream_examples(write(tmp_path / "examples.parquet", lists))
    ] == lists


# Text -> (number of the bad example, marker of the byte that the error must name). An empty marker
# is the end of the text.
MALFORMED = {
    '[{"a": "é"}, {"a": 1,}]': (2, "}]"),
    '[{"a": 1} {"a": 2}]': (1, ' {"a": 2'),
    '[{"a": 1}, {"a": 2': (2, ""),
    '[{"a": 1}, {"a": "x': (2, '"x'),
    '[{"a": 1}, 5, {"a": 2}]': (1, ", 5"),
    '[{"a": 1},]': (1, ",]"),
    '[{"a": 1}] {"a": 2}': (1, "] {"),
    '[{"a": NaN}]': (1, '{"a": NaN'),
    '[["a"]]': (1, '["a"]]'),
    '{"a": "é"}\n{"a": }\n{"a": 2}\n': (2, "}\n{"),
    '{"a": 1}\n\n{"a": 2} {"a": 3}\n': (2, ' {"a": 3}'),
    '{"a": 1}\n[1]\n': (2, "[1]"),
    '{"a": 1}\n{"a": 2': (2, ""),
}


@pytest.mark.parametrize("text", MALFORMED)
@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_malformed_input_names_example_and_byte(tmp_path, monkeypatch, text, block):
    monkeypatch.setattr("ltu.data.dataset_io.BLOCK", block)
    path = tmp_path / "examples.json"
    path.write_text(text, encoding="utf-8")
    example, mark = MALFORMED[text]
    with pytest.raises(DatasetError) as found:
        list(stream_examples(path))
    message = str(found.value)
    assert f"{path}, example {example}, byte " in message
    assert "fix or remove" in message
    byte = int(message.split("byte ")[1].split(":")[0])
    wanted = len(text[: text.rindex(mark)].encode()) if mark else len(text)
    assert abs(byte - wanted) <= 3, message


@pytest.mark.parametrize("form", ["[%s]", "%s"])
def test_invalid_utf8_names_example_and_byte(tmp_path, form):
    path = tmp_path / "examples.json"
    examples = b'{"a": "b"}%s{"a": "\xff"}' % (b", " if form == "[%s]" else b"\n")
    path.write_bytes(form.encode() % examples)
    with pytest.raises(
        DatasetError, match=rf"example 2, byte {path.read_bytes().index(255)}: not UTF-8"
    ):
        list(stream_examples(path))


def test_malformed_example_in_the_middle_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr("ltu.data.dataset_parser.MAX_EXAMPLE", 2**14)
    monkeypatch.setattr("ltu.data.dataset_io.BLOCK", 2**12)
    examples = [json.dumps({"instruction": "q" * 50, "output": f"{n}"}) for n in range(3000)]
    examples[1500] = examples[1500].replace(":", ";", 1)
    path = tmp_path / "examples.json"
    for separator, form in ((",\n", "[%s]"), ("\n", "%s")):
        path.write_text(form % separator.join(examples))
        with pytest.raises(
            DatasetError, match=f"example 1501, byte {path.read_text().index(';')}: "
        ):
            list(stream_examples(path))


@pytest.mark.parametrize("ending", [".json.gz", ".json.zst", ".parquet", ".json"])
def test_cut_off_files_are_errors(tmp_path, ending):
    path = write(tmp_path / f"examples{ending}", nasty_examples(3000))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DatasetError, match="examples"):
        list(stream_examples(path))


def test_gzip_of_python_and_several_members(tmp_path):
    path = tmp_path / "examples.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n'))
    assert list(stream_examples(path)) == [{"a": 1}, {"a": 2}]


def test_an_error_leaves_no_file_and_does_not_change_the_old_one(tmp_path):
    path = write(tmp_path / "examples.json", [{"a": 1}])
    with pytest.raises(RuntimeError), ExampleWriter(path) as output:
        output.write({"a": 2})
        raise RuntimeError
    assert list(stream_examples(path)) == [{"a": 1}]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="is an input"):
        ExampleWriter(path, [path])
    with pytest.raises(ValueError, match="jsonl"):
        ExampleWriter(tmp_path / "examples.txt")


@pytest.mark.parametrize("splitter", [ListSplitter, LineSplitter])
def test_parser_accepts_nothing_that_is_not_json(splitter):
    """A file that is damaged at any byte gives a DatasetError or examples, nothing else."""
    text = (
        json.dumps(nasty_examples(4))[1:]
        if splitter is ListSplitter
        else json.dumps(nasty_examples(1)[0])
    ).encode()
    chance = random.Random(0)
    for _ in range(2000):
        damaged = bytearray(text)
        damaged[chance.randrange(len(text))] = chance.randrange(256)
        try:
            examples, _ = splitter(Path("examples"), 0)(bytes(damaged), at_end=True)
        except DatasetError:
            continue
        assert all(isinstance(example, dict) for example in examples)


# Shuffle, combine, filter.


def run_shuffle(source: Path, target: Path, *flags: str) -> list[dict]:
    assert shuffle.main(["--data_path", str(source), "--output_path", str(target), *flags]) == 0
    return list(stream_examples(target))


@pytest.mark.parametrize("ending", [".json", ".jsonl.zst"])
def test_shuffle_preserves_examples_and_repeats(tmp_path, monkeypatch, ending):
    examples = nasty_examples(2000)
    source = write(tmp_path / f"a{ending}", examples)
    found = run_shuffle(source, tmp_path / f"b{ending}", "--seed", "5")
    assert multiset(found) == multiset(examples)
    assert found != examples
    first = (
        (tmp_path / f"b{ending}").read_bytes(),
        (tmp_path / f"b{ending}.provenance.json").read_bytes(),
    )
    monkeypatch.setattr(shuffle, "MAX_BUFFERED", 1000)  # Less memory, the same order.
    monkeypatch.setattr(shuffle, "MAX_SORTED", 2000)
    run_shuffle(source, tmp_path / f"b{ending}", "--seed", "5")
    assert first == (
        (tmp_path / f"b{ending}").read_bytes(),
        (tmp_path / f"b{ending}.provenance.json").read_bytes(),
    )
    assert run_shuffle(source, tmp_path / f"c{ending}", "--seed", "6") != found
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_shuffle_is_uniform():
    """The chi-squared statistic of all 24 orders of four examples is within its 99.9 % bound."""
    orders = Counter()
    for seed in range(2400):
        keys = shuffle.random_keys(seed)
        orders[tuple(sorted(range(4), key=lambda _, keys=keys: next(keys)))] += 1
    assert len(orders) == 24
    assert sum((count - 100) ** 2 / 100 for count in orders.values()) < 49.7


@pytest.mark.parametrize("count", [0, 1, 2, 257, 3000])
def test_original_shuffle_is_pythons(tmp_path, count):
    examples = [{"instruction": str(number)} for number in range(count)]
    found = run_shuffle(
        write(tmp_path / "a.json", examples), tmp_path / "b.json", "--original_shuffle"
    )
    random.seed(0)
    random.shuffle(examples)
    assert found == examples


def test_combine_shuffle_split_preserves_the_multiset(tmp_path):
    for seed in range(5):
        files = [
            write(
                tmp_path / f"{n}.jsonl", nasty_examples(random.Random(n + seed).randint(0, 300), n)
            )
            for n in range(4)
        ]
        target = tmp_path / "all.json"
        combine.main(
            ["--data_path", *map(str, files), "--output_path", str(target), "--seed", str(seed)]
            + ["--transcripts", "unchanged"]
        )
        found = list(stream_examples(target))
        cut = len(found) // 3
        parts = [
            write(tmp_path / "x.json", found[:cut]),
            write(tmp_path / "y.parquet", found[cut:]),
        ]
        wanted = multiset(example for file in files for example in stream_examples(file))
        assert sum((multiset(stream_examples(part)) for part in parts), Counter()) == wanted


def test_combine_original_order_over_several_files(tmp_path):
    examples = nasty_examples(900)
    files = [write(tmp_path / "a.json", examples[:500]), write(tmp_path / "b.json", examples[500:])]
    target = tmp_path / "all.json"
    combine.main(
        ["--data_path", *map(str, files), "--output_path", str(target)]
        + ["--original_shuffle", "--transcripts", "unchanged"]
    )
    random.seed(0)
    random.shuffle(examples)
    assert list(stream_examples(target)) == examples


def test_recipe_marks_repeats_and_lists_differences(tmp_path, capsys):
    recipe = {
        "about": "",
        "parts": {
            "c": {"num_examples": 1000, "closed_ended_fraction": 0.5},
            "d": {"repeat": {"Clotho*": 2}},
        },
    }
    recipe["expected"] = {"num_examples": 1030, "dataset": {"Clotho": 20, "X": "1k"}}
    recipe_path = tmp_path / "recipe.json"
    recipe_path.write_text(json.dumps(recipe))
    closed = write(
        tmp_path / "c.json",
        [{"instruction": "q?", "dataset": "x", "output": str(n)} for n in range(1000)],
    )
    names = ["Clotho"] * 10 + ["other"] * 5
    caption = write(
        tmp_path / "d.json", [{"instruction": "d", "dataset": name, "output": ""} for name in names]
    )
    target = tmp_path / "out.jsonl"
    flags = [
        "--recipe",
        str(recipe_path),
        "--data_path",
        f"c={closed}",
        f"d={caption}",
        "--output_path",
        str(target),
    ]
    for order in ([], ["--original_shuffle"], ["--no_shuffle"]):
        assert combine.main([*flags, *order]) == 0
        examples = list(stream_examples(target))
        marked = sum(example["instruction"] == "Closed-ended question: q?" for example in examples)
        assert len(examples) == 1025
        assert 440 < marked < 560
        assert Counter(example["dataset"] for example in examples) == {
            "x": 1000,
            "Clotho": 20,
            "other": 5,
        }
    record = json.loads((tmp_path / "out.jsonl.provenance.json").read_text())
    assert record["differences"] == ["all: 1,025 examples, published 1,030"]
    assert record["counts"]["part"] == {"c": 1000, "d": 25}
    assert len(record["inputs"]) == 2
    assert "differs: all: 1,025 examples" in capsys.readouterr().out
    with pytest.raises(ValueError, match="No file for d"):
        combine.main([*flags[:3], f"c={closed}", *flags[-2:]])
    with pytest.raises(ValueError, match="'e' is not a part"):
        combine.main([*flags[:3], f"e={closed}", *flags[-2:]])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"parts": {"a": {"repeats": {"x": 2}}}}', "unknown field `repeats` - at `$.parts"),
        ('{"parts": {"a": {"repeat": {"x": "2"}}}}', "Expected `int`, got `str` - at `$.parts"),
        ('{"parts": {}, "total": 3}', "unknown field `total`"),
        ('{"about": "x"}', "missing required field `parts`"),
        ('{"parts": {}', "truncated"),
    ],
)
def test_a_wrong_recipe_is_an_error_with_its_path(tmp_path, text, reason):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="A part may have num_examples, repeat") as found:
        combine.read_recipe(str(path))
    assert str(found.value).startswith(f"{path}: ")
    assert reason in str(found.value)


def test_published_recipes_add_up():
    recipes = {path.stem: combine.read_recipe(path.stem) for path in combine.RECIPES.glob("*.json")}
    assert len(recipes) == 6
    for name in ("openaqa_all", "openasqa_classification", "openasqa_v1", "openasqa_v2"):
        numbers = [part.num_examples for part in recipes[name].parts.values()]
        assert sum(numbers) == recipes[name].expected.num_examples, name
    exact = recipes["openasqa_classification"].expected
    assert sum(exact.dataset.values()) == exact.num_examples == 2_072_481
    assert sum(exact.task.values()) == exact.num_examples
    assert recipes["openaqa_all"].expected.num_examples == NUM_EXAMPLES == 5_681_708


@pytest.mark.parametrize("rule", ["refusal", "original"])
def test_filter_is_idempotent_and_never_wider(tmp_path, rule):
    chance = random.Random(0)
    words = "the sound is loud I not to it for clear determine information about dog answer".split()
    examples = []
    for number in range(3000):
        parts = [
            chance.choice(filter_unanswerable.PHRASES)
            if chance.random() < 0.1
            else chance.choice(words)
            for _ in range(8)
        ]
        examples.append(
            {"instruction": "q", "audio_id": str(number), "output": " ".join(parts).capitalize()}
        )
    source = write(tmp_path / "a.json", examples)
    first = tmp_path / "b.json"
    second = tmp_path / "c.json"
    flags = ["--rule", rule, "--dropped_path", str(tmp_path / "dropped.jsonl")]
    filter_unanswerable.main(["--data_path", str(source), "--output_path", str(first), *flags])
    filter_unanswerable.main(
        ["--data_path", str(first), "--output_path", str(second), "--rule", rule]
    )
    assert first.read_bytes() == second.read_bytes()
    dropped = list(stream_examples(tmp_path / "dropped.jsonl"))
    assert multiset(dropped) + multiset(stream_examples(first)) == multiset(examples)
    wanted = [
        example
        for example in examples
        if any(phrase in example["output"].lower() for phrase in filter_unanswerable.PHRASES)
    ]
    assert (
        dropped == wanted if rule == "original" else all(example in wanted for example in dropped)
    )
    record = json.loads((tmp_path / "b.json.provenance.json").read_text())
    assert record["dropped"]["original"] == len(wanted) > record["dropped"]["refusal"] > 0


def test_filter_rules():
    assert len(set(filter_unanswerable.PHRASES)) == 27
    answers = {
        "It is loud enough to be heard outdoors.": (True, False),
        "She says that she is sorry for it.": (True, False),
        "The dog cannot reach the ball.": (True, False),
        "It cannot be determined from the audio clip.": (True, True),
        "Sorry, but I do not know who speaks.": (True, True),
        "There is not enough information to tell.": (True, True),
        "The speaker's age is not specified.": (True, True),
        "A dog barks.": (False, False),
    }
    for answer, wanted in answers.items():
        found = tuple(
            filter_unanswerable.is_unanswerable(answer, rule) for rule in ("original", "refusal")
        )
        assert found == wanted, answer


# Statistics, samples and checks.


@pytest.fixture
def published(tmp_path):
    """Return a file of 5,700 examples with the proportions of OpenAQA."""
    return write(
        tmp_path / "examples.jsonl",
        [*random_examples(CLOSED, 0.001, 0), *random_examples(OPEN, 0.001, 1)],
    )


def test_stats(tmp_path, published):
    target = tmp_path / "stats.json"
    plot = tmp_path / "stats.png"
    assert (
        stats.main(
            ["--data_path", str(published), "--output_path", str(target), "--plot", str(plot)]
        )
        == 0
    )
    found = json.loads(target.read_text())
    examples = list(stream_examples(published))
    assert found["num_examples"] == len(examples)
    assert found["clips"] == len({example["audio_id"] for example in examples})
    assert found["questions"] == len({example["instruction"] for example in examples})
    assert found["dataset"] == dict(
        Counter(example["dataset"] for example in examples).most_common()
    )
    words = sorted(len(example["output"].split(" ")) for example in examples)
    assert found["lengths"]["output"]["longest"] == words[-1]
    assert found["lengths"]["output"]["median"] == words[(len(words) - 1) // 2]
    assert plot.read_bytes().startswith(b"\x89PNG")
    first = target.read_bytes()
    stats.main(["--data_path", str(published), "--output_path", str(target)])
    assert target.read_bytes() == first


def test_files_without_examples_or_audio(tmp_path):
    for examples in ([], [{"instruction": "q", "audio_id": "empty", "output": "a"}]):
        source = write(tmp_path / "a.json", examples)
        target = str(tmp_path / "b.json")
        for command in (stats, shuffle, combine, filter_unanswerable):
            assert command.main(["--data_path", str(source), "--output_path", target]) == 0
        with pytest.raises(ValueError, match="no example with a clip"):
            sample.main(["--data_path", str(source), "--output_path", target, "--clips", "1"])
        if examples:
            assert validate.main(["--data_path", str(source)]) == 0
        else:  # Training refuses it.
            with pytest.raises(ValueError, match="a.json contains no examples"):
                validate.main(["--data_path", str(source)])
        assert (
            contamination_check.main(["--data_path", str(source), "--eval_files", str(source)]) == 0
        )


def test_duplicate_detector(tmp_path, monkeypatch):
    monkeypatch.setattr("data.duplicate_detection.MAX_BUFFERED", 100)
    values = [random.Random(0).randrange(400) for _ in range(1050)]
    counter = DuplicateDetector(str(tmp_path))
    for number, value in enumerate(values):
        counter.add(str(value), number)
    assert counter.firsts().tolist() == sorted(
        {value: n for n, value in reversed(list(enumerate(values)))}.values()
    )


def test_sample_takes_whole_clips(tmp_path, published):
    target = tmp_path / "toy" / "examples.json"
    sample.main(
        [
            "--data_path",
            str(published),
            "--output_path",
            str(target),
            "--clips",
            "40",
            "--seed",
            "3",
        ]
    )
    found = list(stream_examples(target))
    examples = list(stream_examples(published))
    chosen = {example["audio_id"] for example in found}
    assert len(chosen) == 40
    assert found == [example for example in examples if example["audio_id"] in chosen]
    reversed_examples = write(tmp_path / "reversed.jsonl", examples[::-1])
    sample.main(
        [
            "--data_path",
            str(reversed_examples),
            "--output_path",
            str(target),
            "--clips",
            "40",
            "--seed",
            "3",
        ]
    )
    assert {example["audio_id"] for example in stream_examples(target)} == chosen
    sample.main(
        [
            "--data_path",
            str(published),
            "--output_path",
            str(target),
            "--clips",
            "2",
            "--by_dataset",
        ]
    )
    groups = Counter(
        dataset
        for dataset, _ in {
            (example["dataset"], example["audio_id"]) for example in stream_examples(target)
        }
    )
    assert set(groups.values()) <= {1, 2}
    assert len(groups) == len({example["dataset"] for example in examples})


def clip(path: Path, seed: int, rate: int = 16_000, seconds: float = 0.5) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-9999, 9999, int(rate * seconds), np.int16)
    soundfile.write(path, noise, rate)
    return str(path)


def question(audio_id: str, text: str = "q", dataset: str = "d") -> dict:
    return {
        "instruction": text,
        "input": "",
        "audio_id": audio_id,
        "dataset": dataset,
        "task": "t",
        "output": "a",
    }


def test_sample_copies_audio(tmp_path):
    names = [f"{folder}/same.wav" for folder in "ab"]
    for number, name in enumerate(names):
        clip(tmp_path / name, number)
    source = write(tmp_path / "examples.json", [question(name) for name in names])
    target = tmp_path / "toy" / "examples.json"
    sample.main(
        ["--data_path", str(source), "--output_path", str(target), "--clips", "2", "--copy_audio"]
    )
    copied = [target.parent / example["audio_id"] for example in stream_examples(target)]
    assert [path.read_bytes() for path in copied] == [
        (tmp_path / name).read_bytes() for name in names
    ]


def test_sample_overwrites_no_clip(tmp_path):
    """Clips of the user or of another sample in audio/ stay, and no clip is copied twice."""
    for number, name in enumerate(["a/1.wav", "audio/1.wav", "other/a/1.wav", "third/a/1.wav"]):
        clip(tmp_path / name, number)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.wav")}
    target = tmp_path / "examples.json"
    copied = []
    for folder, names in (
        ("", ["a/1.wav", "audio/1.wav"]),
        ("other", ["a/1.wav"]),
        ("third", ["a/1.wav"]),
    ) * 2:
        source = write(tmp_path / folder / "given.json", [question(name) for name in names])
        sample.main(
            [
                "--data_path",
                str(source),
                "--output_path",
                str(target),
                "--clips",
                "2",
                "--copy_audio",
            ]
        )
        copied.append([example["audio_id"] for example in stream_examples(target)])
        for name, copy in zip(names, copied[-1], strict=True):
            assert (tmp_path / copy).read_bytes() == before[tmp_path / folder / name]
        assert all(path.read_bytes() == data for path, data in before.items())
    assert copied[:3] == copied[3:]
    assert copied[0][1] == "audio/1.wav"
    assert len(list((tmp_path / "audio").iterdir())) == 4


@pytest.mark.parametrize("decode", [False, True])
def test_validate(tmp_path, capsys, decode):
    clip(tmp_path / "a.wav", 0)
    clip(tmp_path / "b.wav", 1, rate=44_100)
    clip(tmp_path / "short.wav", 2, seconds=0.01)
    (tmp_path / "text.wav").write_text("no sound")
    examples = [
        question("a.wav"),
        question("a.wav"),
        question("b.wav"),
        question("gone.wav"),
        question("short.wav"),
    ]
    examples += [
        question("text.wav", dataset="e"),
        question("empty"),
        {"instruction": "q", "audio_id": "a.wav"},
    ]
    source = write(tmp_path / "examples.jsonl", examples)
    report = tmp_path / "report.json"
    flags = ["--data_path", str(source), "--output_path", str(report), *["--decode"] * decode]
    assert validate.main(flags) == 1
    found = json.loads(report.read_text())
    wrong = {
        "example": 1,
        "duplicate": 1,
        "clip missing": 1,
        "clip too_short": 1,
        "clip unreadable": 1,
    }
    assert found["wrong"] == wrong
    assert (found["num_examples"], found["clips"]) == (8, 5)
    assert found["coverage"] == {"d": {"clips": 4, "usable": 2}, "e": {"clips": 1, "usable": 0}}
    assert found["sampling_rates"] == {"16000 Hz": 1, "44100 Hz": 1}
    assert found["first_errors"]["example"][0].startswith("example 8: no 'output'")
    assert found["first_errors"]["duplicate"] == ["example 2: the same as an earlier one"]
    assert validate.main([*flags, "--max_bad", "5"]) == 0


def test_contamination_check(tmp_path, capsys):
    clip(tmp_path / "train/YabcdefghijK.wav", 0)
    clip(tmp_path / "train/renamed.flac", 1)
    clip(tmp_path / "train/clean.wav", 2)
    clip(tmp_path / "eval/abcdefghijK_10.000.wav", 3)
    clip(tmp_path / "eval/original.wav", 1)
    names = ["YabcdefghijK.wav", "renamed.flac", "clean.wav", "clean.wav"]
    train = write(
        tmp_path / "train/examples.json", [question(name, str(n)) for n, name in enumerate(names)]
    )
    test = write(
        tmp_path / "eval/examples.json",
        [question(n) for n in ("abcdefghijK_10.000.wav", "original.wav", "empty")],
    )
    flags = ["--data_path", str(train), "--eval_files", str(test), "--workers", "1"]
    assert contamination_check.main(flags) == 1
    assert "1 of 4 examples are on 1 clips" in capsys.readouterr().out
    clean = tmp_path / "clean.json"
    assert contamination_check.main([*flags, "--content", "--clean_path", str(clean)]) == 1
    assert "2 of 4 examples are on 2 clips" in capsys.readouterr().out
    assert [example["instruction"] for example in stream_examples(clean)] == ["2", "3"]
    again = [
        "--data_path",
        str(clean),
        "--audio_root",
        str(train.parent),
        "--eval_files",
        str(test),
        "--content",
    ]
    assert contamination_check.main([*again, "--workers", "1"]) == 0


def test_numbers_are_not_ids(tmp_path, capsys):
    """The same number in the name (VoxCeleb) is not contamination, but the same content is."""
    speakers = ("id1/21Uxsk56VDQ", "id2/_z_BR0ERa9g")
    test = [clip(tmp_path / f"test/{who}/00001.wav", number) for number, who in enumerate(speakers)]
    clip(tmp_path / "train/id3/JF4Rb0tDv1E/00001.wav", 5)
    clip(tmp_path / "train/id4/copy/00001.wav", 0)
    names = [str(path.relative_to(tmp_path / "test")) for path in map(Path, test)]
    eval_file = write(tmp_path / "test/examples.json", [question(name) for name in names])
    examples = [question(name) for name in ("id3/JF4Rb0tDv1E/00001.wav", "id4/copy/00001.wav")]
    flags = [
        "--data_path",
        str(write(tmp_path / "train/examples.json", examples)),
        "--eval_files",
        str(eval_file),
        "--workers",
        "1",
    ]
    assert contamination_check.main(flags) == 1
    printed = capsys.readouterr().out
    assert "2 clips were not compared, because they have no unique name" in printed
    assert "0 of 2 examples" in printed
    assert contamination_check.main([*flags, "--content"]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 examples" in printed
    assert "not compared" not in printed
    # Without the copy, all clips are compared and none is found.
    write(tmp_path / "train/examples.json", examples[:1])
    assert contamination_check.main([*flags, "--content"]) == 0


def describe_process(path: str) -> str:
    """Replace `hash_content`; return how the process was started, and its number of threads."""
    return f"{multiprocessing.get_start_method()} {torch.get_num_threads()}"


def test_contents_are_hashed_by_processes_with_one_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(contamination_check, "hash_content", describe_process)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)  # A forked process would have two.
    try:
        hashes = list(contamination_check.hash_clips(["a.wav", "b.wav"], tmp_path, 1))
    finally:
        torch.set_num_threads(num_threads)
    assert hashes == [("a.wav", "forkserver 1"), ("b.wav", "forkserver 1")]


def test_remap_paths(tmp_path, capsys):
    local = [clip(tmp_path / "disk/x/Yabcdefghijk.wav", 0), clip(tmp_path / "disk/other.flac", 1)]
    examples = [
        question("/far/audio/abcdefghijk.flac"),
        question("/far/other.wav"),
        question("empty"),
        question("/gone/z.wav"),
    ]
    source = write(tmp_path / "examples.jsonl", examples)
    target = tmp_path / "out" / "examples.jsonl"
    flags = [
        "--data_path",
        str(source),
        "--output_path",
        str(target),
        "--folder",
        str(tmp_path / "disk"),
    ]
    with pytest.raises(
        ValueError,
        match="1 of 3 examples have a clip that was not found .example 4: /gone/z.wav",
    ):
        remap_paths.main(flags)
    assert not target.exists()
    assert remap_paths.main([*flags, "--drop_missing"]) == 0
    assert [example["audio_id"] for example in stream_examples(target)] == [*local, "empty"]
    assert remap_paths.main([*flags, "--drop_missing", "--relative"]) == 0
    assert (target.parent / next(stream_examples(target))["audio_id"]).resolve() == Path(local[0])
    table = tmp_path / "disk/audio_ids.csv"
    table.write_text("id,audio_id\nz,other.flac\n")
    prefix = ["--prefix", f"/far/audio={tmp_path}/disk", "--prefix", f"/far={tmp_path}/disk"]
    clip(tmp_path / "disk/abcdefghijk.flac", 5)
    clip(tmp_path / "disk/other.wav", 6)
    assert remap_paths.main([*flags[:4], *prefix, "--table", str(table)]) == 0
    found = [Path(example["audio_id"]).name for example in stream_examples(target)]
    assert found == ["abcdefghijk.flac", "other.wav", "empty", "other.flac"]
    # Each of two names is now the name of two files.
    assert remap_paths.main([*flags, "--drop_missing"]) == 0
    assert [example["audio_id"] for example in stream_examples(target)] == [
        f"{tmp_path}/disk/other.wav",
        "empty",
    ]
    record = json.loads((tmp_path / "out/examples.jsonl.provenance.json").read_text())
    assert (record["missing"], record["ambiguous"]) == (1, 1)


# Memory, and the commands in processes of their own.


def peak(run) -> int:
    """Return the largest number of bytes that Python has allocated during a call."""
    tracemalloc.start()
    run()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_memory_does_not_grow_with_the_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "MAX_BUFFERED", 2**15)
    monkeypatch.setattr("ltu.data.dataset_io.BLOCK", 2**14)
    # Files are hashed in blocks of 1 MB, which is more than everything else in memory.
    monkeypatch.setattr("ltu.files.HASH_BLOCK", 2**14)
    monkeypatch.setattr("ltu.data.dataset_io.EXAMPLES_AT_ONCE", 64)
    monkeypatch.setattr("data.duplicate_detection.MAX_BUFFERED", 2**11)
    examples = [json.dumps(example) for example in random_examples(OPEN, 0.0001, 0)]  # 0.18 MB
    peaks = {}
    for times in (1, 2, 10):  # The first run warms up: imports and their caches.
        source = tmp_path / f"{times}.json"
        with source.open("w") as file:
            file.write("[" + ",\n".join(",\n".join(examples) for _ in range(times)) + "]")
        flags = ["--data_path", str(source), "--output_path"]
        commands = {
            "shuffle": lambda flags=flags: shuffle.main([*flags, str(tmp_path / "b.json")]),
            "combine": lambda flags=flags: combine.main([*flags, str(tmp_path / "b.jsonl.zst")]),
            "filter": lambda flags=flags: filter_unanswerable.main(
                [*flags, str(tmp_path / "b.json")]
            ),
            "stats": lambda flags=flags: stats.main([*flags, str(tmp_path / "s.json")]),
            "sample": lambda flags=flags: sample.main(
                [*flags, str(tmp_path / "b.json"), "--clips", "9"]
            ),
        }
        peaks[times] = {name: peak(command) for name, command in commands.items()}
    assert source.stat().st_size > 2 * max(peaks[10].values()), (source.stat().st_size, peaks)
    for name in peaks[2]:
        assert peaks[10][name] < 1.25 * peaks[2][name] + 2**17, (name, peaks)


def test_commands_print_errors_in_one_line(tmp_path, tmp_path_factory):
    path = tmp_path / "examples.json"
    path.write_text('[{"a": 1},\n{"a": 2,}]')
    command = ["-m", "data.shuffle", "--data_path", str(path)]
    command += ["--output_path", str(tmp_path / "b.json")]
    found = run_python(command, tmp_path_factory.mktemp("process"))
    assert found.returncode == 1
    assert found.stderr.startswith(f"error: {path}, example 2, byte 19: ")
    assert found.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_encoded_examples_have_no_line_ends():
    assert all(b"\n" not in encode_line(example) for example in nasty_examples(500))


def test_repeats_that_a_recipe_makes_can_be_allowed(tmp_path, capsys):
    example = {"instruction": "What?", "input": "", "audio_id": "empty", "output": "A dog."}
    (tmp_path / "examples.json").write_text(json.dumps([example, example]))
    command = ["--data_path", str(tmp_path / "examples.json"), "--no_audio"]
    assert (validate.main(command), validate.main([*command, "--allow_duplicates"])) == (1, 0)
    assert '"duplicate": 1' in capsys.readouterr().out


def test_an_input_by_another_path_is_not_overwritten(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    for name, given in (("link.jsonl", "a.jsonl"), ("b.jsonl", "b.jsonl.tmp")):
        with pytest.raises(ValueError, match="another name"):
            ExampleWriter(tmp_path / name, [tmp_path / given])
