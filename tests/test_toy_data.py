"""Tests the toy dataset: the committed split, the templates, and the examples that are built."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
import soundfile

from data.toy import build, sound_examples
from data.toy.attribution import write_attribution
from data.toy.render_sounds import WINDOW, centred
from data.toy.sound_clips import (
    AUDIO,
    HERE,
    make_split,
    read_fold,
    read_json,
    read_manifest,
    recording_of,
)
from data.toy.training_audio import sample_sounds
from ltu.data.check_examples import read_examples
from tests.machine import run_python

SOUNDS = read_manifest()
BY_FILE = {sound["file"]: sound for sound in SOUNDS}
SPLIT = read_json("split.json")
HELDOUT = [file for fold in SPLIT["folds"] for file in fold]
STAGES = [f"stage{number}" for number in sound_examples.STAGES]
SMALL = build.Sizes([230, 60, 120, 160], crops=2, mixtures=6, pairs=6)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "fold0"
    build.build(build.BuildSettings("ltu", folder, SMALL))
    return folder


def load(folder: Path, name: str):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def normalised(question: str) -> str:
    question = question.removeprefix(sound_examples.QUESTIONS["closed_prefix"])
    return re.sub(r"[^a-z0-9]+", " ", question.lower()).strip()


# The committed files


def test_manifest_and_audio_agree():
    assert sorted(BY_FILE) == sorted(path.name for path in AUDIO.glob("*.flac"))
    assert len(SOUNDS) == 246
    for sound in SOUNDS:
        info = soundfile.info(AUDIO / sound["file"])
        assert (info.samplerate, info.channels) == (16_000, 1), sound["file"]
        assert abs(info.duration - sound["seconds"]) < 0.01, sound["file"]
        assert info.frames <= WINDOW, sound["file"]
        assert sound["licence"], sound["file"]
        assert sound["author"], sound["file"]
        assert sound["package"], sound["file"]
        assert sound["source_file"], sound["file"]
    assert not re.search(
        r"/(work|home|tmp|root)/", (HERE / "manifest.jsonl").read_text(encoding="utf-8")
    )


def test_attribution_is_what_the_manifest_says(tmp_path):
    write_attribution(SOUNDS, tmp_path / "ATTRIBUTION.md")
    text = (tmp_path / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert text == (HERE / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(f"| {sound['file']} | {sound['source_file']} |" in text for sound in SOUNDS)


def test_split_is_what_the_rule_says():
    assert make_split(SOUNDS) == SPLIT
    assert make_split(SOUNDS[::-1])["folds"] == SPLIT["folds"]


def test_split_holds_out_what_may_be_held_out():
    assert len(SPLIT["folds"]) == 5
    assert len(HELDOUT) == len(set(HELDOUT)) >= 120
    assert sorted(HELDOUT + SPLIT["training_only"]) == sorted(BY_FILE)
    labels = Counter(sound["label"] for sound in SOUNDS)
    assert not [file for file in HELDOUT if labels[BY_FILE[file]["label"]] < 2]
    assert not [file for file in HELDOUT if "lincity" in BY_FILE[file]["package"]]


@pytest.mark.parametrize("fold", range(5))
def test_other_recordings_of_each_held_out_label_are_in_training(fold):
    training, heldout = read_fold(fold)
    assert len(training) + len(heldout) == len(SOUNDS)
    assert {sound["label"] for sound in heldout} <= {sound["label"] for sound in training}
    assert not {recording_of(sound) for sound in heldout} & {
        recording_of(sound) for sound in training
    }


def test_folds_are_alike():
    sizes = [len(fold) for fold in SPLIT["folds"]]
    assert max(sizes) - min(sizes) <= 2
    for category in {sound["category"] for sound in SOUNDS}:
        counts = [
            sum(BY_FILE[file]["category"] == category for file in fold) for fold in SPLIT["folds"]
        ]
        assert max(counts) - min(counts) <= 3, (category, counts)


def test_an_unknown_fold_is_an_error():
    with pytest.raises(ValueError, match="no fold 5"):
        read_fold(5)


# The templates


def test_every_label_and_category_has_texts():
    labels = sound_examples.VOCABULARY["labels"]
    categories = sound_examples.VOCABULARY["categories"]
    assert set(labels) == {sound["label"] for sound in SOUNDS}
    assert len(labels) == 95
    assert set(categories) == {sound["category"] for sound in SOUNDS}
    assert not set(labels) & set(categories), (
        "a label that is a category's name could not be scored"
    )
    for name, texts in labels.items():
        assert texts["phrase"], name
        assert len(texts["descriptions"]) == len(set(texts["descriptions"])) >= 4, name
        for description in texts["descriptions"]:
            assert not re.search(r"->|[.:;\n]", description), (name, description)
            assert not set(categories) & set(re.findall(r"\w+", description)), (name, description)


def test_test_questions_are_never_training_questions():
    for kind in ("closed", "open"):
        for task, texts in sound_examples.QUESTIONS[kind].items():
            train, test = (20, 5) if kind == "closed" else (24, 8)
            if task == "how_many":
                train, test = 12, 4
            assert len(set(texts["train"])) == len(texts["train"]) >= train, task
            assert len(set(texts["test"])) == len(texts["test"]) >= test, task
    tasks = [
        texts for kind in ("closed", "open") for texts in sound_examples.QUESTIONS[kind].values()
    ]
    train = {normalised(question) for texts in tasks for question in texts["train"]}
    assert not train & {normalised(question) for texts in tasks for question in texts["test"]}


def open_answers(task: str) -> dict[str, list[str]]:
    """Return the answer templates of an open task: "answers", or "answers_yes" and "_no"."""
    texts = sound_examples.QUESTIONS["open"][task]
    return {key: templates for key, templates in texts.items() if key.startswith("answers")}


@pytest.mark.parametrize("task", sound_examples.QUESTIONS["open"])
def test_every_open_answer_names_the_label_and_says_why(task):
    minimum = 3 if task in ("yes_no", "how_many") else 4
    for templates in open_answers(task).values():
        assert len(set(templates)) == len(templates) >= minimum
        for template in templates:
            fields = Counter(re.findall(r"{(\w+)}", template))
            assert fields["phrase"] == 1, template
            assert fields["other_phrase"] == (task == "how_many"), template
            assert set(fields) & {"description", "reason", "meaning", "place", "kind"}, template


def test_open_answers_look_like_no_closed_answer():
    answers = sound_examples.QUESTIONS["answers"]
    closed = {template.split(":")[0] + ":" for template in answers.values()}
    assert closed == {"Labels:", "Audio caption:", "First:", "Order:"}
    openings = []
    for task in sound_examples.QUESTIONS["open"]:
        for template in sum(open_answers(task).values(), []):
            assert not template.startswith(tuple(closed)), template
            assert re.fullmatch(r"([A-Z]|{caption} [A-Z])[^;\n]+\.", template), template
            openings.append(" ".join(template.split()[:3]))
    assert len(set(openings)) == len(openings), Counter(openings).most_common(3)


def test_every_form_of_a_yes_or_no_question_contains_the_question():
    texts = sound_examples.QUESTIONS["open"]["yes_no"]
    for form in texts["train"] + texts["test"]:
        assert form.count("{question}") == 1, form
    for task, texts in sound_examples.QUESTIONS["open"].items():
        if task != "yes_no":
            assert "{" not in "".join(texts["train"] + texts["test"]), task


# The built examples


def test_same_seed_same_bytes(built, tmp_path):
    build.build(build.BuildSettings("ltu", tmp_path / "fold0", SMALL))
    made = sorted(path.relative_to(built) for path in built.rglob("*.*"))
    assert made == sorted(
        path.relative_to(tmp_path / "fold0") for path in (tmp_path / "fold0").rglob("*.*")
    )
    for path in made:
        first = built / path
        second = tmp_path / "fold0" / path
        if path.suffix == ".flac":
            assert first.read_bytes() == second.read_bytes(), path
        else:  # The relative path of the committed clips depends on the output folder.
            path_start = r'"[./\w-]*data/toy/audio/'
            assert re.sub(path_start, '"', first.read_text()) == re.sub(
                path_start, '"', second.read_text()
            ), path


def test_another_seed_gives_other_examples(built, tmp_path):
    sizes = build.Sizes(SMALL.num_examples, crops=1, mixtures=1, pairs=1)
    build.build(build.BuildSettings("ltu", tmp_path, sizes, seed=1))
    assert load(built, "stage1") != load(tmp_path, "stage1")


def test_stages_have_the_requested_examples(built):
    for stage, count in zip(STAGES, [230, 60, 120, 160], strict=True):
        made = load(built, stage)
        assert len(made) == count
        assert {example["task"] for example in made} <= set(sound_examples.STAGES[int(stage[-1])])
        assert all(
            set(example) == {"instruction", "input", "audio_id", "dataset", "task", "output"}
            for example in made
        )
    assert {example["task"] for example in load(built, "stage1")} == {"cla_label", "cla_label_des"}
    assert {example["task"] for example in load(built, "stage4")} == set(sound_examples.STAGES[4])
    for fractions in sound_examples.STAGES.values():
        assert sum(fractions.values()) == pytest.approx(1.0)


def test_examples_are_read_by_the_trainer(built):
    for name in (*STAGES, "heldout_right", "heldout_wrong", "heldout_none", "heldout_show"):
        for example in read_examples(built / f"{name}.json"):
            assert (
                example["audio"] is None
                if name == "heldout_none"
                else Path(example["audio"]).is_file()
            )


def test_training_has_no_test_question_and_test_no_training_question(built):
    trained = {
        normalised(example["instruction"]) for stage in STAGES for example in load(built, stage)
    }
    tested = {
        normalised(example["instruction"])
        for name in ("right", "show")
        for example in load(built, f"heldout_{name}")
    }
    assert not trained & tested


def test_half_of_the_closed_questions_have_the_prefix(built):
    made = [example for stage in STAGES for example in load(built, stage)]
    prefixed = [
        example["instruction"].startswith("Closed-ended question: ")
        for example in made
        if example["task"] in sound_examples.CLOSED
    ]
    assert 0.4 < np.mean(prefixed) < 0.6
    open_ended = [example for example in made if example["task"] not in sound_examples.CLOSED]
    assert open_ended
    assert not any(example["instruction"].startswith("Closed") for example in open_ended)


def test_sampling_favours_rare_categories_and_includes_every_clip():
    training, _ = read_fold(0)
    sampled = Counter(sound["file"] for sound in sample_sounds(training, 1200, Random(0)))
    assert sum(sampled.values()) == 1200
    assert set(sampled) == {sound["file"] for sound in training}
    files_of = defaultdict(list)
    for sound in training:
        files_of[sound["category"]].append(sound["file"])
    drums, instruments = (
        np.mean([sampled[file] for file in files_of[category]])
        for category in ("drums", "instruments")
    )
    assert instruments > 1.5 * drums  # A quarter of the samples is balanced.


# Leakage, by the sources that the builder names and by the audio itself


def test_no_held_out_clip_or_recording_in_training_audio(built):
    heldout = {recording_of(BY_FILE[file]) for file in SPLIT["folds"][0]}
    sources = load(built, "sources")
    for stage in STAGES:
        for example in load(built, stage):
            if example["audio_id"] in sources:
                clips = [part["clip"] for part in sources[example["audio_id"]]["parts"]]
            else:
                clips = [Path(example["audio_id"]).name]
                assert (built / example["audio_id"]).resolve() == (AUDIO / clips[0]).resolve()
            assert not {recording_of(BY_FILE[clip]) for clip in clips} & heldout, example
    assert {path.name for path in (built / "audio").iterdir()} == {
        Path(audio_id).name for audio_id in sources
    }


def test_training_audio_is_what_its_provenance_says(built):
    for audio_id, provenance in load(built, "sources").items():
        waveform, rate = soundfile.read(built / audio_id, dtype="float32")
        assert rate == 16_000
        assert len(waveform) == round(provenance["seconds"] * rate) <= WINDOW
        assert 0.01 < np.abs(waveform).max() < 1.0, audio_id
        expected = np.zeros_like(waveform)
        half = (
            (WINDOW - provenance["parts"][-1]["at"])
            if provenance["kind"] == "pair"
            else len(waveform)
        )
        for part in provenance["parts"]:
            clip = (
                centred(part["clip"])[part["start"] : part["start"] + part["samples"]]
                * part["gain"]
            )
            length = len(clip) if provenance["kind"] == "crop" else half
            expected[part["at"] : part["at"] + length] += np.resize(clip, length)
        error = np.abs(waveform - expected)
        if provenance["kind"] == "pair":  # Faded over 10 ms at the ends of both halves.
            for edge in (0, half, WINDOW - half, WINDOW):
                error[max(0, edge - 160) : edge + 160] = 0.0
        assert error.max() < 1e-4, audio_id


def test_answers_say_what_the_sources_are(built):
    sources = load(built, "sources")
    for example in [example for stage in STAGES for example in load(built, stage)]:
        provenance = sources.get(
            example["audio_id"], {"parts": [{"clip": Path(example["audio_id"]).name}]}
        )
        sounds = [BY_FILE[part["clip"]] for part in provenance["parts"]]
        assert len(sounds) == (
            2 if example["task"] in sound_examples.MIXTURE_TASKS + sound_examples.PAIR_TASKS else 1
        ), example
        if example["task"].startswith(("cla_label", "temporal")):
            found = [example["output"].index(sound["label"]) for sound in sounds]
            assert found == sorted(found), example
        if example["task"].startswith("cla_label"):
            assert example["output"].endswith(f"{sounds[0]['label']}; {sounds[0]['category']}."), (
                example
            )
        if example["task"].startswith("caption"):
            assert all(sound["caption"] in example["output"] for sound in sounds), example
        assert "{" not in example["instruction"] + example["output"], example


# The test questions


def test_heldout_questions(built):
    right, wrong, none = (load(built, f"heldout_{name}") for name in ("right", "wrong", "none"))
    heldout = SPLIT["folds"][0]
    assert sorted(Path(example["audio_id"]).name for example in right) == heldout
    for example, with_wrong, without in zip(right, wrong, none, strict=True):
        assert (built / example["audio_id"]).resolve().parent == AUDIO.resolve(), (
            "held-out clips are not changed"
        )
        assert (
            example | {"audio_id": None}
            == with_wrong | {"audio_id": None}
            == without | {"audio_id": None}
        )
        sound = BY_FILE[Path(example["audio_id"]).name]
        other = BY_FILE[Path(with_wrong["audio_id"]).name]
        assert other["file"] in heldout
        assert other["category"] != sound["category"]
        assert example["output"] == f"Labels: {sound['label']}; {sound['category']}."
        assert without["audio_id"] == "empty"
    show = load(built, "heldout_show")
    assert [example["task"] for example in show] == list(sound_examples.SHOWN)
    assert len({BY_FILE[Path(example["audio_id"]).name]["category"] for example in show}) == 5
    assert {Path(example["audio_id"]).name for example in show} <= set(heldout)


# The command line


@pytest.mark.parametrize(
    "bad",
    [
        ["--num_examples", "1,2,3"],
        ["--num_examples", "a,b,c,d"],
        ["--crop", "3"],
        ["--pairs", "0"],
        ["--versions", "2"],
    ],
)
def test_bad_arguments_stop(bad, capsys):
    with pytest.raises(SystemExit):
        build.parse_args(bad)
    assert bad[0] in capsys.readouterr().err


def test_default_output_folder_names_the_fold():
    settings = build.parse_args(["--fold", "3"]).settings
    assert settings.output_dir == Path("exp/toy_data/fold3")
    settings = build.parse_args(["--kind", "ltu_as", "--fold", "3"]).settings
    assert settings.output_dir == Path("exp/toy_data_as/fold3")


def test_flags_change_the_sizes_of_one_run_only():
    flags = ["--num_examples", "1,2,3,4", "--crops", "1"]
    sizes = build.parse_args(flags).settings.sizes
    assert sizes == build.Sizes([1, 2, 3, 4], crops=1, mixtures=120, pairs=160)
    assert build.DEFAULTS["ltu"].num_examples == [240, 1200, 400, 1300]
    assert build.DEFAULTS["ltu"].crops == 6


def test_an_error_of_the_command_is_one_line(tmp_path):
    command = ["-m", "data.toy.build", "--fold", "9", "--output_dir", str(tmp_path / "out")]
    ended = run_python(command, tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "error: There is no fold 9; the split has folds 0 to 4.\n"
