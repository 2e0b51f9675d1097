"""Compares eval/captions.py with pycocoevalcap itself and with BLEU by hand.

Both ways to read a caption are tested too.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from eval import captions as module
from eval.captions import captions
from eval.scorer_interface import Context, EvaluationError
from eval.tasks import find_task

pytest.importorskip("pycocoevalcap", reason='pip install -e ".[eval]"')
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
TASK = find_task("audiocaps")
REFS = {
    "a.wav": [
        "A dog barks while birds sing in the background.",
        "A dog is barking and birds are chirping.",
        "A barking dog and singing birds outdoors.",
    ],
    "b.wav": [
        "Heavy rain falls on a roof with thunder.",
        "Rain is pouring and thunder rumbles.",
        "A thunderstorm with heavy rain.",
    ],
    "c.wav": [
        "A man speaks while a car engine idles.",
        "A car engine runs and a man talks.",
        "An engine idles as a man is speaking.",
    ],
}
ANSWERS = {
    "a.wav": [
        "A dog barks and birds chirp.",
        "Birds sing",
        "A dog is barking and birds are chirping.",
    ],
    "b.wav": [
        "Rain is falling heavily and thunder roars.",
        "Heavy rain falls.",
        "It can't be seen.",
    ],
    "c.wav": ["A woman is singing a song.", "A man speaks near a running car engine", ""],
}


@pytest.fixture(scope="module")
def jar() -> Iterator[Any]:
    """The Java process of METEOR, one for all tests because it takes seconds to start."""
    from pycocoevalcap.meteor.meteor import Meteor

    made = Meteor()
    yield made
    made.meteor_p.kill()
    made.meteor_p.communicate()  # Waits for its end and closes its pipes.


@pytest.fixture
def one_meteor(jar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every new `Meteor` the one that runs."""
    monkeypatch.setattr("pycocoevalcap.meteor.meteor.Meteor", lambda: jar)


def rows_of(answers: dict[str, list[str | None]], prefix: str = "Audio caption: ") -> list[dict]:
    """Return predictions one trial after the other, as repeated generation writes them."""
    return [
        {
            "audio_id": f"/x/{name}",
            "pred": text if text is None else prefix + text,
            "ref": prefix + REFS[name][t],
        }
        for t in range(3)
        for name, texts in answers.items()
        for text in texts[t : t + 1]
    ]


def plain(text: str) -> str:
    return text.lower().replace(".", "").replace("'", "")


class Package:
    """The metrics of pycocoevalcap for one trial, run as its COCOEvalCap does."""

    def __init__(self, java: bool):
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        texts = {name: [*map(plain, REFS[name] + ANSWERS[name])] for name in REFS}
        if java:
            given = {
                name: [{"caption": text or "."} for text in part] for name, part in texts.items()
            }
            texts = PTBTokenizer().tokenize(given)
        self.texts, self.meteor = texts, Meteor() if java else None

    def __call__(self, clips: list[str], trial: int) -> dict[str, float]:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        refs = {n: self.texts[name][:3] for n, name in enumerate(clips)}
        preds = {n: self.texts[name][3 + trial : 4 + trial] for n, name in enumerate(clips)}
        names = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
        found = dict(zip(names, Bleu(4).compute_score(refs, preds, 0)[0], strict=True))
        found |= {
            "CIDEr-D": Cider().compute_score(refs, preds)[0],
            "ROUGE-L": Rouge().compute_score(refs, preds)[0],
        }
        return found | (
            {"METEOR": self.meteor.compute_score(refs, preds)[0]} if self.meteor else {}
        )


@pytest.mark.parametrize("java", [pytest.param(True, marks=needs_java), False])
def test_metrics_equal_the_package(java: bool, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("one_meteor" if java else "without_java")
    package = Package(java)
    outcome = captions(rows_of(ANSWERS), TASK, Context())
    assert ("SPICE, SPIDEr: not computed: no CoreNLP models" in outcome.notes[-1]) == java
    trials = [package(list(REFS), trial) for trial in range(3)]
    found = outcome.compute(np.arange(3))
    for name in trials[0]:
        values = [trial[name] for trial in trials]
        assert found[name] == pytest.approx(np.mean(values), abs=1e-12), name
        assert found[f"{name} std"] == pytest.approx(np.std(values), abs=1e-12), name
    assert ("METEOR" in found) == java
    # A caption of c.wav is empty. A long wrong one would lower BLEU and METEOR more, so they have
    # no value over all clips; the others do.
    assert outcome.notes[1].startswith("on all: BLEU and METEOR have no value")
    on_all = outcome.on_all()
    assert {name for name, value in on_all.items() if np.isnan(value)} == {
        f"{name}{end}" for name in trials[0].keys() & module.CORPUS_METRICS for end in ("", " std")
    }
    assert on_all["CIDEr-D"] == found["CIDEr-D"] and on_all["ROUGE-L"] == found["ROUGE-L"]
    assert (outcome.notes[0].endswith("PTB tokenizer"), outcome.notes[-1].startswith("METEOR")) == (
        java,
        not java,
    )
    # In a resample, corpus metrics come from summed counts, the others from a mean over its clips.
    again = outcome.compute(np.array([0, 0, 1]))
    trials = [package(["a.wav", "a.wav", "b.wav"], trial) for trial in range(3)]
    for name in set(trials[0]) - {"CIDEr-D"}:  # whose document frequencies stay those of all clips
        assert again[name] == pytest.approx(
            np.mean([trial[name] for trial in trials]), abs=1e-12
        ), name
    of_clip = [item["CIDEr-D"] for item in outcome.items]
    assert again["CIDEr-D"] == pytest.approx((2 * of_clip[0] + of_clip[1]) / 3, abs=1e-12)


@needs_java
@pytest.mark.usefixtures("one_meteor")
def test_metrics_recorded_before_this_was_written() -> None:
    first = {name: texts[:1] * 3 for name, texts in ANSWERS.items()}
    found = captions(rows_of(first), TASK, Context()).compute(np.arange(3))
    recorded = {"BLEU-1": 0.569, "BLEU-2": 0.400, "BLEU-3": 0.223, "BLEU-4": 0.0}
    recorded |= {"ROUGE-L": 0.503, "CIDEr-D": 0.964, "METEOR": 0.230}
    assert {name: found[name] for name in recorded} == pytest.approx(recorded, abs=6e-4)
    assert all(found[f"{name} std"] < 1e-12 for name in recorded)


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.usefixtures("without_java")
def test_bleu_by_hand() -> None:
    rows = [{"audio_id": "a.wav", "pred": "a dog sings", "ref": "A dog barks loudly!"}]
    found = captions(rows, TASK, Context()).compute(np.array([0]))
    # Three words for four. Of the n-grams, 2 of 3, 1 of 2 and 0 of 1 are right.
    brevity = np.exp(1 - 4 / 3)
    assert found["BLEU-1"] == pytest.approx(brevity * 2 / 3, abs=1e-9)
    assert found["BLEU-2"] == pytest.approx(brevity * np.sqrt(2 / 3 * 1 / 2), abs=1e-9)
    assert found["BLEU-3"] < 1e-4


@pytest.mark.parametrize(
    ("text", "strict", "original"),
    [
        ("Audio caption: A dog's bark.", "a dogs bark", "a dogs bark"),
        ("A dog barks.", "a dog barks", " dog barks"),  # loses a letter
        (
            "audio caption:A clock at 10:30 rings, twice",
            "a clock at 1030 rings twice",
            "0 rings twice",
        ),
        ("Speech: a man talks", "speech a man talks", "a man talks"),
        (
            " Audio  caption :  Rain\u2028and\nwind - loud",
            "audio caption rain and wind loud",
            "rain and wind loud",
        ),
        (None, "", ""),
        ("", "", ""),
    ],
)
def test_both_ways_to_read_a_caption(text: str | None, strict: str, original: str) -> None:
    assert module._text(text, Context()) == strict
    assert module._text(text, Context(protocol="original")) == " ".join(original.split())


@pytest.mark.usefixtures("without_java")
def test_failed_answers() -> None:
    rows = rows_of({name: [*texts] for name, texts in ANSWERS.items()})
    rows[4] |= {"pred": None, "status": "unreadable"}  # b.wav's second
    outcome = captions(rows, TASK, Context())
    assert [item["failed"] for item in outcome.items] == [None, "unreadable", "empty answer"]
    texts = [f"Audio caption: {text}" for text in ANSWERS["b.wav"]]
    assert outcome.items[1]["pred"] == [texts[0], None, texts[2]]
    whole = captions(rows_of(ANSWERS), TASK, Context())
    assert outcome.compute(np.array([0, 2])) == whole.compute(np.array([0, 2]))
    assert outcome.compute(np.arange(3))["BLEU-1"] < whole.compute(np.arange(3))["BLEU-1"]
    # A text that came with a failure is no caption.
    rows[4]["pred"] = texts[1]
    assert captions(rows, TASK, Context()).on_all()["CIDEr-D"] == outcome.on_all()["CIDEr-D"]
    rows[4] |= {"pred": "Audio caption: ", "status": "ok"}
    assert captions(rows, TASK, Context()).items[1]["failed"] == "empty answer"
    for row in rows:
        row["pred"] = None
    nothing = captions(rows, TASK, Context()).compute(np.arange(3))
    assert {round(value, 9) for value in nothing.values()} == {0.0}


def test_invalid_sets_of_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(ANSWERS)
    with pytest.raises(
        EvaluationError,
        match="P.json: 2 predictions for a.wav, not 3|P.json: 3 predictions for b.wav, not 2",
    ):
        captions(rows[:3] + rows[4:], TASK, Context(source="P.json"))
    with pytest.raises(EvaluationError, match="P.json: 3 predictions for a.wav, not 5"):
        captions(rows, TASK, Context(protocol="original", source="P.json"))
    with pytest.raises(
        EvaluationError, match="P.json, prediction 2: /y/a.wav .* /x/a.wav has the same name"
    ):
        captions([rows[0], rows[0] | {"audio_id": "/y/a.wav"}], TASK, Context(source="P.json"))
    with pytest.raises(EvaluationError, match="prediction 1: None is no clip"):
        captions([rows[0] | {"audio_id": None}], TASK, Context())
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EvaluationError, match=r"pycocoevalcap.* pip install -e '.\[eval\]'"):
        captions(rows, TASK, Context())


@needs_java
@pytest.mark.usefixtures("one_meteor")
def test_five_trials_of_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "Audio caption: a dog barks",
        "Audio caption: a cat",
        "Audio caption: rain",
        "wind",
        "Audio caption: a dog",
    ]
    rows = [
        {"audio_id": "a.wav", "pred": text, "ref": f"Audio caption: {text[-5:]}"} for text in texts
    ]
    found = captions(rows, TASK, Context(protocol="original")).compute(np.array([0]))
    # The references contain all words of a trial except "wind", which is read as "ind".
    assert found["BLEU-1"] == pytest.approx(0.8, abs=1e-6)
    assert found["BLEU-1 std"] == pytest.approx(0.4, abs=1e-6)
    assert captions(rows, TASK, Context()).compute(np.array([0]))["BLEU-1"] == pytest.approx(
        1.0, abs=1e-6
    )
    # A sixth prediction for the clip does not count. The same name in another folder is the same
    # clip.
    rows[3] |= {"audio_id": "/y/a.wav"}
    more = captions(
        [*rows, rows[0] | {"pred": "a lion", "ref": "lion"}], TASK, Context(protocol="original")
    )
    assert (
        more.compute(np.array([0])) == found
        and len(more.items) == 1
        and len(more.items[0]["ref"]) == 5
    )
    assert more.notes[-1] == "1 predictions left out: the first five of a clip count"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    # Another tokenizer would give other values.
    nothing = captions(rows, TASK, Context(protocol="original"))
    assert nothing.compute(np.array([0])) == {} and "not computed: no Java" in nothing.notes[0]


@needs_java
@pytest.mark.usefixtures("one_meteor")
def test_spice_with_its_models(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from pycocoevalcap.spice import spice

    monkeypatch.setattr(spice, "__file__", str(tmp_path / "spice.py"))
    monkeypatch.setattr(spice, "get_stanford_models", lambda: pytest.fail("began to download"))
    with pytest.raises(OSError, match="no CoreNLP models"):
        module._spice({}, {})
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "stanford-corenlp-3.6.0-models.jar").write_text("")

    class Fake:
        def compute_score(self, refs: dict, preds: dict) -> tuple[float, list[dict]]:
            assert [len(refs[n]) for n in refs] == [3, 3, 3]
            return 0.0, [{"All": {"f": value}} for value in (0.1, 0.3, float("nan"))]

    monkeypatch.setattr(spice, "Spice", Fake)
    outcome = captions(rows_of(ANSWERS), TASK, Context())
    monkeypatch.setattr(
        Fake, "compute_score", lambda *_: subprocess.run(["false", str(tmp_path)], check=True)
    )
    notes = captions(rows_of(ANSWERS), TASK, Context()).notes
    # The message has no names of temporary files, which differ each time.
    assert notes[-1] == "SPICE, SPIDEr: not computed: java ended with 1"
    found = outcome.compute(np.array([0, 1, 1, 2]))
    assert found["SPICE"] == pytest.approx((0.1 + 0.3 + 0.3 + 0) / 4, abs=1e-12)
    assert found["SPIDEr"] == pytest.approx((found["SPICE"] + found["CIDEr-D"]) / 2, abs=1e-12)
    assert outcome.items[1]["SPICE"] == pytest.approx(0.3)
