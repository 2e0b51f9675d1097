"""The oldest releases that requirements.txt admits: they can be installed together, and the model is the same on them.

python -m pytest -m slow tests/test_lower_bounds.py                                    some gigabytes, ten minutes
LTU_LOWER_BOUNDS_VENV=DIR python -m pytest -m slow tests/test_lower_bounds.py          the environment stays in DIR
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ["contract", "golden_names", "golden_model", "golden_ltu_as", "ltu_as_contract", "any_llm", "convert_originals"]
TESTS += ["pipeline", "label_scoring", "inference_batch"]


def lower_bounds() -> list[str]:
    """Every requirement at its lower bound, and the test runner at that of the extra `dev`."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    lines += re.findall(r'"(pytest>=[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert "pytest" in lines[-1], "the extra dev of pyproject.toml has no lower bound of pytest"
    for line in filter(None, lines):
        assert re.fullmatch(r"[\w-]+>=[\d.]+", line), f"requirements.txt: {line!r} is not of the form NAME>=RELEASE"
    return [line.replace(">=", "==") for line in lines if line]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with exactly these releases."""
    folder = Path(os.environ.get("LTU_LOWER_BOUNDS_VENV") or tmp_path_factory.mktemp("lower_bounds") / "venv")
    found = folder / "bin" / "python"
    if not found.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(found), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *lower_bounds()]
    result = subprocess.run(pip, capture_output=True, text=True)
    said = "\n".join(line[:300] for line in result.stderr.splitlines() if not line.startswith("WARNING"))
    # An index that lists other releases was reached: then the bounds are at fault, not the network.
    if "ResolutionImpossible" in said or re.search(r"\(from versions: (?!none)", said):
        pytest.fail(f"The lower bounds of requirements.txt cannot be installed:\n{said}")
    if result.returncode:
        pytest.skip(f"pip cannot get the packages here: {said[-300:]}")
    return found


@pytest.mark.slow
def test_the_model_is_the_same_on_the_lower_bounds(python: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST"))}
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(f"tests/test_{name}.py" for name in TESTS),
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(result.stdout[-2000:])
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
