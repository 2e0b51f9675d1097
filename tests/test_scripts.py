"""Shell scripts and README commands: they parse, they show the paper's numbers, finished work is skipped."""

import argparse
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ltu.training.arguments import parse_args

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["stage1_proj_cla", "stage2_all_cla", "stage3_all_close", "stage4_all_mix"]
SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("train_scripts/**/*.sh"), ROOT / ".ci" / "run"])
PACKAGES = ("ltu", "ltu_as", "data", "eval", "qa_generation", "benchmarks", "train_scripts")
TINY = [
    line
    for line in (ROOT / "train_scripts/tiny.args").read_text().splitlines()
    if not line.startswith("#")
]


def run_script(
    name: str, tmp_path: Path, *flags: str, exit_code: int = 0, **environment: str
) -> tuple[int, list[str]]:
    """Run a stage script (of ltu, or `ltu_as/NAME`) with a stand-in for Python: its exit status, what Python got."""
    name = name if "/" in name else f"ltu/{name}"
    stub, seen = tmp_path / "python", tmp_path / "argv"
    stub.write_text(
        f'#!/bin/sh\nprintf "%s\\0" "$@" > {shlex.quote(str(seen))}\nexit {exit_code}\n'
    )
    stub.chmod(0o755)
    seen.unlink(missing_ok=True)
    variables = {
        key: value for key, value in os.environ.items() if key not in ("BASE", "DATA", "EXP")
    }
    variables |= {"PYTHON": str(stub), "NPROC": "1", **environment}
    done = subprocess.run(
        ["bash", f"train_scripts/{name}.sh", *flags], cwd=ROOT, env=variables, timeout=30
    )
    return done.returncode, seen.read_text().split("\0")[:-1] if seen.is_file() else []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    for word in ("mapfile", "readarray", "declare -A", "local -A", "${1,,}", "&>>", "|&"):
        assert word not in text, f"{word} needs a newer bash than macOS has"


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("train_scripts/ltu*/*.sh")), ids=lambda path: path.stem
)
def test_stage_scripts_are_short(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 25


# The papers' tables and the original's scripts: plan, rows per pass, epochs, learning rate, text ids.
@pytest.mark.parametrize(
    ("name", "plan", "micro", "epochs", "rate", "cutoff"),
    [
        ("stage1_proj_cla", "proj", 8, 2, 1e-3, 108),
        ("stage2_all_cla", "all", 4, 2, 1e-4, 108),
        ("stage3_all_close", "all", 4, 1, 1e-4, 108),
        ("stage4_all_mix", "all", 4, 1, 1e-4, 108),
        ("finetune_toy", "all", 4, 1, 1e-4, 100),
        ("ltu_as/stage1_proj_cla", "proj", 8, 2, 1e-3, 108),
        ("ltu_as/stage2_all_cla", "all", 8, 2, 1e-4, 108),
        ("ltu_as/stage3_all_mix_v1", "all", 8, 1, 2e-4, 108),
        ("ltu_as/stage3_all_mix_v2", "all", 4, 1, 2e-4, 160),
        ("ltu_as/finetune_toy", "all", 4, 1, 2e-4, 160),
    ],
)
def test_hyper_parameters(name, plan, micro, epochs, rate, cutoff, tmp_path: Path) -> None:
    status, argv = run_script(name, tmp_path)
    assert status == 0 and argv[:2] == [
        "-m",
        f"{name.split('/')[0] if '/' in name else 'ltu'}.finetune",
    ]
    model, data, run = parse_args(argv[2:])
    assert model.trainable_params == plan
    assert model.lora_target_modules == ('["dummy"]' if plan == "proj" else "[q_proj,v_proj]")
    assert (run.batch_size, run.micro_batch_size, run.num_epochs, run.learning_rate) == (
        256,
        micro,
        epochs,
        rate,
    )
    assert (data.cutoff_len, run.warmup_steps) == (cutoff, 100)
    assert data.train_on_inputs and data.original_positions and run.group_by_length


def test_each_stage_starts_where_the_one_before_ended(tmp_path: Path) -> None:
    before = "my_init"
    for name in STAGES:
        _, argv = run_script(name, tmp_path, BASE="my_init", DATA="rows", EXP="out dir")
        model, data, run = parse_args(argv[2:])
        assert model.base_model == before and run.output_dir == f"out dir/{name}"
        assert data.data_path == f"rows/{name.split('_')[0]}.json"
        before = run.output_dir


def test_stages_of_ltu_as(tmp_path: Path) -> None:
    """Both kinds of stage 3 start from stage 2; features come from a folder if one is named."""
    found = {}
    for name in ("stage1_proj_cla", "stage2_all_cla", "stage3_all_mix_v1", "stage3_all_mix_v2"):
        _, argv = run_script(
            f"ltu_as/{name}", tmp_path, BASE="my_init", EXP="out dir", FEATURES="my features"
        )
        found[name], data, run = parse_args(argv[2:])
        assert run.output_dir == f"out dir/{name}" and data.feature_root == "my features"
    starts = [Path(model.base_model).name for model in found.values()]
    assert starts == ["my_init", "stage1_proj_cla", "stage2_all_cla", "stage2_all_cla"]
    assert parse_args(run_script("ltu_as/stage1_proj_cla", tmp_path)[1][2:])[1].feature_root is None


@pytest.mark.parametrize("name", [*STAGES, "finetune_toy"])
def test_later_flags_override(name: str, tmp_path: Path) -> None:
    wanted = dict(line.lstrip("-").split(" ", 1) for line in TINY if " " in line)
    _, argv = run_script(name, tmp_path, *" ".join(TINY).split(), "--seed", "7")
    run = parse_args(argv[2:])[2]
    assert run.batch_size == int(wanted["batch_size"]) and run.seed == 7


def test_processes_and_exit_status(tmp_path: Path) -> None:
    status, argv = run_script("stage1_proj_cla", tmp_path, NPROC="4", exit_code=3)
    assert status == 3
    launcher = argv[: argv.index("ltu.finetune") + 1]
    assert (
        launcher
        == "-m torch.distributed.run --standalone --nproc_per_node 4 -m ltu.finetune".split()
    )


@pytest.mark.parametrize("flags", [(), ("--output_dir", "{}"), ("--output_dir={}",)])
def test_finished_stage_is_skipped(flags: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "exp" / "stage1_proj_cla"
    folder.mkdir(parents=True)
    arguments = [flag.format(folder) for flag in flags]
    exp = str(tmp_path / "elsewhere" if flags else tmp_path / "exp")
    for finished in (False, True):
        (folder / "ltu_state.json").write_text(
            json.dumps({"step": 5, "finished": finished}, indent=1)
        )
        status, argv = run_script("stage1_proj_cla", tmp_path, *arguments, EXP=exp)
        assert status == 0 and bool(argv) is not finished


def test_paths_are_relative_to_the_repository(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\npwd\n")
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stub), "NPROC": "1", "EXP": str(tmp_path)}
    script = str(ROOT / "train_scripts/ltu/stage2_all_cla.sh")
    done = subprocess.run(
        ["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(ROOT)


def readme_commands() -> list[str]:
    """Every command of the README's ```bash blocks, continued lines joined, without comments and prompts."""
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.is_file() else ""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


class Parsed(Exception):
    """The command's flags were understood."""


@pytest.mark.parametrize(
    "command", [c for c in readme_commands() if re.search(r"(^|\s)(bash|python) ", c)]
)
def test_readme_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(re.sub(r"\$\(.*?\)", "", command), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), f"README: no {words[1]}"
        return
    if words[1] != "-m" or words[2].split(".")[0] not in PACKAGES:
        return
    assert importlib.util.find_spec(words[2]) is not None, f"README: no module {words[2]}"
    understand = argparse.ArgumentParser.parse_known_args

    def stop_after_parsing(
        parser: argparse.ArgumentParser, args: list[str] | None = None, namespace=None
    ):
        _, unknown = understand(parser, args, namespace)
        raise Parsed if not unknown else AssertionError(f"README: {words[2]} knows no {unknown}")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop_after_parsing)
    monkeypatch.setattr(sys, "argv", words[2:])
    module = importlib.import_module(words[2])
    if hasattr(module, "main"):
        with pytest.raises((Parsed, SystemExit)) as end:
            module.main()
        assert end.type is Parsed or (end.value.code == 0 and "--help" in words), (
            f"README: {command}"
        )
