"""Tests the comparison of the four stages with stage 4 alone on the toy set."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import toy_curriculum, toy_runs
from benchmarks.toy_curriculum import STAGE4
from eval.toy import Toy
from tests.test_toy_eval import perfect


@pytest.fixture
def commands(monkeypatch):
    """Replace training: stage 4 alone is right about every clip, four stages about half of them.

    The losses of a fold are 1, 2, ... by name of the clip, those with another category's clip 3
    higher after stage 4 alone and 1 higher after four stages.
    """
    seen = {}

    def run(command, env, **settings):
        folder = Path(command[5])
        seen[folder.name] = (command, env)
        answers = folder / STAGE4 / "answers"
        answers.mkdir(parents=True)
        is_alone = "alone" in folder.name
        right = sorted(perfect(int(command[3])), key=lambda answer: answer["audio_id"])
        losses, other_losses = [], []
        for number, answer in enumerate(right):
            if number % 2 and not is_alone:
                answer["pred"] = "A sound."
            losses.append(answer | {"loss": number + 1.0})
            other_losses.append(answer | {"loss": number + (4.0 if is_alone else 2.0)})
        wrong = [answer | {"pred": "A sound.", "audio_id": "other.flac"} for answer in right]
        contents = {
            "right": right,
            "wrong": wrong,
            "loss_right": losses,
            "loss_wrong": other_losses,
            "loss_none": other_losses,
        }
        for name, rows in contents.items():
            # Pairs are found by the name of the clip, not by the order.
            if "trained" in folder.name:
                rows = rows[::-1]
            (answers / f"{name}.json").write_text(json.dumps(rows))
        return toy_runs.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(toy_runs.subprocess, "run", run)
    return seen


def test_the_four_trainings_take_equal_steps_and_differ_as_said(commands, tmp_path, capsys):
    toy_curriculum.main(["--output_dir", str(tmp_path), "--num_examples", "8,8,8,4"])
    assert len(commands) == 20

    command, environment = commands["fold1_four_stages_frozen_encoder"]
    assert environment["NUM_EXAMPLES"] == "8,8,8,4"
    assert environment["ENCODER_RATE"] == ""
    assert "STAGES" not in environment
    assert len(command) == 6
    _, environment = commands["fold1_four_stages_trained_encoder"]
    assert environment["ENCODER_RATE"] == "1e-4"

    command, environment = commands["fold4_stage_4_alone_trained_encoder"]
    assert command[2:5] == ["ltu", "4", "0"]
    assert environment["NUM_EXAMPLES"] == "8,8,8,28"
    assert environment["STAGES"] == STAGE4
    flags = dict(zip(command[6::2], command[7::2], strict=True))
    assert flags == {
        "--base_model": str(tmp_path / "fold4_stage_4_alone_trained_encoder" / "init"),
        "--learning_rate": "2e-3",
        "--projector_learning_rate": "8e-3",
        "--encoder_learning_rate": "1e-4",
    }

    result = json.loads((tmp_path / "results.json").read_text())
    assert [row["right"]["right"] for row in result["rows"]] == [85, 85, 170, 170]
    for response, expected in {
        "category": [0.5, 0.5, 0, 0],
        "loss": [0, 0, 0, 0],
        "mismatched": [0, 0, 0, 0],
        "loss_gain": [2, 2, 0, 0],
    }.items():
        found = [difference[response] for difference in result["differences"]]
        assert [difference["mean"] for difference in found] == expected, response
        assert found[0]["folds"] == [expected[0]] * 5
        # Each clip has the same difference where the encoder alone differs.
        assert found[2]["low"] == found[2]["high"] == 0
    printed = capsys.readouterr().out
    assert re.search(r"^four stages, frozen encoder +0\.50 \[0\.43, 0\.57\] ", printed, re.M)
    name = "stage 4 alone, frozen encoder, minus four stages, frozen encoder"
    assert f"| {name} | +0.50 [" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_examples", "8,8,8"], "give four numbers"),
        (["--num_examples", "8,8,8,x"], "give four numbers"),
        (["--num_examples", "8,8,0,8"], "multiples of the batch size 4"),
        (["--num_examples", "8,8,6,8"], "multiples of the batch size 4"),
        (["--folds", "0", "1", "0"], "give each fold once"),
        (["--jobs", "0"], "at least 1"),
    ],
)
def test_flags_that_would_not_compare_equals_are_errors(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        toy_curriculum.main(["--output_dir", str(tmp_path), *flags])
    assert message in capsys.readouterr().err


def test_answers_of_another_fold_are_an_error(commands, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--num_examples", "8,8,8,4", "--folds", "0"]
    toy_curriculum.main(flags)
    run = toy_curriculum.make_run(toy_curriculum.TRAININGS[0], 0, tmp_path, [8, 8, 8, 4])
    assert toy_runs.read_responses(run, Toy.load())
    with pytest.raises(ValueError, match="has the clips of fold 0, not 1"):
        toy_runs.read_responses(replace(run, fold=1), Toy.load())
