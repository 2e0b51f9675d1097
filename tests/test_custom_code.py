"""Checkpoint folders with the code of their classes, opened in a process that has no `ltu`."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoProcessor

from ltu import LtuForConditionalGeneration, LtuProcessor
from ltu.checkpoints.open_checkpoint import open_model
from ltu.convert_checkpoint import main as convert
from ltu.models.custom_code import CODE_FOLDER, CONFIG_FILES
from ltu.models.provenance import hash_settings
from ltu_as import LtuAsForConditionalGeneration, LtuAsProcessor
from tests import tiny
from tests.audio_encoders import FAMILIES, write_audio_model
from tests.fake_hub import open_fake_hub
from tests.machine import PATIENCE
from tests.whisper_tiny import write_ltu_as

ROOT = Path(__file__).parents[1]
# A process in which the packages of `missing` are not installed.
WITHOUT_PACKAGES = """
import importlib.abc, json, sys

missing = {"ltu", "ltu_as"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Refuse())

import numpy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

def answer(folder, auto_class=AutoModelForMultimodalLM):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    clip = numpy.random.default_rng(1).normal(0, 0.1, 8000).astype(numpy.float32)
    batch = processor(text=["What is it?"], audio=[clip], transcript=["yes"], return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False).tolist()
    return processor, model, tokens

def error_without(package, folder):
    missing.add(package)
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    except ImportError as error:
        return str(error)
    finally:
        missing.remove(package)
"""


def run_without_packages(code: str, cache: Path) -> dict:
    """Run Python without `ltu`, from another folder, and return the JSON of its last line."""
    environment = os.environ | {"HF_HOME": str(cache), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT_PACKAGES}\n{code}"],
        env=environment,
        cwd=cache.parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def answer(model: LtuForConditionalGeneration, processor: LtuProcessor) -> list[list[int]]:
    """Generate with the classes of the package what the other process does."""
    clip = np.random.default_rng(1).normal(0, 0.1, 8000).astype(np.float32)
    batch = processor(text=["What is it?"], audio=[clip], transcript=["yes"], return_tensors="pt")
    return model.generate(**batch, max_new_tokens=8, do_sample=False).tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of LTU, with an encoder of transformers too, and of LTU-AS, saved with code."""
    root = tmp_path_factory.mktemp("custom_code")
    llm = tiny.write_llm(root / "llm")
    classes = {
        "wrapped": (LtuForConditionalGeneration, LtuProcessor),
        "ltu": (LtuForConditionalGeneration, LtuProcessor),
        "ltu_as": (LtuAsForConditionalGeneration, LtuAsProcessor),
    }
    write_audio_model(root / "encoder", FAMILIES["whisper"])
    flags = f"--init --llm {llm} --audio_encoder {root}/encoder --output_dir {root}/plain_wrapped"
    convert([*flags.split(), "--num_audio_tokens", "4", "--chunk_seconds", "1"])
    plain = {
        "wrapped": root / "plain_wrapped",
        "ltu": tiny.write_checkpoint(root / "plain", llm, lora=tiny.LORA),
        "ltu_as": write_ltu_as(root / "plain_as", llm),
    }
    saved = {}
    for name, (model_class, processor_class) in classes.items():
        saved[name] = root / f"{name}_with_code"
        for cls in (model_class, processor_class):
            cls.from_pretrained(plain[name]).save_pretrained(saved[name], custom_code=True)
    return saved


def test_folders_open_without_the_package(folders: dict[str, Path], tmp_path: Path) -> None:
    """The answers are equal, both models fit into one process, and what it saves opens again.

    Nor do the copies stand in the way of the package, if it is imported later.
    """
    code = f"""
found = dict()
for name, folder in { ({name: str(folder) for name, folder in folders.items()})!r}.items():
    package = "whisper" if name == "ltu_as" else "peft"
    found[name + " without"] = error_without(package, folder)
    processor, model, found[name] = answer(folder)
    saved = {str(tmp_path)!r} + "/" + name
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    found[name + " again"] = answer(saved, AutoModelForCausalLM)[2]
found["modules"] = [name for name in sys.modules if name.partition(".")[0] in missing]
missing.clear()
sys.path.insert(0, {str(ROOT)!r})
import ltu
model = AutoModelForCausalLM.from_pretrained({str(folders["ltu"])!r})
found["class after import"] = type(model).__module__
print(json.dumps(found))
"""
    (tmp_path / "client").mkdir()
    found = run_without_packages(code, tmp_path / "client" / "cache")
    assert found["modules"] == []
    assert found["class after import"].startswith("ltu.")
    assert found["wrapped without"].endswith("Run `pip install peft`")
    assert found["ltu_as without"].endswith("Install it with: pip install openai-whisper")
    for name, folder in folders.items():
        # The commands open such a folder with the classes of the package.
        model = open_model(folder)
        assert type(model).__module__.startswith(("ltu.", "ltu_as."))
        assert found[name] == answer(model, AutoProcessor.from_pretrained(folder))
        assert found[f"{name} again"] == found[name]
        assert read_code(tmp_path / name) == read_code(folder)
        assert list((tmp_path / name).glob("*.py")) == []


def read_code(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text("utf-8") for file in (folder / CODE_FOLDER).glob("*.py")}


def test_code_is_that_of_the_package(folders: dict[str, Path]) -> None:
    """Only imports differ, and no file names a path of this machine."""
    for folder in folders.values():
        code = read_code(folder)
        assert code.pop("entry.py").startswith("# Copied from the module ltu.models.custom_code")
        for name, text in code.items():
            header, license_line, *copied = text.splitlines()
            module = re.fullmatch(r"# Copied from the module (\S+) of ltu .*", header)[1]
            assert name == f"{module.replace('.', '_')}.py"
            assert "Apache License, Version 2.0" in license_line
            original = Path(import_module(module).__file__).read_text("utf-8").splitlines()
            for line in copied:
                if line and line not in original:
                    assert re.match(" *(from|import|try:|except|raise) ?", line), line
        for file in folder.rglob("*.*"):
            if file.suffix in (".py", ".json"):
                text = file.read_text("utf-8")
                assert str(ROOT) not in text
                assert str(folder.parent) not in text


def test_a_folder_without_code_names_none(folders: dict[str, Path], tmp_path: Path) -> None:
    """A model that the package has opened is saved without code, unless it is asked for."""
    model = AutoModelForCausalLM.from_pretrained(folders["ltu"])
    processor = AutoProcessor.from_pretrained(folders["ltu"])
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / CODE_FOLDER).exists()
    for name in CONFIG_FILES:
        assert "auto_map" not in json.loads((tmp_path / "saved" / name).read_text())
        assert "auto_map" in json.loads((folders["ltu"] / name).read_text())


def test_code_is_no_setting_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """A run whose parent is saved again with code can be resumed."""
    for part in (LtuForConditionalGeneration, LtuProcessor):
        part.from_pretrained(folders["ltu"]).save_pretrained(tmp_path)
    assert hash_settings(tmp_path) == hash_settings(folders["ltu"])


def test_a_class_of_the_user_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    class Mine(LtuForConditionalGeneration):
        pass

    with pytest.raises(ValueError, match="test_custom_code. Save without it"):
        Mine.from_pretrained(folders["ltu"]).save_pretrained(tmp_path / "mine", custom_code=True)


@pytest.mark.slow
def test_a_repository_opens_without_the_package(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same by `push_to_hub` and the id of the repository."""
    push = f"""
from ltu import LtuForConditionalGeneration, LtuProcessor

for cls in (LtuForConditionalGeneration, LtuProcessor):
    part = cls.from_pretrained({str(folders["ltu"])!r})
    if cls is LtuForConditionalGeneration:
        part.config.language_model = "org/llm"
    part.push_to_hub("me/new", custom_code=True)
"""
    opened = f"""
{WITHOUT_PACKAGES}
print(json.dumps(answer("me/new")[2]))
"""
    with open_fake_hub() as hub:
        for file in (folders["ltu"].parent / "llm").iterdir():
            hub.files["org/llm", file.name] = file.read_bytes()
        done = hub.run(push)
        assert done.returncode == 0, done.stderr[-3000:]
        code = {path for repo, path in hub.files if path.startswith(CODE_FOLDER)}
        assert code == {f"{CODE_FOLDER}/{name}" for name in read_code(folders["ltu"])}
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        done = hub.run(opened)
    assert done.returncode == 0, done.stderr[-3000:]
    model = open_model(folders["ltu"])
    expected = answer(model, AutoProcessor.from_pretrained(folders["ltu"]))
    assert json.loads(done.stdout.splitlines()[-1]) == expected
