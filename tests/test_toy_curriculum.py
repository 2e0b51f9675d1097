"""Tests the comparison of the four stages with stage 4 alone on the toy set."""

import json
from pathlib import Path

import pytest

from benchmarks import toy_curriculum, toy_runs
from benchmarks.toy_curriculum import STAGE4
from tests.test_toy_eval import perfect


@pytest.fixture
def commands(monkeypatch):
    """Replace training: stage 4 alone is right about every clip, four stages about half of them."""
    seen = {}

    def run(command, env, **settings):
        folder = Path(command[5])
        seen[folder.name] = (command, env)
        answers = folder / STAGE4 / "answers"
        answers.mkdir(parents=True)
        right = perfect(int(command[3]))
        losses = [answer | {"loss": 1.0} for answer in right]
        if "alone" not in folder.name:
            for answer in sorted(right, key=toy_runs.clip_name)[::2]:
                answer["pred"] = "A sound."
        # Pairs are found by the name of the clip, not by the order.
        if "trained" in folder.name:
            right.reverse()
        (answers / "right.json").write_text(json.dumps(right))
        (answers / "loss_right.json").write_text(json.dumps(losses))
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
    assert [row["category"]["right"] for row in result["rows"]] == [85, 85, 170, 170]
    means = [difference["category"]["mean"] for difference in result["differences"]]
    assert means == [0.5, 0.5, 0.0, 0.0]
    assert result["differences"][0]["category"]["folds"] == [0.5] * 5
    # Each clip has the same difference where the encoder alone differs.
    assert result["differences"][2]["category"]["high"] == 0
    printed = capsys.readouterr().out
    assert "| four stages | frozen encoder | 0.50 [0.43, 0.57] |" in printed
    assert (
        "| stage 4 alone, frozen encoder instead of four stages, frozen encoder | +0.50" in printed
    )
