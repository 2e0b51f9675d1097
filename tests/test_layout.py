"""Who may import whom, and what a folder may be called."""

import ast
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"ltu", "ltu_as", "eval", "data", "qa_generation", "benchmarks"}
# A package -> what of ours it may import (its own modules aside).
ARROWS = {
    "ltu": set(),
    "ltu_as": {"ltu"},
    "eval": {"ltu", "ltu_as", "qa_generation.llm"},
    "data": {"ltu.audio", "ltu.qa_dataset", "ltu.row_files"},
    "qa_generation": set(),
}
WITHOUT_TRANSFORMERS = ["ltu/audio.py", "ltu/qa_dataset.py", "ltu/row_files.py", "ltu/row_parser.py"]


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Late in a session Python 3.11's ast.parse was seen to fail ("recursion depth mismatch"), as it does when garbage
    is collected meanwhile."""
    gc.disable()
    yield
    gc.enable()


def imports(file: Path) -> set[str]:
    """Every module that a file names in an import."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("package", [name for name in ARROWS if (ROOT / name).is_dir()])
def test_arrows(package):
    for file in (ROOT / package).rglob("*.py"):
        for module in imports(file):
            top = module.split(".")[0]
            if top not in OURS - {package}:
                continue
            allowed = ARROWS[package]
            fits = any(module == a or module.startswith(f"{a}.") or a.startswith(f"{module}.") for a in allowed)
            assert fits, f"{file.relative_to(ROOT)} imports {module}; {package} may import {sorted(allowed)}"


@pytest.mark.parametrize("file", WITHOUT_TRANSFORMERS)
def test_light_modules(file):
    assert not {module.split(".")[0] for module in imports(ROOT / file)} & {"transformers", "peft", "accelerate"}


def test_no_file_is_called_utils():
    names = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not [file for package in OURS for file in (ROOT / package).rglob("*.py") if file.name in names]


def test_no_pickle_is_opened_unsafely():
    for package in OURS:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
                    assert safe, f"{file}:{node.lineno} opens a pickle without weights_only=True"
