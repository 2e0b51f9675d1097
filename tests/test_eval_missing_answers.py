"""Tests that leaving answers out never improves a metric of any task, in the strict protocol.

It starts from right and wrong answers, some of them extreme, and replaces them by no answer, by an
empty one or by a failure, in every combination.
"""

import itertools
import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from eval import report, run
from eval.classification import Classes, choice_metrics, multi_label
from eval.run import find_scorer
from eval.scorer_interface import Context
from eval.tasks import TASKS, Task, find_task
from tests.test_eval_questions import Stub

GAPS = (
    {"pred": None},
    {"pred": ""},
    {"pred": ' "Audio caption: "'},
    {"pred": "", "status": "unreadable"},
    {"pred": "Labels: ... \u200b"},
    {"pred": "\x00\ufeff"},
    {"pred": None, "status": ""},
)
# What is left of an answer whose transcript is missing.
SPEECH_GAPS = (*GAPS, {"pred": "Spoken text: "}, {"pred": "spoken text: ...\u200b"})
RATES = ("wer", "wer_normalized", "wer_substituted")
BOUNDED_RATES = tuple(f"{name}_bounded" for name in RATES)
LOWER_IS_BETTER = (*RATES, *BOUNDED_RATES, "mae")
# Metrics in which more is neither better nor worse, and those of Whisper alone.
NEUTRAL = ("classes", "wer_whisper", "wer_whisper_bounded")
WORST = {"mAP": 0, "mAUC": 0, "accuracy": 0, "micro_f1": 0, "macro_f1": 0, "following_rate": 0}
WORST |= dict.fromkeys(BOUNDED_RATES, 1) | {"ROUGE-L": 0, "CIDEr-D": 0}
WORST |= {"exact_label": 0, "well_formed": 0, "coverage": 0}


class YesOrNo:
    """A judge that says yes to the answers with the word "right"."""

    def record(self) -> dict:
        return {}

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        return ["yes" if "right" in response else "no" for _, response in pairs]


# Task -> (reference, answer) of each prediction.
PAIRS = {
    "librispeech": [
        ("Spoken text: a dog barks", "Spoken text: a dog barks"),
        ("Spoken text: it rains", "Spoken text: " + "no and no again " * 9),
        ("Spoken text: good morning", "Spoken text: good evening"),
        ("Spoken text: hmm", "Spoken text: oh no"),
        ("Spoken text: one two three", "four five six seven"),
    ],
    "voxceleb_gender": [
        ("Female.", "Female."),
        ("Female.", "male"),
        ("Male.", "male"),
        ("Male.", "a woman"),
        ("Male.", "a man or a woman"),
    ],
    "voxceleb_age": [
        ("The age of the speaker is 30.", "30"),
        ("The age of the speaker is 40.", "999"),
        ("The age of the speaker is 50.", "0"),
        ("The age of the speaker is 60.", "70s"),
        ("The age of the speaker is 70.", "120"),
    ],
    "open_ended": [("", "right"), ("", "wrong"), ("", "right too"), ("", "wrong too")],
    "toy": [
        ("Labels: dog barking; animals.", "Labels: dog barking; animals."),
        ("Labels: dog barking; animals.", "Labels: snare drum; drums."),
        ("Labels: snare drum; drums.", "Labels: bass drum; drums."),
        ("Labels: snare drum; drums.", "A drum."),
    ],
}
CAPTIONS = {
    "a.wav": [
        ("A dog barks while birds sing loudly", "A dog barks while birds sing loudly"),
        ("A dog is barking and birds chirp", "The " + "engine of a big red car idles " * 9),
    ],
    "b.wav": [
        ("Heavy rain falls on a tin roof", "a"),
        ("Rain is pouring down and it thunders", "Rain is pouring down and it thunders"),
    ],
}


def make_predictions(task: Task) -> list[dict]:
    """Return predictions of a task, some right and some wrong."""
    if task.scorer.startswith("captions"):
        pairs = [(clip, *pair) for trial in zip(*CAPTIONS.values(), strict=True)
                 for clip, pair in zip(CAPTIONS, trial, strict=True)]  # fmt: skip
    elif "labels" in task.options:
        pairs = [(f"{n}.wav", *pair) for n, pair in enumerate(label_pairs(task))]
    else:
        pairs = [(f"{n}.wav", *pair) for n, pair in enumerate(PAIRS[task.name])]
    return [
        {"prompt": clip, "audio_id": clip, "ref": reference, "pred": answer}
        for clip, reference, answer in pairs
    ]


def label_pairs(task: Task) -> list[tuple[str, str]]:
    """Return references and answers: right, wrong, the same wrong ones again, and right."""
    names = Classes(task, "strict").names
    first, second, third = names[0], names[1], names[2]
    references = [first, second, third, third, second]
    answers = [first, first, third, first, third]
    if task.options.get("separator"):
        references = [f"{name}{task.options['separator']}{names[3]}" for name in references]
        references[0] = first
    return [(f"Labels: {ref}", answer) for ref, answer in zip(references, answers, strict=True)]


def on_all(task: Task, predictions: list[dict], protocol: str = "strict") -> dict:
    """Return the metrics over all predictions; None is no value."""
    whisper = {row["audio_id"]: "a dog" for row in predictions}
    context = Context(protocol, Stub(), whisper=whisper, judge=YesOrNo())
    outcome = find_scorer(task)(predictions, task, context)
    return {name: None if np.isnan(value) else value for name, value in outcome.on_all().items()}


def improvements(before: dict, after: dict) -> list[str]:
    """Return the metrics that are better after; one without a value is not."""
    found = []
    for name, value in after.items():
        if name in NEUTRAL or name.endswith(" std") or value is None:
            continue
        sign = -1 if name in LOWER_IS_BETTER else 1
        if before[name] is None or sign * value > sign * before[name] + 1e-12:
            found.append(f"{name}: {before[name]} -> {value}")
    return found


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    for size in range(count + 1):
        yield from itertools.combinations(range(count), size)


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    """METEOR takes seconds to start; tests/test_eval_captions.py has it."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_missing_answer_is_never_better(task):
    if task.scorer.startswith("captions"):
        pytest.importorskip("pycocoevalcap")
    predictions = make_predictions(task)
    gaps = SPEECH_GAPS if task.metric in RATES else GAPS
    metrics = {}
    for size, missing in enumerate(subsets(len(predictions))):
        rows = [row.copy() for row in predictions]
        for number in missing:
            rows[number] |= gaps[(number + size) % len(gaps)]
        metrics[missing] = on_all(task, rows)
    for missing in metrics:
        for number in set(range(len(predictions))) - set(missing):
            after = metrics[tuple(sorted([*missing, number]))]
            better = improvements(metrics[missing], after)
            assert better == [], f"without {number} in addition to {missing}"
    # All answers count: the metric of each task changes when its right ones are left out.
    nothing = metrics[tuple(range(len(predictions)))]
    for name, value in nothing.items():
        assert value is None or name not in WORST or value == pytest.approx(WORST[name]), name
    metric = f"{task.metric}_bounded" if task.metric in RATES else task.metric
    if metric in nothing and metric != "mae":
        assert nothing[metric] == WORST[metric] != metrics[()][metric]


@pytest.mark.parametrize("task", ["dcase17", "fsd50k", "voxceleb_gender", "librispeech"])
def test_the_original_may_reward_missing_answers(task):
    """Its protocol computes what its evaluators compute; so this is a property of strict alone."""
    predictions = make_predictions(find_task(task))
    if task in ("dcase17", "fsd50k"):
        for row in predictions:
            row["ref"] = row["ref"].replace("Labels: ", "Labels:" if task == "dcase17" else "L: ")
            row["pred"] = f"Audio caption: {row['pred']}"
    before = on_all(find_task(task), predictions, "original")
    better = []
    for number in range(1, len(predictions)):
        rows = [row.copy() for row in predictions]
        rows[number]["pred"] = None
        better += improvements(before, on_all(find_task(task), rows, "original"))
    assert better


def test_macro_f1_is_the_lowest_of_all_wrong_answers():
    """Compare with scikit-learn's definition on every way to fill the gaps."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        count = int(rng.integers(2, 5))
        reference = rng.integers(0, count, 7)
        chosen = np.where(rng.random(7) < 0.5, reference, rng.integers(0, count, 7))
        gaps = rng.choice(7, size=int(rng.integers(1, 5)), replace=False)
        values = []
        for filling in itertools.product(range(count), repeat=len(gaps)):
            filled = chosen.copy()
            filled[gaps] = filling
            f1 = []
            for number in np.union1d(reference, filled):
                right = ((reference == number) & (filled == number)).sum()
                f1.append(2 * right / ((reference == number).sum() + (filled == number).sum()))
            values.append(np.mean(f1))
        chosen[gaps] = -1
        found = choice_metrics(reference, chosen, count, "strict")
        assert found["macro_f1"] == pytest.approx(min(values), abs=1e-12)


def test_average_precision_with_ties():
    """Scores of few values, in which moving a tied positive down may raise the precision."""
    task = find_task("fma")
    names = Classes(task, "strict").names
    rng = np.random.default_rng(1)
    for _ in range(40):
        scores = rng.integers(0, 3, (6, len(names))).astype(float)
        rows = []
        for number in range(6):
            chosen = rng.choice(names, size=4, replace=False)
            row = {"audio_id": str(number), "ref": f"G: {', '.join(chosen)}", "pred": "x"}
            rows.append(row)
        order = rng.permutation(6)
        before = multi_label(rows, task, Context(label_scores=scores)).on_all()
        for number in order:
            rows[number] = rows[number] | {"pred": None}
            after = multi_label(rows, task, Context(label_scores=scores)).on_all()
            assert improvements(before, after) == []
            before = after
        assert (before["mAP"], before["mAUC"]) == (0, 0)


@pytest.mark.parametrize("protocol", ["strict", "original"])
def test_the_report_says_how_missing_answers_count(tmp_path, monkeypatch, capsys, protocol):
    monkeypatch.setattr(report, "_save", lambda figure, path: None)
    row = {"prompt": "How old?", "ref": "The age of the speaker is 35.", "audio_id": "a.wav"}
    path = tmp_path / "p.jsonl"
    report.write_records([row | {"pred": "30"}, row | {"pred": None}], path)
    argv = ["--task", "voxceleb_age", "--predictions", str(path), "--protocol", protocol]
    assert run.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    line = run.MISSING_ANSWERS[protocol]
    printed = capsys.readouterr().out.splitlines()
    assert f"- {line}" in printed
    assert ("in the original" in line) == (protocol == "original")
    assert f'"missing_answers": "{line}"' in (tmp_path / "out" / "report.json").read_text()
