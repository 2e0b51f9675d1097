"""Speech: word error rate, the speaker's gender and age.

Notable:
- Words are what follows "spoken text:". `wer` compares upper case without punctuation ("don't" is DONT);
  `wer_substituted` takes Whisper's transcript where the answer holds it; `wer_normalized` follows Whisper's normaliser.
- Slips of the original: an empty transcript is held by every answer and empties it, "A" by "CAT"; whatever lacks
  "female" is male, "woman" and "" too; "20 to 30" is 20, "30s" is no age. Strict: a transcript has to stand there as
  words; one gender and only one has to be named; "20 to 30" is 25 and the 30s are 35.
- An age without a number is failed: the error is over those that have one, `coverage` says how many that are.
"""

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jiwer
import numpy as np

from eval.closed import choice_figures, table
from eval.score_result import Context, Outcome, start_items
from eval.tasks import Task

GENDERS = ["female", "male"]
FEMALE = re.compile(r"\b(female|wom[ae]n|girl|lady|she|her)\b", re.IGNORECASE)
MALE = re.compile(r"\b(male|m[ae]n|boy|gentleman|he|his|him)\b", re.IGNORECASE)
YEARS = r"(?<![\w.])(\d{1,3}(?:\.\d+)?)"
# A number or a range of them, of years or decades; "5th" is none, "70yo" is one.
AGE = re.compile(
    YEARS
    + r"(?:'?s?\s*(?:-|–|—|to\b|and\b)\s*(\d{1,3}(?:\.\d+)?))?('?s\b)?(?!\d|\.\d|st\b|nd\b|rd\b|th\b)"
)
ORIGINAL_AGE = re.compile(r"\b(\d+(?:-\d+)?)\b")


def spoken(text: str) -> str:
    """The words of an answer or a reference, in lower case."""
    return text.lower().split("spoken text: ")[-1].replace("spoken text:", "").lstrip()


def bare(text: str) -> str:
    """Upper case, no punctuation."""
    return jiwer.RemovePunctuation()(text.upper())


def substituted(words: str, transcript: str, protocol: str) -> str:
    """Whisper's transcript if the words hold it, else the words; both bare."""
    if protocol == "original":
        return transcript if transcript in words else words
    inner, outer = (f" {' '.join(text.split())} " for text in (transcript, words))
    return transcript if inner in outer else words


def word_error_rate(rows: list[dict], task: Task, context: Context) -> Outcome:
    """Errors by words of the references, of all rows together; a failed answer lacks all words."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    spellings = (
        Path(find_spec("whisper").origin).parent / "normalizers" / "english.json"
    )  # Importing it takes seconds.
    normalize = EnglishTextNormalizer(json.loads(spellings.read_text(encoding="utf-8")))
    items = start_items(rows, context)
    for index, item in enumerate(items):
        truth, answer = spoken(item["ref"]), "" if item["failed"] else spoken(item["pred"])
        pairs = {
            "wer": (bare(truth), bare(answer)),
            "wer_normalized": (normalize(truth), normalize(answer)),
        }
        if not pairs["wer"][0].split():
            raise context.error(index, "the reference has no words. Leave the row out.")
        if context.whisper is not None:
            heard = context.whisper.get(item["audio_id"])
            if heard is None and not item["failed"]:
                raise context.error(
                    index,
                    f"no Whisper transcript of {item['audio_id']!r}. Give each clip's, or none.",
                )
            heard = bare(spoken(heard or ""))
            said = substituted(bare(answer), heard, context.protocol)
            pairs |= {"wer_whisper": (bare(truth), heard), "wer_substituted": (bare(truth), said)}
        found = {name: jiwer.process_words(*pair) for name, pair in pairs.items()}
        item["words"] = {
            name: one.hits + one.substitutions + one.deletions for name, one in found.items()
        }
        item["errors"] = {
            name: one.substitutions + one.deletions + one.insertions for name, one in found.items()
        }
    names = items[0]["words"] if items else {}
    counts = {
        name: np.array([(item["errors"][name], item["words"][name]) for item in items])
        for name in names
    }

    def compute(indices: np.ndarray) -> dict[str, float]:
        sums = {name: pairs[indices].sum(0) for name, pairs in counts.items()}
        # Whisper's normaliser may leave no words: it takes out all of "hmm".
        return {
            name: float(errors / words) if words else float("nan")
            for name, (errors, words) in sums.items()
        }

    notes = (
        []
        if context.whisper is not None
        else ["wer_substituted: not computed: no Whisper transcripts"]
    )
    return Outcome(items, compute, notes=notes)


def read_gender(text: str, protocol: str) -> str | None:
    """One of GENDERS; None if none is named, or both are."""
    if protocol == "original":
        return "female" if "female" in text.lower() else "male"
    is_female, is_male = bool(FEMALE.search(text)), bool(MALE.search(text))
    return None if is_female == is_male else GENDERS[is_male]


def _read(
    rows: list[dict], context: Context, read: tuple[Callable, Callable], complaint: str, failed: str
) -> list[dict]:
    """Items with `truth` and `chosen`, as two functions of text and protocol read references and answers."""
    items = start_items(rows, context)
    for index, item in enumerate(items):
        item["truth"] = read[0](item["ref"], context.protocol)
        if item["truth"] is None:
            raise context.error(index, f"the reference {item['ref']!r} {complaint}. Mend it.")
        item["chosen"] = None if item["failed"] else read[1](item["pred"], context.protocol)
        if item["chosen"] is None and not item["failed"]:
            item["failed"] = failed
    return items


def gender(rows: list[dict], task: Task, context: Context) -> Outcome:
    """Accuracy and F1."""
    items = _read(
        rows, context, (read_gender, read_gender), "does not name one gender", "not one gender"
    )
    for item in items:
        item["right"] = item["truth"] == item["chosen"]
    numbers = {"female": 0, "male": 1, None: -1}
    truth, chosen = (
        np.array([numbers[item[key]] for item in items], dtype=int) for key in ("truth", "chosen")
    )

    def compute(
        indices: np.ndarray,
    ) -> dict[str, float]:  # scikit-learn leaves out a class that is nowhere.
        return choice_figures(truth[indices], chosen[indices], 2, "strict")

    return Outcome(items, compute, confusion=(GENDERS, table(truth, chosen, 2)))


def read_age(text: str, protocol: str) -> float | None:
    """Years; None if no number says them."""
    match = (AGE if protocol == "strict" else ORIGINAL_AGE).search(text)
    if match is None:
        return None
    numbers = (
        [number for number in match.groups()[:2] if number]
        if protocol == "strict"
        else match[1].split("-")
    )
    decade = 5 if protocol == "strict" and match[3] else 0
    return sum(map(float, numbers)) / len(numbers) + decade


def true_age(reference: str, protocol: str) -> float | None:
    """Years of a reference; None if it has none, or several. The original: the last word, less one character."""
    last = reference.split(" ")[-1][:-1]
    numbers = re.findall(YEARS, reference) if protocol == "strict" else [last] * last.isdecimal()
    return float(numbers[0]) if len(numbers) == 1 else None


def age(rows: list[dict], task: Task, context: Context) -> Outcome:
    """Mean absolute error in years and Pearson's r; of all rows also how many name an age."""
    items = _read(
        rows, context, (true_age, read_age), "does not end with one age in years", "no age"
    )
    true, said = (
        np.array([item[key] for item in items], dtype=float) for key in ("truth", "chosen")
    )  # None: nan

    def compute(indices: np.ndarray) -> dict[str, float]:
        named = indices[~np.isnan(said[indices])]
        coverage = {"coverage": len(named) / len(items)} if len(indices) == len(items) else {}
        if context.protocol == "strict" and len(named) < len(
            indices
        ):  # All have no error if some have none.
            named = named[:0]
        pair = true[named], said[named]
        is_spread = len(named) > 1 and min(np.ptp(values) for values in pair) > 0
        error = float(np.abs(pair[0] - pair[1]).mean()) if len(named) else float("nan")
        correlation = float(np.corrcoef(*pair)[0, 1]) if is_spread else float("nan")
        return {"mae": error, "pearson": correlation} | coverage

    return Outcome(items, compute)
