"""Which class an answer means: the one whose text has the nearest embedding, or that a model scores highest.

Options of a task: `labels`, a file in eval/labels (a class a line, ` | ` before other spellings); `prefix` of every
embedded text; `answer`, `truth`: how the original reads them; `separator` of several truths; `mode` "max": the original
cuts negative cosines at 0; `scores`: it ranks by cosines, else by 1 for the chosen class and 0 for the others.

Strict: of an answer a leading "Audio caption:" or the like and quotes are left out, nothing else; white space is single
everywhere; a truth is found whatever its case, commas, underscores; classes without positives do not count.
"""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np

from eval.ranking import Ranking
from eval.score_result import Context, EvaluationError, Outcome, start_items, without_lead
from eval.tasks import Task

LABELS = Path(__file__).parent / "labels"
ROWS_AT_ONCE = 256  # of cosines, to stay in the processor's cache
WORK = 10**9  # scores that a bootstrap may look at: 94 resamples of 20,000 x 527

# How the original's evaluators read an answer ...
ANSWERS: dict[str, Callable[[str], str]] = {
    # Of a caption with a second colon ("at 10:30 a dog barks") only the tail is left.
    "after_colon": lambda text: text.split(":")[-1].lstrip().lower(),
    # And the first character is lost, unless it is a space: "Loud dog" -> "oud dog".
    "after_colon_cut": lambda text: text.split(":")[-1][1:].lower(),
    # Two characters are lost when the phrase is absent, one when no space follows its colon.
    "after_phrase": lambda text: text.replace('"', "").split("Audio caption")[-1][2:].lower(),
    # The case and a leading "Emotion:" stay, which texts of classes never have.
    "whole": lambda text: text.lstrip(),
}
# ... and a truth. Keys with two spaces ("pigeon,  dove cooing") need them in the truth too.
TRUTHS: dict[str, Callable[[str], str]] = {
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
    """A class's name so that spellings of it are equal."""
    return " ".join(
        re.sub(r"[_,\s]+", " ", name.replace("\u00ad", "")).strip(" .\"'").lower().split()
    )


class Classes:
    """Names and embedded texts of a task's classes, and how answers and references are read.

    Raises:
        EvaluationError: two classes have one key.
    """

    def __init__(self, task: Task, protocol: str):
        self.is_strict, self.prefix = protocol == "strict", task.options.get("prefix", "")
        self.rule, self.separator = (
            task.options.get("truth", "after_colon"),
            task.options.get("separator"),
        )
        self.read = ANSWERS[task.options.get("answer", "after_colon")]
        lines = (LABELS / task.options["labels"]).read_text(encoding="utf-8").splitlines()
        spellings = [line.split(" | ") for line in lines]
        self.names = [names[0] for names in spellings]
        self.texts = [self.text(name.replace("_", " ").lower()) for name in self.names]
        self.numbers: dict[str, int] = {}
        for number, names in enumerate(spellings):
            for key in map(plain, names) if self.is_strict else names[:1]:
                if self.numbers.setdefault(key, number) != number:
                    raise EvaluationError(
                        f"{task.options['labels']}, row {number + 1}: {key!r} is there twice."
                    )

    def text(self, words: str) -> str:
        """What is embedded for a class or for what an answer says."""
        return self.prefix + (" ".join(words.split()) if self.is_strict else words)

    def answer(self, answer: str) -> str:
        """What is embedded for an answer."""
        return self.text(without_lead(answer).lower() if self.is_strict else self.read(answer))

    def truths(self, reference: str) -> list[int]:
        """Numbers of the classes that a reference names; KeyError if it names something else."""
        if not self.is_strict:
            text = TRUTHS[self.rule](reference)
            return [
                self.numbers[name]
                for name in (text.split(self.separator) if self.separator else [text])
            ]
        text = reference.split(":")[-1]
        if self.rule == "first_sentence":
            text = re.split("[.,]", text)[0]
        return [
            self.numbers[plain(name)]
            for name in (text.split(self.separator[0]) if self.separator else [text])
        ]


def cosines(answers: np.ndarray, classes: np.ndarray, protocol: str) -> np.ndarray:
    """(answers, classes) cosines of (answers, dim) and (classes, dim).

    The original adds up in a Python loop. "original" does so for all pairs at once: equal to the last bit, which ties
    hang on.
    """
    norms = [np.sqrt(np.cumsum(vectors**2, axis=1)[:, -1:]) for vectors in (answers, classes)]
    if not min(norm.min(initial=1) for norm in norms) > 0:
        raise EvaluationError(
            "An embedding is all zeros or not a number. Mend the table, or take another embedder."
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
    """(items, classes) scores; -inf for an item without an answer."""
    failed = np.array([item["failed"] is not None for item in items], dtype=bool)
    if context.label_scores is not None:
        given, wanted = context.label_scores.shape, (len(items), len(classes.names))
        if given != wanted:
            raise EvaluationError(
                f"{context.source}: {given} label scores, not {wanted} (rows, classes). Score anew."
            )
        return np.where(failed[:, None], -np.inf, context.label_scores)
    if context.embed is None:
        raise EvaluationError(
            f"{context.source}: {task.name} is scored by embeddings. Give an --embedder."
        )
    if context.protocol == "original" and task.options.get("answer") == "after_colon_cut":
        if ":" not in (items[0]["pred"] or ""):  # It prints what stands before that colon.
            raise context.error(
                0,
                "the original stops at a first prediction without a colon. Use --protocol strict.",
            )
    answers = [classes.answer(item["pred"]) for item in items if item["failed"] is None]
    used = {
        text: row for row, text in enumerate(dict.fromkeys(answers))
    }  # Equal texts get equal scores.
    vectors = np.asarray(context.embed([*classes.texts, *used]), dtype=np.float64)
    found = cosines(vectors[len(classes.texts) :], vectors[: len(classes.texts)], context.protocol)
    if context.protocol == "original" and task.options.get("mode") == "max":
        found = np.maximum(found, 0)
    scores = np.full((len(items), len(classes.names)), -np.inf)
    scores[~failed] = found[[used[text] for text in answers]]
    return scores


def choice_figures(
    truth: np.ndarray, chosen: np.ndarray, count: int, protocol: str
) -> dict[str, float]:
    """Accuracy and F1 of (m,) class numbers, -1 chose none. The original's macro F1 has a 0 for absent classes."""
    given = truth, chosen[chosen >= 0], truth[truth == chosen]
    true, said, right = (np.bincount(numbers, minlength=count) for numbers in given)
    macro = (2 * right / np.maximum(true + said, 1))[
        (true + said > 0) | (protocol == "original")
    ].mean()
    micro = 2 * right.sum() / (true.sum() + said.sum())
    return {
        "accuracy": float(right.sum() / len(truth)),
        "micro_f1": float(micro),
        "macro_f1": float(macro),
    }


def ranked_figures(ranking: Ranking, indices: np.ndarray, protocol: str) -> dict[str, float]:
    """mAP, mAUC and d' of the rows at (m,) indices, and how many classes have an AP."""
    precision, area = ranking.scores(np.bincount(indices, minlength=ranking.rows))
    if (
        protocol == "original"
    ):  # A class without positives has AP 0 and AUC -1 (scikit-learn 1.9: nan) and counts.
        precision, area = np.nan_to_num(precision), np.nan_to_num(area, nan=-1.0)
    else:
        precision, area = precision[~np.isnan(precision)], area[~np.isnan(area)]
    means = [float(values.mean()) if len(values) else float("nan") for values in (precision, area)]
    return {
        "mAP": means[0],
        "mAUC": means[1],
        "d_prime": d_prime(means[1]),
        "classes": float(len(precision)),
    }


def d_prime(area: float) -> float:
    """Distance of two normal distributions of unit variance with that area under the curve; nan outside (0, 1)."""
    return 2**0.5 * NormalDist().inv_cdf(area) if 0 < area < 1 else float("nan")


def single_label(rows: list[dict], task: Task, context: Context) -> Outcome:
    """One truth a row: accuracy and F1; of the original also AP and AUC."""
    return _score(rows, task, context, is_ranked=context.protocol == "original", is_single=True)


def multi_label(rows: list[dict], task: Task, context: Context) -> Outcome:
    """Several truths a row: AP and AUC; of the original also the first truth against the highest score."""
    return _score(rows, task, context, is_ranked=True, is_single=False)


def _score(
    rows: list[dict], task: Task, context: Context, is_ranked: bool, is_single: bool
) -> Outcome:
    items, classes = start_items(rows, context), Classes(task, context.protocol)
    count = len(classes.names)
    truths = np.zeros((len(items), count), dtype=bool)
    for index, item in enumerate(items):
        try:
            truths[index, classes.truths(item["ref"])] = True
        except KeyError as error:
            reason = f"the truth {error.args[0]!r} is no class of eval/labels/{task.options['labels']}. Mend it."
            raise context.error(index, reason) from None
    scores = class_scores(items, classes, task, context)
    chosen = np.where([item["failed"] is None for item in items], scores.argmax(1), -1)
    truth = truths.argmax(1)
    for row, (item, said) in enumerate(zip(items, chosen, strict=True)):
        names = [classes.names[number] for number in np.flatnonzero(truths[row])]
        item["truth"], item["chosen"] = (
            names[0] if is_single else names,
            classes.names[said] if said >= 0 else None,
        )
        item["right"] = bool(said >= 0 and truths[row, said])
    has_scores = not is_single or task.options.get("scores", False)
    ranked = scores if has_scores else (chosen[:, None] == np.arange(count)).astype(float)
    ranking = Ranking(ranked, truths) if is_ranked else None

    def compute(indices: np.ndarray) -> dict[str, float]:
        figures = (
            choice_figures(truth[indices], chosen[indices], count, context.protocol)
            if is_single
            else {}
        )
        if ranking:
            figures |= ranked_figures(ranking, indices, context.protocol)
        if not is_single and context.protocol == "original":
            figures["accuracy"] = float((truth[indices] == chosen[indices]).mean())
        return figures

    absent, few = (
        int(((low <= truths.sum(0)) & (truths.sum(0) < high)).sum())
        for low, high in ((0, 1), (1, 5))
    )
    notes = [f"{absent} of {count} classes have no positives"] if is_ranked and absent else []
    if few and not is_single:
        why = "resamples repeat or lose these, which biases the interval"
        notes.append(f"{few} of {count} classes have fewer than 5 positives: {why}")
    resamples = int(np.clip(WORK // max(scores.size, 1), 20, 1000)) if is_ranked else 1000
    confusion = (classes.names, table(truth, chosen, count)) if is_single else None
    return Outcome(items, compute, resamples, confusion, notes)


def table(truth: np.ndarray, chosen: np.ndarray, count: int) -> np.ndarray:
    """(true, predicted) counts of what was answered."""
    pairs = truth[chosen >= 0] * count + chosen[chosen >= 0]
    return np.bincount(pairs, minlength=count * count).reshape(count, count)


def toy_category(rows: list[dict], task: Task, context: Context) -> Outcome:
    """The toy set: category, label and form of an answer, as eval.toy reads them. Both protocols are one."""
    from eval.toy import Toy, score

    items, reader = start_items(rows, context), Toy.load().reader
    for index, item in enumerate(items):
        if reader.read(item["ref"]) is None:
            raise context.error(
                index, f"the reference {item['ref']!r} has no form of data/toy/questions.json."
            )
    hits = score(
        [item if item["failed"] is None else item | {"pred": None} for item in items], reader
    )
    for item, right in zip(items, hits["category"], strict=True):
        item["right"] = right
    shares = {"accuracy": "category", "exact_label": "label", "in_form": "in_form"}
    found = {name: np.array(hits[key], dtype=float) for name, key in shares.items()}
    return Outcome(
        items, lambda indices: {name: float(right[indices].mean()) for name, right in found.items()}
    )
