"""Tests that SIGTERM ends a stage script with a checkpoint and its own status.

A Slurm job is then requeued, and the run continues with the losses of one that was not stopped.
Slurm itself is replaced by stubs.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing import ProcessFailure
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ltu.files import sha256_of
from ltu.finetune import main
from ltu.training.arguments import parse_args
from ltu.training.run_folder import what_is_incomplete
from ltu.training.stop_signal import STOPPED
from ltu.training.trainer import make_trainer
from tests.machine import PATIENCE, ROOT, start_python, wait_until
from tests.test_scripts import run_script
from tests.tiny import LORA, write_checkpoint, write_llm, write_rows
from tests.tiny import training_flags as flags
from train_scripts.torchrun import exit_status, forward

COMMON = {"save_steps": 2, "num_epochs": 2, "num_workers": 1}  # 6 steps of 4 examples
TRAINING_SCRIPTS = [
    path for path in sorted(ROOT.glob("train_scripts/ltu*/*.sh")) if path.stem != "prep_train"
]

# Python imports this module when it starts. It holds a training at its first checkpoint until the
# file `go` exists, so that the test does not depend on the speed of the machine.
HOLD = """
import os, sys, time

def hold(event, arguments):
    if event == "os.mkdir" and str(arguments[0]).endswith("checkpoint-2"):
        open(GO + ".reached", "w").close()
        while not os.path.exists(GO):
            time.sleep(0.01)

sys.addaudithook(hold)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose LoRA has dropout, so that a run depends on the random state too."""
    root = tmp_path_factory.mktemp("model")
    lora = LORA | {"lora_dropout": 0.05}
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), lora)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file of 12 examples."""
    return write_rows(tmp_path_factory.mktemp("data"), 12, without_audio=3)


def result(folder: Path) -> tuple[list, str]:
    """Return the losses of a finished run, and the hash of its weights."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    assert json.loads((folder / "ltu_state.json").read_text())["finished"]
    return losses, sha256_of(folder / "model.safetensors")


# --- stage scripts


def start_script(arguments: list[str], num_ranks: int, site: Path) -> subprocess.Popen:
    """Start a stage script on a CPU; `site` is the folder of its sitecustomize.py."""
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]),
        "NPROC": str(num_ranks),
        # Another number of threads would round differently than this process.
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    command = ["bash", "train_scripts/ltu/stage2_all_cla.sh", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


@pytest.mark.parametrize(
    ("target", "num_ranks"),
    [
        ("all", 1),
        pytest.param("script", 1, marks=pytest.mark.slow),
        pytest.param("all", 2, marks=pytest.mark.slow),
        pytest.param("script", 2, marks=pytest.mark.slow),
        pytest.param("last rank", 2, marks=pytest.mark.slow),
    ],
)
def test_sigterm_to_a_stage_script(checkpoint, data_path, tmp_path, target, num_ranks):
    """It comes to the script only, as from a shell, to one rank, or to all processes, as in Slurm.

    Step 3, after which no checkpoint was due, ends the run.
    """
    site = tmp_path / "site"
    site.mkdir()
    go = tmp_path / "go"
    (site / "sitecustomize.py").write_text(f"GO = {str(go)!r}\n{HOLD}")
    folder = tmp_path / "run"
    arguments = flags(checkpoint, data_path, folder, **COMMON, lora_r=4, lora_alpha=8)

    script = start_script(arguments, num_ranks, site)
    wait_until(Path(f"{go}.reached").exists, script)
    processes = psutil.Process(script.pid).children(recursive=True)
    assert processes  # A worker that loads audio, or ranks and their workers.
    if target == "all":
        for process in processes:
            process.terminate()
    if target == "last rank":
        psutil.Process(script.pid).children()[-1].terminate()
    else:
        script.terminate()
    go.touch()
    assert script.wait(PATIENCE) == STOPPED == 143
    assert not any(process.is_running() for process in processes)
    assert what_is_incomplete(folder / "checkpoint-3") is None
    assert not (folder / "checkpoint-4").exists()

    # The same command continues, with the losses of a run that was not stopped.
    whole = flags(checkpoint, data_path, tmp_path / "whole", **COMMON, lora_r=4, lora_alpha=8)
    for words in (arguments, whole):
        if num_ranks == 1:  # In this process, because a new one takes seconds to import torch.
            _, argv = run_script("stage2_all_cla", tmp_path, *words)
            assert main(argv[2:]) == 0
        else:
            assert start_script(words, num_ranks, site).wait(PATIENCE) == 0
    assert result(folder) == result(tmp_path / "whole")


@pytest.mark.parametrize("script", TRAINING_SCRIPTS, ids=lambda path: "-".join(path.parts[-2:]))
def test_the_training_replaces_the_script(script: Path, tmp_path: Path) -> None:
    """A shell that waits for Python would end at SIGTERM, and leave the training alone."""
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho $$\n")
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stub), "NPROC": "1", "EXP": str(tmp_path)}
    process = subprocess.Popen(
        ["bash", str(script)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert int(process.communicate()[0]) == process.pid


# --- workers


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_sigterm_does_not_end_a_worker(checkpoint, data_path, tmp_path, kind):
    """Without its workers, a rank could not finish its step."""
    settings = {"num_workers": 1, "val_set_size": 8, "per_device_eval_batch_size": 1}
    arguments = flags(checkpoint, data_path, tmp_path / "run", **settings)
    trainer = make_trainer(*parse_args(arguments))
    loader = getattr(trainer, f"get_{kind}_dataloader")()
    others = multiprocessing.active_children()
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - set(others)
    worker.terminate()
    worker.join(0.5)
    assert worker.is_alive()
    assert len(list(batches)) == len(loader) - 1


def test_a_worker_that_ignores_sigterm_does_not_outlive_the_run(tmp_path):
    code = """
import multiprocessing, time
from ltu.training.stop_signal import ignore_stop_signals, kill_workers_at_exit
def work(is_ready):
    ignore_stop_signals(0)
    is_ready.set()
    time.sleep(1e6)
kill_workers_at_exit()
context = multiprocessing.get_context("fork")
is_ready = context.Event()
context.Process(target=work, args=[is_ready], daemon=True).start()
is_ready.wait()
"""
    assert start_python(["-c", code], tmp_path).wait(PATIENCE) == 0


def test_a_worker_that_is_killed_at_the_end_is_no_error(tmp_path):
    """torch has a handler that raises an error when one of its workers is killed."""
    code = """
from torch.utils.data import DataLoader
from ltu.training.stop_signal import ignore_stop_signals, kill_workers_at_exit
kill_workers_at_exit()
batches = iter(DataLoader([1, 2, 3], num_workers=1, worker_init_fn=ignore_stop_signals))
next(batches)
raise SystemExit("error: one line")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    # Before this line, an installed bitsandbytes may print a warning.
    assert done.returncode == 1
    assert done.stderr.endswith("error: one line\n")


# --- torchrun


@pytest.mark.parametrize(
    ("exit_codes", "status"),
    [
        ([143, 143], 143),
        ([143, -signal.SIGTERM], 143),
        ([143, 1], 1),
        ([-signal.SIGTERM, 1], 1),
        ([-signal.SIGKILL, 143], 137),
    ],
)
def test_exit_status_of_ranks(exit_codes, status):
    """torchrun ends the other ranks by SIGTERM when one fails."""
    failures = {}
    for rank, code in enumerate(exit_codes):
        failures[rank] = ProcessFailure(rank, pid=1, exitcode=code, error_file="")
    assert exit_status(ChildFailedError("finetune", failures)) == status


def test_sigterm_before_the_ranks_start(monkeypatch):
    monkeypatch.setattr(psutil.Process, "children", lambda self: [])
    with pytest.raises(SystemExit) as end:
        forward(signal.SIGTERM, None)
    assert end.value.code == STOPPED


@pytest.mark.slow  # Starts an interpreter that imports torch.
def test_an_error_of_a_rank_is_not_taken_for_sigterm(tmp_path):
    """The launcher has the status of the rank, not that of torchrun, which is 1."""
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(5); time.sleep(1e6)"
    (tmp_path / "rank.py").write_text(code)
    command = [sys.executable, "-m", "train_scripts.torchrun", "--standalone"]
    command += ["--nproc_per_node", "2", str(tmp_path / "rank.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr


# --- Slurm


@pytest.mark.parametrize(
    ("status", "seconds", "is_requeued"),
    [(0, 600, False), (1, 600, False), (137, 600, False), (143, 600, True), (143, 0, False)],
)
def test_slurm_requeues_a_stopped_training(status, seconds, is_requeued, tmp_path):
    """Only SIGTERM is followed by a requeue: a run that failed would fail again and again.

    So would one whose time limit is so short that SIGTERM comes before it trains.
    """
    calls = tmp_path / "calls"
    stubs = {
        "srun": f'#!/bin/sh\necho "srun $*" >> "{calls}"\nexit {status}\n',
        "scontrol": f'#!/bin/sh\necho "scontrol $*" >> "{calls}"\necho node1\n',
    }
    for name, content in stubs.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SECONDS": str(seconds),  # bash counts on from there.
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    command = ["bash", "train_scripts/slurm.sh", "stage.sh", "--seed", "7"]
    assert subprocess.run(command, env=environment, cwd=ROOT).returncode == status
    expected = ["scontrol show hostnames node[1-2]"]
    expected.append("srun --kill-on-bad-exit=0 bash stage.sh --seed 7")
    if is_requeued:
        expected.append("scontrol requeue 7")
    assert calls.read_text().splitlines() == expected


def test_slurm_sends_sigterm_before_the_time_limit():
    """It goes to the training, not to the script, which must live to requeue the job."""
    lines = (ROOT / "train_scripts/slurm.sh").read_text().splitlines()
    assert len(lines) <= 40
    assert {"#SBATCH --signal=TERM@600", "#SBATCH --requeue"} <= set(lines)
    assert "#SBATCH --open-mode=append" in lines
