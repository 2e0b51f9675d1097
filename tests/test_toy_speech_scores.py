"""Tests the scores of answers about speech on predictions made by hand."""

import json
from pathlib import Path

import pytest

from benchmarks import toy_cross_validation, toy_runs
from eval import toy, toy_speech
from eval.scorer_interface import EvaluationError
from eval.toy_speech import (
    Table,
    evaluate,
    format_table,
    main,
    read_choice,
    reference,
    spoken,
    word_error_rate,
)

LINES = (toy_speech.TOY / "speech" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
TEST = [clip for clip in map(json.loads, LINES) if clip["split"] == "test"]
UNKNOWN = [clip for clip in TEST if clip["voice"] != "allison"]


def predictions(file: str, answer, clips: list[dict] = TEST, **more) -> list[dict]:
    """Return predictions as inference writes them.

    Args:
        answer: Maps a clip to `pred`.
    """
    rows = []
    for clip in clips:
        row = {
            "prompt": "?",
            "pred": answer(clip),
            "ref": reference(file, clip),
            "audio_id": f"../x/{clip['file']}",
        }
        rows.append(row | {"status": "ok"} | more)
    return rows


def write(folder: Path, **files: list[dict]) -> Path:
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    for file, rows in files.items():
        (folder / "answers" / f"{file}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def means(table: Table) -> dict[str, float]:
    return {row.name: row.mean for row in table.rows}


@pytest.mark.parametrize(
    ("file", "answer", "choice"),
    [
        ("speech_gender", "Female.", "female"),
        ("speech_gender", " male\n", "male"),
        ("speech_gender", "It is a female speaker.", None),
        ("speech_gender", "Male. Female.", None),
        ("speech_gender", "", None),
        ("speech_gender", None, None),
        ("speech_pitch", "The pitch is low.", "low"),
        ("speech_pitch", "Low.", None),
        ("speech_pitch", "The pitch is low or high.", None),
        ("speech_speed", "the speed is FAST", "fast"),
        ("speech_speed", "The speed is quick.", None),
    ],
)
def test_an_answer_counts_only_if_well_formed(file, answer, choice):
    assert read_choice(file, answer) == choice


def test_the_prefix_is_removed_only_at_the_beginning():
    assert (
        spoken("Spoken text: A dog.")
        == "A dog."
        == spoken("A dog.")
        == spoken("\nspoken text:A dog.")
    )
    assert (
        spoken("He said: spoken text: a dog") == "He said: spoken text: a dog"
        and spoken(None) == ""
    )


def test_word_error_rate_ignores_case_punctuation_and_digits():
    assert word_error_rate(["Press 9 for more entries."], ["press nine for more entries"]) == 0
    assert word_error_rate(["a dog ran home"], ["A dog home."]) == 0.25
    assert word_error_rate(["The dog ran."], [""]) == 1


def test_gender_by_voice_with_and_without_words(tmp_path):
    def women_and_kal(clip):
        if clip["gender"] == "female":
            return "Female."
        return "Male." if clip["voice"] == "kal" else "A man."

    folder = write(
        tmp_path,
        speech_gender=predictions("speech_gender", women_and_kal, UNKNOWN),
        speech_gender_empty=predictions("speech_gender_empty", lambda clip: "Male.", UNKNOWN),
    )
    scores = means(evaluate([folder]))
    assert (
        scores["gender, transcript given"]
        == pytest.approx(56 / 92)
        == scores["gender, transcript given: well-formed"]
    )
    assert (
        scores["gender, transcript given: slt_hts (female)"]
        == 1
        == scores["gender, transcript given: kal (male)"]
    )
    assert scores["gender, transcript given: awb (male)"] == 0
    assert (
        scores["gender, no transcript"]
        == pytest.approx(56 / 92)
        == scores["gender, no transcript: if always the most frequent"]
    )
    assert (
        scores["gender, no transcript: slt_hts (female)"] == 0
        and scores["gender, no transcript: well-formed"] == 1
    )
    rows = {row.name: row for row in evaluate([folder]).rows}
    (cell,) = rows["gender, transcript given: kal (male)"].scores
    assert (cell.right, cell.count, cell.high) == (20, 20, 1.0) and 0.83 < cell.low < 0.85


def test_pitch_and_speed(tmp_path):
    folder = write(
        tmp_path,
        speech_pitch=predictions("speech_pitch", lambda clip: f"The pitch is {clip['pitch']}."),
        speech_speed=predictions("speech_speed", lambda clip: clip["speed"]),
    )
    scores = means(evaluate([folder]))
    assert scores["pitch"] == 1 and scores["speed"] == 0 == scores["speed: well-formed"]
    assert 1 / 3 < scores["speed: if always the most frequent"] < 0.6


def test_transcripts_in_four_conditions(tmp_path):
    def next_text(clip):
        texts = [clip["text"] for clip in TEST]
        return f"Spoken text: {texts[(texts.index(clip['text']) + 7) % len(texts)]}"

    folder = write(
        tmp_path,
        speech_words_right=predictions(
            "speech_words_right", lambda clip: f"Spoken text: {clip['text'].lower()}"
        ),
        speech_words_whisper=predictions(
            "speech_words_whisper", lambda clip: clip["text"], transcript="Nothing."
        ),
        speech_words_wrong=predictions("speech_words_wrong", next_text),
        speech_words_none=predictions("speech_words_none", lambda clip: None),
    )
    scores = means(evaluate([folder]))
    assert (
        scores["WER, right transcript given"]
        == 0
        == scores["WER, right transcript given: recorded voice"]
    )
    assert scores["WER, Whisper's transcript"] == 0 == scores["Whisper's transcript: well-formed"]
    assert scores["WER, Whisper's transcript: the transcript itself"] == pytest.approx(1, abs=0.02)
    assert (
        0.85 < scores["WER, another clip's transcript"] < 1.3
        and scores["another clip's transcript: well-formed"] == 1
    )
    assert scores["WER, no transcript"] == 1 and scores["no transcript: well-formed"] == 0


def test_several_runs_have_a_column_each_and_a_mean(tmp_path, capsys):
    for name, answer in (("fold0", "Male."), ("fold1", "Female.")):
        rows = predictions("speech_gender", lambda clip, answer=answer: answer, UNKNOWN)
        write(tmp_path / name, speech_gender=rows)
    write(
        tmp_path / "fold1",
        speech_pitch=predictions("speech_pitch", lambda clip: "The pitch is low."),
    )
    table = evaluate([tmp_path / "fold0", tmp_path / "fold1"])
    assert means(table)["gender, transcript given"] == pytest.approx(0.5)
    rows = {row.name: row for row in table.rows}
    assert rows["pitch"].scores[0] is None
    assert "fold0" in format_table(table) and "mean" in format_table(table)
    main(["--run", str(tmp_path / "fold0")])
    assert "0.61 [0.51, 0.70]" in capsys.readouterr().out
    assert json.loads((tmp_path / "fold0" / "speech_table.json").read_text())["runs"] == ["fold0"]


def test_wrong_references_and_missing_answers_stop(tmp_path):
    rows = predictions("speech_gender", lambda clip: "Male.", UNKNOWN)
    other = {"ref": "Male." if rows[0]["ref"] == "Female." else "Female."}
    write(tmp_path, speech_gender=[rows[0] | other, *rows[1:]])
    with pytest.raises(EvaluationError, match="manifest.jsonl says"):
        evaluate([tmp_path])
    for others in (
        rows[:-1],
        rows[:-1] + rows[:1],
        [*rows[:-1], rows[-1] | {"audio_id": "rms_00.flac"}],
    ):
        write(tmp_path, speech_gender=others)
        with pytest.raises(EvaluationError, match="each held-out clip once"):
            evaluate([tmp_path])
    with pytest.raises(EvaluationError, match="holds no answers"):
        main(["--run", str(tmp_path / "elsewhere")])


@pytest.mark.parametrize(("num_right", "status"), [(7, 0), (6, 1)])
def test_a_missed_bound_is_the_exit_status(tmp_path, monkeypatch, num_right, status):
    """The bound of the category is 0.70."""
    category = toy.Rate.of([True] * num_right + [False] * (10 - num_right))
    sounds = toy.Table(clips=10, folds=[0], rows=[toy.Row("stage3", right=category)], show=[])
    speech = Table(["fold2", "fold3"], [toy_speech.Row("pitch", [category, category])])
    monkeypatch.setattr(toy_runs, "run_folds", lambda *args: None)
    encoders, tables = [], []

    def evaluate_sounds(folders, audio_encoder):
        encoders.append(audio_encoder)
        tables.append([folder.name for folder in folders])
        return sounds

    monkeypatch.setattr(toy, "evaluate", evaluate_sounds)
    monkeypatch.setattr(toy_speech, "evaluate", lambda folders: speech)
    for fold in (2, 3):
        (tmp_path / f"fold{fold}" / "stage3_all_mix").mkdir(parents=True)
    flags = ["--kind", "ltu_as", "--folds", "2", "3", "--output_dir", str(tmp_path)]
    assert toy_cross_validation.main(flags) == status
    verdicts = json.loads((tmp_path / "results.json").read_text())["verdicts"]
    assert list(verdicts.values()) == [status == 0]
    # The settings were chosen on folds 0, 1 and 2.
    assert tables == [["fold2", "fold3"], ["fold3"]]
    assert set(encoders) == {Path("pretrained_mdls/whisper-tiny.en/whisper.pt")}


def test_no_seconds_of_a_training_that_was_continued(tmp_path):
    """The second part of stage 2 has 122 of its 360 steps."""
    for stage, seconds, rate in (("stage1", 99.0, 0.404), ("stage2", 621.6, 0.196)):
        summary = {"train_runtime": seconds, "train_steps_per_second": rate}
        state = {"max_steps": 40, "log_history": [{"loss": 1.0}, summary]}
        if stage == "stage2":
            state["max_steps"] = 360
            assert toy_cross_validation.seconds_of_training(tmp_path) == 99.0
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    assert toy_cross_validation.seconds_of_training(tmp_path) is None


def test_the_bound_of_the_gender_is_for_all_voices_and_for_each(tmp_path):
    """Of the men, 13 of 20 are right, of all clips 33 of 40."""
    voices = {"slt_hts": 20, "kal": 13}
    hits = {voice: [number < right for number in range(20)] for voice, right in voices.items()}
    rows = []
    for name, answers in (
        ("gender, no transcript", [*hits["slt_hts"], *hits["kal"]]),
        ("gender, no transcript: slt_hts (female)", hits["slt_hts"]),
        ("gender, no transcript: kal (male)", hits["kal"]),
        ("gender, no transcript: well-formed", [False] * 40),
        ("gender, no transcript: if always the most frequent", [True, False]),
        ("pitch", [False]),
    ):
        rows.append(toy_speech.Row(name, [toy.Rate.of(answers)]))
    sounds = [toy.Row("stage3", right=toy.Rate.of([True]))]
    assert toy_cross_validation.verdicts_as(sounds, rows) == {
        "category 1.000 >= 0.70": True,
        "gender, no transcript 0.825 >= 0.80": True,
        "gender, no transcript: slt_hts (female) 1.000 >= 0.80": True,
        "gender, no transcript: kal (male) 0.650 >= 0.80": False,
    }


def test_no_answer_is_never_better_than_a_wrong_one(tmp_path):
    """An answer with many wrong words has a word error rate above 1, an empty one has 1."""
    title = "WER, no transcript: at most 1 a clip"
    rates = []
    for answer in ("no and again no " * 9, None, "Spoken text: ", ""):
        rows = predictions("speech_words_none", lambda clip, answer=answer: answer)
        scores = means(evaluate([write(tmp_path, speech_words_none=rows)]))
        rates.append(scores[title])
        if answer and "no" in answer:
            assert scores["WER, no transcript"] > 2
    assert rates == [1, 1, 1, 1]
    # A text that came with a failure is no answer, and the right words are right.
    rows = predictions("speech_words_none", lambda clip: clip["text"])
    assert means(evaluate([write(tmp_path, speech_words_none=rows)]))[title] == 0
    failed = [row | {"status": "unreadable"} for row in rows]
    assert means(evaluate([write(tmp_path, speech_words_none=failed)]))[title] == 1


@pytest.mark.parametrize("audio_id", [["a.wav"], 5, False])
def test_malformed_answers_stop(tmp_path, audio_id):
    rows = predictions("speech_gender", lambda clip: "Male.", UNKNOWN)
    write(tmp_path, speech_gender=[rows[0] | {"audio_id": audio_id}, *rows[1:]])
    with pytest.raises(EvaluationError, match="json, prediction 1: 'audio_id' is a"):
        evaluate([tmp_path])
