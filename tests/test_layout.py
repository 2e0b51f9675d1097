"""Tests the rules of imports between packages and folders, and the names of files."""

import ast
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"ltu", "ltu_as", "eval", "data", "qa_generation", "benchmarks"}
# The packages and modules of this repository that each package may import, besides its own.
ARROWS = {
    "ltu": set(),
    "ltu_as": {"ltu"},
    "eval": {"ltu", "ltu_as", "qa_generation.llm"},
    "data": {"ltu.files", "ltu.data"},
    "qa_generation": {"ltu.files"},
}
# Inside ltu, the folders of a line may import from the lines below it. Two folders of one line may
# not import from each other.
ROOMS = [
    {"commands"},
    {"serving"},
    {"training", "inference"},
    {"checkpoints"},
    {"models"},
    {"data"},
    {"files"},
]
LIGHT = {"data", "files"}  # Folders that do not import transformers.


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Switch off garbage collection.

    If it runs during ast.parse, Python 3.11 may fail late in a session ("recursion depth
    mismatch").
    """
    gc.disable()
    yield
    gc.enable()


def imports(file: Path) -> set[str]:
    """Return every module that a file names in an import."""
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
            is_allowed = any(
                module == name or module.startswith(f"{name}.") or name.startswith(f"{module}.")
                for name in allowed
            )
            assert is_allowed, (
                f"{file.relative_to(ROOT)} imports {module}; {package} may import {sorted(allowed)}"
            )


def room_of(module: str) -> str:
    """Return the folder of a module of ltu: "models" of ltu.models.lora, "commands" of ltu.ask."""
    _, room, *_ = module.split(".")
    return room if any(room in line for line in ROOMS) else "commands"


def modules_of_ltu() -> dict[str, set[str]]:
    """Return each module of ltu with the modules of ltu that it imports, anywhere in its code.

    The package itself is left out: it only re-exports names, and Python imports it with each of its
    modules.
    """
    files = [file for file in (ROOT / "ltu").rglob("*.py") if file.name != "__init__.py"]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name: imports(file) & set(names) - {name} for name, file in names.items()}


def test_imports_inside_ltu_go_down():
    level = {room: number for number, line in enumerate(ROOMS) for room in line}
    for module, imported in modules_of_ltu().items():
        for other in imported:
            room = room_of(module)
            other_room = room_of(other)
            is_down = level[room] < level[other_room]
            assert is_down or room == other_room, f"{module} imports {other}"
            assert room != "commands" or is_down, (
                f"the command {module} imports the command {other}"
            )


def test_no_circle_inside_ltu():
    # Remove the modules that import no remaining module, until none remains.
    remaining = modules_of_ltu()
    while remaining:
        free = {module for module, imported in remaining.items() if not imported & set(remaining)}
        assert free, f"these import each other: {sorted(remaining)}"
        for module in free:
            del remaining[module]


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


ENCODERS = re.compile("cav_?mae|yamnet|tltr|whisper|wav2vec|hubert|clap", re.IGNORECASE)


@pytest.mark.parametrize("folder", ["training", "inference", "serving"])
def test_nothing_asks_which_audio_encoder_it_is(folder):
    """No name and no text in the code is that of an encoder; docstrings may give examples."""
    found = []
    for file in (ROOT / "ltu" / folder).rglob("*.py"):
        tree = ast.parse(file.read_text())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = set()
        for node in ast.walk(tree):
            if isinstance(node, documented) and ast.get_docstring(node) is not None:
                docstrings.add(node.body[0].value)
        for node in ast.walk(tree):
            texts = [getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", "")]
            if isinstance(node, ast.Constant) and node not in docstrings:
                texts.append(str(node.value))
            found += [(file.name, text) for text in texts if ENCODERS.search(str(text))]
    assert not found


def test_no_file_is_called_utils():
    names = {"utils.py", "common.py", "helpers.py", "misc.py"}
    for package in OURS:
        for file in (ROOT / package).rglob("*.py"):
            assert file.name not in names, file


def test_no_pickle_is_opened_unsafely():
    for package in OURS:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    is_safe = keywords.get("weights_only") == "True"
                    assert is_safe, f"{file}:{node.lineno} opens a pickle without weights_only=True"
