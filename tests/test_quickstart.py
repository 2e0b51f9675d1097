"""Tests quickstart.sh with stand-ins for its commands, and what it prints at its end."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import ltu.ask
import ltu.inference_gradio
from tests.machine import PATIENCE, ROOT, wait_until
from tests.test_scripts import TOY_STUB
from train_scripts.quickstart import next_steps

# Stands for a training: at SIGTERM it writes a file, as a training writes its checkpoint.
TRAINING = """
trap 'sleep 0.3; touch $1.saved; exit 143' TERM
touch $1.started
while true; do sleep 0.05; done
"""
SIDE_BY_SIDE = """
source "$1/train_scripts/functions.sh"
source train_scripts/quickstart/side_by_side.sh
cd "$2"
train() {
    step "training $1"
    bash training.sh "$1"
    echo "not reached"
}
eval "$3"
start First "" first
start Second second.txt second
wait_for_commands
echo "both have ended"
"""


def restore_signals() -> None:
    """Let the process get signals that the process of the tests may ignore."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start_both(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen]]:
    """Start the functions `first` and `second`, side by side, in the folder of the test.

    If the test fails, its processes are killed at the end. They share a session.
    """
    (tmp_path / "training.sh").write_text(TRAINING)
    sessions = []

    def start(functions: str) -> subprocess.Popen:
        process = subprocess.Popen(
            ["bash", "-c", SIDE_BY_SIDE, "quickstart.sh", str(ROOT), str(tmp_path), functions],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=restore_signals,
        )
        sessions.append(process.pid)
        return process

    yield start
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) in sessions:
                process.kill()


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Return exit status and output."""
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that have not ended."""
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


# Two commands side by side


def test_both_succeed(start_both, tmp_path: Path) -> None:
    functions = """
    first() { echo "output of first"; until [ -f second.started ]; do sleep 0.05; done; }
    second() { step one; touch second.started; sleep 2; step two; sleep 2; echo last; }
    """
    status, output = finish(start_both(functions))
    assert status == 0
    lines = output.splitlines()
    assert lines[0] == "output of first"
    assert lines[-1] == "both have ended"
    # While the first one writes to the terminal, nothing is printed about the second one.
    assert [line.split()[-1] for line in lines[1:-1]] == ["one", "two"]
    assert all(line.startswith("Second is at ") for line in lines[1:-1])
    assert (tmp_path / "second.txt").read_text().endswith("last\n")


@pytest.mark.parametrize("failing", ["first", "second"])
def test_one_fails(failing: str, start_both, tmp_path: Path) -> None:
    other = {"first": "second", "second": "first"}[failing]
    functions = f"""
    {other}() {{ train {other}; }}
    {failing}() {{
        until [ -f {other}.started ]; do sleep 0.05; done
        seq 100
        printf '1%% done\\r2%% done\\n'
        echo "error: no memory"
        (exit 3)
        echo "not reached"
    }}
    """
    process = start_both(functions)
    wait_until((tmp_path / f"{other}.started").exists)
    processes = psutil.Process(process.pid).children(recursive=True)
    status, output = finish(process)
    assert status == 3
    assert not running(processes)
    # The other training had the time to write its checkpoint.
    assert (tmp_path / f"{other}.saved").exists()
    assert f"error: {failing.capitalize()} failed with exit status 3" in output
    assert "not reached" not in output + (tmp_path / "second.txt").read_text()
    assert "both have ended" not in output
    assert "error: no memory\n" in output
    if failing == "second":
        # Twenty lines; a progress bar has a line for each state.
        assert "2% done\nerror: no memory\nThose are the last lines of second.txt" in output
        assert "\n84\n85\n" in output and "\n83\n" not in output
        # They come last, and the error above them.
        assert output.endswith("the whole output of Second.\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_both(name: str, start_both, tmp_path: Path) -> None:
    """The signal comes to the script only, as Ctrl-C does: the commands have their own groups."""
    functions = "first() { train first; }; second() { train second; }"
    process = start_both(functions)
    for command in ("first", "second"):
        wait_until((tmp_path / f"{command}.started").exists, process)
    processes = psutil.Process(process.pid).children(recursive=True)
    number = getattr(signal, name)
    process.send_signal(number)
    status, output = finish(process)
    assert status == 128 + number
    assert not running(processes)
    assert (tmp_path / "first.saved").exists() and (tmp_path / "second.saved").exists()
    assert "both have ended" not in output and "not reached" not in output


def test_a_command_that_ignores_sigterm_is_killed(start_both, tmp_path: Path) -> None:
    functions = """
    GRACE=1
    first() { trap "" TERM; touch first.started; sleep 1000; }
    second() { train second; }
    """
    process = start_both(functions)
    wait_until((tmp_path / "first.started").exists, process)
    wait_until((tmp_path / "second.started").exists, process)
    processes = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    status, _ = finish(process)
    assert status == 143
    time.sleep(0.1)  # SIGKILL ends a process at once, but not before `kill` returns.
    assert not running(processes)


# The whole script


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with quickstart.sh and an environment whose Python only creates its outputs."""
    folder = tmp_path / "my checkout"
    shutil.copytree(ROOT / "train_scripts", folder / "train_scripts")
    (folder / "data").symlink_to(ROOT / "data")
    for name in ("quickstart.sh", "requirements.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    stub = folder / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    # It also writes down its number of threads, and fails if its module is that of FAIL.
    shebang, rest = TOY_STUB.split("\n", 1)
    record = 'echo "$2 $OMP_NUM_THREADS" >> "$(dirname "$0")/threads.txt"\n'
    record += 'echo "$*" >> "$(dirname "$0")/arguments.txt"'
    fail = 'if [ "$2" = "${FAIL:-}" ]; then echo "$2 fails"; exit 7; fi'
    stub.write_text(f"{shebang}\n{record}\n{fail}\n{rest}")
    stub.chmod(0o755)
    command = f"cd {shlex.quote(str(folder))}; source train_scripts/venv.sh; install_stamp"
    stamp = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    (folder / ".venv" / "installed").write_text(f"dev {stamp.stdout.strip()}\n")
    return folder


def run_quickstart(checkout: Path, *flags: str, **variables: str) -> tuple[int, str, Counter]:
    """Return exit status, output and the modules that ran, with their numbers of runs."""
    done = checkout / ".venv" / "bin" / "commands.txt"
    done.write_text("")
    environment = dict(os.environ)
    environment.pop("THREADS", None)
    process = subprocess.run(
        ["bash", str(checkout / "quickstart.sh"), *flags],
        cwd=checkout.parent,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    return process.returncode, process.stdout, Counter(done.read_text().split())


def test_quickstart_trains_both_models(checkout: Path) -> None:
    status, output, modules = run_quickstart(checkout)
    assert status == 0, output
    assert (modules["ltu.finetune"], modules["ltu_as.finetune"]) == (4, 3)
    assert modules["eval.toy_confusion"] == modules["train_scripts.quickstart.plot_loss"] == 2
    assert modules["train_scripts.quickstart.next_steps"] == 1
    log = "exp/quickstart/seed0/ltu_as/log.txt"
    assert f"LTU-AS, whose output goes to {log}" in output
    # The stages of LTU are on the terminal, those of LTU-AS in the log.
    assert "stage4_all_mix" in output
    assert "stage3_all_mix_v2" in (checkout / log).read_text()
    assert output.splitlines()[-1].startswith("Wall time: 0 min ")
    # The commands that the script prints are relative to its folder.
    escaped = str(checkout).replace(" ", "\\ ")
    assert f"cd {escaped}\n" in output
    threads = (checkout / ".venv" / "bin" / "threads.txt").read_text().split()[1::2]
    assert set(threads) == {"1"}

    # The linear probe is on the audio encoder of the model.
    arguments = (checkout / ".venv" / "bin" / "arguments.txt").read_text()
    assert "-m eval.toy --folds exp/quickstart/seed0 --require_audio\n" in arguments
    assert (
        "-m eval.toy --folds exp/quickstart/seed0/ltu_as "
        "--audio_encoder pretrained_mdls/whisper-tiny.en/whisper.pt --require_audio\n"
    ) in arguments

    # A second run trains nothing.
    status, output, modules = run_quickstart(checkout)
    assert status == 0
    assert modules["ltu.finetune"] == modules["ltu_as.finetune"] == 0
    assert modules["eval.toy"] == 2


@pytest.mark.parametrize("kind", ["ltu", "ltu_as"])
def test_quickstart_trains_one_model(kind: str, checkout: Path) -> None:
    status, output, modules = run_quickstart(checkout, "--only", kind, THREADS="3")
    assert status == 0, output
    other = {"ltu": "ltu_as", "ltu_as": "ltu"}[kind]
    assert modules[f"{kind}.finetune"] and not modules[f"{other}.finetune"]
    assert "stage2_all_cla" in output
    assert not (checkout / "exp/quickstart/seed0/ltu_as/log.txt").exists()
    threads = (checkout / ".venv" / "bin" / "threads.txt").read_text().split()[1::2]
    assert set(threads) == {"3"}


def test_quickstart_fails_with_its_training(checkout: Path) -> None:
    status, output, modules = run_quickstart(checkout, FAIL="ltu_as.finetune")
    assert status == 7
    assert "error: LTU-AS failed with exit status 7" in output
    assert "ltu_as.finetune fails\nThose are the last lines of exp/quickstart/seed0/" in output
    assert not modules["train_scripts.quickstart.next_steps"]

    # The next run continues.
    status, output, modules = run_quickstart(checkout)
    assert status == 0, output
    assert modules["ltu_as.finetune"] == 3


@pytest.mark.parametrize("threads", ["0", "two", "-1"])
def test_a_wrong_number_of_threads_is_one_line(threads: str, checkout: Path) -> None:
    status, output, _ = run_quickstart(checkout, THREADS=threads)
    assert status == 2
    assert output == f"error: THREADS={threads} is not a number from 1\n"


# The commands that it prints


class Opened(Exception):
    """The flags of the command were parsed, and the model would be opened."""


def test_the_printed_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_engine(args) -> None:
        raise Opened(args.model)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ltu.ask, "open_engine", open_engine)
    exp_dir = tmp_path / "my run"
    for stage in ("stage1_proj_cla", "stage4_all_mix", "ltu_as/stage2_a", "ltu_as/stage3_b"):
        (exp_dir / stage).mkdir(parents=True)
    text = next_steps.describe(exp_dir, ["ltu", "ltu_as"])
    lines = [line.strip() for line in text.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith(next_steps.PYTHON)]
    modules = [words[2] for words in commands]
    assert modules == [
        *("ltu.inference_gradio", "ltu_as.inference_gradio"),
        *("ltu.ask", "ltu.ask", "ltu_as.ask", "ltu_as.ask", "ltu_as.ask"),
    ]
    checkpoints = {"ltu": exp_dir / "stage4_all_mix", "ltu_as": exp_dir / "ltu_as" / "stage3_b"}
    for _, _, module, *argv in commands:
        assert importlib.util.find_spec(module) is not None
        package, command = module.split(".")
        if command == "ask":
            assert (ROOT / argv[0]).is_file()
            with pytest.raises(Opened) as opened:
                ltu.ask.main(argv)
            model = str(opened.value)
        else:
            model = ltu.inference_gradio.parse_args(argv).model
        assert model == str(checkpoints[package])


def test_the_clips_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sound = next_steps.sound_example()
    split = json.loads((ROOT / "data/toy/split.json").read_text())
    assert Path(sound.clip).name in split["folds"][next_steps.FOLD]
    manifest = (ROOT / "data/toy/speech/manifest.jsonl").read_text().splitlines()
    clips = {clip["file"]: clip for clip in map(json.loads, manifest)}
    speaker = clips[Path(next_steps.speech_example().clip).name]["speaker"]
    splits = {clip["split"] for clip in clips.values() if clip["speaker"] == speaker}
    assert splits == {"test"}
    for name, example in (
        ("questions.json", sound),
        ("speech/questions.json", next_steps.speech_example()),
    ):
        questions = json.loads((ROOT / "data/toy" / name).read_text())
        in_training = set()
        for group in (*questions["closed"].values(), *questions["open"].values()):
            in_training |= set(group["train"])
        assert not in_training & set(example.questions)


def test_an_untrained_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ltu_as has no stage"):
        next_steps.main(["--exp_dir", str(tmp_path), "--kinds", "ltu_as"])
