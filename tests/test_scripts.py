"""Tests shell scripts and README commands.

They parse, the scripts pass the papers' hyper-parameters, and finished stages are skipped.
"""

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

import ltu_as  # noqa: F401  adds the flags of Whisper
from benchmarks import toy_runs
from ltu import finetune
from ltu.training.arguments import parse_args
from tests.tiny import write_checkpoint, write_llm, write_rows

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["stage1_proj_cla", "stage2_all_cla", "stage3_all_close", "stage4_all_mix"]
SCRIPTS = sorted(
    [
        *ROOT.glob("*.sh"),
        *ROOT.glob("benchmarks/*.sh"),
        *ROOT.glob("train_scripts/**/*.sh"),
        ROOT / ".ci" / "run",
    ]
)
PACKAGES = ("ltu", "ltu_as", "data", "eval", "qa_generation", "benchmarks", "train_scripts")
CURRICULUM = "train_scripts/curriculum.args"
TOY = "train_scripts/quickstart/toy.args"


@pytest.fixture(autouse=True)
def repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to the folder in which the scripts start their commands."""
    monkeypatch.chdir(ROOT)


def run_script(
    name: str, tmp_path: Path, *flags: str, exit_code: int = 0, **environment: str
) -> tuple[int, list[str]]:
    """Run a stage script with a stub that replaces Python.

    Args:
        name: a script of `train_scripts/ltu`, or `ltu_as/NAME`.
        exit_code: exit status of the stub.
        environment: variables on top of those of the tests.

    Returns:
        The exit status of the script and the arguments of the stub, [] if it was not called.
    """
    name = name if "/" in name else f"ltu/{name}"
    stub = tmp_path / "python"
    received = tmp_path / "argv"
    received.unlink(missing_ok=True)
    write_arguments = f'printf "%s\\0" "$@" > {shlex.quote(str(received))}'
    stub.write_text(f"#!/bin/sh\n{write_arguments}\nexit {exit_code}\n")
    stub.chmod(0o755)
    variables = dict(os.environ)
    for variable in ("BASE", "DATA", "EXP"):
        variables.pop(variable, None)
    variables |= {"PYTHON": str(stub), "NPROC": "1", **environment}
    command = ["bash", f"train_scripts/{name}.sh", *flags]
    result = subprocess.run(command, cwd=ROOT, env=variables, timeout=30)
    argv = received.read_text().split("\0")[:-1] if received.is_file() else []
    return result.returncode, argv


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


# From the papers' tables and the original's scripts: trainable parameters, micro-batch size,
# epochs, learning rate, and the maximum number of text tokens.
@pytest.mark.parametrize(
    ("name", "plan", "micro", "epochs", "rate", "cutoff"),
    [
        ("stage1_proj_cla", "proj", 8, 2, 1e-3, 108),
        ("stage2_all_cla", "all", 4, 2, 1e-4, 108),
        ("stage3_all_close", "all", 4, 1, 1e-4, 108),
        ("stage4_all_mix", "all", 4, 1, 1e-4, 108),
        ("stage4_full_finetune", "full", 4, 1, 2e-5, 108),
        ("finetune_toy", "all", 4, 1, 1e-4, 100),
        ("ltu_as/stage1_proj_cla", "proj", 8, 2, 1e-3, 108),
        ("ltu_as/stage2_all_cla", "all", 8, 2, 1e-4, 108),
        ("ltu_as/stage3_all_mix_v1", "all", 8, 1, 2e-4, 108),
        ("ltu_as/stage3_all_mix_v2", "all", 4, 1, 2e-4, 160),
        ("ltu_as/stage3_full_finetune", "full", 4, 1, 2e-5, 160),
        ("ltu_as/finetune_toy", "all", 4, 1, 2e-4, 160),
    ],
)
def test_hyper_parameters(name, plan, micro, epochs, rate, cutoff, tmp_path: Path) -> None:
    status, argv = run_script(name, tmp_path)
    assert status == 0
    package = name.split("/")[0] if "/" in name else "ltu"
    assert argv[:3] == ["-m", f"{package}.finetune", f"@{CURRICULUM}"]
    model, data, run = parse_args(argv[2:])
    assert model.trainable_params == plan
    targets = "[q_proj,v_proj]" if plan == "all" else '["dummy"]'
    assert model.lora_target_modules == targets
    assert run.batch_size == 256
    assert run.micro_batch_size == micro
    assert run.num_epochs == epochs
    assert run.learning_rate == rate
    assert run.warmup_steps == 100
    assert data.cutoff_len == cutoff
    assert data.train_on_inputs
    assert data.original_positions
    assert run.group_by_length


def test_each_stage_starts_where_the_one_before_ended(tmp_path: Path) -> None:
    before = "my_init"
    for name in STAGES:
        _, argv = run_script(name, tmp_path, BASE="my_init", DATA="rows", EXP="out dir")
        model, data, run = parse_args(argv[2:])
        assert model.base_model == before
        assert run.output_dir == f"out dir/{name}"
        assert data.data_path == f"rows/{name.split('_')[0]}.json"
        before = run.output_dir
    _, argv = run_script("stage4_full_finetune", tmp_path, EXP="out dir")
    model, data, _ = parse_args(argv[2:])
    assert model.base_model == "out dir/stage3_all_close"
    assert data.data_path.endswith("/stage4.json")


def test_stages_of_ltu_as(tmp_path: Path) -> None:
    """All kinds of stage 3 start from stage 2; FEATURES is the folder of stored features."""
    environment = {"BASE": "my_init", "EXP": "out dir", "FEATURES": "my features"}
    base_models = []
    last = ("stage3_all_mix_v1", "stage3_all_mix_v2", "stage3_full_finetune")
    for name in ("stage1_proj_cla", "stage2_all_cla", *last):
        _, argv = run_script(f"ltu_as/{name}", tmp_path, **environment)
        model, data, run = parse_args(argv[2:])
        assert run.output_dir == f"out dir/{name}"
        assert data.front_end["feature_root"] == "my features"
        base_models.append(Path(model.base_model).name)
    assert base_models == ["my_init", "stage1_proj_cla", *["stage2_all_cla"] * 3]

    _, argv = run_script("ltu_as/stage1_proj_cla", tmp_path)
    _, data, _ = parse_args(argv[2:])
    assert data.front_end["feature_root"] is None


@pytest.mark.parametrize("name", [*STAGES, "finetune_toy"])
def test_later_flags_override(name: str, tmp_path: Path) -> None:
    _, argv = run_script(name, tmp_path, f"@{TOY}", "--seed", "7")
    model, data, run = parse_args(argv[2:])
    assert (run.batch_size, run.warmup_steps, run.learning_rate) == (4, 10, 2e-3)
    assert model.freeze_audio_tower
    assert not data.train_on_inputs
    assert data.original_positions
    assert run.seed == 7


def test_a_script_shows_only_what_is_its_own() -> None:
    """No script repeats a flag of curriculum.args with the same value."""
    text = (ROOT / CURRICULUM).read_text()
    shared = [shlex.split(line, comments=True) for line in text.splitlines()]
    for script in ROOT.glob("train_scripts/ltu*/*.sh"):
        words = shlex.split(script.read_text(), comments=True)
        for flag in shared:
            if flag and flag[0] in words:
                start = words.index(flag[0])
                assert words[start : start + len(flag)] != flag, f"{script.name}: {flag}"


def test_flags_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Comments, several flags in a line, quotes; the last value of a flag counts."""
    required = ["--base_model", "a", "--data_path", "b", "--output_dir", "c"]
    file = tmp_path / "my flags.args"
    file.write_text("# 4\n\n--seed 4 --num_epochs 3  # epochs\n--llm 'my folder'\n")
    model, _, run = parse_args([*required, "--seed", "1", f"@{file}", "--num_epochs", "2"])
    assert (run.seed, run.num_epochs, model.llm) == (4, 2, "my folder")
    with pytest.raises(SystemExit) as end:
        parse_args([*required, f"@{tmp_path}/missing.args"])
    assert end.value.code == 2
    assert "missing.args" in capsys.readouterr().err


def test_processes_and_exit_status(tmp_path: Path) -> None:
    status, argv = run_script("stage1_proj_cla", tmp_path, NPROC="4", exit_code=3)
    assert status == 3
    launcher = "-m train_scripts.torchrun --standalone --nproc_per_node 4 -m ltu.finetune"
    assert argv[: argv.index("ltu.finetune") + 1] == launcher.split()


class TrainingStarted(Exception):
    """A stage was not skipped."""


def test_finished_stage_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`stage1_proj_cla.sh` trains once; a second call with the same flags does nothing."""
    base_model = write_checkpoint(tmp_path / "base", write_llm(tmp_path / "llm"))
    data_path = write_rows(tmp_path / "data", 8)
    folder = tmp_path / "exp" / "stage1_proj_cla"
    small = "--batch_size 4 --micro_batch_size 2 --num_workers 0 --bf16 False --cutoff_len 100"
    paths = ["--base_model", str(base_model), "--data_path", str(data_path)]
    exp = str(tmp_path / "exp")
    status, argv = run_script("stage1_proj_cla", tmp_path, *paths, *small.split(), EXP=exp)
    assert status == 0
    finetune.main(argv[2:])
    assert json.loads((folder / "ltu_state.json").read_text())["finished"]

    def train(*_) -> None:
        raise TrainingStarted

    monkeypatch.setattr(finetune, "make_trainer", train)
    capsys.readouterr()
    finetune.main(argv[2:])
    assert f"{folder} is finished; --overwrite trains it again\n" in capsys.readouterr().out
    for flags in (["--overwrite"], ["--output_dir", str(tmp_path / "new")]):
        with pytest.raises(TrainingStarted):
            finetune.main([*argv[2:], *flags])
    assert finetune.main([*argv[2:], "--plan"]) == 0
    assert "trainable params" in capsys.readouterr().out

    # A finished run with other flags, or from other weights, is not taken for this one.
    with pytest.raises(ValueError, match="another run: --seed: 42 there, 1 here"):
        finetune.main([*argv[2:], "--seed", "1"])
    write_checkpoint(base_model, tmp_path / "llm", seed=1)
    with pytest.raises(ValueError, match="another run: the weights of --base_model"):
        finetune.main(argv[2:])


# A Python whose commands only create their outputs, empty. It appends the module of each command
# to commands.txt in its folder.
TOY_STUB = """#!/bin/sh
shift
module=$1
flag=""
for word in "$@"; do
    case $word in
        --*) flag=$word ;;
        *)
            case $flag in
                --output_dir) mkdir -p "$word"; output_dir=$word ;;
                --output_path) mkdir -p "$(dirname "$word")"; touch "$word" ;;
            esac
            ;;
    esac
done
case $module in
    *.finetune)
        test -f "$output_dir/model.safetensors" && exit
        touch "$output_dir/model.safetensors"
        ;;
    *.convert_checkpoint) touch "$output_dir/ltu_state.json" ;;
esac
echo "$module" >> "$(dirname "$0")/commands.txt"
"""


@pytest.mark.parametrize(
    ("kind", "expected", "last_stage"),
    [
        (
            "ltu",
            "data.toy.build ltu.convert_checkpoint"
            + 4 * " ltu.finetune eval.answer_loss ltu.inference_batch eval.toy",
            "stage4_all_mix",
        ),
        (
            "ltu_as",
            "data.toy.build ltu_as.extract_whisper_feature ltu_as.pretrain_tltr"
            + " ltu_as.convert_checkpoint"
            + 3 * " ltu_as.finetune eval.answer_loss ltu_as.inference_batch eval.toy"
            + " eval.toy_speech",
            "stage3_all_mix_v2",
        ),
    ],
)
def test_toy_fold(kind: str, expected: str, last_stage: str, tmp_path: Path) -> None:
    """A second run does nothing; a stage that was trained again gets new answers."""
    stub = tmp_path / "python"
    stub.write_text(TOY_STUB)
    stub.chmod(0o755)
    done = tmp_path / "commands.txt"
    folder = tmp_path / "my fold"
    command = ["bash", "train_scripts/quickstart/toy_fold.sh", kind, "0", "0", str(folder)]
    environment = os.environ | {"PYTHON": str(stub)}

    def run() -> list[str]:
        done.write_text("")
        subprocess.run(command, env=environment, timeout=60, check=True)
        return done.read_text().split()

    assert run() == expected.split()
    assert run() == []

    weights = folder / last_stage / "model.safetensors"
    weights.unlink()
    after_training = [f"{kind}.finetune", "eval.answer_loss", f"{kind}.inference_batch", "eval.toy"]
    if kind == "ltu_as":
        after_training.append("eval.toy_speech")
    assert run() == after_training

    # The run was killed after training, with the answers of an earlier model in place.
    now = weights.stat().st_mtime
    os.utime(weights, (now + 10, now + 10))
    assert run() == after_training[1:]
    os.utime(weights, (now - 10, now - 10))
    (folder / last_stage / "answers" / "loss_none.json").unlink()
    assert run() == ["eval.answer_loss"]

    # Another setting needs another folder.
    for name, value in (("AUDIO_TOKENS", "1"), ("BUILD_FLAGS", "--x"), ("NUM_EXAMPLES", "4")):
        environment[name] = value
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        del environment[name]
        assert done.returncode == 2
        assert "give another DIR" in done.stderr


@pytest.mark.parametrize("kind", ["ltu", "ltu_as"])
def test_settings_of_a_toy_fold_reach_the_commands(kind: str, tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text(TOY_STUB.replace('echo "$module"', 'echo "$module" "$@"'))
    stub.chmod(0o755)
    command = ["bash", "train_scripts/quickstart/toy_fold.sh", kind, "0", "0", str(tmp_path / "f")]
    settings = {
        "PYTHON": str(stub),
        "AUDIO_TOKENS": "2",
        "SHORT_CLIPS": "pad",
        "LORA_TARGETS": "[v_proj]",
        "LORA_RANK": "4",
        "ENCODER_RATE": "1e-4",
        "BUILD_FLAGS": "--no_descriptions",
        "FEATURES": str(tmp_path / "shared"),
        "QUESTIONS": "all",
    }
    subprocess.run(command, env=os.environ | settings, timeout=60, check=True)
    lines = (tmp_path / "commands.txt").read_text().splitlines()
    trainings = [line for line in lines if line.startswith(f"{kind}.finetune")]
    assert "--no_descriptions" in lines[0]
    assert "--encoder_learning_rate" not in trainings[0]
    assert "--lora_r" not in trainings[0]
    for line in trainings[1:]:
        assert "--lora_target_modules [v_proj] --lora_r 4 --lora_alpha 8" in line
        assert "--freeze_audio_tower False --encoder_learning_rate 1e-4" in line
    # The last stage has half of the learning rates.
    assert "--learning_rate 1e-3 --projector_learning_rate 4e-3" in trainings[-1]
    init = next(line for line in lines if "--init" in line)
    if kind == "ltu":
        assert "--num_audio_tokens 2" in init
    else:
        extraction = next(line for line in lines if "extract_whisper_feature" in line)
        assert f"--num_audio_tokens 2 --output_dir {tmp_path}/shared" in extraction
        pretraining = next(line for line in lines if line.startswith("ltu_as.pretrain_tltr"))
        assert f"--feature_root {tmp_path}/shared --output_path {tmp_path}/f/tltr" in pretraining
        assert f"--audio_encoder {tmp_path}/f/tltr.safetensors" in init
        assert "speech_words_none.json" in lines[-3]
        assert "speech_pitch.json" in lines[-3]


@pytest.mark.parametrize("kind", ["ltu", "ltu_as"])
def test_defaults_of_a_toy_fold(kind: str, tmp_path: Path) -> None:
    """LoRA has rank 32, the audio encoder is frozen, and the questions about speech are few."""
    stub = tmp_path / "python"
    stub.write_text(TOY_STUB.replace('echo "$module"', 'echo "$module" "$@"'))
    stub.chmod(0o755)
    settings = toy_runs.variables()
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    command = ["bash", "train_scripts/quickstart/toy_fold.sh", kind, "0", "0", str(tmp_path / "f")]
    subprocess.run(command, env=environment | {"PYTHON": str(stub)}, timeout=60, check=True)
    lora = []
    lines = (tmp_path / "commands.txt").read_text().splitlines()
    answering = [line for line in lines if "inference_batch" in line]
    assert ("speech_words_whisper.json" in answering[-1]) == (kind == "ltu_as")
    assert "speech_pitch.json" not in "".join(answering)
    for line in lines:
        assert "--encoder_learning_rate" not in line
        if line.split()[0] == f"{kind}.finetune":
            assert "--freeze_audio_tower False" not in line
            lora.append("--lora_r 32 --lora_alpha 64" in line)
    assert lora == [False] + [True] * (len(lora) - 1)
    # LTU has half of the learning rates in its last stage, LTU-AS in all that train LoRA.
    trainings = [line for line in lines if line.startswith(f"{kind}.finetune")]
    half = ["--learning_rate 1e-3 --projector_learning_rate 4e-3" in line for line in trainings]
    long_warmup = ["--warmup_steps 30" in line for line in trainings]
    if kind == "ltu":
        assert (half, long_warmup) == ([False] * 3 + [True], [False] * 4)
    else:
        assert half == long_warmup == [False, True, True]
    assert len(lora) == {"ltu": 4, "ltu_as": 3}[kind]


def test_last_questions_of_a_toy_fold(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text(TOY_STUB)
    stub.chmod(0o755)
    command = ["bash", "train_scripts/quickstart/toy_fold.sh", "ltu", "0", "0", str(tmp_path / "f")]
    environment = os.environ | {"PYTHON": str(stub), "QUESTIONS": "last"}
    subprocess.run(command, env=environment, timeout=60, check=True)
    commands = (tmp_path / "commands.txt").read_text().split()
    asked = ["eval.answer_loss", "ltu.inference_batch", "eval.toy"]
    assert commands[2:] == ["ltu.finetune"] * 4 + asked
    answers = tmp_path / "f" / "stage4_all_mix" / "answers"
    assert {"right.json", "wrong.json", "none.json", "open.json", "loss_wrong.json"} <= {
        path.name for path in answers.iterdir()
    }


@pytest.mark.parametrize("setting", [("SHORT_CLIPS", "looped"), ("QUESTIONS", "All")])
def test_a_misspelt_setting_of_a_toy_fold_is_an_error(setting, tmp_path: Path) -> None:
    command = ["bash", "train_scripts/quickstart/toy_fold.sh", "ltu_as", "0", "0", str(tmp_path)]
    environment = os.environ | dict([setting])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: {setting[0]}={setting[1]}: choose" in done.stderr


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
    """Return the commands of the ```bash blocks of README.md and docs/*.md, each once.

    Comments are left out. Lines that end with a backslash are joined with the next one.
    """
    lines = []
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            lines += block.replace("\\\n", " ").splitlines()
    commands = dict.fromkeys(line.strip() for line in lines)
    return [command for command in commands if command and not command.startswith("#")]


class Parsed(Exception):
    """The flags of the command were parsed."""


CHECKED_COMMANDS = [
    command for command in readme_commands() if re.search(r"(^|\s)(bash|python) ", command)
]


@pytest.mark.parametrize("command", CHECKED_COMMANDS)
def test_readme_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = shlex.split(re.sub(r"\$\(.*?\)", "", command), comments=True)
    while argv and re.fullmatch(r"[A-Z_]+=.*", argv[0]):
        argv.pop(0)
    if argv[0] == "bash":
        assert (ROOT / argv[1]).is_file(), f"README: no {argv[1]}"
        return
    if argv[1] != "-m" or argv[2].split(".")[0] not in PACKAGES:
        return
    assert importlib.util.find_spec(argv[2]) is not None, f"README: no module {argv[2]}"
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def stop_after_parsing(
        parser: argparse.ArgumentParser, args: list[str] | None = None, namespace=None
    ):
        _, unknown = parse_known_args(parser, args, namespace)
        if unknown:
            raise AssertionError(f"README: {argv[2]} has no flags {unknown}")
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop_after_parsing)
    monkeypatch.setattr(sys, "argv", argv[2:])
    module = importlib.import_module(argv[2])
    if hasattr(module, "main"):
        with pytest.raises((Parsed, SystemExit)) as end:
            module.main()
        printed_help = end.type is SystemExit and end.value.code == 0 and "--help" in argv
        assert end.type is Parsed or printed_help, f"README: {command}"
