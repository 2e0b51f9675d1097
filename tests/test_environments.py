"""Checks that requirements.txt, constraints.txt and pyproject.toml agree and that they work.

The slow test creates three environments and runs the contract and golden tests in each:

- constraints: the exact versions of constraints.txt, which quickstart.sh and run_tests.sh install;
- oldest: every requirement at its lower bound;
- newest: the newest versions that requirements.txt admits.

    python -m pytest -m slow tests/test_environments.py
    LTU_ENVIRONMENTS=DIR python -m pytest -m slow tests/test_environments.py -k newest

An environment takes several gigabytes. With LTU_ENVIRONMENTS, the environments stay in DIR, and the
next run updates them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TESTS = [
    "contract",
    "golden_names",
    "golden_model",
    "golden_ltu_as",
    "ltu_as_contract",
    "any_llm",
    "convert_originals",
    "engine",
    "label_scoring",
    "inference_batch",
    "training",
    "run_folder",
    "trainer_flags",
    "sharding",
]
# constraints.txt has wheels for these. A platform is (sys_platform, platform_machine).
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
# The commands are in these folders.
FOLDERS = ["ltu", "ltu_as", "data", "eval", "qa_generation", "train_scripts", "benchmarks"]
# Minor versions of these are not compatible with each other, so that only tested ones are allowed.
BOUNDED = ["accelerate", "gradio", "peft", "torch", "torchaudio", "transformers"]
# ltu and ltu_as do not import these. transformers needs them for functions that they use.
INDIRECT = {"protobuf", "sentencepiece"}
# Names of distributions that differ from those of their modules.
DISTRIBUTIONS = {"whisper": "openai-whisper"}


def read_requirements(name: str) -> list[Requirement]:
    """Read a file of one requirement a line. Comments are left out."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    texts = [line.split("#")[0].strip() for line in lines]
    return [Requirement(text) for text in texts if text]


def read_extras() -> dict[str, list[Requirement]]:
    """Read the optional dependencies of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    return {extra: [Requirement(text) for text in texts] for extra, texts in extras}


def direct_requirements() -> list[Requirement]:
    """Return the requirements of the project itself, with all extras."""
    found = read_requirements("requirements.txt")
    for requirements in read_extras().values():
        found += [requirement for requirement in requirements if requirement.name != "ltu"]
    return found


def test_every_requirement_has_one_pin_within_its_range() -> None:
    pins = read_requirements("constraints.txt")
    for requirement in direct_requirements():
        name = canonicalize_name(requirement.name)
        own = [pin for pin in pins if canonicalize_name(pin.name) == name]
        for pin in own:
            version = str(pin.specifier).removeprefix("==")
            assert requirement.specifier.contains(version), (
                f"constraints.txt has {pin}, but {requirement} is required. "
                "The head of constraints.txt has the command that updates it."
            )
        for python in PYTHONS:
            for system, machine in PLATFORMS:
                environment = {
                    "python_version": python,
                    "python_full_version": f"{python}.0",
                    "sys_platform": system,
                    "platform_machine": machine,
                }
                count = sum(pin.marker is None or pin.marker.evaluate(environment) for pin in own)
                assert count == 1, (
                    f"constraints.txt has {count} pins of {name} for Python {python}, "
                    f"{system}, {machine}. Its head has the command that updates it."
                )


def test_constraints_are_exact_versions_that_pip_accepts() -> None:
    for pin in read_requirements("constraints.txt"):
        # pip rejects constraints with extras.
        assert pin.url is None and not pin.extras, f"constraints.txt: {pin}"
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), f"constraints.txt: {pin}"


def test_requirements_are_ranges() -> None:
    requirements = {found.name: found for found in read_requirements("requirements.txt")}
    for requirement in direct_requirements():
        assert re.search(r">=[\d.]+", str(requirement.specifier)), f"{requirement}: no lower bound"
    for name in BOUNDED:
        specifier = str(requirements[name].specifier)
        assert re.search(r"<[\d.]+", specifier), f"requirements.txt: {name} has no upper bound"


def test_requirements_are_what_the_packages_import() -> None:
    modules = set()
    for package in ("ltu", "ltu_as"):
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            modules |= set(re.findall(r"^ *import (\w+)", text, re.MULTILINE))
            modules |= set(re.findall(r"^ *from (\w+)[\w.]* import ", text, re.MULTILINE))
    modules -= {*sys.stdlib_module_names, "ltu", "ltu_as"}
    imported = {canonicalize_name(DISTRIBUTIONS.get(module, module)) for module in modules}
    required = {canonicalize_name(found.name) for found in read_requirements("requirements.txt")}
    # The server and liger are optional.
    extras = read_extras()
    optional = {canonicalize_name(found.name) for found in extras["serve"] + extras["liger"]}
    assert required - INDIRECT == imported - optional


def test_the_files_of_the_slow_test_exist() -> None:
    for name in TESTS:
        assert (ROOT / "tests" / f"test_{name}.py").is_file(), name


def test_the_commands_install_extras_that_exist() -> None:
    extras = read_extras()
    included = next(found.extras for found in extras["dev"] if found.name == "ltu")
    installed = {}
    for script in ("quickstart.sh", "run_tests.sh"):
        text = (ROOT / script).read_text(encoding="utf-8")
        installed[script] = re.findall(r"^setup_venv (\w+)$", text, re.MULTILINE)
    assert installed["run_tests.sh"] == ["dev"]
    # train_scripts/venv.sh assumes that dev includes the extras of the quickstart.
    assert set(installed["quickstart.sh"]) <= included <= set(extras)


def test_a_task_names_the_extra_it_needs(tmp_path, monkeypatch) -> None:
    from eval import run

    file = tmp_path / "predictions.json"
    file.write_text(json.dumps([{"prompt": "?", "pred": "dog", "ref": "dog", "audio_id": "a"}]))
    monkeypatch.setitem(sys.modules, "jiwer", None)  # An import then fails.
    monkeypatch.delitem(sys.modules, "eval.speech", raising=False)
    argv = ["--task", "librispeech", "--predictions", str(file), "--output_dir", str(tmp_path)]
    message = r"jiwer.* librispeech needs it. pip install -e '.\[eval\]'"
    with pytest.raises(ValueError, match=message):
        run.main(argv)


def test_a_command_names_the_extra_it_needs() -> None:
    """Without the packages of the extras, a command can be imported, or exits with a hint."""
    # The packages that no requirement in requirements.txt needs.
    hidden = "bitsandbytes datasets gguf jiwer liger_kernel onnx openai prometheus_client"
    hidden += " pycocoevalcap scipy sklearn tensorboard trl wandb"
    code = f"""
import importlib
import sys
from pathlib import Path

class Finder:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        is_hidden = name.partition(".")[0] in {hidden.split()}
        return None if is_hidden else self.finder.find_spec(name, *args)

sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
for folder in {FOLDERS}:
    for path in sorted(Path(folder).rglob("*.py")):
        if "__main__" in path.read_text(encoding="utf-8"):
            name = ".".join(path.with_suffix("").parts)
            try:
                importlib.import_module(name)
            except (ImportError, SystemExit) as error:
                print(name, type(error).__name__, error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    form = re.compile(
        r"(\S+) SystemExit error: No module named '(\w+)': pip install -e '\.\[(\w+)\]'"
    )
    packages = {
        extra: {requirement.name.replace("-", "_") for requirement in requirements}
        for extra, requirements in read_extras().items()
    }
    commands = []
    for line in lines:
        found = form.fullmatch(line)
        assert found, line
        command, package, extra = found.groups()
        assert package in packages[extra], line
        commands.append(command)
    assert {"ltu.serve", "ltu_as.serve", "eval.run"} <= set(commands)
    assert "ltu.finetune" not in commands


def at_lower_bound(requirement: Requirement) -> str:
    """Return the requirement of exactly the lower bound."""
    bound = next(bound.version for bound in requirement.specifier if bound.operator == ">=")
    return f"{requirement.name}=={bound}"


def pip_arguments(environment: str) -> list[str]:
    """Return the arguments of `pip install` for an environment, each of which has pytest."""
    pytest_requirement = next(found for found in read_extras()["dev"] if found.name == "pytest")
    requirements = [*read_requirements("requirements.txt"), pytest_requirement]
    if environment == "oldest":
        return [at_lower_bound(requirement) for requirement in requirements]
    ranges = [str(requirement) for requirement in requirements]
    if environment == "constraints":
        return ["--constraint", str(ROOT / "constraints.txt"), *ranges]
    return ["--upgrade", "--upgrade-strategy", "eager", *ranges]


@pytest.fixture
def environments() -> Iterator[Path]:
    """The folder of the environments. Without LTU_ENVIRONMENTS it is removed after each test."""
    permanent = os.environ.get("LTU_ENVIRONMENTS")
    if permanent:
        yield Path(permanent).absolute()
        return
    with tempfile.TemporaryDirectory(prefix="ltu_environments_") as folder:
        yield Path(folder)


def install(environment: str, folder: Path) -> Path:
    """Create or update an environment, and return its interpreter.

    The test fails if the versions cannot be installed together, and is skipped if pip cannot
    download them.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    result = subprocess.run(command + pip_arguments(environment), capture_output=True, text=True)
    if result.returncode == 0:
        return python

    # pip explains a conflict on stdout. On stderr it warns about each failed connection: then
    # another index may list other versions, and the message only looks like a conflict.
    lines = f"{result.stdout}\n{result.stderr}".splitlines()
    message = "\n".join(line[:300] for line in lines if line and not line.startswith("WARNING"))
    is_conflict = re.search(r"ResolutionImpossible|\(from versions: (?!none)", message)
    if is_conflict and "WARNING: Retrying" not in result.stderr:
        pytest.fail(f"the environment {environment!r} cannot be installed:\n{message}")
    pytest.skip(f"pip cannot download the packages: {message[-300:]}")


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["constraints", "oldest", "newest"])
def test_the_model_is_the_same(environment: str, environments: Path) -> None:
    python = install(environment, environments / environment)
    variables = dict(os.environ)
    for name in os.environ:
        if name.startswith(("PYTHON", "PYTEST")):
            del variables[name]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/test_{name}.py" for name in TESTS]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    print(result.stdout[-2000:])
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
