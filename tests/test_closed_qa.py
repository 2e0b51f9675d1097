"""Tests closed-ended questions by rule: formats of the answers, seeds, and the toy dataset."""

import json
import re
from pathlib import Path
from random import Random

import pytest

from data import closed_qa
from data.toy import sound_examples as sound_examples
from data.toy.sound_clips import HERE, read_manifest
from data.toy.speech_clips import SPEECH, cut_offs, name_of, read_speech
from ltu.data.check_examples import read_examples

pytest.importorskip("msgspec")
TEXTS = json.loads((HERE.parent / "closed_qa.json").read_text(encoding="utf-8"))
DESCRIPTIONS = {
    "Dog": ["short, harsh bursts"],
    "Speech": ["rich in frequency modulation", "lively in pitch"],
}
EVENTS = [
    {"label": "Dog", "onset": 0.5, "offset": 1.0},
    {"label": "Speech", "onset": 2.0, "offset": 4.04},
    {"label": "Dog", "onset": 3.0, "offset": 3.5},
    {"label": "Dog", "onset": 5, "offset": 6},
]


def settings(**changes) -> closed_qa.RuleSettings:
    cuts = {"pitch": closed_qa.PITCH, "speed": (2.0, 4.0)}
    base = {"dataset": "own", "descriptions": DESCRIPTIONS, "cuts": cuts}
    return closed_qa.RuleSettings(**(base | changes))


def outputs(task: str, record: dict, **changes) -> list[str]:
    record = {"audio_id": "a.flac"} | record
    return [
        example["output"]
        for example in closed_qa.examples_of(record, [task], TEXTS, settings(**changes))
    ]


@pytest.mark.parametrize(
    "task, record, expected",
    [
        ("cla_label", {"labels": ["Dog", "Speech"]}, ["Labels: Dog; Speech"]),
        ("cla_label", {"labels": "Dog; Speech;"}, ["Labels: Dog; Speech"]),
        ("cla_label", {"labels": []}, []),
        ("cla_label", {"labels": [""]}, []),
        ("genre_cla", {"genre": " ; "}, []),
        ("asr", {"text": "  "}, []),
        ("speed_cla", {"speed": "nan"}, []),
        ("cla_label_des", {"labels": "Dog"}, ["Labels: short, harsh bursts -> Dog"]),
        ("cla_label_des", {"labels": "Dog;Cat"}, []),  # no description of the cat
        ("caption", {"caption": "A dog."}, ["Audio caption: A dog."]),
        (
            "caption",
            {"caption": ["A dog.", " ", "It barks."]},
            ["Audio caption: A dog.", "Audio caption: It barks."],
        ),
        ("temporal_order", {"events": EVENTS}, ["Order: Dog; Speech; Dog."]),
        ("temporal_first", {"events": EVENTS}, ["First: Dog."]),
        (
            "temporal_all",
            {"events": EVENTS},
            ["Dog: [0.5-1.0, 3.0-3.5, 5.0-6.0]; Speech: [2.0-4.0]."],
        ),
        ("temporal_single", {"events": EVENTS[:1]}, ["Dog: [0.5-1.0]."]),
        ("temporal_order", {"events": EVENTS[:1]}, []),
        ("temporal_first", {"events": EVENTS[1:3]}, []),  # the dog begins later and ends earlier
        ("temporal_order", {"events": [EVENTS[0], EVENTS[1] | {"onset": 0.5}]}, []),  # both at once
        ("gender_cla", {"gender": "F"}, ["Female."]),
        ("gender_cla", {"gender": "unknown"}, []),
        ("age_cla", {"age": "34.7"}, ["The age of the speaker is 35."]),
        ("age_cla", {"age": "thirties"}, []),
        ("age_cla", {"age": "nan"}, []),
        ("pitch_cla", {"pitch": 119.9, "gender": "male"}, ["The pitch is low."]),
        ("pitch_cla", {"pitch": "180", "gender": "m"}, ["The pitch is very high."]),
        ("pitch_cla", {"pitch": 180.0, "gender": "female"}, ["The pitch is low."]),
        ("pitch_cla", {"pitch": 180.0}, []),  # high for a man, low for a woman
        ("pitch_cla", {"pitch": "High"}, ["The pitch is high."]),
        ("speed_cla", {"speed": 4.0}, ["The speed is fast."]),
        ("speed_cla", {"speed": 1}, ["The speed is slow."]),
        ("energy_cla", {"energy": "medium"}, ["The energy is medium."]),
        ("emotion_cla", {"emotion": "happy", "sentiment": 2}, ["Happy."]),
        (
            "emotion_detail",
            {"emotion": "happy", "sentiment": 2},
            ["Happy, with a sentiment score of 2 (positive)."],
        ),
        (
            "emotion_detail",
            {"emotion": "sad", "sentiment": "-1.5"},
            ["Sad, with a sentiment score of -1.5 (negative)."],
        ),
        (
            "emotion_detail",
            {"emotion": "sad", "sentiment": -0.0},
            ["Sad, with a sentiment score of 0 (neutral)."],
        ),
        ("emotion_detail", {"emotion": "happy"}, []),
        ("emotion_bin", {"sentiment": 0.333333}, ["Positive."]),
        ("emotion_bin", {"sentiment": "-3"}, ["Negative."]),
        (
            "emotion_bin",
            {"sentiment": 0},
            ["Neutral."],
        ),  # The published count includes every clip.
        ("emotion_bin", {"emotion": "happy"}, []),
        ("emotion_score", {"sentiment": "2.0"}, ["The sentiment score is 2."]),
        ("emotion_score", {"sentiment": -0.666667}, ["The sentiment score is -0.666667."]),
        ("emotion_score", {"sentiment": 7}, []),  # no score of MOSEI
        ("emotion_score", {"sentiment": "nan"}, []),
        ("gender_emotion_cla", {"emotion": "Angry", "gender": "f"}, ["Female, angry."]),
        ("gender_emotion_cla", {"emotion": "Angry"}, []),
        ("emotion_cla", {"emotion": "neutral"}, ["Neutral."]),
        ("genre_cla", {"genre": "Folk; Pop"}, ["Folk, Pop."]),
        ("asr", {"text": " Hello {you}. "}, ["Spoken text: Hello {you}."]),
    ],
)
def test_answers(task, record, expected):
    assert outputs(task, record) == expected


def test_evaluators_can_parse_the_answers():
    """The references are split as the papers' own evaluators do it."""
    (labels,) = outputs("cla_label", {"labels": "Dog;Speech"})
    assert labels.split(": ")[-1].split("; ") == ["Dog", "Speech"]
    (age,) = outputs("age_cla", {"age": 35})
    assert int(age.split(" ")[-1][:-1]) == 35
    (emotion,) = outputs("emotion_cla", {"emotion": "angry"})
    assert emotion.split(":")[-1].split(".")[0].lstrip() == "Angry"
    (caption,) = outputs("caption", {"caption": "A dog barks."})
    assert caption.split("Audio caption")[-1][2:] == "A dog barks."
    (text,) = outputs("asr", {"text": "Yes."})
    assert text.lower().split("spoken text: ")[-1] == "yes."


def test_every_task_has_questions_that_can_be_filled():
    assert set(TEXTS) == set(closed_qa.TASKS)
    for task, texts in TEXTS.items():
        assert len(set(texts["questions"])) == len(texts["questions"]) >= 10, task
        for question in texts["questions"]:
            assert set(re.findall(r"{(\w*)}", question)) == {
                "caption": {"style"},
                "temporal_single": {"label"},
            }.get(task, set())
    all_questions = {question for texts in TEXTS.values() for question in texts["questions"]}
    fixed = [
        "Generate audio labels.",
        "Produce audible tags.",
        "Which sound begins and ends first?",
    ]
    fixed += [
        "Can you determine the music genre?",
        "Can you identify the spoken text?",
        "How old is the speaker?",
    ]
    assert set(fixed) <= all_questions
    assert closed_qa.CLOSED_ENDED == sound_examples.QUESTIONS["closed_prefix"]
    styled = {
        f"Write an audio caption describing the sound{style}."
        for style in ("", ", in AudioCaps style")
    }
    made = {
        closed_qa.make_question(
            TEXTS["caption"]["questions"][:1], "", {"style": style}, Random(0), 0
        )[0]
        for style in ("", ", in AudioCaps style")
    }
    assert made == styled


def test_examples_have_the_keys_and_input_of_the_papers():
    keys = ["instruction", "input", "audio_id", "dataset", "task", "output"]
    record = {"audio_id": "a", "labels": "Dog", "gender": "f"}
    assert all(
        list(example) == keys and example["input"] == ""
        for example in closed_qa.examples_of(record, ["cla_label"], TEXTS, settings())
    )
    spoken = record | {"text": "Hello."}
    assert all(
        "input" not in example
        for example in closed_qa.examples_of(spoken, ["cla_label", "asr"], TEXTS, settings())
    )
    transcribed = spoken | {"input": "hello"}
    assert all(
        example["input"] == "hello"
        for example in closed_qa.examples_of(transcribed, ["cla_label", "asr"], TEXTS, settings())
    )


def test_examples_depend_only_on_seed_clip_and_task():
    record = {"audio_id": "a", "labels": "Dog;Speech", "caption": "A dog.", "events": EVENTS}
    everything = list(closed_qa.examples_of(record, list(closed_qa.TASKS), TEXTS, settings()))
    alone = [
        example
        for task in closed_qa.TASKS
        for example in closed_qa.examples_of(record, [task], TEXTS, settings())
    ]
    assert everything == alone
    of_seeds = {
        json.dumps(list(closed_qa.examples_of(record, ["caption"], TEXTS, settings(seed=s))))
        for s in range(20)
    }
    assert len(of_seeds) > 5
    made = [
        example
        for s in range(400)
        for example in closed_qa.examples_of(
            record, ["cla_label"], TEXTS, settings(seed=s, prefix_fraction=0.5)
        )
    ]
    questions = [example["instruction"] for example in made]
    assert 150 < sum(text.startswith(closed_qa.CLOSED_ENDED) for text in questions) < 250
    different = {text.removeprefix(closed_qa.CLOSED_ENDED) for text in questions}
    assert len(different) == len(TEXTS["cla_label"]["questions"])


def test_a_mosei_clip_has_the_tasks_of_the_published_counts(tmp_path):
    """There are eight tasks of MOSEI, one of ASR and, with a gender, gender_emotion_cla."""
    record = {
        "audio_id": "v_1.wav",
        "dataset": "mosei_tr",
        "emotion": "happy",
        "sentiment": 2,
        "gender": "male",
    }
    record |= {"pitch": 130.0, "speed": "slow", "energy": "high", "text": "A film."}
    (tmp_path / "clips.json").write_text(json.dumps([record]))
    made = run(tmp_path, "--metadata", tmp_path / "clips.json")
    assert {example["task"]: example["output"] for example in made} == {
        "gender_cla": "Male.",
        "pitch_cla": "The pitch is medium.",
        "speed_cla": "The speed is slow.",
        "energy_cla": "The energy is high.",
        "emotion_cla": "Happy.",
        "emotion_bin": "Positive.",
        "emotion_detail": "Happy, with a sentiment score of 2 (positive).",
        "emotion_score": "The sentiment score is 2.",
        "gender_emotion_cla": "Male, happy.",
        "asr": "Spoken text: A film.",
    }
    counts = json.loads((tmp_path / "examples.json.provenance.json").read_text())["counts"]
    assert counts == {"records": 1, "records without an example": 0} | {
        example["task"]: 1 for example in made
    }
    published = json.loads((HERE.parent / "recipes/openasqa_classification.json").read_text())[
        "expected"
    ]["task"]
    assert not [task for task in published if task.strip("*") not in closed_qa.TASKS]


# The command


def run(tmp_path: Path, *arguments, name: str = "examples.json") -> list[dict]:
    assert closed_qa.main([*map(str, arguments), "--output_path", str(tmp_path / name)]) == 0
    return read_examples(tmp_path / name)


def test_toy_sounds_by_their_manifest(tmp_path):
    columns = ["labels=audioset", "audio_id=file"]
    arguments = ["--metadata", HERE / "manifest.jsonl", "--columns", *columns, "--dataset", "toy"]
    made = run(tmp_path, *arguments)
    sounds = {sound["file"]: sound for sound in read_manifest()}
    assert [example["audio_id"] for example in made if example["task"] == "caption"] == list(sounds)
    for example in made:
        sound = sounds[example["audio_id"]]
        expected = {
            "cla_label": f"Labels: {'; '.join(sound['audioset'])}",
            "caption": f"Audio caption: {sound['caption']}",
        }
        assert example["output"] == expected[example["task"]]
        assert example["dataset"] == "toy"
    first = (tmp_path / "examples.json").read_bytes()
    run(tmp_path, *arguments)
    assert (tmp_path / "examples.json").read_bytes() == first
    provenance = json.loads((tmp_path / "examples.json.provenance.json").read_text())
    assert provenance["seed"] == 0
    assert provenance["counts"] == {
        "records": 246,
        "records without an example": 0,
        "cla_label": 246,
        "caption": 246,
    }


def test_toy_speech_by_its_manifest(tmp_path):
    columns = ["audio_id=file", "pitch=f0_hz", "speed=syllables_per_second"]
    made = run(tmp_path, "--metadata", SPEECH / "manifest.jsonl", "--columns", *columns)
    clips = {clip["file"]: clip for clip in read_speech()}
    low, high = closed_qa.thirds([clip["syllables_per_second"] for clip in clips.values()])
    for example in made:
        clip = clips[example["audio_id"]]
        pitch = name_of(clip["f0_hz"], closed_qa.PITCH[clip["gender"]], closed_qa.NAMES["pitch"][1])
        speed = name_of(clip["syllables_per_second"], (low, high), closed_qa.NAMES["speed"][0])
        expected = {
            "gender_cla": f"{clip['gender'].capitalize()}.",
            "asr": f"Spoken text: {clip['text']}",
        }
        expected |= {"pitch_cla": f"The pitch is {pitch}.", "speed_cla": f"The speed is {speed}."}
        assert example["output"] == expected[example["task"]]
        assert "input" not in example
    assert len(made) == 4 * len(clips)
    train = [clip["f0_hz"] for clip in clips.values() if clip["split"] == "train"]
    assert cut_offs(list(clips.values()))["f0_hz"] == tuple(
        round(cut / 5) * 5.0 for cut in closed_qa.thirds(train)
    )


def test_csv_with_prepared_audio_and_other_names(tmp_path):
    (tmp_path / "clips.csv").write_text(
        "\ufefffile_name,tags,age,events\n"
        'one.wav,"Dog;Speech",40,"[{""label"": ""Dog"", ""onset"": 0, ""offset"": 1.5}]"\n'
        "two.wav,Dog,,\nthree.wav,Cat,7,\n",
        encoding="utf-8",
    )
    (tmp_path / "audio_ids.csv").write_text(
        "id,audio_id,file,seconds\none.wav,x/1.flac,one.wav,2\ntwo.wav,x/2.flac,b,1\n"
    )
    (tmp_path / "des.json").write_text(json.dumps(DESCRIPTIONS))
    arguments = [
        "--metadata",
        tmp_path / "clips.csv",
        "--columns",
        "audio_id=file_name",
        "labels=tags",
    ]
    arguments += [
        "--audio_ids",
        tmp_path / "audio_ids.csv",
        "--descriptions",
        tmp_path / "des.json",
    ]
    made = run(tmp_path, *arguments, "--prefix_fraction", 1, name="examples.jsonl")
    assert {example["audio_id"] for example in made} == {"x/1.flac", "x/2.flac"}
    assert [example["output"] for example in made if example["task"] == "temporal_all"] == [
        "Dog: [0.0-1.5]."
    ]
    assert [example["output"] for example in made if example["task"] == "age_cla"] == [
        "The age of the speaker is 40."
    ]
    assert sum(example["task"] == "cla_label_des" for example in made) == 2
    assert all(example["instruction"].startswith(closed_qa.CLOSED_ENDED) for example in made)
    only = run(tmp_path, *arguments, "--tasks", "cla_label", name="examples.jsonl")
    assert {example["task"] for example in only} == {"cla_label"}


def test_tables_of_clotho_audiocaps_and_fsd50k(tmp_path):
    (tmp_path / "clotho.csv").write_text(
        "file_name,caption_1,caption_2\na b.wav,A radio.,It hums.\n"
    )
    names = ["--columns", "audio_id=file_name", "caption=caption_1,caption_2"]
    made = run(tmp_path, "--metadata", tmp_path / "clotho.csv", *names, "--style", "Clotho")
    assert [example["output"] for example in made] == [
        "Audio caption: A radio.",
        "Audio caption: It hums.",
    ]
    assert all(example["instruction"].endswith(", in Clotho style.") for example in made)
    lines = "".join(f"{number},r1nicOVtvkQ,130,Caption {number}\n" for number in range(20))
    (tmp_path / "audiocaps.csv").write_text(f"audiocap_id,youtube_id,start_time,caption\n{lines}")
    made = run(
        tmp_path, "--metadata", tmp_path / "audiocaps.csv", "--columns", "audio_id=youtube_id"
    )
    assert (
        len(made) == 20 and len({example["instruction"] for example in made}) > 4
    )  # one clip, a line for each caption
    (tmp_path / "fsd.csv").write_text(
        'fname,labels,mids,split\n64760,"Guitar,Music","/m/0,/m/1",train\n'
    )
    made = run(
        tmp_path,
        "--metadata",
        tmp_path / "fsd.csv",
        "--columns",
        "audio_id=fname",
        "--separator",
        ",",
    )
    assert [example["output"] for example in made] == ["Labels: Guitar; Music"]


def test_clips_with_another_spelling_are_an_error(tmp_path):
    (tmp_path / "clips.csv").write_text("audio_id,labels\none.wav,Dog\n")
    (tmp_path / "audio_ids.csv").write_text("id,audio_id\none,one.flac\n")
    with pytest.raises(ValueError, match="none of 0 records .* --clip_list"):
        run(
            tmp_path,
            "--metadata",
            tmp_path / "clips.csv",
            "--audio_ids",
            tmp_path / "audio_ids.csv",
        )
    assert not (tmp_path / "examples.json").exists()


@pytest.mark.parametrize(
    "cuts",
    [
        {"speed": [1, 2, 3]},
        {"speed": [1, 2, 3, 4, 5]},
        {"energy": [2, 1]},
        {"speed": [2, 2]},
        {"speed": ["1", "2"]},
        {"speed": 3},
        {"pitch": {"male": [1, 2], "female": [3]}},
        {"tempo": [1, 2]},
        [1, 2],
    ],
)
def test_malformed_cuts_are_an_error(tmp_path, cuts):
    (tmp_path / "clips.csv").write_text("audio_id,speed\na.wav,3\n")
    (tmp_path / "cuts.json").write_text(json.dumps(cuts))
    with pytest.raises(ValueError, match="cuts.json: .*2 or 4 ascending numbers"):
        run(tmp_path, "--metadata", tmp_path / "clips.csv", "--cuts", tmp_path / "cuts.json")


def test_given_cuts(tmp_path):
    (tmp_path / "clips.csv").write_text("audio_id,gender,pitch,speed\na.wav,f,50,3\nb.wav,m,50,9\n")
    (tmp_path / "cuts.json").write_text(
        '{"speed": [1, 2, 3, 4], "pitch": {"male": [10, 20], "female": [60, 70]}}'
    )
    arguments = ["--metadata", tmp_path / "clips.csv", "--cuts", tmp_path / "cuts.json"]
    made = run(tmp_path, *arguments, "--tasks", "pitch_cla", "speed_cla")
    words = [example["output"].split(" is ")[1] for example in made]
    assert words == ["low.", "fast.", "high.", "very fast."]


def test_numbers_that_have_no_thirds_make_no_examples(tmp_path, capsys):
    for speeds, words in (("23334", []), ("12345", ["slow", "slow", "normal", "fast", "fast"])):
        lines = "".join(f"{number}.wav,{speed},m\n" for number, speed in enumerate(speeds))
        (tmp_path / "clips.csv").write_text(f"audio_id,speed,gender\n{lines}")
        made = run(
            tmp_path, "--metadata", tmp_path / "clips.csv", "--tasks", "speed_cla", "gender_cla"
        )
        assert [example["output"] for example in made if example["task"] == "speed_cla"] == [
            f"The speed is {w}." for w in words
        ]
        assert ("speed: no thirds, too many are 3" in capsys.readouterr().out) == (not words)


def test_a_table_of_ids_without_its_columns_is_an_error(tmp_path):
    (tmp_path / "clips.csv").write_text("audio_id,labels\none.wav,Dog\n")
    (tmp_path / "ids.csv").write_text("audio_id,path\none.wav,one.flac\n")
    with pytest.raises(
        ValueError, match="ids.csv has no column 'id'. Let its first line be id,audio_id"
    ):
        run(tmp_path, "--metadata", tmp_path / "clips.csv", "--audio_ids", tmp_path / "ids.csv")


def test_a_line_with_more_cells_than_names_is_an_error(tmp_path):
    (tmp_path / "clips.csv").write_text("audio_id,caption\na.wav,Rain, then thunder.\n")
    with pytest.raises(ValueError, match="line 2: 3 cells under 2 names. Quote the commas"):
        run(tmp_path, "--metadata", tmp_path / "clips.csv")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"labels": "Dog"}, "record 1 has no audio_id"),
        ({"audio_id": "a", "events": [{"label": "Dog"}]}, r"record 1 \(a\): KeyError\('onset'\)"),
        ({"audio_id": "a", "caption": 3}, r"record 1 \(a\): TypeError"),
    ],
)
def test_bad_records_are_named_and_leave_nothing(record, message, tmp_path):
    (tmp_path / "clips.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=message):
        closed_qa.main(
            [
                "--metadata",
                str(tmp_path / "clips.json"),
                "--output_path",
                str(tmp_path / "examples.json"),
            ]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["clips.json"]
