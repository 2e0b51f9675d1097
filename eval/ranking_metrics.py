"""Computes average precision and area under the ROC curve of many classes, for weighted rows.

The rows are sorted once for each class. A resample of a bootstrap then changes only how often each
row counts, and only the positions of the positives are looked up. Each positive is in a group of
rows with the same score, which rank together (as in scikit-learn).
"""

import numpy as np


class Ranking:
    """The rows of each class from the highest score down.

    Args:
        scores: (rows, classes), any float; -inf ranks last.
        references: (rows, classes) bool.
    """

    def __init__(self, scores: np.ndarray, references: np.ndarray):
        self.rows, self.classes = scores.shape
        index_type = np.uint16 if self.rows < 2**16 else np.uint32
        self.order = np.empty((self.classes, self.rows), dtype=index_type)
        # For the positives of each class: class, start and end (excluded) of the group, row.
        found = []
        for number in range(self.classes):
            order = np.argsort(-scores[:, number], kind="stable")
            self.order[number] = order
            ranked = scores[order, number]
            positions = np.flatnonzero(references[order, number])
            changes = np.flatnonzero(ranked[1:] != ranked[:-1]) + 1
            bounds = np.concatenate([[0], changes, [self.rows]])
            group = np.searchsorted(bounds, positions, side="right")
            class_column = np.full(len(positions), number)
            found.append(
                np.stack([class_column, bounds[group - 1], bounds[group], order[positions]])
            )
        positives = np.concatenate(found, axis=1)
        # The groups are sorted by class, then by position.
        groups, self.group = np.unique(positives[:3], axis=1, return_inverse=True)
        self.of_class, self.start, self.end = groups
        self.positives = positives[3]

    def scores(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (classes,) average precision and (classes,) area under the ROC curve.

        They are nan for a class without positives, the area also for one without negatives.

        Args:
            weights: (rows,) how often each row counts.
        """

        def by_class(values: np.ndarray) -> np.ndarray:
            return np.bincount(self.of_class, values, self.classes)

        # Sum the weights of the first i rows of each class.
        ranked = np.zeros((self.classes, self.rows + 1), dtype=np.int32)
        np.cumsum(weights.astype(np.int32)[self.order], axis=1, out=ranked[:, 1:])
        before = ranked[self.of_class, self.start]
        seen = ranked[self.of_class, self.end]
        # Sum the weights of the positives of each group, and of all up to its end.
        true = np.bincount(self.group.ravel(), weights[self.positives], len(self.of_class))
        total = by_class(true)
        true_seen = np.cumsum(true) - (np.cumsum(total) - total)[self.of_class]
        # Count the negatives that rank below each group; a tie counts half.
        negatives = ranked[:, -1] - total
        ties = (seen - before - true) / 2
        below = negatives[self.of_class] - (seen - true_seen) + ties
        with np.errstate(invalid="ignore"):
            precision = by_class(true * true_seen / np.maximum(seen, 1)) / total
            area = by_class(true * below) / (total * negatives)
        return precision, area
