"""Tests checkpoint folders that are damaged, or made to harm, of more than a hundred kinds.

Each is refused with one line, or opened if the value does no harm. None ends in a traceback from
inside a library, hangs, or takes memory. Time and memory are limited generously: what is refused is
refused before anything is built, in milliseconds.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from ltu.convert_checkpoint import main as convert
from ltu.finetune import main as finetune
from ltu.inference.engine import LtuEngine
from ltu.models.locate_checkpoint import CHECKPOINT_FILES, find_checkpoint
from ltu.models.modeling_ltu import build_on_meta
from ltu_as.convert_checkpoint import main as convert_as
from tests.audio_encoders import FAMILIES, write_audio_model
from tests.tiny import LORA, training_flags, write_checkpoint, write_llm, write_rows
from tests.whisper_tiny import save_whisper

SECONDS = 60  # Per folder and way to open it. On a slow machine, a tiny model opens in a second.
MEMORY = 4 * 2**30  # Bytes of address space on top of what the tests have.


class Hang(BaseException):
    """Something took longer than it may; no error handler catches it."""


@contextmanager
def limits() -> Iterator[None]:
    """Limit time and memory of what is done inside."""

    def stop(*_: object) -> None:
        raise Hang

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    memory = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, memory[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def written(pipe: Path) -> Iterator[None]:
    """Let another process write to a pipe when the time is up.

    A library that waits for the pipe may not take signals, so `limits` could not end it.
    """
    script = f'sleep {SECONDS}; : <> "$0"'
    writer = subprocess.Popen(["sh", "-c", script, str(pipe)], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(writer.pid, signal.SIGKILL)
        writer.wait()


def opened(open_it: Callable[[], Any]) -> str:
    """Return the error of opening something as a command prints it, "" if there is none.

    Every other error than OSError and ValueError fails the test.
    """
    with limits():
        try:
            open_it()
        except OSError as error:  # transformers breaks its lines, which `run_command` joins.
            return " ".join(str(error).split())
        except ValueError as error:
            assert "\n" not in str(error), str(error)
            assert len(str(error)) < 1000, str(error)
            return str(error)
    return ""


def convert_back(folder: Path) -> None:
    convert(["--model", str(folder), "--to_original", str(folder.parent / "back.bin")])


def open_processor(folder: Path) -> None:
    """Open a processor as all commands do."""
    AutoProcessor.from_pretrained(find_checkpoint(folder, CHECKPOINT_FILES))


# Ways to open a checkpoint folder.
ROUTES: dict[str, Callable[[Path], Any]] = {
    "engine": lambda folder: LtuEngine.from_pretrained(folder, device="cpu"),
    "auto": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    "config": lambda folder: AutoConfig.from_pretrained(folder),
    "processor": open_processor,
    "convert": convert_back,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoint folders.

    The language model of "named", "as" and "wrapped" is in another folder, and that of "whole" in
    its own. "wrapped" names its audio encoder too.
    """
    root = tmp_path_factory.mktemp("hostile")
    llm = write_llm(root / "llm")
    write_checkpoint(root / "named", llm, LORA)
    flags = ["--model", str(root / "named"), "--merge", "--output_dir", str(root / "whole")]
    convert(flags)
    save_whisper(root / "whisper.pt")
    flags = ["--init", "--llm", str(llm), "--whisper", str(root / "whisper.pt")]
    flags += ["--feature_precision", "fp32", "--num_layer_heads", "2"]
    convert_as([*flags, "--output_dir", str(root / "as")])
    write_audio_model(root / "encoder", FAMILIES["whisper"])
    flags = ["--init", "--llm", str(llm), "--audio_encoder", str(root / "encoder")]
    convert([*flags, "--output_dir", str(root / "wrapped")])
    return root


@pytest.fixture
def copies(root: Path, tmp_path: Path) -> Path:
    """Copies of the folders, which a test may damage."""
    shutil.copytree(root, tmp_path / "copy")
    return tmp_path / "copy"


def change(file: Path, path: str, value: object) -> None:
    """Set a value in a JSON file; `path` has the keys, joined by dots."""
    content = json.loads(file.read_text())
    *outer, last = path.split(".")
    place = content
    for key in outer:
        place = place[key]
    place[last] = value
    file.write_text(json.dumps(content))


# --- files that are none

NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a device that blocks": lambda path: path.symlink_to("/dev/random"),
    "a link to a pipe": lambda path: (os.mkfifo(f"{path}.p"), path.symlink_to(f"{path}.p")),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a huge file": lambda path: (path.touch(), os.truncate(path, 10**12)),
    "an empty file": Path.touch,
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "a list": lambda path: path.write_text("[1, 2]"),
    "a number": lambda path: path.write_text("5"),
    "deep": lambda path: path.write_text('{"a": ' * 100_000 + "1" + "}" * 100_000),
    "deep lists": lambda path: path.write_text("[" * 100_000),
    "a key twice": lambda path: path.write_text('{"model_type": "ltu", "model_type": "ltu"}'),
    "a long number": lambda path: path.write_text(f'{{"model_type": {"9" * 10_000}}}'),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
    "a web page": lambda path: path.write_text("<html>404</html>"),
}
FILES = [
    "named/config.json",
    "named/model.safetensors",
    "named/processor_config.json",
    "named/tokenizer.json",
    "named/tokenizer_config.json",
    "llm/config.json",
    "llm/model.safetensors",
]
# The kinds with which `finetune` is tested too.
TRAINED = ("a pipe", "a huge file", "deep")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", NO_FILES)
def test_a_file_that_is_none(copies: Path, file: str, kind: str) -> None:
    path = copies / file
    assert path.is_file()
    path.unlink()
    NO_FILES[kind](path)
    with written(path) if path.is_fifo() else nullcontext():
        check_refused(copies, file, kind)


def check_refused(copies: Path, file: str, kind: str) -> None:
    """Check that all ways to open the folders end with an error."""
    error = opened(lambda: LtuEngine.from_pretrained(copies / "named", device="cpu"))
    assert error, f"{file} was opened"
    assert str(copies) in error, error
    if file.startswith("llm"):
        flags = ["--init", "--llm", str(copies / "llm"), "--output_dir", str(copies / "new")]
        assert opened(lambda: convert(flags))
        return
    needed = ("config.json", "processor_config.json", "tokenizer.json", "model.safetensors")
    if file.removeprefix("named/") in needed:
        assert opened(lambda: ROUTES["processor"](copies / "named"))
    if file.startswith(("named/config", "named/model")):
        assert opened(lambda: convert_back(copies / "named"))
        assert not (copies / "back.bin").exists()
    if kind in TRAINED:
        flags = training_flags(copies / "named", write_rows(copies / "rows", 4), copies / "run")
        assert opened(lambda: finetune(flags))
        assert not list((copies / "run").glob("checkpoint-*"))


def test_a_socket_in_the_folder(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may open any file of a folder."""
    monkeypatch.chdir(copies / "named")  # The path of a socket is short.
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("vocab.txt")
    error = opened(lambda: ROUTES["engine"](copies / "named"))
    assert error.startswith(f"{copies}/named/vocab.txt is a socket, not a file.")


# --- values in configs

WRONG = [-1, 0, 10**18, float("nan"), True, None, "x", [], {"a": {"b": []}}]


def leaves(content: dict, prefix: str = "") -> Iterator[str]:
    """Yield the paths of all values in nested objects, and those of the objects."""
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


def errors_of_wrong_values(file: Path, open_it: Callable[[], Any]) -> dict[tuple[str, str], str]:
    """Return the error that each wrong value of each field gives, by field and value."""
    original = file.read_text()
    errors = {}
    for field in leaves(json.loads(original)):
        if field == "model_type":  # transformers reads it before it knows our class.
            continue
        for value in WRONG:
            change(file, field, value)
            errors[field, repr(value)] = opened(open_it)
            file.write_text(original)
    return errors


@pytest.mark.parametrize("name", ["named", "whole", "as", "wrapped"])
def test_any_value_of_any_field_of_a_config(copies: Path, name: str) -> None:
    """`AutoConfig` opens it or refuses it with one line, without a hang."""
    file = copies / name / "config.json"
    errors = errors_of_wrong_values(file, lambda: ROUTES["config"](copies / name))
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
    for size in sizes:
        for value in ("-1", "0", "True", "None", "'x'", "[]", str(10**18)):
            error = errors[f"text_config.{size}", value]
            assert size in error, (size, value, error)
    assert sum(bool(error) for error in errors.values()) > len(errors) / 3


PROCESSOR_FILES = [
    ("named", "processor_config.json"),
    ("named", "tokenizer_config.json"),
    ("as", "processor_config.json"),
    ("as", "tokenizer_config.json"),
    ("wrapped", "processor_config.json"),
]


@pytest.mark.parametrize(("name", "file"), PROCESSOR_FILES)
def test_any_value_of_any_field_of_a_processor(copies: Path, name: str, file: str) -> None:
    folder = copies / name
    errors = errors_of_wrong_values(folder / file, lambda: open_processor(folder))
    if file == "processor_config.json":
        size = "num_frames" if name != "wrapped" else "feature_extractor.feature_size"
        for field in ("num_audio_tokens", f"feature_extractor.{size}"):
            assert all(errors[field, value] for value in ("-1", "0", "'x'", "[]"))


@dataclass(frozen=True)
class Value:
    """A wrong value of a field.

    Attributes:
        file: in the copies.
        path: of the field.
        message: is in the error.
    """

    file: str
    path: str
    value: object
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.path}={self.value!r:.20}"


VALUES = [
    Value("named/config.json", "language_model", 5, "language_model is 5"),
    Value("named/config.json", "language_model", ["llm"], "language_model is"),
    Value("named/config.json", "language_model", "", "language_model is ''"),
    Value("named/config.json", "language_model", "a\0b", "language_model is"),
    Value("named/config.json", "language_model_sha256", 7, "language_model_sha256 is 7"),
    Value("named/config.json", "model_type", ["ltu"], "model of type"),
    Value("named/config.json", "audio_config", [], "audio_config"),
    Value("named/config.json", "audio_config.model_type", "x", "model_type is 'x'"),
    Value("named/config.json", "audio_config.num_hidden_layers", 10**7, "num_hidden_layers is"),
    Value("named/config.json", "audio_config.num_hidden_layers", 1000, "1000 layers"),
    Value("named/config.json", "audio_config.num_hidden_layers", 3, "keys missing"),
    Value("named/config.json", "audio_config.hidden_size", 64, "of shape"),
    Value("named/config.json", "audio_config.hidden_size", 33, "num_attention_heads"),
    Value("named/config.json", "audio_config.patch_size", 0, "patch_size is 0"),
    Value("named/config.json", "audio_config.initializer_range", 0, "initializer_range is 0"),
    Value("named/config.json", "audio_config.dtype", 5, "dtype"),
    Value("named/config.json", "text_config.vocab_size", 513, "audio_token_id"),
    Value("named/config.json", "text_config.hidden_size", 128, "hidden_size 128"),
    Value("named/config.json", "lora.r", 0, "lora.r is 0"),
    Value("named/config.json", "lora.r", 10**7, "lora.r is 10000000"),
    Value("named/config.json", "lora.r", 8, "of shape"),
    Value("named/config.json", "lora.target_modules", [5], "lora.target_modules is 5"),
    Value("named/config.json", "lora.target_modules", ["nowhere"], "nowhere"),
    Value("named/config.json", "prompt_template", "x", "prompt_template is 'x'"),
    Value("named/config.json", "eos_token_id", "x", "eos_token_id is 'x'"),
    Value("whole/config.json", "text_config.num_hidden_layers", 10**7, "num_hidden_layers is"),
    Value("whole/config.json", "text_config.num_hidden_layers", 1000, "1000 layers"),
    Value("whole/config.json", "text_config.num_hidden_layers", 1, "left over"),
    Value("whole/config.json", "text_config.intermediate_size", 10**6, "of shape"),
    Value("whole/config.json", "text_config.num_attention_heads", 5, ""),
    Value("whole/config.json", "text_config.rope_parameters.rope_theta", 0, "rope_theta is 0"),
    Value("whole/config.json", "text_config.tie_word_embeddings", True, "one tensor"),
    Value("llm/config.json", "num_hidden_layers", 10**7, "num_hidden_layers is 10000000"),
    Value("llm/config.json", "num_hidden_layers", 900, "num_hidden_layers"),
    Value("llm/config.json", "intermediate_size", 2**19, "has the shape"),
    Value("llm/config.json", "vocab_size", 10**18, "vocab_size is"),
    Value("llm/config.json", "hidden_size", "64", "hidden_size"),
    Value("as/config.json", "audio_config.num_time_heads", 0, "num_time_heads is 0"),
    Value("as/config.json", "audio_config.standardize", "no", "standardize is 'no'"),
]


@pytest.mark.parametrize("case", VALUES, ids=str)
def test_a_wrong_value(copies: Path, case: Value) -> None:
    file = copies / case.file
    change(file, case.path, case.value)
    checkpoint = copies / "named" if case.file.startswith("llm") else file.parent
    if case.file.startswith("llm"):  # The checkpoint does not know another language model.
        change(checkpoint / "config.json", "language_model_sha256", None)
    # transformers reads the type of the model before it knows our class.
    routes = ["engine"] if case.path == "model_type" else ["engine", "auto"]
    for route in routes:
        error = opened(lambda: ROUTES[route](checkpoint))  # noqa: B023  it is called at once
        assert error, route
        assert case.message in error, error
    opened(lambda: convert_back(checkpoint))  # It opens no other language model.


# --- other files


def test_an_index_of_files_elsewhere(copies: Path) -> None:
    os.mkfifo(copies / "pipe.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../pipe.safetensors"}}
    (copies / "llm" / "model.safetensors.index.json").write_text(json.dumps(index))
    change(copies / "named" / "config.json", "language_model_sha256", None)
    error = opened(lambda: ROUTES["auto"](copies / "named"))
    assert "model.safetensors.index.json is malformed" in error


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_a_header_of_impossible_length(copies: Path, length: int) -> None:
    content = length.to_bytes(8, "little") + (copies / "llm/model.safetensors").read_bytes()[8:]
    (copies / "llm" / "model.safetensors").write_bytes(content)
    error = opened(lambda: ROUTES["engine"](copies / "named"))
    assert "model.safetensors is damaged" in error


def test_a_language_model_that_lacks_a_weight(copies: Path) -> None:
    """transformers would make it up."""
    file = copies / "llm" / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    change(copies / "named" / "config.json", "language_model_sha256", None)
    error = opened(lambda: ROUTES["engine"](copies / "named"))
    assert "1 keys missing ['model.layers.1.mlp.up_proj.weight']" in error


def test_weights_that_are_no_floats(copies: Path) -> None:
    file = copies / "named" / "model.safetensors"
    state = load_file(file)
    state["multi_modal_projector.linear.bias"] = torch.zeros(64, dtype=torch.int64)
    save_file(state, file, metadata={"format": "pt"})
    error = opened(lambda: ROUTES["engine"](copies / "named"))
    assert "multi_modal_projector.linear.bias is I64" in error


def test_a_tokenizer_without_files(copies: Path) -> None:
    """transformers opens it without words."""
    (copies / "named" / "tokenizer.json").unlink()
    assert "its files are missing" in opened(lambda: open_processor(copies / "named"))


def test_a_processor_of_another_model(copies: Path) -> None:
    file = copies / "named" / "processor_config.json"
    change(file, "feature_extractor.num_frames", 2**17)
    error = opened(lambda: ROUTES["engine"](copies / "named"))
    assert error.startswith("The processor has num_frames 131072, but the model has 64.")
    flags = training_flags(copies / "named", write_rows(copies / "rows", 4), copies / "run")
    assert opened(lambda: finetune([*flags, "--plan", "True"])) == error
    change(file, "feature_extractor.num_frames", 64)
    change(file, "prompt_template.prompt_no_input", "{instruction.__class__}")
    assert "prompt_no_input must have the field" in opened(lambda: open_processor(copies / "named"))


@pytest.mark.parametrize("flag", ["--checkpoint", "--audio_encoder"])
def test_a_pipe_as_an_original_file(copies: Path, flag: str) -> None:
    pipe = copies / "pipe.bin"
    os.mkfifo(pipe)
    flags = ["--llm", str(copies / "llm"), "--output_dir", str(copies / "new"), flag, str(pipe)]
    if flag == "--audio_encoder":
        flags.append("--init")
    with written(pipe):
        assert opened(lambda: convert(flags)).startswith(f"{pipe} is a pipe, not a file.")
    assert not (copies / "new").exists()


def test_the_check_changes_no_random_numbers(root: Path) -> None:
    """A seeded run repeats, whether or not a model was opened before."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(root / "named")
    expected = torch.get_rng_state()
    build_on_meta(config)
    assert torch.equal(torch.get_rng_state(), expected)
