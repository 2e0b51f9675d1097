"""Tests the designed experiment on the toy set, and how the benchmarks run folds."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import toy_runs, toy_settings
from benchmarks.toy_settings import DESIGN, SETTINGS, STAGE, find_effects
from tests.test_toy_eval import perfect


def test_no_effect_is_mixed_with_another_or_with_the_interaction_of_two():
    assert DESIGN.shape == (16, 7)
    signs = 2 * DESIGN - 1
    for first, second in itertools.combinations(range(7), 2):
        assert signs[:, first] @ signs[:, second] == 0
        for third in range(7):
            assert signs[:, first] * signs[:, second] @ signs[:, third] == 0


@pytest.mark.parametrize("num_runs", [8, 16])
@pytest.mark.parametrize("kind", SETTINGS)
def test_effects_are_those_that_the_responses_have(kind, num_runs):
    """Each setting adds its own amount; the interval is 0 wide if all clips agree."""
    amounts = np.array([0.5, -0.25, 0.125, 0, 1, 2, -4])
    assert len(SETTINGS[kind]) == len(amounts)
    responses = {}
    for fold in (0, 1):
        for run in range(num_runs):
            value = float(DESIGN[run] @ amounts) + 10 * fold
            row = {"category": [value] * 3, "label": [2 * value] * 3, "loss": [value, value + 1]}
            responses[fold, run] = row
    effects = find_effects(kind, responses, [0, 1], num_runs)
    for effect, amount in zip(effects, amounts, strict=True):
        assert effect["category"]["mean"] == pytest.approx(amount)
        assert effect["category"]["high"] == pytest.approx(amount)
        assert effect["label"]["folds"] == pytest.approx([2 * amount, 2 * amount])
        assert effect["loss"]["mean"] == pytest.approx(amount)


@pytest.mark.parametrize("num_runs", [8, 16])
def test_runs_get_their_levels_and_not_the_shell(num_runs, tmp_path, monkeypatch):
    """What the shell has does not matter."""
    seen = {}

    def run(command, env, **settings):
        seen[Path(command[5]).name] = (command, env)
        answers = Path(command[5]) / STAGE / "answers"
        answers.mkdir(parents=True)
        right = perfect(int(command[3]))
        (answers / "right.json").write_text(json.dumps(right))
        losses = [answer | {"loss": 1.0} for answer in right]
        (answers / "loss_right.json").write_text(json.dumps(losses))
        return toy_runs.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(toy_runs.subprocess, "run", run)
    for name, value in (("ENCODER_RATE", "1"), ("BUILD_FLAGS", "--x"), ("AUDIO_TOKENS", "2")):
        monkeypatch.setenv(name, value)
    flags = ["--kind", "ltu_as", "--output_dir", str(tmp_path), "--num_examples", "8,8,8"]
    toy_settings.main([*flags, "--num_runs", str(num_runs)])
    assert len(seen) == 2 * num_runs
    for number in range(num_runs):
        command, environment = seen[f"fold1_run{number}"]
        levels = toy_settings.levels_of("ltu_as", number)
        assert [level.name for level in levels] == [
            setting.levels[level].name
            for setting, level in zip(SETTINGS["ltu_as"], DESIGN[number], strict=True)
        ]
        assert environment["ENCODER_RATE"] == levels[4].settings["ENCODER_RATE"]
        assert environment.get("BUILD_FLAGS") == levels[6].settings.get("BUILD_FLAGS")
        assert "AUDIO_TOKENS" not in environment
        assert environment["NUM_EXAMPLES"] == "8,8,8"
        rate = float(command[command.index("--learning_rate") + 1])
        projector = float(command[command.index("--projector_learning_rate") + 1])
        assert rate == float(levels[2].settings["RATE"])
        assert projector / rate == pytest.approx(float(levels[1].settings["PROJECTOR_RATIO"]))
    result = json.loads((tmp_path / "results.json").read_text())
    assert [run["category"] for run in result["runs"]] == [1.0] * num_runs
    assert {effect["category"]["mean"] for effect in result["effects"]} == {0.0}


def test_a_failed_fold_ends_the_benchmark(tmp_path, monkeypatch):
    started = []

    def run(command, **settings):
        started.append(command)
        return toy_runs.subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(toy_runs.subprocess, "run", run)
    with pytest.raises(ValueError, match="ended with exit status 3: see .*log"):
        toy_settings.main(["--kind", "ltu", "--output_dir", str(tmp_path), "--jobs", "1"])
    assert len(started) == 1


def test_every_setting_of_the_script_is_known():
    script = toy_runs.SCRIPT.read_text(encoding="utf-8")
    assert "LORA_RANK" in toy_runs.variables()
    for name in toy_runs.variables():
        assert f"${{{name}" in script or f"${name}" in script, name
    for kind in SETTINGS:
        for setting in SETTINGS[kind]:
            for level in setting.levels:
                names = set(level.settings) - {"RATE", "PROJECTOR_RATIO"}
                assert names <= set(toy_runs.variables())
