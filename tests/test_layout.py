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
    "data": {"ltu.files", "ltu.data"},
    "qa_generation": set(),
}
# Inside ltu, each line may import from the lines below it. Two rooms of one line know nothing of each
# other.
ROOMS = [
    {"commands"},
    {"serving"},
    {"training", "inference"},
    {"checkpoints"},
    {"models"},
    {"data"},
    {"files"},
]
LIGHT = {"data", "files"}  # They import no transformers.


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
            fits = any(
                module == a or module.startswith(f"{a}.") or a.startswith(f"{module}.")
                for a in allowed
            )
            assert fits, (
                f"{file.relative_to(ROOT)} imports {module}; {package} may import {sorted(allowed)}"
            )


def room_of(module: str) -> str:
    """The room of a module of ltu: "models" of ltu.models.lora, "commands" of ltu.ask."""
    _, room, *_ = module.split(".")
    return room if any(room in line for line in ROOMS) else "commands"


def modules_of_ltu() -> dict[str, set[str]]:
    """Each module of ltu and the modules of ltu that it imports, anywhere in its code.

    The package itself is left out: it only re-exports, and Python imports it with each of its modules.
    """
    files = [file for file in (ROOT / "ltu").rglob("*.py") if file.name != "__init__.py"]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name: imports(file) & set(names) - {name} for name, file in names.items()}


def test_imports_inside_ltu_go_down():
    level = {room: number for number, line in enumerate(ROOMS) for room in line}
    for module, imported in modules_of_ltu().items():
        for other in imported:
            room, other_room = room_of(module), room_of(other)
            is_down = level[room] < level[other_room]
            assert is_down or room == other_room, f"{module} imports {other}"
            assert room != "commands" or is_down, (
                f"the command {module} imports the command {other}"
            )


def test_no_circle_inside_ltu():
    left = modules_of_ltu()
    while left:
        free = {module for module, imported in left.items() if not imported & set(left)}
        assert free, f"these import each other: {sorted(left)}"
        left = {module: imported for module, imported in left.items() if module not in free}


def test_the_root_of_ltu_has_commands_only():
    for file in (ROOT / "ltu").glob("*.py"):
        if file.name not in ("__init__.py", "files.py"):
            assert 'if __name__ == "__main__":' in file.read_text(), f"{file.name} is no command"


def test_light_modules():
    heavy = {"transformers", "peft", "accelerate"}
    for file in (ROOT / "ltu").rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if module != "ltu.__init__" and room_of(module) in LIGHT:
            assert not {name.split(".")[0] for name in imports(file)} & heavy, file


def test_no_file_is_called_utils():
    names = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not [
        file for package in OURS for file in (ROOT / package).rglob("*.py") if file.name in names
    ]


def test_no_pickle_is_opened_unsafely():
    for package in OURS:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    safe = [
                        k
                        for k in node.keywords
                        if k.arg == "weights_only" and ast.unparse(k.value) == "True"
                    ]
                    assert safe, f"{file}:{node.lineno} opens a pickle without weights_only=True"
