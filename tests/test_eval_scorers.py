"""Tests the scoring functions.

The original protocol is compared with the original to the digit, the strict protocol with values by
hand.
"""

import json
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from eval.classification import (
    ANSWERS,
    LABELS,
    REFERENCE_READERS,
    Classes,
    cosines,
    d_prime,
    multi_label,
    plain,
    single_label,
)
from eval.ranking_metrics import Ranking
from eval.scorer_interface import Context, EvaluationError
from eval.speech import age, gender, read_age, read_gender, substituted, word_error_rate
from eval.tasks import TASKS, find_task
from eval.toy import toy_category
from ltu.files import sha256_of
from tests.golden import rule_init

LABELLED = [task for task in TASKS if "labels" in task.options]
EXACT = {"rel": 0, "abs": 1e-12}


def stub_embedding(texts: list[str]) -> np.ndarray:
    """Return the embeddings that golden/eval.json documents."""
    return np.array([one_embedding(text) for text in texts])


@cache
def one_embedding(text: str) -> np.ndarray:
    vector = np.full(64, 0.01)
    for word in re.findall("[a-z0-9]+", text.lower()):
        vector = vector + len(word) * rule_init.uniform(f"emb.{word}", 64)
    return vector


def rows(*pairs: tuple[str | None, str]) -> list[dict]:
    return [
        {"pred": pred, "ref": ref, "audio_id": f"{number}.wav"}
        for number, (pred, ref) in enumerate(pairs)
    ]


def metrics_of(outcome) -> dict[str, float]:
    return outcome.on_all()


def answered_indices(outcome) -> np.ndarray:
    indices = [index for index, item in enumerate(outcome.items) if item["failed"] is None]
    return np.array(indices, dtype=int)


def run(scorer, name: str, made: list[dict], protocol: str = "strict", **context):
    return scorer(
        made, find_task(name), Context(protocol, stub_embedding, source="P.json", **context)
    )


@pytest.fixture(params=["committed", "full"])
def golden_metrics(request, golden) -> dict:
    folder = golden if request.param == "committed" else request.getfixturevalue("full_golden")
    return json.loads((folder / "eval.json").read_text())


# Values of docs/evaluation.md#protocols: task, scorer, metric, and the (original, strict) values of
# each predictions file.
CHANGES = [
    ("esc50", single_label, "accuracy", [(0.433, 0.500), (0.467, 0.533)]),
    ("gtzan", single_label, "accuracy", [(0.083, 0.083), (0.125, 0.125)]),
    ("audioset", multi_label, "mAP", [(0.027, 0.339)]),
    ("voxceleb_age", age, "mae", [(20.0, 18.45)]),
    ("voxceleb_age", age, "coverage", [(0.708, 0.833)]),
    ("librispeech", word_error_rate, "wer", [(0.191, 0.191)]),
    ("librispeech", word_error_rate, "wer_substituted", [(0.148, 0.148)]),
]


@pytest.mark.parametrize("name, scorer, metric, want", CHANGES)
def test_what_strict_changes(golden_metrics, name, scorer, metric, want):
    found = []
    for made in golden_metrics[name]["inputs"].values():
        whisper = {
            row["audio_id"]: row["_whisper_text"] for row in made if "_whisper_text" in row
        } or None
        both = [
            run(scorer, name, made, protocol, whisper=whisper)
            for protocol in ("original", "strict")
        ]
        metrics = [
            one.compute(answered_indices(one)) if metric == "mae" else metrics_of(one)
            for one in both
        ]
        found.append(tuple(round(one[metric], 3) for one in metrics))
    assert found == want[-len(found) :]  # If there are two files, the second is committed.


@pytest.mark.parametrize("name", ["esc50", "gtzan"])
def test_single_label_metrics_of_the_original(golden_metrics, name):
    want = golden_metrics[name]
    for (file, made), (_, accuracy) in zip(want["inputs"].items(), want["all_res"], strict=True):
        outcome = run(single_label, name, made, "original")
        assert metrics_of(outcome)["accuracy"] == pytest.approx(accuracy, **EXACT), file
    names = Classes(find_task(name), "original").names
    assert [item["chosen"] for item in outcome.items] == [
        names[number] for number in want["all_pred_argmax"]
    ]
    assert metrics_of(outcome)["micro_f1"] == pytest.approx(accuracy, **EXACT)
    assert metrics_of(outcome)["mAP"] == pytest.approx(want["mAP"], **EXACT)
    assert metrics_of(outcome)["mAUC"] == pytest.approx(want["mAUC"], **EXACT)


def test_multi_label_metrics_of_the_original(golden_metrics):
    want = golden_metrics["audioset"]
    (made,) = want["inputs"].values()
    found = metrics_of(run(multi_label, "audioset", made, "original"))
    for ours, theirs in {"mAP": "mAP", "mAUC": "mAUC", "accuracy": "acc"}.items():
        assert found[ours] == pytest.approx(want[theirs], **EXACT)


def test_speech_metrics_of_the_original(golden_metrics):
    want = golden_metrics["librispeech"]
    (made,) = want["inputs"].values()
    whisper = {row["audio_id"]: row["_whisper_text"] for row in made}
    found = metrics_of(run(word_error_rate, "librispeech", made, "original", whisper=whisper))
    names = {"wer_whisper": "wer_whisper", "wer_substituted": "wer_ltue", "wer": "wer_ltue_ori"}
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(want[theirs], **EXACT)

    want = golden_metrics["voxceleb_age"]
    (made,) = want["inputs"].values()
    outcome = run(age, "voxceleb_age", made, "original")
    assert [item["chosen"] for item in outcome.items if item["failed"] is None] == want["all_pred"]
    *_, predicted, _, error, correlation = want["all_res"][0]
    assert metrics_of(outcome) == pytest.approx(
        {"mae": error, "pearson": correlation, "coverage": predicted / 24}, **EXACT
    )


def test_average_precision_and_area_of_the_original(golden_metrics):
    want = golden_metrics["calculate_stats"]
    references = rule_init.seeded("eval.stats.target", (40, 6), 0, 1) < 0.3
    references[:, 5] = False
    scores = rule_init.seeded("eval.stats.output", (40, 6), 0, 1).astype(float)
    precision, area = Ranking(scores, references).scores(np.ones(40, dtype=int))
    assert np.isnan(precision[5]) and np.isnan(area[5])
    assert np.nan_to_num(precision) == pytest.approx(
        [line["AP"] for line in want["stats"]], **EXACT
    )
    assert np.nan_to_num(area, nan=-1) == pytest.approx(
        [line["auc"] for line in want["stats"]], **EXACT
    )
    for value, distance in want["d_prime"].items():
        assert d_prime(float(value)) == pytest.approx(distance, rel=1e-12)


def test_ranking_equals_scikit_learn_with_ties_and_repeats():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, (300, 7)) / 4.0  # many ties
    scores[rng.random(300) < 0.1] = -np.inf  # failed rows
    references = rng.random((300, 7)) < [0.01, 0.1, 0.3, 0.5, 0.9, 1.0, 0.02]
    ranking = Ranking(scores, references)
    for indices in (np.arange(300), rng.integers(0, 300, 300), rng.integers(0, 40, 90)):
        precision, area = ranking.scores(np.bincount(indices, minlength=300))
        known = np.where(np.isinf(scores), -1.0, scores)
        for number in range(7):
            reference = references[indices, number]
            score = known[indices, number]
            want = metrics.average_precision_score(reference, score) if reference.any() else np.nan
            assert precision[number] == pytest.approx(want, abs=1e-12, nan_ok=True)
            want = np.nan
            if 0 < reference.sum() < len(reference):
                want = metrics.roc_auc_score(reference, score)
            assert area[number] == pytest.approx(want, abs=1e-12, nan_ok=True)


# By hand: task -> (class, its embedded text, answer, its embedded text, reference).
READ_BY_THE_ORIGINAL = {
    "esc50": (
        "sea_waves",
        "sound of sea waves",
        "A: At 10:30  Dogs",
        "sound of 30  dogs",
        "Labels:sea_waves",
    ),
    "vocalsound": (
        "Throat clearing",
        "sound of throat clearing",
        "Loud cough",
        "sound of oud cough",
        "L:Throat clearing",
    ),
    "tut17": (
        "city center",
        "sound of city center",
        "A:  Bus",
        "sound of  bus",
        "Labels:city_center",
    ),
    "beijing_opera": (
        "Clapper-drum",
        "sound of clapper-drum",
        "A:Gong",
        "sound of ong",
        "L:Clap\u00adper-drum,",
    ),
    "dcase17": (
        "Air horn truck horn",
        "sound of air horn truck horn",
        "A: Horn",
        "sound of horn",
        "Labels:Air horn, truck horn",
    ),
    "vggsound": (
        "pigeon,  dove cooing",
        "sound of pigeon,  dove cooing",
        'Audio caption: "Doves: two"',
        "sound of doves: two",
        "Labels: Pigeon,  dove cooing",
    ),
    "audioset": (
        "Wail, moan",
        "sound of wail, moan",
        "A dog barks",
        "sound of dog barks",
        "Labels: Wail, moan",
    ),
    "fsd50k": (
        "Coin (dropping)",
        "sound of coin (dropping)",
        "Audio caption:Coin",
        "sound of oin",
        "Labels: Coin (dropping)",
    ),
    "gtzan": (
        "Hip-Hop",
        "Music Genre: hip-hop",
        "Genre:  Hip-Hop",
        "Music Genre: hip-hop",
        "Genre: Hip-Hop",
    ),
    "iemocap": ("happy", "happy", " Emotion: Happy", "Emotion: Happy", "Emotion: happy. Very much"),
}


@pytest.mark.parametrize("name", READ_BY_THE_ORIGINAL)
def test_texts_that_the_original_embeds(name):
    key, class_text, answer, answer_text, reference = READ_BY_THE_ORIGINAL[name]
    classes = Classes(find_task(name), "original")
    number = classes.names.index(key)
    assert classes.texts[number] == class_text
    assert classes.answer(answer) == answer_text
    assert classes.reference_numbers(reference) == [number]


LABEL_FILES = {  # first digits of the sha256
    "audioset.txt": "83e2e4fd16cbe86f",
    "beijing_opera.txt": "1b1821f3c9e429ee",
    "dcase17.txt": "b0f127af3cfdfb03",
    "esc50.txt": "bd4cdb8c9badd38e",
    "fma.txt": "9fd2a53743b93ffe",
    "fsd50k.txt": "c05090654e10705a",
    "gtzan.txt": "7bd597749f2b32f4",
    "iemocap.txt": "7ee18b480f798ef3",
    "mosei.txt": "880d2bb16d727771",
    "tut17.txt": "7d39206a623b3b2d",
    "vggsound.txt": "1ae13903e9c6cd47",
    "vocalsound.txt": "8afebda60b4953f7",
}


def test_tables_and_labels():
    assert {task.options.get("answer") for task in LABELLED} <= ANSWERS.keys()
    assert {
        task.options.get("reference", "after_colon") for task in LABELLED
    } <= REFERENCE_READERS.keys()
    # `Classes` raises if two classes have the same key.
    counts = {task.name: len(Classes(task, "strict").names) for task in LABELLED}
    assert counts == {
        **{
            "esc50": 50,
            "dcase17": 17,
            "vocalsound": 6,
            "tut17": 15,
            "beijing_opera": 4,
            "vggsound": 309,
        },
        **{"fsd50k": 200, "audioset": 527, "iemocap": 4, "mosei": 7, "gtzan": 10, "fma": 16},
    }
    hashes = {
        task.options["labels"]: sha256_of(LABELS / task.options["labels"])[:16] for task in LABELLED
    }
    # The order of the labels decides ties and the columns of --score_labels.
    assert hashes == LABEL_FILES
    assert sum("  " in name for name in Classes(find_task("vggsound"), "original").names) == 23
    assert max(Counter(task.name for task in TASKS).values()) == 1
    with pytest.raises(ValueError, match="no task 'esc51'. Choose from: esc50, "):
        find_task("esc51")


@pytest.mark.parametrize("protocol", ["strict", "original"])
@pytest.mark.parametrize("task", LABELLED, ids=lambda task: task.name)
def test_a_reference_that_is_no_class_stops_with_file_and_number(task, protocol):
    known = f"Labels: {Classes(task, protocol).names[0]}"
    if protocol == "original" and not task.options.get("reference"):
        known = known.replace(": ", ":")
    made = rows(
        (
            "A: dog",
            known.replace(": ", ":") if "no_" in task.options.get("reference", "") else known,
        ),
        ("A: b", "L: x y"),
    )
    scorer = multi_label if task.scorer.endswith("multi_label") else single_label
    assert len(run(scorer, task.name, made[:1], protocol).items) == 1
    with pytest.raises(
        EvaluationError,
        match=r"^P.json, prediction 2: the reference ' ?x y' is no class of eval/labels/",
    ):
        run(scorer, task.name, made, protocol)


def test_the_original_stops_at_a_first_answer_without_colon_and_strict_does_not():
    made = rows(("Loud cough", "Labels:Cough"), ("A: cough", "Labels:Cough"))
    with pytest.raises(
        EvaluationError,
        match="prediction 1: the original stops at a first prediction without a colon",
    ):
        run(single_label, "vocalsound", made, "original")
    assert metrics_of(run(single_label, "vocalsound", made))["accuracy"] == 1.0


@pytest.mark.parametrize(
    "answer, text",
    [
        ("Audio caption: A dog barks at 10:30", "a dog barks at 10:30"),  # only the tail
        ("Loud cough.", "loud cough."),  # the first character
        ("Audio caption:Cough", "cough"),
        ('"Audio caption: The  cough"', "the cough"),
        ("Labels: cat", "cat"),
        ("Emotion: Happy", "happy"),
    ],
)
def test_strict_reads_the_whole_answer(answer, text):
    assert Classes(find_task("esc50"), "strict").answer(answer) == f"sound of {text}"


def test_strict_matches_references_however_they_are_spelled():
    classes = Classes(find_task("vggsound"), "strict")
    # The original finds no match for a single space.
    number = classes.reference_numbers("Labels: Pigeon, dove cooing")[0]
    assert (
        classes.names[number] == "pigeon,  dove cooing"
        and classes.texts[number] == "sound of pigeon, dove cooing"
    )
    with pytest.raises(KeyError):
        Classes(find_task("vggsound"), "original").reference_numbers("Labels: Pigeon, dove cooing")
    assert (
        plain("Sea_waves.") == "sea waves"
        and plain("Air horn, truck horn") == "air horn truck horn"
    )
    emotions = Classes(find_task("mosei"), "strict")
    assert emotions.reference_numbers("Happiness, with a sentiment score of 2 (positive).") == [0]


def test_unanswered_rows_are_wrong_and_stay_in_the_denominator():
    made = rows(("A: dog", "L:dog"), (None, "L:dog"), (" ", "L:cat"), ("A: cat", "L:dog"))
    made[3]["status"] = "unreadable"
    outcome = run(single_label, "esc50", made)
    assert [item["failed"] for item in outcome.items] == [
        None,
        "no answer",
        "empty answer",
        "unreadable",
    ]
    assert metrics_of(outcome)["accuracy"] == 0.25
    # There are 4 references and 1 answer; each missing answer counts as a wrong one.
    assert metrics_of(outcome)["micro_f1"] == pytest.approx(2 * 1 / (4 + 4))
    # Dog, cat and three more classes, which the missing answers could have named.
    assert metrics_of(outcome)["macro_f1"] == pytest.approx((2 * 1 / (3 + 1) + 0) / 5)
    assert outcome.compute(np.array([0, 0]))["accuracy"] == 1.0
    assert outcome.confusion[1].sum() == 1 and outcome.items[0]["chosen"] == "dog"
    nothing = run(
        single_label, "esc50", rows((None, "L:dog"), ("", "L:cat"), ('"Audio caption: "', "L:dog"))
    )
    assert metrics_of(nothing)["accuracy"] == 0.0
    # "sound of " is near to some class, but the answer names none.
    assert nothing.items[2]["failed"] == "empty answer"
    assert (
        run(single_label, "esc50", rows(("Audio caption: ", "L:dog")), "original").items[0][
            "failed"
        ]
        is None
    )


def test_macro_f1_of_absent_classes():
    # F1 is 1 for car and 0 for bus and train; fourteen classes are absent.
    made = rows(("A: car", "L:Car"), ("A: bus", "L:Train"))
    assert metrics_of(run(single_label, "dcase17", made, "original"))["macro_f1"] == pytest.approx(
        1 / 17
    )
    assert metrics_of(run(single_label, "dcase17", made))["macro_f1"] == pytest.approx(1 / 3)


def test_classes_without_positives_do_not_count():
    made = rows(
        ("Audio caption: speech", "Labels: Speech"),
        ("Audio caption: yell", "Labels: Yell"),
        (None, "Labels: Yell"),
    )
    outcome = run(multi_label, "audioset", made)
    # Speech ranks below the missing answer: AP 1/2, AUC 1/2. Yell: first, and never found:
    # AP (1 + 0) / 2, AUC 1/2.
    want = {"mAP": 0.5, "mAUC": 0.5, "d_prime": d_prime(0.5), "classes": 2.0}
    assert metrics_of(outcome) == pytest.approx(want)
    few = (
        "2 of 527 classes have fewer than 5 positives: "
        "resamples repeat or lose these, which biases the interval"
    )
    assert outcome.notes == ["525 of 527 classes have no positives", few]
    assert len(run(multi_label, "audioset", made[:2] * 5).notes) == 1
    # A single-label task is scored by accuracy, so few positives are not noted.
    assert (
        len(run(single_label, "gtzan", rows(("Genre: pop", "Genre: Pop")), "original").notes) == 1
    )
    assert metrics_of(run(multi_label, "audioset", made, "original"))["mAP"] == pytest.approx(
        (1 + 5 / 6) / 527
    )


def test_label_scores_replace_embeddings():
    scores = np.log([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    made = rows(("x", "Emotion: neutral"), ("x", "Emotion: sad"))
    outcome = single_label(made, find_task("iemocap"), Context(label_scores=scores))
    assert metrics_of(outcome)["accuracy"] == 0.5
    assert [item["chosen"] for item in outcome.items] == ["neutral", "angry"]
    fma = rows(("x", "Genre: Rock"), (None, "Genre: Folk, Pop"))
    # The second example would rank first if it had an answer. Without one it ranks above Rock, and
    # is not found for Folk and Pop.
    best = np.tile(np.arange(16.0), (2, 1)) * [
        [1],
        [2],
    ]
    assert metrics_of(multi_label(fma, find_task("fma"), Context(label_scores=best)))[
        "mAP"
    ] == pytest.approx((1 / 2 + 0 + 0) / 3)
    with pytest.raises(EvaluationError, match=r"\(2, 4\) label scores, not \(1, 4\)"):
        single_label(made[:1], find_task("iemocap"), Context(label_scores=scores))
    with pytest.raises(EvaluationError, match="Give an --embedder"):
        single_label(made, find_task("iemocap"), Context())


def test_cosines_of_the_original_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    answers, classes = rng.standard_normal((300, 40)), rng.standard_normal((5, 40))

    def dot(left: np.ndarray, right: np.ndarray) -> float:
        total = 0.0
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            total += one * other
        return total

    def cosine(left: np.ndarray, right: np.ndarray) -> float:
        return dot(left, right) / (dot(left, left) ** 0.5 * dot(right, right) ** 0.5)

    want = [[cosine(answer, one) for one in classes] for answer in answers]
    assert cosines(answers, classes, "original").tolist() == want
    assert cosines(answers, classes, "strict") == pytest.approx(np.array(want), abs=1e-14)
    with pytest.raises(EvaluationError, match="all zeros or not a number"):
        cosines(answers, np.zeros((5, 40)), "strict")


def test_negative_cosines_are_cut_by_mode_max_only():
    def embed(texts: list[str]) -> np.ndarray:
        return np.array(
            [
                [1.0, 0.1 * ("cough" in text)] if "answer" not in text else [-1.0, 0.1]
                for text in texts
            ]
        )

    made, task = rows(("A: answer", "L:Laughter")), find_task("vocalsound")
    # All scores are 0, so the first class is chosen.
    assert single_label(made, task, Context("original", embed)).items[0]["chosen"] == "Laughter"
    assert single_label(made, task, Context("strict", embed)).items[0]["chosen"] == "Cough"


@pytest.mark.parametrize(
    "answer, original, strict",
    [
        ("20 to 30 years", 20, 25),
        ("30\u201340", 30, 35),
        ("30-40", 35, 35),
        ("The speaker is in their 30s.", None, 35),
        ("20s to 30s", None, 30),
        ("3.5 years", 3, 3.5),
        ("5th grade, 11 years", 11, 11),
        ("70yo", None, 70),
        ("61, or maybe 65", 61, 61),
        ("twenty", None, None),
    ],
)
def test_ages(answer, original, strict):
    assert (read_age(answer, "original"), read_age(answer, "strict")) == (original, strict)


def test_a_missing_age_lowers_the_coverage():
    reference = "The age of the speaker is {}."
    made = rows(
        ("40", reference.format(30)),
        ("20", reference.format(25)),
        ("old", reference.format(60)),
        (None, reference.format(9)),
    )
    outcome = run(age, "voxceleb_age", made)
    # All answers name an age.
    assert outcome.compute(np.arange(2)) == pytest.approx({"mae": 7.5, "pearson": 1.0})
    # Without an age the error is that of the farthest: 0 for 60 and 120 for 9.
    want = {"mae": (10 + 5 + 60 + 111) / 4, "pearson": np.nan, "coverage": 0.5}
    assert metrics_of(outcome) == pytest.approx(want, nan_ok=True)
    assert metrics_of(run(age, "voxceleb_age", made, "original")) == pytest.approx(
        want | {"mae": 7.5, "pearson": 1.0}
    )
    # An age of 500 is as wrong as 120 over all, and as it is over those that are answered.
    absurd = run(age, "voxceleb_age", rows(("500", reference.format(30))))
    assert absurd.compute(np.arange(1))["mae"] == 470 and metrics_of(absurd)["mae"] == 90
    assert metrics_of(run(age, "voxceleb_age", made[:2])) == pytest.approx(
        {"mae": 7.5, "pearson": 1.0, "coverage": 1}
    )
    assert [item["failed"] for item in outcome.items] == [None, None, "no age", "no answer"]
    for protocol in ("strict", "original"):
        with pytest.raises(
            EvaluationError,
            match="P.json, prediction 1: the reference 'Old.' does not end with one age",
        ):
            run(age, "voxceleb_age", rows(("40", "Old.")), protocol)


def test_genders():
    read = {
        text: (read_gender(text, "original"), read_gender(text, "strict"))
        for text in ("A woman", "She", "", "Male")
    }
    assert read == {
        "A woman": ("male", "female"),
        "She": ("male", "female"),
        "": ("male", None),
        "Male": ("male", "male"),
    }
    made = rows(
        ("Female", "Female."),
        ("a man or a woman", "Male."),
        ("a woman", "Male."),
        ("male", "Male."),
        ("she", "Female."),
    )
    strict, original = (
        metrics_of(run(gender, "voxceleb_gender", made)),
        metrics_of(run(gender, "voxceleb_gender", made, "original")),
    )
    # Female: 2 right of 2 references and 4 answers (both genders count as the wrong one);
    # male: 1 of 3 and 1. The original: 1 of 2 and 1; 3 of 3 and 4.
    assert strict == pytest.approx(
        {"accuracy": 0.6, "micro_f1": 6 / 10, "macro_f1": (4 / 6 + 2 / 4) / 2}
    )
    assert original == pytest.approx(
        {"accuracy": 0.8, "micro_f1": 0.8, "macro_f1": (2 / 3 + 6 / 7) / 2}
    )
    with pytest.raises(
        EvaluationError, match="prediction 1: the reference 'x' does not name one gender"
    ):
        run(gender, "voxceleb_gender", rows(("male", "x")))


def test_whisper_is_substituted_only_where_the_answer_contains_it():
    assert (
        substituted("A CAT SAT", "", "original") == ""
        and substituted("A CAT SAT", "", "strict") == "A CAT SAT"
    )
    assert (
        substituted("THE CAT", "A", "original") == "A"
        and substituted("THE CAT", "A", "strict") == "THE CAT"
    )
    assert substituted("OH THE CAT SAT", "THE CAT", "strict") == "THE CAT"


def test_word_error_rates():
    made = rows(
        ("Spoken text: it's the colour of 20 cats", "spoken text:IT IS THE COLOR OF TWENTY CATS"),
        (None, "a b c"),
    )
    outcome = run(
        word_error_rate, "librispeech", made, whisper={"0.wav": "the colour", "1.wav": ""}
    )
    # ITS for IT IS, COLOUR, 20: 4 errors in 7 words, none after normalization. Whisper's "the
    # colour": 1 wrong, 5 missing.
    want = {
        "wer": (4 + 3) / 10,
        "wer_normalized": 3 / 10,
        "wer_whisper": 9 / 10,
        "wer_substituted": 9 / 10,
    }
    bounded = {f"{name}_bounded": value for name, value in want.items()}
    no_value = dict.fromkeys(want, np.nan)
    assert metrics_of(outcome) == pytest.approx(no_value | bounded, nan_ok=True)
    assert outcome.compute(np.arange(2)) == pytest.approx(want)
    assert outcome.compute(np.array([0]))["wer"] == pytest.approx(4 / 7)
    assert "wer_substituted: not computed" in run(word_error_rate, "librispeech", made).notes[0]
    with pytest.raises(EvaluationError, match="prediction 1: no Whisper transcript of '0.wav'"):
        run(word_error_rate, "librispeech", made, whisper={"1.wav": "a"})
    # Whisper's normalizer removes all of "hmm": 1 word of 1 is wrong, and there is 1 word for 0.
    made += rows(("spoken text: oh", "spoken text:HMM"))
    for protocol in ("strict", "original"):
        outcome = run(word_error_rate, "librispeech", made, protocol)
        assert outcome.compute(np.array([2])) == pytest.approx(
            {"wer": 1.0, "wer_normalized": np.nan}, nan_ok=True
        )
        everything = outcome.compute(np.arange(3))
        assert everything == pytest.approx({"wer": 8 / 11, "wer_normalized": 4 / 10})
    # The original counts a missing answer as one that lacks all words.
    assert metrics_of(outcome) == everything
    # With all answers, the rates are those that everybody computes. The bounded one leaves out the
    # word for 0, which is beyond the words of its reference.
    outcome = run(word_error_rate, "librispeech", [made[0], made[2]])
    assert metrics_of(outcome) == pytest.approx(
        {
            "wer": 5 / 8,
            "wer_bounded": 5 / 8,
            "wer_normalized": 1 / 7,
            "wer_normalized_bounded": 0,
        }
    )
    with pytest.raises(EvaluationError, match="prediction 1: the reference has no words"):
        run(word_error_rate, "librispeech", rows(("a", "...")))


def test_toy_category():
    reference = "Labels: dog barking; animals."
    outcome = toy_category(
        rows((reference, reference), ("A dog.", reference), (None, reference)),
        find_task("toy"),
        Context(),
    )
    assert metrics_of(outcome) == pytest.approx(
        {"accuracy": 1 / 3, "exact_label": 1 / 3, "well_formed": 1 / 3}
    )
    with pytest.raises(EvaluationError, match="prediction 1: the reference 'x' has no form"):
        toy_category(rows((reference, "x")), find_task("toy"), Context())


@pytest.mark.parametrize("protocol", ["strict", "original"])
def test_an_answer_that_is_no_text_stops(protocol):
    with pytest.raises(
        EvaluationError, match='^P.json, prediction 2: "pred" is neither text nor null'
    ):
        run(gender, "voxceleb_gender", rows((None, "Male."), (7, "Male.")), protocol)


def test_a_row_without_a_reference_stops():
    with pytest.raises(EvaluationError, match='prediction 1: "ref" is no text'):
        run(gender, "voxceleb_gender", [{"pred": "male", "ref": None}])
