"""Runs every case of the tables in docs/training_cases.md on a tiny model.

Each quoted line must be printed, and the exit status must be that of the table. So a message that
changes must be changed on the page too. The page names a test for each case, which must exist.
"""

import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile

from ltu.data import audio
from ltu.files import lock_file, run_command
from ltu.training import trainer
from ltu.training.arguments import REFUSED
from tests.interruption import is_step_4, limit_file_size, send_sigterm
from tests.tiny import LORA, clip, write_checkpoint, write_llm

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "training_cases.md"
# The page states these flags once, for all rows.
COMMON = (
    "--base_model base --data_path mine.json --output_dir exp/run --batch_size 4 "
    "--micro_batch_size 2 --save_steps 2 --warmup_steps 2 --learning_rate 1e-2 --num_workers 0 "
    "--bf16 False --disable_tqdm True"
)
NUM_EXAMPLES = 24
# What differs between machines: values, sizes of files, hashes, and the words of a disk that is
# full.
VARYING = (
    (r"these examples: .*", "these examples: ..."),
    (r"cannot be written \(.*\)\.", "cannot be written (...)."),
    (r"\d+ bytes instead of \d+", "N bytes instead of M"),
    (r"\b[0-9a-f]{12}\b", "HASH"),
    (r"\b(nan|inf|\d+\.\d+)\b", "X"),
)


class Killed(BaseException):
    """Stands for kill -9: no code of the project catches it."""


@dataclass(frozen=True)
class Row:
    """A row of a table of the page.

    Attributes:
        case: what is tried.
        command: the flags after `COMMON`, or a whole command.
        lines: what is printed, among other lines.
        status: the exit status.
        test: the name of the test that holds the case in detail, on the page in words.
    """

    case: str
    command: str
    lines: list[str]
    status: int
    test: str


def read_rows() -> list[Row]:
    """Return the rows of all tables of the page that have an exit status."""
    rows = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 5 or not cells[3].isdecimal():
            continue
        case, command, printed, status, test = cells
        lines = [text.replace("\\|", "|") for text in re.findall(r"`([^`]+)`", printed)]
        test = f"test_{test.replace(' ', '_')}"
        rows.append(Row(case, command.strip("`"), lines, int(status), test))
    return rows


ROWS = read_rows()


def normalized(text: str) -> str:
    """Return a text without what differs between machines."""
    for pattern, replacement in VARYING:
        text = re.sub(pattern, replacement, text)
    return " ".join(text.split())


# --- the folder in which a case is run


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, clips, and dataset files that are right and wrong."""
    root = tmp_path_factory.mktemp("template")
    write_checkpoint(root / "base", write_llm(root / "llm"), LORA)
    _write_diverged(root)
    examples = []
    for number in range(NUM_EXAMPLES):
        name = f"{number}.wav"
        soundfile.write(root / name, clip(number), 16_000)
        audio_id = "empty" if number < 4 else name
        example = {"instruction": "What is it?", "input": "", "audio_id": audio_id}
        examples.append(example | {"output": f"Sound {number}."})
    soundfile.write(root / "loud.wav", np.float32([0, 12000] * 4000), 16_000, subtype="FLOAT")

    files = {
        "mine": examples,
        "audio": [_renamed(example, "audio_id", "audio") for example in examples],
        "audio_path": [_renamed(example, "audio_id", "audio_path") for example in examples],
        "no_audio_id": [_without(example, "audio_id") for example in examples],
        "split": [example | {"split": "train"} for example in examples],
        "text": [example | {"audio_id": "empty"} for example in examples],
        "empty_output": [examples[0] | {"output": " "}, *examples[1:]],
        "long": [*examples[:-1], examples[-1] | {"instruction": "Rain? " * 60}],
        "loud": [*examples[:-1], examples[-1] | {"audio_id": "loud.wav"}],
        "missing": [*examples[:-1], examples[-1] | {"audio_id": "missing.wav"}],
        "reordered": examples[::-1],
        "changed": [examples[0] | {"output": "Another answer."}, *examples[1:]],
    }
    shutil.copytree(ROOT / "train_scripts" / "configs", root / "train_scripts" / "configs")
    for name, content in files.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def _without(example: dict, key: str) -> dict:
    return {name: value for name, value in example.items() if name != key}


def _renamed(example: dict, key: str, new: str) -> dict:
    return _without(example, key) | {new: example[key]}


def _write_diverged(root: Path) -> None:
    """Copy the checkpoint, with one value that is NaN, as an older version could leave it."""
    folder = root / "diverged"
    shutil.copytree(root / "base", folder)
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["multi_modal_projector.linear.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})


def execute(command: str) -> int:
    """Run a command of a row in this process; return its exit status."""
    words = shlex.split(command)
    module = "ltu.finetune"
    if words[:2] == ["python", "-m"]:
        module, words = words[2], words[3:]
    else:
        words = [*shlex.split(COMMON), *words]
    with pytest.raises(SystemExit) as end:
        run_command(lambda: import_module(module).main(words))
    if isinstance(end.value.code, str):  # Python prints it and exits with 1.
        print(end.value.code)
        return 1
    return end.value.code or 0


# --- what was in the folder before: by words of the case


def kill_at_step(step: int) -> None:
    """Leave a run that was killed before the checkpoint of a step was complete."""

    def complete(checkpoint: Path, record: dict) -> None:
        if checkpoint.name == f"checkpoint-{step}":
            raise Killed
        stock_complete(checkpoint, record)

    stock_complete = trainer.complete_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "complete_checkpoint", complete)
        with pytest.raises(Killed):
            run_command(lambda: import_module("ltu.finetune").main(shlex.split(COMMON)))


def finish() -> None:
    """Leave a run that is finished."""
    assert execute("") == 0


def stop() -> None:
    """Leave a run that was killed after checkpoint-4."""
    kill_at_step(6)
    shutil.rmtree("exp/run/checkpoint-6")


def begin_again() -> None:
    """Leave a run that was killed after checkpoint-2, next to checkpoint-6 of an older run."""
    finish()
    shutil.move("exp/run/checkpoint-6", "older")
    shutil.rmtree("exp/run")
    kill_at_step(4)
    shutil.rmtree("exp/run/checkpoint-4")
    shutil.move("older", "exp/run/checkpoint-6")


STATES = {
    "finished run": finish,
    "stopped run": stop,
    "cut `": stop,
    "killed while checkpoint-4": lambda: kill_at_step(4),
    "killed before checkpoint-2": lambda: kill_at_step(2),
    "older run": begin_again,
}


# --- what happens after that, or during the command: by words of the case


def damage(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a function that cuts a file of checkpoint-4."""

    def cut(patch: pytest.MonkeyPatch) -> None:
        path = Path("exp/run/checkpoint-4", name)
        path.write_bytes(path.read_bytes()[:-100])

    return cut


def lock(patch: pytest.MonkeyPatch) -> None:
    """Let another run have the folder."""
    Path("exp/run").mkdir(parents=True)
    file = lock_file(Path("exp/run/_run.lock"), Path("exp/run"))
    patch.setattr(os, "another_run", file, raising=False)  # As long as the test lasts.


def fill_disk(patch: pytest.MonkeyPatch) -> None:
    """Let no file be longer than 4 kB in the save of step 4."""
    limit_file_size(patch, "_save_checkpoint", is_step_4, 4096)


EVENTS = {
    "another run writes": lock,
    "SIGTERM in step 3": send_sigterm,
    "the disk is full": fill_disk,
}
for _name in (
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "ltu_state.json",
):
    EVENTS[f"cut `{_name}`"] = damage(_name)


# --- the tests


@pytest.fixture(scope="module")
def folder_of(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row], Path]:
    """Return a function that returns a folder as it is before a row. Each state is made once."""
    made: dict[str, Path] = {}

    def find(row: Row) -> Path:
        names = [name for name in STATES if name in row.case]
        if not names:
            return template
        name = names[0]
        if name not in made:
            folder = tmp_path_factory.mktemp("state") / "here"
            shutil.copytree(template, folder)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                STATES[name]()
            made[name] = folder
        return made[name]

    return find


@pytest.mark.parametrize("row", ROWS, ids=lambda row: re.sub(r"\W+", "_", row.case))
def test_a_row_is_what_is_printed(row, folder_of, tmp_path, monkeypatch, capsys, caplog):
    folder = tmp_path / "here"
    shutil.copytree(folder_of(row), folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(audio, "_first_warnings", audio.FirstWarnings())
    for words, prepare in EVENTS.items():
        if words in row.case:
            prepare(monkeypatch)
    capsys.readouterr()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        status = execute(row.command)
    printed = capsys.readouterr()
    output = "\n".join([printed.out, printed.err, *caplog.messages])
    assert status == row.status, output
    for line in row.lines:
        assert normalized(line) in normalized(output)


def test_every_row_names_a_test_that_exists():
    source = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    assert len(ROWS) > 30
    for row in ROWS:
        assert f"def {row.test}(" in source, row.test
        assert row.lines, row.case


def test_the_refused_flags_are_those_of_the_code():
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("| flag | reason |")
    table, _, _ = rest.partition("\n\n")
    assert dict(re.findall(r"^\| `--(\w+)` \| (.*) \|$", table, re.MULTILINE)) == REFUSED


def test_the_page_states_the_common_flags():
    text = " ".join(PAGE.read_text(encoding="utf-8").replace("\\\n", " ").split())
    assert COMMON in text
