"""Average precision and area under the ROC curve of many classes, for rows that count any number of times.

Rows are sorted once a class. A bootstrap's resample then changes multiplicities only, and all that is looked up are the
places of positives: each stands in a group of rows with one score, which rank together (as in scikit-learn).
"""

import numpy as np


class Ranking:
    """The rows of each class from the highest score down.

    Args:
        scores: (rows, classes), any float; -inf ranks last.
        truths: (rows, classes) bool.
    """

    def __init__(self, scores: np.ndarray, truths: np.ndarray):
        self.rows, self.classes = scores.shape
        self.order = np.empty(
            (self.classes, self.rows), dtype=np.uint16 if self.rows < 2**16 else np.uint32
        )
        found = []  # of each class's positives: class, first and last place of the group (end excluded), row
        for number in range(self.classes):
            order = np.argsort(-scores[:, number], kind="stable")
            self.order[number] = order
            ranked, places = scores[order, number], np.flatnonzero(truths[order, number])
            bounds = np.concatenate(
                [[0], np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, [self.rows]]
            )
            group = np.searchsorted(bounds, places, side="right")
            found.append(
                np.stack(
                    [np.full(len(places), number), bounds[group - 1], bounds[group], order[places]]
                )
            )
        positives = np.concatenate(found, axis=1)
        groups, self.group = np.unique(
            positives[:3], axis=1, return_inverse=True
        )  # Sorted by class, then place.
        self.of_class, self.start, self.end = groups
        self.positives = positives[3]

    def scores(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(classes,) average precision and (classes,) area; nan where a class has no positives (or no negatives).

        Args:
            weights: (rows,) how often each row counts.
        """

        def by_class(values: np.ndarray) -> np.ndarray:
            return np.bincount(self.of_class, values, self.classes)

        ranked = np.zeros(
            (self.classes, self.rows + 1), dtype=np.int32
        )  # weight of the first i rows
        np.cumsum(weights.astype(np.int32)[self.order], axis=1, out=ranked[:, 1:])
        true = np.bincount(
            self.group.ravel(), weights[self.positives], len(self.of_class)
        )  # in each group
        before, seen = ranked[self.of_class, self.start], ranked[self.of_class, self.end]
        total = by_class(true)
        true_seen = np.cumsum(true) - (np.cumsum(total) - total)[self.of_class]
        negatives = ranked[:, -1] - total
        below = (
            negatives[self.of_class] - (seen - true_seen) + (seen - before - true) / 2
        )  # a tie is half a win
        with np.errstate(invalid="ignore"):
            precision = by_class(true * true_seen / np.maximum(seen, 1)) / total
            return precision, by_class(true * below) / (total * negatives)
