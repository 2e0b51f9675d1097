"""Tests what `data.combine` does as the original's scripts: repeats, transcripts, VoxCeleb's paths.

The expected values are computed here from the description of the scripts, with the random numbers
of numpy or Python, and not with code of `data.combine`.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import combine
from ltu.data.dataset_io import ExampleWriter, stream_examples
from ltu.data.transcripts import clean_as_original, clean_transcript


def example(audio_id: str, dataset: str = "d", **more: str | None) -> dict:
    content = {"instruction": "q", "input": "", "audio_id": audio_id, "dataset": dataset}
    return content | {"task": "caption", "output": audio_id} | more


def write(path: Path, examples: list[dict]) -> Path:
    with ExampleWriter(path) as output:
        for entry in examples:
            output.write(entry)
    return path


def run(folder: Path, flags: list[str], files: list[str]) -> tuple[list[dict], dict]:
    """Combine files; return the examples and the content of the provenance file."""
    target = folder / "out" / "all.json"
    assert combine.main(["--data_path", *files, "--output_path", str(target), *flags]) == 0
    record = json.loads(target.with_name("all.json.provenance.json").read_text())
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []
    return list(stream_examples(target)), record


def captions(folder: Path) -> dict[str, list[dict]]:
    """Write the captions of three datasets, one file each."""
    sizes = {"audiocaps_train": 40, "clotho_development": 61, "sound_bible": 23}
    examples = {}
    for dataset, count in sizes.items():
        examples[dataset] = [example(f"{dataset}/{n}", dataset) for n in range(count)]
        write(folder / f"{dataset}.json", examples[dataset])
    return examples


CLOSED = ["--recipe", "openaqa_closed", "--partial"]
TIMES = {"audiocaps_train": 1, "clotho_development": 2, "sound_bible": 10}


def caption_files(folder: Path) -> list[str]:
    return [f"caption={folder}/{dataset}.json" for dataset in TIMES]


def test_original_repeats_are_the_lists_of_the_original(tmp_path):
    """After random.seed(0): random.choices for each file, then random.shuffle of everything."""
    examples = captions(tmp_path)
    generator = random.Random(0)
    expected = []
    for dataset, times in TIMES.items():
        expected += examples[dataset]
        if times > 1:
            expected += generator.choices(examples[dataset], k=len(examples[dataset]) * (times - 1))
    generator.shuffle(expected)
    flags = [*CLOSED, "--original_repeats", "--original_shuffle"]
    found, record = run(tmp_path, flags, caption_files(tmp_path))
    assert found == expected
    assert (record["repeats"], record["order"], record["seed"]) == ("original", "original", 0)


@pytest.mark.parametrize("seed", [0, 7])
def test_original_repeats_are_numpys_numbers(tmp_path, seed):
    """The numbers of the sampled examples, computed by numpy's Mersenne Twister."""
    examples = captions(tmp_path)
    _, state, _ = random.Random(seed).getstate()
    twister = np.random.RandomState()
    twister.set_state(("MT19937", np.array(state[:-1], np.uint32), state[-1]))
    expected = []
    for dataset, times in TIMES.items():
        count = len(examples[dataset])
        numbers = range(count)
        if times > 1:
            sampled = np.floor(twister.random_sample(count * (times - 1)) * count).astype(int)
            numbers = [*numbers, *sampled]
        expected += [f"{dataset}/{number}" for number in numbers]
    flags = [*CLOSED, "--original_repeats", "--no_shuffle", "--seed", str(seed)]
    found, record = run(tmp_path, flags, caption_files(tmp_path))
    assert [entry["output"] for entry in found] == expected
    assert (record["repeats"], record["seed"]) == ("original", seed)


def test_original_repeats_are_a_draw_with_replacement(tmp_path):
    """Each example is there once, and 9 times more on average, as binomial counts spread."""
    count = 4000
    write(tmp_path / "a.json", [example(str(n), "sound_bible") for n in range(count)])
    flags = [*CLOSED, "--original_repeats", "--seed", "3"]
    found, _ = run(tmp_path, flags, [f"caption={tmp_path}/a.json"])
    times = np.array(list(Counter(entry["output"] for entry in found).values()))  # (count,)
    assert len(times) == count and times.sum() == 10 * count and times.min() >= 1
    # Of a binomial distribution: the variance is 9, with a standard error of 9 sqrt(2/n), and
    # n e^-9 = 0.5 examples are there only once.
    assert abs(times.var() - 9) < 6 * 9 * (2 / count) ** 0.5
    assert (times == 1).sum() <= 6


def test_repeats_are_exact_and_the_same_by_default(tmp_path):
    captions(tmp_path)
    found, record = run(tmp_path, CLOSED, caption_files(tmp_path))
    counts = Counter(entry["output"] for entry in found)
    for name, number in counts.items():
        assert number == TIMES[name.split("/")[0]]
    assert record["repeats"] == "exact"


def test_original_repeats_repeat_with_the_seed_and_differ_without(tmp_path):
    captions(tmp_path)
    results = []
    for seed in ("1", "1", "2"):
        flags = [*CLOSED, "--original_repeats", "--seed", seed]
        found, _ = run(tmp_path, flags, caption_files(tmp_path))
        results.append(Counter(entry["output"] for entry in found))
    assert results[0] == results[1] != results[2]
    assert {counts.total() for counts in results} == {40 + 2 * 61 + 10 * 23}


def test_original_repeats_of_datasets_in_one_file(tmp_path):
    """Each dataset of a file is sampled by itself, and half a surrogate pair survives."""
    examples = [example(f"{n}\ud83d", ["clotho", "sound bible", "x"][n % 3]) for n in range(60)]
    write(tmp_path / "a.json", examples)
    flags = [*CLOSED, "--original_repeats", "--no_shuffle"]
    found, _ = run(tmp_path, flags, [f"caption={tmp_path}/a.json"])
    assert found[:60] == examples
    datasets = Counter(entry["dataset"] for entry in found[60:])
    assert datasets == {"clotho": 20, "sound bible": 180}
    assert all(entry in examples for entry in found[60:])


def test_flags_without_effect_are_refused(tmp_path):
    write(tmp_path / "a.json", [example("a")])
    files = [f"{tmp_path}/a.json"]
    with pytest.raises(ValueError, match="--original_repeats: no recipe repeats none"):
        run(tmp_path, ["--original_repeats"], files)
    with pytest.raises(ValueError, match="openaqa_open repeats none"):
        run(tmp_path, ["--recipe", "openaqa_open", "--original_repeats"], [f"open={files[0]}"])
    with pytest.raises(ValueError, match="--keep_audio_ids: no recipe replaces no"):
        run(tmp_path, ["--keep_audio_ids"], files)


# The phrases that the original removes, longest first.
PHRASES = []
for phrase in ("thanks for watching", "thank you for watching"):
    for spelling in (phrase, phrase.capitalize(), phrase.upper()):
        PHRASES += [f"{spelling}{mark}" for mark in ("", ".", "!")]
PHRASES.sort(key=len, reverse=True)


def as_original(text: str) -> str:
    """Clean a transcript as the original does, with a list of phrases."""
    text = re.sub("|".join(map(re.escape, PHRASES)), "", text)
    return text.lstrip() if text[:1] == " " else text


TRANSCRIPTS = [
    # transcript, after --transcripts clean, after --transcripts original
    ("Thanks for watching!", "", ""),
    (" Thank you for watching.", "", ""),
    ("Hello. Thanks for watching!", "Hello.", "Hello. "),
    ("  Hello. ", "Hello.", "Hello. "),
    ("\nHello.\n", "Hello.", "\nHello.\n"),
    ("thank you for watching, all", ", all", ", all"),
    ("THANKS FOR WATCHING!!", "!", "!"),
    ("Thanks For Watching!", "Thanks For Watching!", "Thanks For Watching!"),
    ("Thank you.", "Thank you.", "Thank you."),
    ("Thanks for watching. Bye.", "Bye.", "Bye."),
    ("Hello.", "Hello.", "Hello."),
    ("", "", ""),
]


@pytest.mark.parametrize("text, cleaned, original", TRANSCRIPTS)
def test_rules_of_transcripts(text, cleaned, original):
    assert clean_transcript(text) == cleaned
    assert clean_as_original(text) == original == as_original(text)


def test_the_original_rule_equals_the_list_of_phrases_on_random_texts():
    chance = random.Random(0)
    pieces = [*PHRASES, " ", "\n", ".", "!", "Hello", "thanks for ", "watching", "Thank you "]
    for _ in range(5000):
        text = "".join(chance.choices(pieces, k=chance.randrange(6)))
        assert clean_as_original(text) == as_original(text)


def transcripts(folder: Path) -> list[str]:
    examples = [example(f"{n}", input=text) for n, (text, _, _) in enumerate(TRANSCRIPTS)]
    without = example("no transcript")
    del without["input"]
    write(folder / "a.json", [*examples, without, example("null", input=None)])
    return [str(folder / "a.json")]


@pytest.mark.parametrize("rule, column", [("unchanged", 0), ("clean", 1), ("original", 2)])
def test_combine_cleans_transcripts_and_counts_them(tmp_path, capsys, rule, column):
    files = transcripts(tmp_path)
    found, record = run(tmp_path, ["--no_shuffle", "--transcripts", rule], files)
    assert [entry["input"] for entry in found[:-2]] == [row[column] for row in TRANSCRIPTS]
    assert "input" not in found[-2] and found[-1]["input"] is None
    num_outros = sum("watching" in text.lower() for text, _, _ in TRANSCRIPTS) - 1
    num_spaces = {"unchanged": 0, "clean": 2, "original": 1}[rule]
    expected = {
        "transcripts": rule,
        "transcripts_without_outro": num_outros if rule != "unchanged" else 0,
        "transcripts_without_spaces": num_spaces,
        "audio_ids": {},
    }
    assert record["corrections"] == expected
    printed = capsys.readouterr().out
    assert (f"outros removed from {num_outros} transcripts" in printed) == (rule != "unchanged")
    # The other values are not changed, and cleaning is the default.
    assert [entry["output"] for entry in found[:3]] == ["0", "1", "2"]
    if rule == "clean":
        assert run(tmp_path, ["--no_shuffle"], files)[0] == found


def test_counts_are_those_of_one_reading(tmp_path):
    """The original's order reads the examples twice."""
    _, once = run(tmp_path, ["--transcripts", "original"], transcripts(tmp_path))
    flags = ["--transcripts", "original", "--original_shuffle"]
    _, twice = run(tmp_path, flags, transcripts(tmp_path))
    assert once["corrections"] == twice["corrections"]


VOXCELEB = "/data/sls/scratch/yuangong/voxceleb/wav/id1/x.wav"
MOVED = "/data/sls/scratch/yuangong/dataset/voxceleb/wav/id1/x.wav"
# Recipe -> a part, its rule for transcripts, and whether it replaces the former folder.
SCRIPTS = {
    "openasqa_classification": ("speech", "unchanged", True),
    "openasqa_v1": ("speech_open", "original", False),
    "openasqa_v2": ("joint_added", "original", True),
    "openaqa_all": ("open", "clean", False),
}


@pytest.mark.parametrize("recipe", SCRIPTS)
def test_recipes_correct_what_their_scripts_correct(tmp_path, recipe):
    part, rule, is_moved = SCRIPTS[recipe]
    text = " Hello. Thanks for watching!"
    ids = [VOXCELEB, MOVED, "/data/voxceleb/x.wav", "empty"]
    write(tmp_path / "a.json", [example(name, input=text) for name in ids])
    files = [f"{part}={tmp_path}/a.json"]
    flags = ["--recipe", recipe, "--partial", "--no_shuffle"]
    found, record = run(tmp_path, flags, files)
    cleaned = {"unchanged": text, "original": "Hello. ", "clean": "Hello."}[rule]
    assert {entry["input"] for entry in found} == {cleaned}
    moved = [MOVED, *ids[1:]] if is_moved else ids
    assert [entry["audio_id"] for entry in found] == moved
    counts = {"yuangong/voxceleb -> yuangong/dataset/voxceleb": 1} if is_moved else {}
    assert record["corrections"]["audio_ids"] == counts
    # Both can be turned off.
    flags += ["--transcripts", "unchanged", *(["--keep_audio_ids"] if is_moved else [])]
    found, record = run(tmp_path, flags, files)
    assert [entry["audio_id"] for entry in found] == ids
    assert {entry["input"] for entry in found} == {text}
    assert record["corrections"]["audio_ids"] == {}
