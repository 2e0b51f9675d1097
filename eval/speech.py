"""Scores answers about speech: word error rate, gender and age of the speaker.

The transcript of an answer is the text after "spoken text:". `wer` compares upper case without
punctuation ("don't" is DONT). `wer_substituted` uses the transcript of Whisper where the answer
contains it. `wer_normalized` uses Whisper's normalizer.

The original has bugs: every answer contains an empty transcript, which then replaces the answer,
and "CAT" contains "A"; an answer without "female" is male, "woman" and "" too; "20 to 30" is 20 and
"30s" is no age. The strict protocol looks for whole words of the transcript, needs one gender and
only one, and reads "20 to 30" as 25 and the 30s as 35.

An answer about age without a number fails. `coverage` is the fraction of answers with an age.

Neither a word error rate nor an error of age has a worst value: an answer may have any number of
wrong words. Over all answers the strict protocol therefore bounds the error of each, and a missing
answer has the largest: in `wer_bounded` as many wrong words as its reference has, and the distance
to the farthest age from 0 to OLDEST years. `wer`, which is not bounded, has no value then. Over the
answered ones nothing is bounded.
"""

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jiwer
import numpy as np
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from eval.classification import choice_metrics, confusion_counts
from eval.scorer_interface import Context, Outcome, is_empty, start_items
from eval.tasks import Task

GENDERS = ["female", "male"]
FEMALE = re.compile(r"\b(female|wom[ae]n|girl|lady|she|her)\b", re.IGNORECASE)
MALE = re.compile(r"\b(male|m[ae]n|boy|gentleman|he|his|him)\b", re.IGNORECASE)
YEARS = r"(?<![\w.])(\d{1,3}(?:\.\d+)?)"
# A number of years or decades, or a range of them; "5th" is none, "70yo" is one.
AGE = re.compile(
    YEARS
    + r"(?:'?s?\s*(?:-|–|—|to\b|and\b)\s*(\d{1,3}(?:\.\d+)?))?('?s\b)?"
    + r"(?!\d|\.\d|st\b|nd\b|rd\b|th\b)"
)
OLDEST = 120.0  # years; no speaker is older
ORIGINAL_AGE = re.compile(r"\b(\d+(?:-\d+)?)\b")


def spoken(text: str) -> str:
    """Return the transcript in an answer or a reference, in lower case."""
    return text.lower().split("spoken text: ")[-1].replace("spoken text:", "").lstrip()


def bare(text: str) -> str:
    """Return a text in upper case without punctuation."""
    return jiwer.RemovePunctuation()(text.upper())


def substituted(answer: str, transcript: str, protocol: str) -> str:
    """Return Whisper's transcript if the answer contains it, else the answer.

    Both are without punctuation and in upper case.
    """
    if protocol == "original":
        is_contained = transcript in answer
    else:
        inner = f" {' '.join(transcript.split())} "
        outer = f" {' '.join(answer.split())} "
        is_contained = inner in outer
    return transcript if is_contained else answer


def word_error_rate(predictions: list[dict], task: Task, context: Context) -> Outcome:
    """Score word errors, summed over all predictions and divided by the words of the references.

    In the strict protocol the rates over all predictions have no value if an answer failed: no
    number of errors is that of the worst answer. The bounded rates, in which an answer has at most
    as many errors as its reference has words, count it as that many.
    """
    # Find the file without importing whisper, which takes seconds.
    spellings = Path(find_spec("whisper").origin).parent / "normalizers" / "english.json"
    normalize = EnglishTextNormalizer(json.loads(spellings.read_text(encoding="utf-8")))
    items = start_items(predictions, context)
    counts: dict[str, list[tuple[int, int]]] = {}  # metric -> (errors, words) of each item
    for index, item in enumerate(items):
        reference = spoken(item["ref"])
        answer = ""
        if item["failed"] is None:
            answer = spoken(item["pred"])
            # An answer that is only "Spoken text:" would have fewer errors than a wrong one.
            if context.protocol == "strict" and is_empty(answer):
                item["failed"] = "no transcript"
        pairs = {
            "wer": (bare(reference), bare(answer)),
            "wer_normalized": (normalize(reference), normalize(answer)),
        }
        if not bare(reference).split():
            raise context.error(index, "the reference has no words. Leave the prediction out.")
        if context.whisper is not None:
            transcript = _whisper_transcript(index, item, context)
            answer_or_transcript = substituted(bare(answer), transcript, context.protocol)
            pairs["wer_whisper"] = (bare(reference), transcript)
            pairs["wer_substituted"] = (bare(reference), answer_or_transcript)
        item["words"] = {}
        item["errors"] = {}
        for name, pair in pairs.items():
            found = jiwer.process_words(*pair)
            words = found.hits + found.substitutions + found.deletions
            errors = found.substitutions + found.deletions + found.insertions
            item["words"][name] = words
            item["errors"][name] = errors
            counts.setdefault(name, []).append((errors, words))
    count_arrays = {name: np.array(pairs) for name, pairs in counts.items()}  # (items, 2) each

    def compute(indices: np.ndarray) -> dict[str, float]:
        metrics = {}
        for name, pairs in count_arrays.items():
            metrics[name] = error_rate(pairs[indices])
        return metrics

    is_complete = all(item["failed"] is None for item in items)

    def compute_all() -> dict[str, float]:
        metrics = {}
        for name, pairs in count_arrays.items():
            metrics[name] = float("nan")
            if is_complete:
                metrics[name] = error_rate(pairs)
            words = pairs[:, 1:]
            metrics[f"{name}_bounded"] = error_rate(np.minimum(pairs, words))
        return metrics

    outcome = Outcome(items, compute)
    if context.whisper is None:
        outcome.notes.append("wer_substituted: not computed: no Whisper transcripts")
    if context.protocol == "strict":
        outcome.compute_all = compute_all
        outcome.notes.append(
            "on all: wer_bounded counts at most as many errors of an answer as its reference has "
            "words"
        )
        if not is_complete:
            outcome.notes.append("on all: wer has no value, because answers are missing")
    return outcome


def error_rate(counts: np.ndarray) -> float:
    """Return the sum of errors divided by the sum of words, of (items, 2) errors and words.

    It is nan without words: Whisper's normalizer may leave none, as it removes all of "hmm".
    """
    errors, words = counts.sum(0)
    return float(errors / words) if words else float("nan")


def _whisper_transcript(index: int, item: dict, context: Context) -> str:
    """Return Whisper's transcript of a clip in upper case without punctuation.

    It is optional if the answer failed.
    """
    transcript = context.whisper.get(item["audio_id"])
    if transcript is None and item["failed"] is None:
        reason = f"no Whisper transcript of {item['audio_id']!r}."
        raise context.error(index, f"{reason} Give one for each clip, or none.")
    return bare(spoken(transcript or ""))


def read_gender(text: str, protocol: str) -> str | None:
    """Return one of GENDERS, None if the text names none or both."""
    if protocol == "original":
        return "female" if "female" in text.lower() else "male"
    is_female = FEMALE.search(text) is not None
    is_male = MALE.search(text) is not None
    if is_female == is_male:
        return None
    return "female" if is_female else "male"


def _read_values(
    predictions: list[dict],
    context: Context,
    read_reference: Callable,
    read_answer: Callable,
    complaint: str,
    failed: str,
) -> list[dict]:
    """Return items with `reference` and `chosen`.

    Args:
        read_reference: Maps text and protocol to the value of a reference, or to None.
        read_answer: Maps text and protocol to the value of an answer, or to None.
        complaint: End of the error message about a reference without a value.
        failed: Reason of the failure of an answer without a value.
    """
    items = start_items(predictions, context)
    for index, item in enumerate(items):
        item["reference"] = read_reference(item["ref"], context.protocol)
        if item["reference"] is None:
            raise context.error(index, f"the reference {item['ref']!r} {complaint}. Fix it.")
        item["chosen"] = None
        if item["failed"] is None:
            item["chosen"] = read_answer(item["pred"], context.protocol)
            if item["chosen"] is None:
                item["failed"] = failed
    return items


def gender(predictions: list[dict], task: Task, context: Context) -> Outcome:
    """Score the gender of the speaker: accuracy and F1.

    In the strict protocol an answer that does not name one gender counts as the wrong one.
    """
    items = _read_values(
        predictions,
        context,
        read_reference=read_gender,
        read_answer=read_gender,
        complaint="does not name one gender",
        failed="not one gender",
    )
    numbers = {"female": 0, "male": 1, None: -1}
    reference = np.empty(len(items), dtype=int)
    chosen = np.empty(len(items), dtype=int)
    for index, item in enumerate(items):
        item["right"] = item["reference"] == item["chosen"]
        reference[index] = numbers[item["reference"]]
        chosen[index] = numbers[item["chosen"]]

    def compute(indices: np.ndarray) -> dict[str, float]:
        # As scikit-learn does, leave out a class that is in no reference and no answer.
        return choice_metrics(reference[indices], chosen[indices], 2, context.protocol)

    return Outcome(items, compute, confusion=(GENDERS, confusion_counts(reference, chosen, 2)))


def read_age(text: str, protocol: str) -> float | None:
    """Return the age in years, None if the text has no number that states one."""
    if protocol == "original":
        match = ORIGINAL_AGE.search(text)
        return _mean(match[1].split("-")) if match else None
    match = AGE.search(text)
    if match is None:
        return None
    first, last, is_decade = match.groups()
    years = _mean([first, last] if last else [first])
    if is_decade:
        years += 5
    return years


def _mean(numbers: list[str]) -> float:
    return sum(map(float, numbers)) / len(numbers)


def reference_age(reference: str, protocol: str) -> float | None:
    """Return the age of a reference in years, None if it has none or several.

    The original takes the last word without its last character.
    """
    if protocol == "strict":
        numbers = re.findall(YEARS, reference)
        return float(numbers[0]) if len(numbers) == 1 else None
    last = reference.split(" ")[-1][:-1]
    return float(last) if last.isdecimal() else None


def age(predictions: list[dict], task: Task, context: Context) -> Outcome:
    """Score the age of the speaker: mean absolute error in years and Pearson's r.

    Over all predictions, also the fraction that names an age. In the strict protocol, an answer
    over all predictions is at most as wrong as the farthest age from 0 to OLDEST years, which is
    the error of a missing one. Pearson's r has no value if an age is missing. The original leaves
    missing ages out.
    """
    items = _read_values(
        predictions,
        context,
        read_reference=reference_age,
        read_answer=read_age,
        complaint="does not end with one age in years",
        failed="no age",
    )
    reference = np.array([item["reference"] for item in items], dtype=float)
    predicted = np.array([item["chosen"] for item in items], dtype=float)  # None becomes nan

    errors = np.abs(reference - predicted)
    is_named = ~np.isnan(predicted)

    def compute(indices: np.ndarray) -> dict[str, float]:
        named = indices[is_named[indices]]
        metrics = {"mae": float("nan"), "pearson": float("nan")}
        if len(named):
            metrics["mae"] = float(errors[named].mean())
        # Without spread the correlation is not defined.
        if len(named) > 1 and np.ptp(reference[named]) > 0 and np.ptp(predicted[named]) > 0:
            metrics["pearson"] = float(np.corrcoef(reference[named], predicted[named])[0, 1])
        return metrics

    def compute_all() -> dict[str, float]:
        metrics = compute(np.arange(len(items)))
        if context.protocol == "strict":
            largest = np.maximum(np.abs(reference), np.abs(OLDEST - reference))
            bounded = np.fmin(errors, largest)  # fmin ignores the nan of a missing age
            metrics["mae"] = float(bounded.mean())
            if not is_named.all():
                metrics["pearson"] = float("nan")
        return metrics | {"coverage": float(is_named.mean())}

    notes = []
    if context.protocol == "strict":
        notes.append(f"on all: the error of an age is at most that of 0 or of {OLDEST:g} years")
    return Outcome(items, compute, notes=notes, compute_all=compute_all)
