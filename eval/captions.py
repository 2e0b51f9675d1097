"""Scores captions with CIDEr-D, BLEU-1 to -4 and ROUGE-L, and with METEOR and SPICE if possible.

METEOR and SPICE need Java and their models. Every metric is that of `pycocoevalcap`, whose Cider is
CIDEr-D.

A clip is identified by its file name and has one prediction for each of its references. Trial t
scores prediction t of each clip against all references of that clip. A metric is the mean over the
trials (five in the paper), reported with its standard deviation. The original takes the first five
predictions of a clip and needs Java: another tokenizer gives other values.

BLEU and METEOR of several clips are not means over clips. As in pycocoevalcap, they are computed
from summed counts. The document frequencies of CIDEr-D are those of all clips.

A missing caption has CIDEr-D, ROUGE-L and SPICE 0, as the worst caption. In the strict protocol,
BLEU and METEOR over clips of which a caption is missing have no value. From summed counts, a wrong
caption also lowers the precision of the others, the more the longer it is; so an empty one, which
only lowers the recall, could be better than a wrong one.
"""

import shutil
import string
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import numpy as np

from eval.scorer_interface import (
    Context,
    EvaluationError,
    Outcome,
    start_items,
    without_answer_prefix,
)
from eval.tasks import Task

Captions = dict[int, list[str]]  # index of a clip -> its captions
ORIGINAL_TRIALS = 5  # the original scores the first five predictions of a clip
CORPUS_METRICS = {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR"}  # from summed counts
PUNCTUATION = str.maketrans("", "", string.punctuation)
# Parameters of METEOR 1.5 for English.
MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym and paraphrase matches
WORD_WEIGHTS = np.array([0.75, 0.25])  # content and function words
ALPHA = 0.85
BETA = 0.2
GAMMA = 0.6


@dataclass
class TrialScores:
    """The scores of every clip in every trial.

    Args:
        means: name -> (trials, clips) scores, for each metric that is a mean over clips.
        bleu: (trials, clips, 10) counts, as `_bleu_counts` returns them.
        meteor: (trials, clips, 23) counts of the METEOR jar; None without Java.
        notes: notes for the report.
    """

    means: dict[str, np.ndarray]
    bleu: np.ndarray
    meteor: np.ndarray | None
    notes: list[str]


def captions(predictions: list[dict], task: Task, context: Context) -> Outcome:
    """Score captions; an item is a clip.

    A clip fails if one of its predictions failed; that caption is empty (strict: whatever text
    came with its failure).

    Raises:
        EvaluationError: The clips have unequal numbers of predictions (original: fewer than five),
            or pycocoevalcap is not installed.
    """
    clips = _group_by_clip(predictions, context)
    items = [_make_item(clip) for clip in clips]
    if context.protocol == "original" and not shutil.which("java"):
        note = "not computed: no Java, which runs the original's tokenizer"
        return Outcome(items, lambda indices: {}, notes=[note])
    reference_texts = _texts(clips, "ref", context)
    answer_texts = _texts(clips, "pred", context)
    try:
        tokens = _tokenize(set(chain(*reference_texts, *answer_texts)))
        references = _tokens_by_clip(reference_texts, tokens)
        answers = _tokens_by_clip(answer_texts, tokens)
        trials = [_trial(answers, number) for number in range(len(clips[0]))]
        scores = _score(references, trials)
    except ImportError as error:
        raise EvaluationError(f"{error}: captions need it. pip install -e '.[eval]'") from None
    for name, values in scores.means.items():
        for item, mean in zip(items, values.mean(0), strict=True):
            item[name] = float(mean)

    is_complete = all(item["failed"] is None for item in items)

    def compute(indices: np.ndarray) -> dict[str, float]:
        found = {}
        for name, values in _metrics(scores, indices).items():
            found[name] = float(np.mean(values))
            found[f"{name} std"] = float(np.std(values))
        return found

    def compute_all() -> dict[str, float]:
        found = compute(np.arange(len(items)))
        if context.protocol == "strict" and not is_complete:
            for name in found.keys() & CORPUS_METRICS:
                found |= {name: float("nan"), f"{name} std": float("nan")}
        return found

    num_scored = sum(map(len, clips))
    left_out = len(predictions) - num_scored
    if left_out:
        scores.notes.append(f"{left_out} predictions left out: the first five of a clip count")
    if context.protocol == "strict" and not is_complete:
        scores.notes.insert(
            1, "on all: BLEU and METEOR have no value, because captions are missing"
        )
    return Outcome(items, compute, notes=scores.notes, compute_all=compute_all)


def _metrics(scores: TrialScores, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics (trials,) of the clips at these indices, by name."""
    metrics = {}
    for name, values in scores.means.items():
        metrics[name] = values[:, indices].mean(1)
    for order, values in enumerate(_bleu(scores.bleu[:, indices].sum(1)), start=1):
        metrics[f"BLEU-{order}"] = values
    if scores.meteor is not None:
        metrics["METEOR"] = _meteor(scores.meteor[:, indices].sum(1))
    if "SPICE" in metrics:
        metrics["SPIDEr"] = (metrics["CIDEr-D"] + metrics["SPICE"]) / 2
    return metrics


def _group_by_clip(predictions: list[dict], context: Context) -> list[list[dict]]:
    """Return the items of each clip, all clips with the same number of them."""
    clips: dict[str, list[dict]] = {}
    is_original = context.protocol == "original"
    for index, item in enumerate(start_items(predictions, context)):
        clip = clips.setdefault(Path(item["audio_id"] or "").name, [])
        clip.append(item)
        is_other_clip = clip[0]["audio_id"] != item["audio_id"] and not is_original
        if not item["audio_id"] or is_other_clip:
            reason = f"{item['audio_id']} is no clip, or {clip[0]['audio_id']} has the same name."
            raise context.error(index, reason)
        if is_original:
            del clip[ORIGINAL_TRIALS:]
    expected = len(next(iter(clips.values())))
    if is_original:
        expected = ORIGINAL_TRIALS
    for name, clip in clips.items():
        if len(clip) != expected:
            raise EvaluationError(
                f"{context.source}: {len(clip)} predictions for {name}, not {expected}: every clip "
                "needs one for each of its references, and all clips the same number of them."
            )
    return list(clips.values())


def _make_item(clip: list[dict]) -> dict[str, Any]:
    """Merge the items of a clip into one."""
    item = {"audio_id": clip[0]["audio_id"], "ref": [], "pred": [], "failed": None}
    for own in clip:
        item["ref"].append(own["ref"])
        item["pred"].append(own["pred"])
        item["failed"] = item["failed"] or own["failed"]
    return item


def _texts(clips: list[list[dict]], key: str, context: Context) -> list[list[str]]:
    """Return the captions of each clip; `key` is "ref" or "pred"."""
    texts = []
    for clip in clips:
        texts.append([_text(_caption(item, key, context), context) for item in clip])
    return texts


def _caption(item: dict, key: str, context: Context) -> str | None:
    """Return the reference or the answer of an item, None for an answer that failed (strict)."""
    if key == "pred" and context.protocol == "strict" and item["failed"]:
        return None
    return item[key]


def _text(text: str | None, context: Context) -> str:
    """Return a caption in lower case without prefix and ASCII punctuation, with single spaces."""
    if context.protocol == "original":
        # The original drops a letter where there is no prefix, and all that precedes "10:30".
        text = (text or "").split(":")[-1][1:]
    else:
        text = without_answer_prefix(text or "")
    return " ".join(text.translate(PUNCTUATION).lower().split())


def _tokenize(texts: set[str]) -> dict[str, str]:
    """Return the tokens of each text, joined by single spaces."""
    sorted_texts = sorted(texts - {""})  # An empty text would shift the lines of the tokenizer.
    if not shutil.which("java") or not sorted_texts:
        return {text: text for text in texts}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    inputs = {}
    for number, text in enumerate(sorted_texts):
        inputs[number] = [{"caption": text}]
    tokenized = PTBTokenizer().tokenize(inputs)
    if len(tokenized) != len(sorted_texts):
        raise EvaluationError(
            f"The PTB tokenizer returned {len(tokenized)} of {len(sorted_texts)} captions. "
            "Check that java runs."
        )
    tokens = {"": ""}
    for number, text in enumerate(sorted_texts):
        tokens[text] = tokenized[number][0]
    return tokens


def _tokens_by_clip(texts: list[list[str]], tokens: dict[str, str]) -> Captions:
    found = {}
    for number, clip in enumerate(texts):
        found[number] = [tokens[text] for text in clip]
    return found


def _trial(answers: Captions, trial: int) -> Captions:
    """Return one answer of each clip."""
    return {number: [clip[trial]] for number, clip in answers.items()}


def _score(references: Captions, trials: list[Captions]) -> TrialScores:
    """Compute the scores and counts of every clip in every trial."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    cider = []
    rouge = []
    bleu = []
    for trial in trials:
        cider.append(Cider().compute_score(references, trial)[1])
        rouge.append(Rouge().compute_score(references, trial)[1])
        bleu.append(_bleu_counts(references, trial))
    means = {"CIDEr-D": np.array(cider), "ROUGE-L": np.array(rouge)}
    tokens = "tokens: ASCII punctuation deleted, lower case, "
    if not shutil.which("java"):
        notes = [
            f"{tokens}split at white space (no Java: no PTB tokenizer)",
            "METEOR, SPICE, SPIDEr: not computed: no Java",
        ]
        return TrialScores(means, np.array(bleu), None, notes)
    notes = [f"{tokens}PTB tokenizer"]
    jar = Meteor()  # a Java process, which ends with the object
    meteor = np.array([_meteor_counts(jar, references, trial) for trial in trials], np.float64)
    # A prediction that matches as a whole has no gap, so its single chunk does not count.
    is_partial = (meteor[..., 21:] != meteor[..., :2]).any(-1)
    meteor[..., 20] *= is_partial | (meteor[..., 20] > 1)
    try:
        means["SPICE"] = np.array([_spice(references, trial) for trial in trials])
    except CalledProcessError as error:  # Its message contains the names of temporary files.
        notes.append(f"SPICE, SPIDEr: not computed: java ended with {error.returncode}")
    except OSError as error:
        notes.append(f"SPICE, SPIDEr: not computed: {error}")
    return TrialScores(means, np.array(bleu), meteor, notes)


def _bleu_counts(references: Captions, trial: Captions) -> list[list[int]]:
    """Return ten counts for each clip.

    They are the length of the prediction, the length of the nearest reference, the numbers of
    n-grams for n = 1 to 4, and the numbers of these that a reference contains.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for number, (answer,) in trial.items():
        scorer += (answer, references[number])
    counts = []
    for clip in scorer.ctest:
        length = clip["testlen"]
        # Of two references that are equally near, the shorter one is the nearest.
        by_length = sorted(clip["reflen"])
        nearest = min(by_length, key=lambda reference: abs(length - reference))
        counts.append([length, nearest, *clip["guess"], *clip["correct"]])
    return counts


def _bleu(counts: np.ndarray) -> np.ndarray:
    """Return BLEU-1 to -4, (4, trials), from summed counts (trials, 10)."""
    length, nearest, guess, correct = np.split(counts.astype(np.float64), (1, 2, 6), axis=1)
    # The small numbers that avoid 0 / 0 are those of pycocoevalcap.
    bleu = np.cumprod((correct + 1e-15) / (guess + 1e-9), axis=1) ** (1 / np.arange(1, 5))
    brevity_penalty = np.exp(np.minimum(0, 1 - (nearest + 1e-9) / (length + 1e-15)))
    return (bleu * brevity_penalty).T


def _meteor_counts(jar: Any, references: Captions, trial: Captions) -> list[list[str]]:
    """Return the 23 counts of the METEOR jar for each clip, as text."""
    counts = []
    for number, (answer,) in trial.items():
        line = jar._stat(answer, references[number])
        counts.append(line.split())
    return counts


def _meteor(counts: np.ndarray) -> np.ndarray:
    """Return METEOR (trials,) from summed counts (trials, 23), as the jar computes it."""
    # All counts but those of chunks are of the prediction and of the reference.
    length, function, matches, chunks, matched = np.split(counts, (2, 4, 20, 21), axis=1)
    matches = matches.reshape(-1, 4, 2, 2)
    weighted = np.einsum("tskr,s,k->tr", matches, MATCH_WEIGHTS, WORD_WEIGHTS)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = WORD_WEIGHTS[0] * (length - function) + WORD_WEIGHTS[1] * function
        precision, recall = (weighted / total).T
        mean = precision * recall / ((1 - ALPHA) * recall + ALPHA * precision)
        fragmentation = chunks[:, 0] / matched.mean(1)
    return np.nan_to_num(mean * (1 - GAMMA * fragmentation**BETA))


def _spice(references: Captions, trial: Captions) -> np.ndarray:
    """Return SPICE of each clip.

    Raises:
        OSError: The CoreNLP models are not there.
    """
    from pycocoevalcap.spice import spice

    library = Path(spice.__file__).with_name("lib")
    if not (library / "stanford-corenlp-3.6.0-models.jar").is_file():
        raise FileNotFoundError(
            "no CoreNLP models (python -m pycocoevalcap.spice.get_stanford_models downloads them)"
        )
    _, scores = spice.Spice().compute_score(references, trial)
    return np.nan_to_num([clip["All"]["f"] for clip in scores])
