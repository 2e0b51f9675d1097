"""Scores predictions against a fixed set of classes.

The predicted class is the one whose text has the nearest embedding, or the one to which the model
gives the highest likelihood.

Options of a task: `labels` is a file in eval/labels with one class per line and ` | ` before other
spellings of it; `prefix` is put before every embedded text; `answer` and `truth` name how the
original reads predictions and references; `separator` separates several references; with `mode`
"max" the original clips negative cosines to 0; with `scores` it ranks by cosines, else by 1 for the
chosen class and 0 for the others.

The strict protocol removes from a prediction only a leading "Audio caption:" or the like and
quotes. It collapses white space everywhere, matches a reference whatever its case, commas and
underscores, and leaves out classes without positives.
"""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np

from eval.ranking_metrics import Ranking
from eval.scorer_interface import Context, EvaluationError, Outcome, start_items, without_lead
from eval.tasks import Task

LABELS = Path(__file__).parent / "labels"
ROWS_AT_ONCE = 256  # rows of cosines per block, so that a block fits the processor's cache
WORK = 10**9  # scores that a bootstrap may read: 94 resamples of 20,000 x 527

# How the evaluators of the original read a prediction ...
ANSWERS: dict[str, Callable[[str], str]] = {
    # A caption with a second colon ("at 10:30 a dog barks") loses all but its tail.
    "after_colon": lambda text: text.split(":")[-1].lstrip().lower(),
    # The first character is lost too, unless it is a space: "Loud dog" -> "oud dog".
    "after_colon_cut": lambda text: text.split(":")[-1][1:].lower(),
    # Two characters are lost without the phrase, one if no space follows its colon.
    "after_phrase": lambda text: text.replace('"', "").split("Audio caption")[-1][2:].lower(),
    # The case and a leading "Emotion:" stay, which the texts of classes never have.
    "whole": lambda text: text.lstrip(),
}
# ... and a reference. A class name with two spaces ("pigeon,  dove cooing") matches only a
# reference with two spaces.
REFERENCE_READERS: dict[str, Callable[[str], str]] = {
    "after_colon": lambda text: text.split(":")[-1],
    "lstrip": lambda text: text.split(":")[-1].lstrip(),
    "no_comma": lambda text: text.split(":")[-1].replace(",", ""),
    "no_underscore": lambda text: text.split(":")[-1].replace("_", " "),
    "no_hyphenation": lambda text: text.split(":")[-1].replace("\u00ad", "").replace(",", ""),
    "after_colon_space": lambda text: text.split(": ")[-1],
    "after_colon_space_lower": lambda text: text.split(": ")[-1].lower(),
    "first_sentence": lambda text: text.split(":")[-1].split(".")[0].lstrip(),
}


def plain(name: str) -> str:
    """Normalize the name of a class, so that different spellings of it are equal."""
    name = re.sub(r"[_,\s]+", " ", name.replace("\u00ad", ""))
    return " ".join(name.strip(" .\"'").lower().split())


class Classes:
    """The names and embedded texts of the classes of a task, and how texts are read.

    Raises:
        EvaluationError: Two classes have the same key.
    """

    def __init__(self, task: Task, protocol: str):
        self.is_strict = protocol == "strict"
        self.prefix = task.options.get("prefix", "")
        self.rule = task.options.get("truth", "after_colon")
        self.separator = task.options.get("separator")
        self.read = ANSWERS[task.options.get("answer", "after_colon")]
        lines = (LABELS / task.options["labels"]).read_text(encoding="utf-8").splitlines()
        spellings = [line.split(" | ") for line in lines]
        self.names = [names[0] for names in spellings]
        self.texts = [self.text(name.replace("_", " ").lower()) for name in self.names]
        self.numbers: dict[str, int] = {}
        for number, names in enumerate(spellings):
            keys = [plain(name) for name in names] if self.is_strict else names[:1]
            for key in keys:
                if self.numbers.setdefault(key, number) != number:
                    raise EvaluationError(
                        f"{task.options['labels']}, row {number + 1}: {key!r} is there twice."
                    )

    def text(self, content: str) -> str:
        """Return the text that is embedded for a class or for the content of a prediction."""
        if self.is_strict:
            content = " ".join(content.split())
        return self.prefix + content

    def answer(self, answer: str) -> str:
        """Return the text that is embedded for a prediction."""
        return self.text(without_lead(answer).lower() if self.is_strict else self.read(answer))

    def reference_numbers(self, reference: str) -> list[int]:
        """Return the numbers of the classes that a reference names.

        Raises:
            KeyError: The reference names something that is no class.
        """
        if not self.is_strict:
            text = REFERENCE_READERS[self.rule](reference)
            names = text.split(self.separator) if self.separator else [text]
            return [self.numbers[name] for name in names]
        text = reference.split(":")[-1]
        if self.rule == "first_sentence":
            text = re.split("[.,]", text)[0]
        names = text.split(self.separator[0]) if self.separator else [text]
        return [self.numbers[plain(name)] for name in names]


def cosines(answers: np.ndarray, classes: np.ndarray, protocol: str) -> np.ndarray:
    """Return the (answers, classes) cosines of (answers, dim) and (classes, dim) embeddings.

    The original sums in a Python loop. "original" does the same for all pairs at once, so the
    result is equal to the last bit, which decides ties.
    """
    norms = [np.sqrt(np.cumsum(vectors**2, axis=1)[:, -1:]) for vectors in (answers, classes)]
    if not min(norm.min(initial=1) for norm in norms) > 0:
        raise EvaluationError(
            "An embedding is all zeros or not a number. Fix the table, or use another embedder."
        )
    if protocol == "strict":
        return (answers / norms[0]) @ (classes / norms[1]).T
    products = np.zeros((len(answers), len(classes)))
    for start in range(0, len(answers), ROWS_AT_ONCE):
        block = products[start : start + ROWS_AT_ONCE]
        for left, right in zip(answers[start : start + ROWS_AT_ONCE].T, classes.T, strict=True):
            block += left[:, None] * right
    return products / (norms[0] * norms[1].T)


def class_scores(items: list[dict], classes: Classes, task: Task, context: Context) -> np.ndarray:
    """Return (items, classes) scores, -inf for an item without an answer."""
    failed = np.array([item["failed"] is not None for item in items], dtype=bool)
    if context.label_scores is not None:
        given = context.label_scores.shape
        expected = (len(items), len(classes.names))
        if given != expected:
            raise EvaluationError(
                f"{context.source}: {given} label scores, not {expected} (rows, classes). "
                "Compute them again."
            )
        return np.where(failed[:, None], -np.inf, context.label_scores)
    if context.embed is None:
        raise EvaluationError(
            f"{context.source}: {task.name} is scored by embeddings. Give an --embedder."
        )
    is_original = context.protocol == "original"
    if is_original and task.options.get("answer") == "after_colon_cut":
        # The original prints the text before that colon.
        if ":" not in (items[0]["pred"] or ""):
            reason = "the original stops at a first prediction without a colon."
            raise context.error(0, f"{reason} Use --protocol strict.")
    answers = [classes.answer(item["pred"]) for item in items if item["failed"] is None]
    # Embed each distinct text once. Equal texts get equal scores.
    row_of_text = {text: row for row, text in enumerate(dict.fromkeys(answers))}
    embeddings = np.asarray(context.embed([*classes.texts, *row_of_text]), dtype=np.float64)
    count = len(classes.texts)
    found = cosines(embeddings[count:], embeddings[:count], context.protocol)
    if is_original and task.options.get("mode") == "max":
        found = np.maximum(found, 0)
    scores = np.full((len(items), len(classes.names)), -np.inf)
    scores[~failed] = found[[row_of_text[text] for text in answers]]
    return scores


def choice_metrics(
    reference: np.ndarray, chosen: np.ndarray, count: int, protocol: str
) -> dict[str, float]:
    """Return accuracy and F1 of (m,) class numbers; -1 means that no class was chosen.

    In the macro F1 of the original, absent classes count as 0.
    """
    reference_count = np.bincount(reference, minlength=count)
    chosen_count = np.bincount(chosen[chosen >= 0], minlength=count)
    right_count = np.bincount(reference[reference == chosen], minlength=count)
    total = reference_count + chosen_count
    f1 = 2 * right_count / np.maximum(total, 1)
    macro = f1[(total > 0) | (protocol == "original")].mean()
    micro = 2 * right_count.sum() / total.sum()
    return {
        "accuracy": float(right_count.sum() / len(reference)),
        "micro_f1": float(micro),
        "macro_f1": float(macro),
    }


def ranked_metrics(ranking: Ranking, indices: np.ndarray, protocol: str) -> dict[str, float]:
    """Return mAP, mAUC, d' and the number of classes with an AP, of the rows at (m,) indices."""
    precision, area = ranking.scores(np.bincount(indices, minlength=ranking.rows))
    if protocol == "original":
        # A class without positives counts with AP 0 and AUC -1 (scikit-learn 1.9: nan).
        precision = np.nan_to_num(precision)
        area = np.nan_to_num(area, nan=-1.0)
    else:
        precision = precision[~np.isnan(precision)]
        area = area[~np.isnan(area)]
    mean_precision = float(precision.mean()) if len(precision) else float("nan")
    mean_area = float(area.mean()) if len(area) else float("nan")
    return {
        "mAP": mean_precision,
        "mAUC": mean_area,
        "d_prime": d_prime(mean_area),
        "classes": float(len(precision)),
    }


def d_prime(area: float) -> float:
    """Return the distance of two unit-variance normal distributions with this area under the curve.

    It is nan for an area outside (0, 1).
    """
    return 2**0.5 * NormalDist().inv_cdf(area) if 0 < area < 1 else float("nan")


def single_label(rows: list[dict], task: Task, context: Context) -> Outcome:
    """Score one reference class per clip: accuracy and F1; for the original also AP and AUC."""
    return _score(rows, task, context, is_ranked=context.protocol == "original", is_single=True)


def multi_label(rows: list[dict], task: Task, context: Context) -> Outcome:
    """Score several reference classes per clip: AP and AUC.

    For the original, also compare the first reference class with the highest score.
    """
    return _score(rows, task, context, is_ranked=True, is_single=False)


def _score(
    rows: list[dict], task: Task, context: Context, is_ranked: bool, is_single: bool
) -> Outcome:
    items = start_items(rows, context)
    classes = Classes(task, context.protocol)
    count = len(classes.names)
    references = _read_references(items, classes, task, context)
    scores = class_scores(items, classes, task, context)
    is_answered = [item["failed"] is None for item in items]
    chosen = np.where(is_answered, scores.argmax(1), -1)
    first_reference = references.argmax(1)
    _add_choices(items, classes, references, chosen, is_single)

    ranking = None
    if is_ranked:
        has_scores = not is_single or task.options.get("scores", False)
        one_hot = (chosen[:, None] == np.arange(count)).astype(float)
        ranking = Ranking(scores if has_scores else one_hot, references)

    def compute(indices: np.ndarray) -> dict[str, float]:
        metrics = {}
        own_reference = first_reference[indices]
        own_chosen = chosen[indices]
        if is_single:
            metrics = choice_metrics(own_reference, own_chosen, count, context.protocol)
        if ranking:
            metrics |= ranked_metrics(ranking, indices, context.protocol)
        if not is_single and context.protocol == "original":
            metrics["accuracy"] = float((own_reference == own_chosen).mean())
        return metrics

    notes = []
    positives = references.sum(0)
    absent = int((positives == 0).sum())
    few = int(((1 <= positives) & (positives < 5)).sum())
    if is_ranked and absent:
        notes.append(f"{absent} of {count} classes have no positives")
    if few and not is_single:
        reason = "resamples repeat or lose these, which biases the interval"
        notes.append(f"{few} of {count} classes have fewer than 5 positives: {reason}")
    resamples = int(np.clip(WORK // max(scores.size, 1), 20, 1000)) if is_ranked else 1000
    confusion = None
    if is_single:
        confusion = (classes.names, confusion_counts(first_reference, chosen, count))
    return Outcome(items, compute, resamples, confusion, notes)


def _read_references(
    items: list[dict], classes: Classes, task: Task, context: Context
) -> np.ndarray:
    """Return (items, classes) bool: the classes that each reference names."""
    references = np.zeros((len(items), len(classes.names)), dtype=bool)
    for index, item in enumerate(items):
        try:
            references[index, classes.reference_numbers(item["ref"])] = True
        except KeyError as error:
            labels = f"eval/labels/{task.options['labels']}"
            reason = f"the reference {error.args[0]!r} is no class of {labels}. Fix it."
            raise context.error(index, reason) from None
    return references


def _add_choices(
    items: list[dict],
    classes: Classes,
    references: np.ndarray,
    chosen: np.ndarray,
    is_single: bool,
) -> None:
    """Add the reference classes, the chosen class and whether it is right to each item."""
    for row, (item, number) in enumerate(zip(items, chosen, strict=True)):
        names = [classes.names[index] for index in np.flatnonzero(references[row])]
        item["truth"] = names[0] if is_single else names
        item["chosen"] = classes.names[number] if number >= 0 else None
        item["right"] = bool(number >= 0 and references[row, number])


def confusion_counts(reference: np.ndarray, chosen: np.ndarray, count: int) -> np.ndarray:
    """Return (reference, predicted) counts of the answered items."""
    is_answered = chosen >= 0
    pairs = reference[is_answered] * count + chosen[is_answered]
    return np.bincount(pairs, minlength=count * count).reshape(count, count)


def toy_category(rows: list[dict], task: Task, context: Context) -> Outcome:
    """Score category, label and form of answers to the toy set as eval.toy does.

    Both protocols are the same.
    """
    from eval.toy import Toy, score

    items = start_items(rows, context)
    reader = Toy.load().reader
    for index, item in enumerate(items):
        if reader.read(item["ref"]) is None:
            reason = f"the reference {item['ref']!r} has no form of data/toy/questions.json."
            raise context.error(index, reason)
    predictions = []
    for item in items:
        predictions.append(item if item["failed"] is None else item | {"pred": None})
    hits = score(predictions, reader)
    for item, is_right in zip(items, hits["category"], strict=True):
        item["right"] = is_right
    keys = {"accuracy": "category", "exact_label": "label", "in_form": "in_form"}
    found = {name: np.array(hits[key], dtype=float) for name, key in keys.items()}

    def compute(indices: np.ndarray) -> dict[str, float]:
        return {name: float(values[indices].mean()) for name, values in found.items()}

    return Outcome(items, compute)
