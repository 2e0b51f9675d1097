"""Tests the scores of the toy test on predictions made by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval import toy, toy_baselines
from eval.scorer_interface import EvaluationError
from eval.toy import (
    Hits,
    Rate,
    Reader,
    Toy,
    evaluate,
    fold_of,
    format_show,
    format_table,
    main,
    read_predictions,
    score,
    wilson,
)
from ltu.data.audio import load_audio
from ltu_as.feature_extraction_ltu_as import DOWNMIX, LtuAsFeatureExtractor
from tests.whisper_tiny import save_whisper

TOY = Toy.load()
READER = TOY.reader


def prediction(
    pred: str | None, ref: str = "Labels: snare drum; drums.", audio_id: str = "empty"
) -> dict:
    return {"prompt": "?", "pred": pred, "ref": ref, "audio_id": audio_id}


def perfect(fold: int) -> list[dict]:
    made = []
    for file in TOY.folds[fold]:
        text = f"Labels: {TOY.clips[file]['label']}; {TOY.clips[file]['category']}."
        made.append(prediction(text, text, f"../data/toy/audio/{file}"))
    return made


def write_fold(folder: Path, fold: int, stages: int = 2, below: str = "") -> Path:
    for stage in range(1, stages + 1):
        directory = folder / f"stage{stage}_name" / below
        directory.mkdir(parents=True)
        right = perfect(fold)
        guessed = [
            row | {"pred": "Labels: bass drum; drums.", "audio_id": "empty"} for row in right
        ]
        for name, rows in (("right", right), ("wrong", guessed), ("none", guessed)):
            (directory / f"{name}.json").write_text(json.dumps(rows))
    return folder


# Parsing an answer


@pytest.mark.parametrize(
    "answer",
    [
        "Labels: snare drum; drums.",
        "Labels: snare drum; drums",
        "  labels:  Snare Drum ;  Drums .\n",
        "Labels: short, bright and snappy -> snare drum; drums.",
        # Words of a description are no categories.
        "Labels: like human speech and music -> snare drum; drums.",
    ],
)
def test_right_answers(answer):
    assert READER.read(answer) == ("snare drum", "drums")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "drums",
        "snare drum; drums.",
        "Labels: drums.",
        "Labels: snare drum.",
        "Labels: ; drums.",
        "Labels: snare drum; drum.",
        "Labels: snare drum; drumsticks.",
        "Labels: snare drum; drums; music.",
        "Labels: snare drum; drums, music.",
        "Labels: snare drum; music and drums.",
        "Labels: human; drums.",
        "Labels: music, human; drums.",
        "Labels: speech and music; drums.",
        "Labels: snare drum; drums. Labels: dog; animals.",
        "Labels: dog; animals. Labels: snare drum; drums.",
        "Labels: snare drum; drums.\nLabels: dog; animals.",
        "Labels: alerts; ambience; animals; domestic; drums.",
        "It is a snare drum, so the category is drums.",
        "Labels: sharp -> dog; animals -> snare drum; drums.",
        "I cannot tell. drums",
    ],
)
def test_answers_that_do_not_count(answer):
    assert READER.read(answer) is None


def test_two_labels_are_one_category_and_no_exact_label():
    hits = score([prediction("Labels: tom drum; snare drum; drums.")], READER)
    assert hits == Hits(category=[True], label=[False], well_formed=[True])


def test_a_label_that_holds_a_category_word_is_only_a_label():
    assert READER.read("Labels: drum beat; music.") == ("drum beat", "music")
    assert READER.read("Labels: music box; alerts.") == ("music box", "alerts")


def test_score_counts_category_label_and_form():
    answers = [
        "Labels: snare drum; drums.",
        "Labels: tom drum; drums.",
        "Labels: dog; animals.",
        "Labels: snare drum; animals.",
        "A snare drum.",
        None,
    ]
    hits = score([prediction(answer) for answer in answers], READER)
    assert hits.category == [True, True, False, False, False, False]
    assert hits.label == [True, False, False, True, False, False]
    assert hits.well_formed == [True, True, True, True, False, False]


def test_answering_with_everything_scores_nothing():
    everything = "Labels: " + "; ".join(
        [*sorted({c["label"] for c in TOY.clips.values()}), *sorted(READER.categories)]
    )
    hits = score([row | {"pred": everything + "."} for row in perfect(0)], READER)
    assert not any(hits.category) and not any(hits.label)


def test_every_reference_of_the_data_can_be_parsed():
    for fold in range(5):
        hits = score(perfect(fold), READER)
        assert all(hits.category) and all(hits.label) and all(hits.well_formed)


def test_another_answer_format_needs_no_other_code():
    reader = Reader(["A {label}, a sound of {category}."], READER.categories)
    assert reader.read("A snare drum, a sound of drums.") == ("snare drum", "drums")
    assert reader.read("A snare drum, a sound of drums and music.") is None
    assert reader.read("A dog or music, a sound of drums.") == ("dog or music", "drums")
    assert Reader(["{category}: {label}"], READER.categories).read("drums: snare drum") == (
        "snare drum",
        "drums",
    )


def test_a_reference_in_another_form_is_an_error():
    with pytest.raises(EvaluationError, match="no answer format"):
        score([prediction("Labels: dog; animals.", ref="A dog.")], READER)


# Intervals


def test_wilson_against_published_values():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 0/20 and 1/29.
    for right, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(right, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_is_symmetric_and_bounded():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(7, 34)
    assert wilson(27, 34) == (pytest.approx(1 - high), pytest.approx(1 - low))
    assert wilson(34, 34)[1] == pytest.approx(1.0)
    assert Rate.of([True, False]).fraction == 0.5 and Rate.of([]).fraction == 0.0


# Baselines


def clips_of(*lines: tuple[str, str, str]) -> dict[str, dict]:
    return {
        str(n): {"category": c, "label": label, "package": p}
        for n, (c, label, p) in enumerate(lines)
    }


def test_majority_and_package_use_the_training_clips_only():
    clips = clips_of(
        ("a", "x", "P"),
        ("a", "x", "P"),
        ("b", "y", "Q"),
        ("b", "z", "Q"),
        ("a", "x", "Q"),
        ("c", "w", "Q"),
    )
    training, heldout = ["0", "1", "2", "3"], ["4", "5"]
    assert toy_baselines.majority(clips, training, heldout, "category") == ["a", "a"]
    assert toy_baselines.package(clips, training, heldout, "category") == ["b", "b"]
    # In a tie, the first in the alphabet is chosen.
    assert toy_baselines.package(clips, training, heldout, "label") == [
        "y",
        "y",
    ]


def test_baselines_of_all_folds():
    def fraction(method, key):
        hits = []
        for fold, heldout in enumerate(TOY.folds):
            guesses = method(TOY.clips, TOY.training(fold), heldout, key)
            hits += [
                guess == TOY.clips[file][key] for guess, file in zip(guesses, heldout, strict=True)
            ]
        return np.mean(hits)

    assert fraction(toy_baselines.majority, "category") == pytest.approx(63 / 170)
    assert 0.5 < fraction(toy_baselines.package, "category") < 0.65


def test_ridge_classify_equals_the_primal_solution():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(30, 50)), rng.normal(size=(9, 50))
    classes = [str(index % 3) for index in range(30)]
    train[:, 0] += 3 * np.array([index % 3 for index in range(30)])
    mean, deviation = train.mean(0), train.std(0) + 1e-3
    scaled, targets = (train - mean) / deviation, np.eye(3)[[int(value) for value in classes]]
    weights = np.linalg.solve(
        scaled.T @ scaled + 5.0 * np.eye(50), scaled.T @ (targets - targets.mean(0))
    )
    expected = (((test - mean) / deviation) @ weights + targets.mean(0)).argmax(1)
    assert toy_baselines.ridge_classify(train, classes, test, (5.0,)) == [
        str(index) for index in expected
    ]


def test_ridge_classify_chooses_the_strength_by_leaving_out():
    """The closed form must choose as regressions that leave out one clip each would."""
    rng = np.random.default_rng(2)
    classes = [str(index % 3) for index in range(30)]
    train = rng.normal(size=(30, 50))
    train[:, 0] += [index % 3 for index in range(30)]
    test = rng.normal(size=(200, 50))
    train = (train - train.mean(0)) / train.std(0)  # standardized as without leaving out
    targets = np.eye(3)[[int(value) for value in classes]]
    targets = targets - targets.mean(0)
    num_right = {}
    for strength in (0.01, 20.0, 5000.0):
        num_right[strength] = 0
        for clip in range(30):
            rest = np.arange(30) != clip
            gram = train[rest].T @ train[rest] + strength * np.eye(50)
            outputs = train[clip] @ np.linalg.solve(gram, train[rest].T @ targets[rest])
            num_right[strength] += classes[clip] == str((outputs + 1 / 3).argmax())
    strengths = tuple(num_right)
    best = max(strengths, key=lambda strength: num_right[strength])
    assert sorted(num_right.values())[-1] > sorted(num_right.values())[-2]  # one is the best

    def classify(*candidates: float) -> list[str]:
        return toy_baselines.ridge_classify(train, classes, test, candidates)

    assert classify(*strengths) == classify(best)
    for other in set(strengths) - {best}:
        assert classify(other) != classify(best)


def test_probe_separates_separable_classes():
    clips = clips_of(*[("ab"[index % 2], "x", "P") for index in range(20)])
    means = {
        file: np.array([1.0 if clip["category"] == "a" else -1.0, 0.0])
        for file, clip in clips.items()
    }
    names = list(clips)
    guesses = toy_baselines.probe(means, clips, names[:16], names[16:], "category")
    assert guesses == [clips[file]["category"] for file in names[16:]]


def test_probe_of_whisper_gets_the_features_of_ltu_as(tmp_path):
    whisper = save_whisper(tmp_path / "whisper.pt")
    file = toy.TOY / "audio" / next(iter(TOY.clips))
    extractor = LtuAsFeatureExtractor(None, None, whisper, loop_short_clips=True)
    extractor.num_tokens = 5  # as in toy_fold.sh
    stored = extractor([load_audio(file, downmix=DOWNMIX)]).input_features[0]  # (layers, 5, width)
    means = toy_baselines.audio_encoder_means([file], Path(whisper))[file.name]
    np.testing.assert_allclose(means, stored.double().mean(1).flatten(), rtol=0, atol=2e-3)
    # With silence after the clip, the features would be others.
    extractor.loop_short_clips = False
    padded = extractor([load_audio(file, downmix=DOWNMIX)]).input_features[0]
    assert np.abs(means - padded.double().mean(1).flatten().numpy()).max() > 0.02


# Folders of predictions


@pytest.mark.parametrize("below", ["", "answers"])
def test_evaluate_pools_folds(tmp_path, below):
    folders = [write_fold(tmp_path / str(fold), fold, below=below) for fold in (0, 3)]
    table = evaluate(folders, audio_encoder=None)
    count = len(TOY.folds[0]) + len(TOY.folds[3])
    drums = sum(
        TOY.clips[file]["category"] == "drums" for fold in (0, 3) for file in TOY.folds[fold]
    )
    assert table.clips == count and table.folds == [0, 3]
    by_name = {row.name: row for row in table.rows}
    assert list(by_name) == ["stage1", "stage2", "majority", "source package alone"]
    assert by_name["stage1"].right.right == by_name["stage1"].label.right == count
    assert by_name["stage2"].none.right == by_name["stage2"].wrong.right == drums
    assert by_name["majority"].right.right == drums
    text = format_table(table)
    assert "stage2" in text and "1.00 [0.95, 1.00]" in text
    assert len(table.show) == 5 and format_show(table.show).count("reference:") == 5


def test_a_missing_condition_is_a_dash(tmp_path):
    folder = write_fold(tmp_path, 1, stages=1)
    (folder / "stage1_name" / "none.json").unlink()
    table = evaluate([folder], audio_encoder=None)
    assert "none" not in table.to_json()["rows"][0]
    assert " - " in format_table(table)


def test_main_prints_and_writes(tmp_path, capsys):
    main(["--folds", str(write_fold(tmp_path, 2)), "--no_probe"])
    assert "source package alone" in capsys.readouterr().out
    assert json.loads((tmp_path / "table.json").read_text())["folds"] == [2]


def test_predictions_that_cannot_be_scored(tmp_path):
    with pytest.raises(EvaluationError, match="no stage"):
        read_predictions(tmp_path)
    folder = write_fold(tmp_path / "a", 0, stages=1)
    with pytest.raises(EvaluationError, match="each fold once"):
        evaluate([folder, folder], audio_encoder=None)
    with pytest.raises(EvaluationError, match="not the held-out clips of any fold"):
        fold_of(perfect(0)[1:], TOY)
    mislabelled = perfect(0)
    mislabelled[0] = mislabelled[0] | {"ref": "Labels: dog; animals."}
    with pytest.raises(EvaluationError, match="not what the manifest says"):
        fold_of(mislabelled, TOY)
    (folder / "stage1_name" / "wrong.json").write_text(json.dumps(perfect(0)[::-1]))
    with pytest.raises(EvaluationError, match=r"does not have the questions of right\.json"):
        main(["--folds", str(folder)])


def test_folds_without_a_common_stage_stop(tmp_path):
    first = write_fold(tmp_path / "a", 0, stages=1)
    second = write_fold(tmp_path / "b", 1, stages=1)
    (second / "stage1_name").rename(second / "stage2_name")
    with pytest.raises(EvaluationError, match="No stage has predictions in every folder"):
        evaluate([first, second], audio_encoder=None)


def test_the_folder_of_the_table_is_created(tmp_path):
    folder = write_fold(tmp_path / "fold", 2, stages=1)
    path = tmp_path / "new" / "table.json"
    main(["--folds", str(folder), "--no_probe", "--output_path", str(path)])
    assert json.loads(path.read_text())["folds"] == [2]


def test_a_failed_answer_is_wrong_whatever_its_text():
    right = "Labels: snare drum; drums."
    rows = [prediction(right), prediction(right) | {"status": "unreadable"}]
    rows.append(prediction(right) | {"status": "truncated_file"})
    hits = score(rows, READER)
    assert hits.category == hits.label == hits.well_formed == [True, False, True]


def test_malformed_predictions_stop(tmp_path):
    folder = write_fold(tmp_path, 0, stages=1)
    (path,) = folder.glob("stage1*/right.json")
    rows = json.loads(path.read_text())
    for row, message in (
        (rows[1] | {"audio_id": ["a.wav"]}, "prediction 2: 'audio_id' is a list, not text"),
        ({"pred": "a"}, "prediction 2: no audio_id, prompt, ref"),
    ):
        path.write_text(json.dumps([rows[0], row, *rows[2:]]))
        with pytest.raises(EvaluationError, match=message):
            evaluate([folder], None)
