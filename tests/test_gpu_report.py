"""Tests the report of benchmarks/gpu.sh at tiny size on the CPU."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_report import (
    Context,
    Row,
    main,
    measure_generation,
    measure_parity,
    rows_path,
)
from tests.machine import ROOT

CPU = torch.device("cpu")
# Packages that a machine with a GPU may lack; none of these files imports them before it must.
# `parquet_writer` is imported where Parquet is written (`test_parquet_is_written_late`).
LATE = {"pyarrow", "whisper", "numba", "ltu_as"}
REPORT_FILES = [
    *(file for file in (ROOT / "ltu").rglob("*.py") if file.name != "parquet_writer.py"),
    ROOT / "data" / "command_line.py",
    ROOT / "tests" / "conftest.py",
    ROOT / "tests" / "tiny.py",
    ROOT / "tests" / "test_devices.py",
]
REPORT_MODULES = (
    "__init__",
    "device",
    "gpu_report",
    "gpu_speed_and_memory",
    "report",
    "static_cache",
)


def read_rows(folder: Path, section: str) -> list[Row]:
    lines = rows_path(folder, section).read_text(encoding="utf-8").splitlines()
    return [Row(**json.loads(line)) for line in lines]


def test_sections_without_time_are_rows_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "report.json"
    flags = ["--size", "tiny", "--device", "cpu", "--time_limit", "0"]
    flags += ["--sections", "parity", "command"]
    assert main([*flags, "--work_dir", str(tmp_path), "--output_path", str(output)]) == 1
    report = json.loads(output.read_text())
    reasons = {row["section"]: row["note"] for row in report["rows"]}
    assert reasons == {
        "prepare": "ended after 0 s",
        "parity": "ended after 0 s",
        "command": "prepare has failed",
    }
    assert all(row["passed"] is False for row in report["rows"])
    assert "FAILED" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]  # The temporary files are gone.


def test_a_value_beyond_its_bound_is_missed(tmp_path: Path) -> None:
    context = Context("model", "tiny", CPU, tmp_path)
    context.add("exact", 1.0, at_most=1.0, at_least=1.0, is_speed=False)
    context.add("too large", 1.1, at_most=1.0, is_speed=False)
    context.add("too small", 0.9, at_least=1.0, is_speed=False)
    context.add("not measured", None, at_least=1.0, is_speed=False)
    context.add("speed of another machine", 0.9, at_least=1.0)
    passed = {row.name: row.passed for row in read_rows(tmp_path, "model")}
    assert passed == {
        "exact": True,
        "too large": False,
        "too small": False,
        "not measured": None,
        "speed of another machine": None,
    }


def test_parity_on_the_cpu(tmp_path: Path) -> None:
    measure_parity(Context("parity", "tiny", CPU, tmp_path))
    rows = read_rows(tmp_path, "parity")
    assert all(row.passed for row in rows)
    values = {row.name: row.value for row in rows}
    name = "largest difference of logits / their range"
    assert values[f"float32: {name}"] == 0
    assert 0 < values[f"float16: {name}"] < values[f"bfloat16: {name}"]


def test_both_caches_are_measured_on_the_cpu(tmp_path: Path) -> None:
    measure_generation(Context("generate", "tiny", CPU, tmp_path))
    rows = read_rows(tmp_path, "generate")
    assert [row.name for row in rows] == [
        "engine, 2 at once, static cache",
        "generate, 2 at once, static cache",
        "engine, 1 at once, static cache",
        "generate, 1 at once, static cache",
        "engine, 2 at once, dynamic cache",
        "engine, 1 at once, dynamic cache",
    ]
    assert all(row.value > 0 for row in rows)


@pytest.mark.slow
def test_the_stage_script_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    flags = ["--size", "tiny", "--device", "cpu", "--sections", "command"]
    assert main([*flags, "--work_dir", str(tmp_path), "--output_path", str(output)]) == 0
    report = json.loads(output.read_text())
    assert list(report["outcomes"]) == ["prepare", "command"]
    rates = [row["value"] for row in report["rows"] if row["unit"] == "samples/s"]
    assert len(rates) == 2 and min(rates) > 0


def test_missing_packages_are_listed(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # Without site-packages.
    python.chmod(0o755)
    environment = {"PYTHON": str(python), "WHEELS": str(tmp_path), "PATH": os.environ["PATH"]}
    process = subprocess.run(
        ["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 1
    for package in ("torch", "peft", "msgspec", "soundfile"):
        assert f"\n  {package} (No module named" in process.stderr


def test_parquet_is_written_late() -> None:
    """No module of ltu imports parquet_writer, which needs pyarrow, at its top."""
    for file in (ROOT / "ltu").rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            is_import = isinstance(node, ast.ImportFrom)
            assert not is_import or node.module != "ltu.data.parquet_writer", file


def test_nothing_needs_pyarrow_or_whisper_to_begin() -> None:
    files = [ROOT / "benchmarks" / f"{name}.py" for name in REPORT_MODULES]
    for file in [*files, *REPORT_FILES]:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            packages = {module.partition(".")[0] for module in modules}
            assert not packages & LATE, file
            own = {module for module in modules if module.startswith("benchmarks.")}
            assert own <= {f"benchmarks.{name}" for name in REPORT_MODULES}, file
