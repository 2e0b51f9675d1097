"""Plots which category the last stage names for the held-out clips of each category, as a PNG.

    python -m eval.toy_confusion --folds exp/quickstart/seed0 --output_path confusion.png

The folders of --folds are those of `eval.toy`, and so is the rule by which an answer names a
category. The last stage is the last one that every fold has.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from eval.toy import (
    Predictions,
    Rate,
    Reader,
    Toy,
    add_folds,
    find_folds,
    read_answer,
    read_predictions,
    stage_rows,
)
from ltu.files import run_command

NO_CATEGORY = "no category"
CELL = 0.44  # Inches.
MARGINS = (2.6, 2.4)  # Inches at the left and right, and above and below the cells.
DPI = 150
# White for none, and for all clips of a category a blue on which black numbers are legible.
COLORS = LinearSegmentedColormap.from_list("light blues", ["#ffffff", "#74aadb"])


@dataclass
class Confusion:
    """How often each category was named for the clips of each category.

    Args:
        categories: names of the rows and of the first columns.
        counts: (categories, categories + 1), true category by named category; the last column
            counts the answers that name none.
        rate: fraction of the answers whose category is right.
        stage: the stage that answered.
        folds: the folds of the clips.
    """

    categories: list[str]
    counts: np.ndarray
    rate: Rate
    stage: str
    folds: list[int]


def read_confusion(folders: list[Path]) -> Confusion:
    """Count the answers of the last stage that all folders have.

    Raises:
        EvaluationError: The folders do not have the predictions of one fold each.
    """
    toy = Toy.load()
    stages_of_folds = [read_predictions(folder) for folder in folders]
    folds = find_folds(stages_of_folds, toy)
    last_row = stage_rows(stages_of_folds, toy)[-1]
    predictions: Predictions = []
    for stages in stages_of_folds:
        predictions += stages[last_row.name]["right"]
    categories = sorted(toy.reader.categories)
    counts = count_answers(predictions, toy.reader, categories)
    return Confusion(categories, counts, last_row.right, last_row.name, folds)


def count_answers(predictions: Predictions, reader: Reader, categories: list[str]) -> np.ndarray:
    """Count the answers by true category and named category.

    Args:
        predictions: Those whose references the reader can parse.
        reader: Parser of references and answers.
        categories: All categories.

    Returns:
        (categories, categories + 1); the last column counts the answers that name no category.
    """
    column_of_none = len(categories)
    counts = np.zeros((len(categories), len(categories) + 1), dtype=int)
    for prediction in predictions:
        _, reference = reader.read(prediction["ref"])
        found = read_answer(prediction, reader)
        column = column_of_none if found is None else categories.index(found[1])
        counts[categories.index(reference), column] += 1
    return counts


def plot(confusion: Confusion, output_path: Path, model_name: str = "") -> None:
    """Write the PNG. A cell is the darker, the larger its fraction of the row is."""
    num_rows, num_columns = confusion.counts.shape
    size = (num_columns * CELL + MARGINS[0], num_rows * CELL + MARGINS[1])
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    totals = confusion.counts.sum(axis=1)  # (categories,)
    fractions = confusion.counts / np.maximum(totals, 1)[:, None]  # (categories, categories + 1)
    axes.imshow(fractions, cmap=COLORS, vmin=0, vmax=1)
    _write_counts(axes, confusion.counts)
    _mark_cells(axes, num_rows, num_columns)

    axes.set_xticks(range(num_columns), [*confusion.categories, NO_CATEGORY])
    axes.tick_params(axis="x", rotation=45)
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(num_rows), confusion.categories)
    axes.set(xlabel="category that the answer names", ylabel="true category")
    # The numbers of clips are at the right, as labels of a second axis.
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(num_rows), totals)
    right.set_ylabel("held-out clips of the category")
    for axis in (axes, right):
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)

    rate = confusion.rate
    model = f"{model_name}: " if model_name else ""
    title = f"{model}right category for {rate.right} of {rate.count} held-out clips"
    axes.set_title(title, fontweight="bold", pad=24)
    fold_names = ", ".join(map(str, confusion.folds))
    subtitle = f"{confusion.stage}, fold {fold_names}: {rate} (95 % interval)"
    axes.text(0.5, 1.01, subtitle, transform=axes.transAxes, ha="center", va="bottom")
    output_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_path, dpi=DPI)


def _write_counts(axes: Axes, counts: np.ndarray) -> None:
    """Write the counts into their cells; cells of 0 stay empty."""
    for row, column in zip(*np.nonzero(counts), strict=True):
        axes.text(column, row, str(counts[row, column]), ha="center", va="center")


def _mark_cells(axes: Axes, num_rows: int, num_columns: int) -> None:
    """Draw lines between the cells, frames around the right answers, and a gap before the last."""
    for row in range(num_rows + 1):
        axes.axhline(row - 0.5, color="0.85", linewidth=0.6)
    for column in range(num_columns + 1):
        axes.axvline(column - 0.5, color="0.85", linewidth=0.6)
    axes.axvline(num_columns - 1.5, color="0.4", linewidth=1.2)
    for row in range(num_rows):
        corner = (row - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="0.4", zorder=3))


def main(argv: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    add_folds(parser)
    parser.add_argument("--output_path", type=Path, required=True, help="The PNG that is written.")
    parser.add_argument("--model_name", default="", help="The name of the model, for the title.")
    args = parser.parse_args(argv)
    plot(read_confusion(args.folds), args.output_path, args.model_name)
    print(f"Categories of the answers: {args.output_path}")


if __name__ == "__main__":
    run_command(main)
