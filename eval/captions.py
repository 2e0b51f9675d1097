"""Captions against references: CIDEr-D, BLEU-1 to -4, ROUGE-L and, where Java and their models are, METEOR and SPICE.

Notable:
- A clip, known by its file's name, is asked once for each of its references. Trial t scores answer t of each clip
  against all its references; a figure is the mean over the trials (five in the paper), with its standard deviation.
  The original takes a clip's first five rows, and needs Java: other tokens give other figures.
- Every metric is that of `pycocoevalcap`, whose Cider is CIDEr-D. BLEU and METEOR of several clips are no means over
  clips: they come from summed counts, here as there. CIDEr-D's document frequencies are those of all clips.
"""

import shutil
import string
from pathlib import Path
from subprocess import CalledProcessError

import numpy as np

from eval.score_result import Context, EvaluationError, Outcome, start_items, without_lead
from eval.tasks import Task

Captions = dict[int, list[str]]  # number of a clip -> its captions
KEYS, ORIGINAL_TRIALS = ("ref", "pred"), 5
PUNCTUATION = str.maketrans("", "", string.punctuation)
# METEOR 1.5, English: weights of exact, stem, synonym and paraphrase matches; of content and function words; the rest.
STAGES, WORDS, ALPHA, BETA, GAMMA = (
    np.array([1.0, 0.6, 0.8, 0.6]),
    np.array([0.75, 0.25]),
    0.85,
    0.2,
    0.6,
)


def captions(rows: list[dict], task: Task, context: Context) -> Outcome:
    """Score captions; an item is a clip. If one of its answers failed, so did the clip; that caption is empty.

    Raises:
        EvaluationError: clips with unequal numbers of rows (original: fewer than five), or pycocoevalcap is missing.
    """
    clips = _clips(rows, context)
    items = [
        {"audio_id": clip[0]["audio_id"]} | {key: [row[key] for row in clip] for key in KEYS}
        for clip in clips
    ]
    for item, clip in zip(items, clips, strict=True):
        item["failed"] = next((row["failed"] for row in clip if row["failed"]), None)
    if context.protocol == "original" and not shutil.which("java"):
        return Outcome(
            items,
            lambda indices: {},
            notes=["not computed: no Java, which runs the original's tokenizer"],
        )
    texts = {key: [[_text(row[key], context) for row in clip] for clip in clips] for key in KEYS}
    try:
        tokens = _tokenize({text for part in texts.values() for clip in part for text in clip})
        refs, preds = (
            {n: [tokens[text] for text in clip] for n, clip in enumerate(part)}
            for part in texts.values()
        )
        trials = [{n: [clip[t]] for n, clip in preds.items()} for t in range(len(clips[0]))]
        means, bleu, meteor, notes = _score(refs, trials)
    except ImportError as error:
        raise EvaluationError(f"{error}: captions need it. pip install pycocoevalcap") from None
    for n, item in enumerate(items):
        item |= {name: float(values[:, n].mean()) for name, values in means.items()}

    def compute(indices: np.ndarray) -> dict[str, float]:
        found = {
            name: values[:, indices].mean(1) for name, values in means.items()
        }  # each (trials,)
        found |= {
            f"BLEU-{n + 1}": values for n, values in enumerate(_bleu(bleu[:, indices].sum(1)))
        }
        if meteor is not None:
            found["METEOR"] = _meteor(meteor[:, indices].sum(1))
        if "SPICE" in found:
            found["SPIDEr"] = (found["CIDEr-D"] + found["SPICE"]) / 2
        return {
            name + end: float(of(v))
            for name, v in found.items()
            for end, of in (("", np.mean), (" std", np.std))
        }

    if left_out := len(rows) - sum(map(len, clips)):
        notes.append(f"{left_out} rows left out: of a clip the first five count")
    return Outcome(items, compute, notes=notes)


def _clips(rows: list[dict], context: Context) -> list[list[dict]]:
    clips, is_original = dict[str, list[dict]](), context.protocol == "original"
    for index, item in enumerate(start_items(rows, context)):
        clip = clips.setdefault(Path(item["audio_id"] or "").name, [])
        clip.append(item)
        if not item["audio_id"] or clip[0]["audio_id"] != item["audio_id"] and not is_original:
            raise context.error(
                index, f"{item['audio_id']} is no clip, or {clip[0]['audio_id']} has the same name."
            )
        del clip[ORIGINAL_TRIALS if is_original else len(rows) :]
    wanted = ORIGINAL_TRIALS if is_original else len(next(iter(clips.values())))
    for name, clip in clips.items():
        if len(clip) != wanted:
            reason = f"{len(clip)} rows of {name}, not {wanted}: all clips need one for each of as many references"
            raise EvaluationError(f"{context.source}: {reason}.")
    return list(clips.values())


def _text(text: str | None, context: Context) -> str:
    """A caption without its prefix, ASCII punctuation and capitals, words one space apart."""
    if context.protocol == "original":
        text = (text or "").split(":")[-1][
            1:
        ]  # Costs a letter where there is no prefix, and all before "10:30".
    else:
        text = without_lead(text or "")
    return " ".join(text.translate(PUNCTUATION).lower().split())


def _tokenize(texts: set[str]) -> dict[str, str]:
    """text -> tokens, one space apart."""
    listed = sorted(texts - {""})  # An empty one would shift the tokenizer's lines.
    if not shutil.which("java") or not listed:
        return {text: text for text in texts}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    made = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(listed)})
    if len(made) != len(listed):
        raise EvaluationError(
            f"The PTB tokenizer gave {len(made)} of {len(listed)} captions back: does java run?"
        )
    return {text: made[n][0] for n, text in enumerate(listed)} | {"": ""}


def _score(
    refs: Captions, trials: list[Captions]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None, list]:
    """Scores whose mean is a figure, (trials, clips); counts of BLEU and METEOR, (trials, clips, counts); notes."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    means = {"CIDEr-D": np.array([Cider().compute_score(refs, preds)[1] for preds in trials])}
    means["ROUGE-L"] = np.array([Rouge().compute_score(refs, preds)[1] for preds in trials])
    bleu = np.array([_bleu_counts(refs, preds) for preds in trials])
    rule = "tokens: ASCII punctuation deleted, lower case, "
    if not shutil.which("java"):
        notes = [rule + "split at white space (no Java: no PTB tokenizer)"]
        return means, bleu, None, [*notes, "METEOR, SPICE, SPIDEr: not computed: no Java"]
    notes, jar = [rule + "PTB tokenizer"], Meteor()  # a Java process, which ends with the object
    lines = [[jar._stat(pred, refs[n]) for n, (pred,) in preds.items()] for preds in trials]
    meteor = np.array([[line.split() for line in part] for part in lines], dtype=np.float64)
    meteor[..., 20] *= (meteor[..., 21:] != meteor[..., :2]).any(-1) | (
        meteor[..., 20] > 1
    )  # A whole match has no gap.
    try:
        means["SPICE"] = np.array([_spice(refs, preds) for preds in trials])
    except CalledProcessError as error:  # Its message has the names of temporary files.
        notes.append(f"SPICE, SPIDEr: not computed: java ended with {error.returncode}")
    except OSError as error:
        notes.append(f"SPICE, SPIDEr: not computed: {error}")
    return means, bleu, meteor, notes


def _bleu_counts(refs: Captions, preds: Captions) -> list[list[int]]:
    """Of each clip: length, that of the nearest reference, n-grams for n = 1 to 4, those found in a reference."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for n, (pred,) in preds.items():
        scorer += (pred, refs[n])
    nearest = [
        min((abs(length - clip["testlen"]), length) for length in clip["reflen"])[1]
        for clip in scorer.ctest
    ]
    return [
        [c["testlen"], n, *c["guess"], *c["correct"]]
        for c, n in zip(scorer.ctest, nearest, strict=True)
    ]


def _bleu(counts: np.ndarray) -> np.ndarray:
    """(trials, 10) -> BLEU-1 to -4 (4, trials). The small numbers against 0 / 0 are pycocoevalcap's."""
    length, nearest, guess, correct = np.split(counts.astype(np.float64), (1, 2, 6), axis=1)
    bleu = np.cumprod((correct + 1e-15) / (guess + 1e-9), axis=1) ** (1 / np.arange(1, 5))
    return (bleu * np.exp(np.minimum(0, 1 - (nearest + 1e-9) / (length + 1e-15)))).T


def _meteor(counts: np.ndarray) -> np.ndarray:
    """(trials, 23) -> METEOR (trials,), as the jar makes it from summed counts."""
    length, function, matches, chunks, matched = np.split(
        counts, (2, 4, 20, 21), axis=1
    )  # (answer, reference) or one
    found = np.einsum("tskr,s,k->tr", matches.reshape(-1, 4, 2, 2), STAGES, WORDS)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = (found / (WORDS[0] * (length - function) + WORDS[1] * function)).T
        mean = precision * recall / ((1 - ALPHA) * recall + ALPHA * precision)
        scattered = chunks[:, 0] / matched.mean(1)
    return np.nan_to_num(mean * (1 - GAMMA * scattered**BETA))


def _spice(refs: Captions, preds: Captions) -> np.ndarray:
    from pycocoevalcap.spice import spice

    if (
        not Path(spice.__file__)
        .with_name("lib")
        .joinpath("stanford-corenlp-3.6.0-models.jar")
        .is_file()
    ):
        raise FileNotFoundError(
            "no CoreNLP models (python -m pycocoevalcap.spice.get_stanford_models brings them)"
        )
    return np.nan_to_num([clip["All"]["f"] for clip in spice.Spice().compute_score(refs, preds)[1]])
