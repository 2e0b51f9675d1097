"""Scores predictions against a fixed set of classes.

The predicted class is the one whose text has the nearest embedding, or the one to which the model
gives the highest likelihood.

Options of a task: `labels` is a file in eval/labels with one class per line and ` | ` before other
spellings of it; `prefix` is put before every embedded text; `answer` and `reference` name how the
original reads predictions and references; `separator` separates several references; with
`clip_negative_cosines` the original raises negative cosines to 0; with `rank_by_cosine` it ranks by
cosines, else by 1 for the chosen class and 0 for the others.

The strict protocol removes from a prediction only a leading "Audio caption:" or the like and
quotes. It collapses white space everywhere, matches a reference whatever its case, commas and
underscores, and leaves out classes without positives. A missing answer counts as the worst one
there could be (`choice_metrics`, `multi_label`), so AP and F1 over all clips fall fast with each
missing answer: any class may have lost to it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np

from eval.ranking_metrics import Ranking
from eval.scorer_interface import (
    USABLE_SIZES,
    Context,
    EvaluationError,
    Outcome,
    has_usable_size,
    start_items,
    without_answer_prefix,
)
from eval.tasks import Task

LABELS = Path(__file__).parent / "labels"
BLOCK_SIZE = 256  # answers per block of cosines, so that a block fits the processor's cache
WORK = 10**9  # scores that a bootstrap may read: 94 resamples of 20,000 x 527
MIN_RESAMPLES = 20
MAX_RESAMPLES = 1000

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
        self.rule = task.options.get("reference", "after_colon")
        self.separator = task.options.get("separator")
        self.read = ANSWERS[task.options.get("answer", "after_colon")]
        self.names: list[str] = []
        self.texts: list[str] = []
        self.numbers: dict[str, int] = {}
        lines = (LABELS / task.options["labels"]).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            name, *other_spellings = line.split(" | ")
            self.names.append(name)
            self.texts.append(self.text(name.replace("_", " ").lower()))
            keys = [name]
            if self.is_strict:
                keys = [plain(spelling) for spelling in (name, *other_spellings)]
            for key in keys:
                if self.numbers.setdefault(key, number) != number:
                    raise EvaluationError(
                        f"{task.options['labels']}, line {number + 1}: {key!r} is there twice."
                    )

    def text(self, content: str) -> str:
        """Return the text that is embedded for a class or for the content of a prediction."""
        if self.is_strict:
            content = " ".join(content.split())
        return self.prefix + content

    def answer(self, answer: str) -> str:
        """Return the text that is embedded for a prediction."""
        content = without_answer_prefix(answer).lower() if self.is_strict else self.read(answer)
        return self.text(content)

    def reference_numbers(self, reference: str) -> list[int]:
        """Return the numbers of the classes that a reference names.

        Raises:
            KeyError: The reference names something that is no class.
        """
        if not self.is_strict:
            names = split_names(REFERENCE_READERS[self.rule](reference), self.separator)
            return [self.numbers[name] for name in names]
        text = reference.split(":")[-1]
        if self.rule == "first_sentence":
            text = re.split("[.,]", text)[0]
        # A space that follows the separator is optional.
        names = split_names(text, self.separator and self.separator[0])
        return [self.numbers[plain(name)] for name in names]


def split_names(text: str, separator: str | None) -> list[str]:
    """Return the names of classes in a text, which is one name if there is no separator."""
    return text.split(separator) if separator else [text]


def cosines(answers: np.ndarray, classes: np.ndarray, protocol: str) -> np.ndarray:
    """Return the (answers, classes) cosines of (answers, dim) and (classes, dim) embeddings.

    The original sums in a Python loop. "original" does the same for all pairs at once, so the
    result is equal to the last bit, which decides ties.
    """
    if not (has_usable_size(answers).all() and has_usable_size(classes).all()):
        raise EvaluationError(
            "An embedding is all zeros or not a number, or its numbers are outside "
            f"{USABLE_SIZES[0]:g} to {USABLE_SIZES[1]:g}. Fix the table, or use another embedder."
        )
    answer_norms = _norms(answers)
    class_norms = _norms(classes)
    if protocol == "strict":
        return (answers / answer_norms) @ (classes / class_norms).T
    products = np.zeros((len(answers), len(classes)))
    for start in range(0, len(answers), BLOCK_SIZE):
        end = start + BLOCK_SIZE
        block = products[start:end]
        for left, right in zip(answers[start:end].T, classes.T, strict=True):
            block += left[:, None] * right
    return products / (answer_norms * class_norms.T)


def _norms(vectors: np.ndarray) -> np.ndarray:
    """Return the norms (n, 1) of vectors (n, dim), summed from the first number to the last."""
    return np.sqrt(np.cumsum(vectors**2, axis=1)[:, -1:])


def class_scores(items: list[dict], classes: Classes, task: Task, context: Context) -> np.ndarray:
    """Return (items, classes) scores, -inf for an item without an answer."""
    shape = (len(items), len(classes.names))
    if context.label_scores is not None:
        given = context.label_scores.shape
        if given != shape:
            raise EvaluationError(
                f"{context.source}: {given} label scores, not {shape} (examples, classes). "
                "Compute them again."
            )
        return np.where(is_answered(items)[:, None], context.label_scores, -np.inf)
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
    # Embed each distinct text once. Equal texts get equal scores.
    items_of_text: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if item["failed"] is None:
            items_of_text.setdefault(classes.answer(item["pred"]), []).append(index)
    embeddings = np.asarray(context.embed([*classes.texts, *items_of_text]), dtype=np.float64)
    class_embeddings, answer_embeddings = np.split(embeddings, [len(classes.texts)])
    found = cosines(answer_embeddings, class_embeddings, context.protocol)  # (texts, classes)
    if is_original and task.options.get("clip_negative_cosines", False):
        found = np.maximum(found, 0)
    scores = np.full(shape, -np.inf)
    for indices, text_scores in zip(items_of_text.values(), found, strict=True):
        scores[indices] = text_scores
    return scores


def is_answered(items: list[dict]) -> np.ndarray:
    """Return (items,) bool: which items have an answer."""
    return np.array([item["failed"] is None for item in items], dtype=bool)


def choice_metrics(
    reference: np.ndarray,
    chosen: np.ndarray,
    count: int,
    protocol: str,
    absent_count: bool = False,
) -> dict[str, float]:
    """Return accuracy and F1 of (m,) class numbers; -1 means that no class was chosen.

    In the strict protocol an item without a class counts as one with a wrong class, a false
    negative and a false positive. The micro F1 is then the accuracy. The macro F1 is the lowest
    that any wrong classes give; it is the mean over the classes that are in a reference or chosen.
    In the original, such an item is a false negative only.

    Args:
        absent_count: Whether the macro F1 counts absent classes as 0, as the original does.
    """
    is_missing = chosen < 0
    reference_count = np.bincount(reference, minlength=count)
    chosen_count = np.bincount(chosen[~is_missing], minlength=count)
    right_count = np.bincount(reference[reference == chosen], minlength=count)
    total = reference_count + chosen_count
    num_counted = total.sum()
    if protocol == "original":
        f1 = 2 * right_count / np.maximum(total, 1)
        macro = f1[(total > 0) | absent_count].mean()
    else:
        missing_count = np.bincount(reference[is_missing], minlength=count)
        macro = lowest_macro_f1(total, right_count, missing_count)
        num_counted += is_missing.sum()
    return {
        "accuracy": float(right_count.sum() / len(reference)),
        "micro_f1": float(2 * right_count.sum() / num_counted),
        "macro_f1": float(macro),
    }


def lowest_macro_f1(total: np.ndarray, right: np.ndarray, missing: np.ndarray) -> float:
    """Return the lowest macro F1 that wrong answers in the gaps give.

    A wrong answer is one more false positive of a class that is in a reference or chosen, or it
    adds a class with F1 0 to the mean. With n wrong answers of the first kind, the others of the
    second, the lowest sum of all F1 has the n largest losses, because each further false positive
    of a class lowers its F1 by less. The result is the lowest mean over all n.

    Args:
        total: (classes,) how often a class is a reference or chosen: 2 TP + FP + FN, if each
            missing answer is an FN.
        right: (classes,) TP.
        missing: (classes,) number of missing answers by the class of their reference.
    """
    num_missing = int(missing.sum())
    num_present = int((total > 0).sum())
    has_right = right > 0  # the other classes have no F1 to lose
    twice_right = 2 * right[has_right, None]
    num_wrong = np.arange(num_missing + 1)  # of one class
    f1 = twice_right / (total[has_right, None] + num_wrong)  # (classes, missing + 1)
    losses = f1[:, :-1] - f1[:, 1:]
    # An answer that names the class of its own reference is not wrong.
    limit = num_missing - missing[has_right, None]
    losses[num_wrong[:-1] >= limit] = 0
    largest = np.sort(losses, axis=None)[::-1][:num_missing]
    sums = np.full(num_missing + 1, f1[:, 0].sum())  # by number of wrong answers of the first kind
    sums[1 : len(largest) + 1] -= np.cumsum(largest)
    sums[len(largest) + 1 :] = sums[len(largest)]
    num_added = np.minimum(num_missing - num_wrong, len(total) - num_present)
    return float((sums / (num_present + num_added)).min())


def ranked_metrics(ranking: Ranking, indices: np.ndarray, protocol: str) -> dict[str, float]:
    """Return mAP, mAUC, d' and the number of classes with an AP, of the items at (m,) indices."""
    weights = np.bincount(indices, minlength=ranking.num_examples)
    precision, area = ranking.scores(weights)
    if protocol == "original":
        # A class without positives counts with AP 0 and AUC -1 (scikit-learn 1.9: nan).
        precision = np.nan_to_num(precision)
        area = np.nan_to_num(area, nan=-1.0)
    else:
        precision = precision[~np.isnan(precision)]
        area = area[~np.isnan(area)]
    mean_area = _mean(area)
    return {
        "mAP": _mean(precision),
        "mAUC": mean_area,
        "d_prime": d_prime(mean_area),
        "classes": float(len(precision)),
    }


def _mean(values: np.ndarray) -> float:
    """Return the mean, nan if there are no values."""
    return float(values.mean()) if len(values) else float("nan")


def d_prime(area: float) -> float:
    """Return the distance of two unit-variance normal distributions with this area under the curve.

    It is nan for an area outside (0, 1).
    """
    return 2**0.5 * NormalDist().inv_cdf(area) if 0 < area < 1 else float("nan")


def single_label(predictions: list[dict], task: Task, context: Context) -> Outcome:
    """Score one reference class per clip: accuracy and F1; for the original also AP and AUC."""
    items, classes, references, scores = _score_classes(predictions, task, context)
    count = len(classes.names)
    reference = references.argmax(1)
    chosen = np.where(is_answered(items), scores.argmax(1), -1)
    _add_choices(items, classes, references, chosen)
    for item in items:
        item["reference"] = item["reference"][0]

    ranking = None
    notes = []
    if context.protocol == "original":
        if not task.options.get("rank_by_cosine", False):
            scores = (chosen[:, None] == np.arange(count)).astype(float)
        ranking = Ranking(scores, references)
        notes = _absence_notes(references)

    def compute(indices: np.ndarray) -> dict[str, float]:
        metrics = choice_metrics(
            reference[indices],
            chosen[indices],
            count,
            context.protocol,
            absent_count=context.protocol == "original",
        )
        if ranking:
            metrics |= ranked_metrics(ranking, indices, context.protocol)
        return metrics

    resamples = num_resamples(scores) if ranking else MAX_RESAMPLES
    confusion = (classes.names, confusion_counts(reference, chosen, count))
    return Outcome(items, compute, resamples, confusion, notes)


def multi_label(predictions: list[dict], task: Task, context: Context) -> Outcome:
    """Score several reference classes per clip: AP and AUC.

    In the strict protocol a clip without an answer ranks above all answers in the classes that its
    reference does not name, and is never found in those that it names. No answer is worse: each
    pair with it is in the wrong order, it lowers the precision of each positive, and its own is 0.

    For the original, also compare the first reference class with the highest score.
    """
    items, classes, references, scores = _score_classes(predictions, task, context)
    first_reference = references.argmax(1)
    chosen = np.where(is_answered(items), scores.argmax(1), -1)
    _add_choices(items, classes, references, chosen)
    if context.protocol == "strict":
        worst = np.where(references, np.nan, np.inf)
        scores = np.where(is_answered(items)[:, None], scores, worst)
    ranking = Ranking(scores, references)

    def compute(indices: np.ndarray) -> dict[str, float]:
        metrics = ranked_metrics(ranking, indices, context.protocol)
        if context.protocol == "original":
            is_right = first_reference[indices] == chosen[indices]
            metrics["accuracy"] = float(is_right.mean())
        return metrics

    notes = _absence_notes(references)
    num_positives = references.sum(0)
    num_few = int(((1 <= num_positives) & (num_positives < 5)).sum())
    if num_few:
        reason = "resamples repeat or lose these, which biases the interval"
        classes_with_few = f"{num_few} of {len(classes.names)} classes have fewer than 5 positives"
        notes.append(f"{classes_with_few}: {reason}")
    return Outcome(items, compute, num_resamples(scores), notes=notes)


def _score_classes(
    predictions: list[dict], task: Task, context: Context
) -> tuple[list[dict], Classes, np.ndarray, np.ndarray]:
    """Return items, classes, references (items, classes) bool and scores (items, classes)."""
    items = start_items(predictions, context)
    classes = Classes(task, context.protocol)
    references = _read_references(items, classes, task, context)
    scores = class_scores(items, classes, task, context)
    return items, classes, references, scores


def num_resamples(scores: np.ndarray) -> int:
    """Return the number of bootstrap resamples of ranked metrics, which take long to compute."""
    return int(np.clip(WORK // max(scores.size, 1), MIN_RESAMPLES, MAX_RESAMPLES))


def _absence_notes(references: np.ndarray) -> list[str]:
    """Return the note about classes without positives, if there are any."""
    num_absent = int((references.sum(0) == 0).sum())
    if num_absent == 0:
        return []
    return [f"{num_absent} of {references.shape[1]} classes have no positives"]


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
    items: list[dict], classes: Classes, references: np.ndarray, chosen: np.ndarray
) -> None:
    """Add the reference classes, the chosen class and whether it is right to each item.

    Args:
        references: (items, classes) bool.
        chosen: (items,) number of the chosen class, -1 for none.
    """
    for item, is_reference, number in zip(items, references, chosen, strict=True):
        item["reference"] = [classes.names[index] for index in np.flatnonzero(is_reference)]
        item["chosen"] = classes.names[number] if number >= 0 else None
        item["right"] = bool(number >= 0 and is_reference[number])


def confusion_counts(reference: np.ndarray, chosen: np.ndarray, count: int) -> np.ndarray:
    """Return (reference, predicted) counts of the answered items."""
    has_choice = chosen >= 0
    pairs = reference[has_choice] * count + chosen[has_choice]
    return np.bincount(pairs, minlength=count * count).reshape(count, count)
