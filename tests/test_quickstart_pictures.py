"""Tests the pictures of the quickstart: what is counted and averaged, and that a PNG is written."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval import toy_confusion
from eval.scorer_interface import EvaluationError
from eval.toy import Reader
from tests.test_toy_eval import TOY, perfect, prediction, write_fold
from train_scripts.quickstart import plot_loss
from train_scripts.quickstart.plot_loss import Stage, running_mean

CATEGORIES = ["animals", "drums", "music"]
READER = Reader(["Labels: {label}; {category}."], set(CATEGORIES))


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# Which category was named


def test_every_answer_is_counted_in_its_cell():
    # (true category, answer) and how often
    answers = {
        ("animals", "Labels: dog; animals."): 3,
        ("animals", "Labels: dog; drums."): 1,
        ("drums", "Labels: tom; drums."): 4,
        # The label does not matter.
        ("drums", "Labels: dog; drums."): 2,
        ("drums", "Labels: tom; music."): 5,
        # These name no category: no form, an unknown category, a second category, nothing.
        ("music", "It is music."): 1,
        ("music", "Labels: song; songs."): 1,
        ("music", "Labels: drums; music."): 1,
        ("music", ""): 1,
    }
    predictions = []
    for (category, answer), count in answers.items():
        predictions += [prediction(answer, f"Labels: thing; {category}.")] * count
    counts = toy_confusion.count_answers(predictions, READER, CATEGORIES)
    assert counts.tolist() == [[3, 1, 0, 0], [0, 6, 5, 0], [0, 0, 0, 4]]


def test_a_failed_answer_names_no_category():
    row = prediction("Labels: tom; drums.", "Labels: tom; drums.")
    counts = toy_confusion.count_answers(
        [row, row | {"status": "unreadable"}, row | {"pred": None}], READER, CATEGORIES
    )
    assert counts[1].tolist() == [0, 1, 0, 2]


def test_the_last_common_stage_of_all_folds_is_counted(tmp_path):
    # The first fold has a stage that the second one lacks, and a wrong answer in stage 3.
    folders = [
        write_fold(tmp_path / "a", 1, stages=4),
        write_fold(tmp_path / "b", 4, stages=3),
    ]
    path = folders[0] / "stage3_name" / "right.json"
    rows = json.loads(path.read_text())
    category = TOY.clips[Path(rows[0]["audio_id"]).name]["category"]
    other = next(name for name in sorted(TOY.reader.categories) if name != category)
    rows[0]["pred"] = f"Labels: thing; {other}."
    path.write_text(json.dumps(rows))

    confusion = toy_confusion.read_confusion(folders)
    assert (confusion.stage, confusion.folds) == ("stage3", [1, 4])
    names = confusion.categories
    expected = np.zeros((len(names), len(names) + 1), dtype=int)
    for fold in (1, 4):
        for file in TOY.folds[fold]:
            index = names.index(TOY.clips[file]["category"])
            expected[index, index] += 1
    expected[names.index(category), names.index(category)] -= 1
    expected[names.index(category), names.index(other)] += 1
    assert (confusion.counts == expected).all()
    # The rate is that of the table, so the picture agrees with it.
    assert confusion.rate.count == expected.sum()
    assert confusion.rate.right == np.trace(expected) == expected.sum() - 1


def test_the_picture_of_the_categories_is_written(tmp_path, capsys):
    folder = write_fold(tmp_path / "fold", 0, stages=1)
    rows = perfect(0)
    rows[0]["pred"] = "I cannot tell."
    (folder / "stage1_name" / "right.json").write_text(json.dumps(rows))
    path = tmp_path / "new" / "confusion.png"
    argv = ["--folds", str(folder), "--output_path", str(path), "--model_name", "LTU"]
    toy_confusion.main(argv)
    assert is_png(path)
    assert str(path) in capsys.readouterr().out
    with pytest.raises(EvaluationError, match="no stage"):
        toy_confusion.main(["--folds", str(tmp_path / "new"), "--output_path", str(path)])


def test_the_picture_says_model_fraction_and_interval(tmp_path, monkeypatch):
    confusion = toy_confusion.read_confusion([write_fold(tmp_path, 0, stages=1)])
    figures = []
    monkeypatch.setattr(
        toy_confusion.Figure, "savefig", lambda self, *_, **__: figures.append(self)
    )
    toy_confusion.plot(confusion, tmp_path / "confusion.png", "LTU")
    axes = figures[0].axes[0]
    count = len(TOY.folds[0])
    assert axes.get_title() == f"LTU: right category for {count} of {count} held-out clips"
    texts = [text.get_text() for text in axes.texts]
    assert any(f"{confusion.rate}" in text and "95 % interval" in text for text in texts)
    # The counts are in the cells.
    in_cells = sorted(int(text) for text in texts if text.isdigit())
    assert in_cells == sorted(confusion.counts[confusion.counts > 0].tolist())


# The loss


def write_log(folder: Path, losses: list[float], held_out: list[float] = ()) -> Path:
    """Write the log of a run that logs every fifth step, and evaluates at the first steps."""
    log = []
    for number, loss in enumerate(losses, start=1):
        log.append({"step": 5 * number, "loss": loss, "learning_rate": 1e-3, "epoch": 0.1})
    for number, loss in enumerate(held_out, start=1):
        log.append({"step": 5 * number, "eval_loss": loss})
    log.append({"step": 5 * len(losses), "train_loss": 1.0})
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def test_running_mean():
    assert running_mean([1, 2, 6, 3, 3, 1]) == pytest.approx([3, 3, 3, 3, 13 / 4, 7 / 3])
    assert running_mean([4]) == [4]
    # In a stage with many losses, the window is a tenth of them.
    losses = [float(index == 100) for index in range(200)]
    assert sum(value > 0 for value in running_mean(losses)) == 21
    # The mean of a straight line is the line, away from its ends.
    line = [float(index) for index in range(50)]
    assert running_mean(line)[2:-2] == line[2:-2]


def test_a_stage_is_read_from_its_log(tmp_path):
    stage = Stage.read(write_log(tmp_path / "stage2_all_cla", [3.0, 2.0, 1.0], [2.5, 1.5]))
    assert (stage.steps, stage.losses) == ([5, 10, 15], [3.0, 2.0, 1.0])
    assert (stage.held_out_steps, stage.held_out_losses) == ([5, 10], [2.5, 1.5])
    assert stage.num_steps == 15
    assert stage.title == "stage2\nall_cla"
    assert Stage("my_run", [1], [1.0], [], []).title == "my_run"


@pytest.mark.parametrize(("lowest", "scale"), [(0.1, "log"), (1.0, "linear"), (0.0, "linear")])
def test_the_picture_of_the_loss(lowest, scale, tmp_path, monkeypatch):
    folders = [
        write_log(tmp_path / "stage1_proj_cla", [6.0, 5.0]),
        write_log(tmp_path / "stage2_all_cla", [4.0] * 40 + [lowest], [3.0]),
    ]
    path = tmp_path / "new" / "loss.png"
    figures = []
    savefig = plot_loss.Figure.savefig

    def save(figure, *args, **settings) -> None:
        figures.append(figure)
        savefig(figure, *args, **settings)

    monkeypatch.setattr(plot_loss.Figure, "savefig", save)
    argv = ["--model_name", "LTU", "--output_path", str(path), *map(str, folders)]
    plot_loss.main(argv)
    assert is_png(path)
    (figure,) = figures
    assert figure.get_suptitle().startswith("LTU: ")
    first, second = figure.axes
    assert first.get_title() == "stage1\nproj_cla"
    assert "nats per token" in first.get_ylabel()
    assert first.get_yscale() == second.get_yscale() == scale
    assert ("log scale" in first.get_ylabel()) == (scale == "log")
    # Thin: as logged. Thick: the running mean. Dots: held-out examples.
    logged, smooth, held_out = second.get_lines()
    assert logged.get_ydata().tolist()[-2:] == [4.0, lowest]
    assert smooth.get_linewidth() > logged.get_linewidth()
    assert held_out.get_linestyle() == "None"
    assert held_out.get_xydata().tolist() == [[5.0, 3.0]]
    names = [text.get_text() for text in second.get_legend().get_texts()]
    assert names == ["as logged", "running mean", "held-out examples"]
