"""Tests that flags this machine cannot follow end a command in one line, before a model is loaded.

The checkpoint folder that the commands are given does not exist, so an error that names the flag
precedes all loading.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import ltu.ask
import ltu.finetune
import ltu.inference_batch
import ltu.inference_gradio
import ltu.serve
import ltu_as.extract_whisper_feature
from ltu.files import run_command
from ltu.models.device_check import check_device, check_device_map, check_dtype
from ltu.training import model_setup
from tests import tiny

HAS_CUDA = torch.cuda.is_available()
HAS_MPS = torch.backends.mps.is_available()
WITHOUT_CUDA = pytest.mark.skipif(HAS_CUDA, reason="there is a GPU here")
WITHOUT_MPS = pytest.mark.skipif(HAS_MPS, reason="there is a GPU of Apple here")
NOWHERE = ["--model", "no/such/folder"]
# Flags, and a part of the error that they cause.
IMPOSSIBLE = [
    pytest.param(["--device", "cuda"], "device 'cuda'", marks=WITHOUT_CUDA),
    pytest.param(["--device", "mps"], "device 'mps'", marks=WITHOUT_MPS),
    (["--device", "cuda:99"], "device 'cuda:99'"),
    (["--device", "banana"], "device 'banana' is not one that PyTorch knows"),
    (["--device", "meta"], "device 'meta'"),
    (["--dtype", "fp16"], "dtype 'fp16' is not auto, float32, bfloat16 or float16"),
    (["--dtype", "int8"], "dtype 'int8'"),
    (["--dtype", "float8_e4m3fn"], "dtype 'float8_e4m3fn'"),
    (["--attention", "banana"], "attention 'banana' is not one of eager"),
    (["--device_map", "banana"], "device_map is auto"),
    (["--device_map", "cuda:99"], "device_map is auto"),
]


def error_of(command: Callable[[], int | None], capsys: pytest.CaptureFixture) -> str:
    """Run a command that must fail with one line, and return that line."""
    with pytest.raises(SystemExit) as end:
        run_command(command)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    assert not capsys.readouterr().out
    return end.value.code


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, Callable[[list[str]], int | None]]:
    """Return each command that generates, with the flags that it needs."""
    rows = tiny.write_rows(tmp_path / "data", 2)
    files = ["--data_path", str(rows), "--output_path", str(tmp_path / "answers.json")]
    return {
        "ask": lambda flags: ltu.ask.main(["none", "What is it?", *NOWHERE, *flags]),
        "inference_batch": lambda flags: ltu.inference_batch.main([*files, *NOWHERE, *flags]),
        "serve": lambda flags: ltu.serve.main([*NOWHERE, *flags]),
        "inference_gradio": lambda flags: ltu.inference_gradio.main([*NOWHERE, *flags]),
    }


@pytest.mark.parametrize("flags, error", IMPOSSIBLE)
@pytest.mark.parametrize("name", ["ask", "inference_batch", "serve", "inference_gradio"])
def test_an_impossible_flag_is_one_line(commands, capsys, name, flags, error):
    found = error_of(partial(commands[name], flags), capsys)
    assert found.startswith("error: ") and error in found


def test_flash_attention_needs_its_package(commands, capsys):
    flags = ["--attention", "flash_attention_2", "--device", "cpu"]
    error = error_of(partial(commands["ask"], flags), capsys)
    if HAS_CUDA:  # The package may be installed.
        assert "flash_attention_2" in error or "no/such/folder" in error
    else:
        assert "attention 'flash_attention_2' needs a GPU and the package flash-attn" in error


@pytest.mark.parametrize("device", ["cuda:99", "banana", "meta"])
def test_whisper_features_need_a_device(tmp_path, capsys, device):
    flags = ["--data_path", str(tiny.write_rows(tmp_path / "data", 2)), *NOWHERE]
    flags += ["--output_dir", str(tmp_path / "features"), "--device", device]
    error = error_of(lambda: ltu_as.extract_whisper_feature.main(flags), capsys)
    assert f"device {device!r}" in error
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--device_map", "banana"], "device_map is auto"),
        (["--device_map", "cuda:99"], "device 'cuda:99'"),
        (["--attn_implementation", "banana"], "attention 'banana'"),
    ],
)
def test_training_checks_them_before_it_loads(tmp_path, monkeypatch, flags, error):
    checkpoint = tmp_path / "model"
    tiny.write_checkpoint(checkpoint, tiny.write_llm(tmp_path / "llm"), tiny.LORA)
    monkeypatch.setattr(model_setup, "open_model", lambda *_: pytest.fail("the model is loaded"))
    words = tiny.training_flags(checkpoint, tiny.write_rows(tmp_path / "data", 4), tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        run_command(lambda: ltu.finetune.main([*words, *flags]))
    assert error in str(end.value.code) and "\n" not in str(end.value.code)


def test_torch_compile_without_a_compiler_is_one_line(tmp_path):
    environment = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = ["none", "What is it?", *NOWHERE, "--device", "cpu", "--compile"]
    process = tiny.start_command("ltu.ask", words, tmp_path / "output", **environment)
    process.join()
    output = (tmp_path / "output").read_text(encoding="utf-8")
    assert process.exitcode == 1
    assert output.startswith("error: torch.compile does not work here: ")
    assert output.count("\n") == 1


def test_what_is_possible_passes():
    for device in ("cpu", "cpu:0", torch.device("cpu")):
        check_device(device)
    for dtype in ("auto", "float32", "bfloat16", "float16", "float64", torch.float16):
        check_dtype(dtype)
    for device_map in (None, "auto", "balanced", "sequential", "cpu", {"": "cpu"}):
        check_device_map(device_map)
    if HAS_CUDA:
        check_device("cuda")
        check_device("cuda:0")


def test_float16_answers_on_a_cpu(tmp_path, capsys):
    tiny.write_checkpoint(tmp_path / "model", tiny.write_llm(tmp_path / "llm"), tiny.LORA)
    flags = ["--model", str(tmp_path / "model"), "--device", "cpu", "--dtype", "float16"]
    assert ltu.ask.main(["none", "What is it?", *flags, "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()
