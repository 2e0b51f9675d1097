"""Records where a checkpoint is from: its stages, the code that wrote it, and its arguments.

`ltu_state.json` of a checkpoint folder has the stages before it as `lineage`, oldest first, so that
the record is whole when the folders of these stages are gone.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ltu.models.locate_checkpoint import sha256_of_weights

LIBRARIES = ("ltu", "torch", "transformers", "peft", "accelerate")
ROOT = Path(__file__).parents[2]
GIT_TIMEOUT = 5  # seconds; a slow file system must not hold up a training run


# --- stages


@dataclass(frozen=True)
class DatasetRecord:
    """The dataset file of a stage.

    Attributes:
        name: of the file, without its folder.
        sha256: of the file.
        num_examples: in the file, those that are held out included.
        num_with_audio: the examples of the file that have a clip.
    """

    name: str
    sha256: str | None = None
    num_examples: int | None = None
    num_with_audio: int | None = None


@dataclass(frozen=True)
class StageRecord:
    """One stage of a checkpoint, as far as it is known.

    Attributes:
        name: of its folder, or of the file that was converted.
        sha256: of its weights.
        stage: as `ltu_state.json` names it.
        language_model: the hub id, or the name of the folder.
        language_model_sha256: see `hash_language_model`.
        trainable_params: the flag `--trainable_params`.
        data: the dataset.
        num_examples: the examples that were trained on.
        examples_per_step: the number of examples in one optimizer step.
        learning_rate: the flag.
        step: the optimizer steps that were done.
        total_steps: the optimizer steps of the whole run.
    """

    name: str
    sha256: str | None = None
    stage: str | None = None
    language_model: str | None = None
    language_model_sha256: str | None = None
    trainable_params: str | None = None
    data: DatasetRecord | None = None
    num_examples: int | None = None
    examples_per_step: int | None = None
    learning_rate: float | None = None
    step: int | None = None
    total_steps: int | None = None

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "StageRecord":
        """Read an entry of `lineage`; keys of later versions are ignored."""
        known = _known_fields(cls, entry)
        if known.get("data") is not None:
            known["data"] = DatasetRecord(**_known_fields(DatasetRecord, known["data"]))
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """Return an entry of `lineage`, without what is not known."""
        entry = _without_none(asdict(self))
        if self.data is not None:
            entry["data"] = _without_none(entry["data"])
        return entry


def _known_fields(record_class: type, entry: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in fields(record_class)]
    return {name: entry[name] for name in names if name in entry}


def _without_none(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value is not None}


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of `ltu_state.json`, {} if the folder has none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "ltu_state.json"
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or write it again.") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is a {type(state).__name__}, not an object. Write it again.")
    return state


def read_stage(folder: Path, sha256: str | None = None) -> StageRecord:
    """Return the record of the stage that wrote a checkpoint folder.

    Args:
        sha256: of its weights, if it was computed before.

    Raises:
        ValueError: `ltu_state.json` is damaged.
        FileNotFoundError: the folder has no weights.
    """
    state = read_state(folder)
    config = json.loads((folder / "config.json").read_bytes())
    arguments = state.get("arguments", {})
    data = None
    if "data" in state:
        data = DatasetRecord(**_known_fields(DatasetRecord, state["data"]))
    elif "data_path" in arguments:
        data = DatasetRecord(_last_part(arguments["data_path"]))
    language_model = config.get("language_model")
    if language_model is not None and is_local_path(language_model):
        language_model = _last_part(language_model)
    return StageRecord(
        name=folder.resolve().name,
        sha256=sha256 or sha256_of_weights(folder),
        stage=state.get("stage"),
        language_model=language_model,
        language_model_sha256=config.get("language_model_sha256"),
        trainable_params=arguments.get("trainable_params"),
        data=data,
        num_examples=state.get("num_examples"),
        examples_per_step=state.get("examples_per_step"),
        learning_rate=arguments.get("learning_rate"),
        step=state.get("step"),
        total_steps=state.get("total_steps"),
    )


def read_lineage(state: Mapping[str, Any]) -> list[StageRecord]:
    """Return the stages before a checkpoint, oldest first, by its `ltu_state.json`.

    A state without `lineage`, as earlier versions wrote it, has at most the direct parent.
    """
    if "lineage" in state:
        return [StageRecord.from_json(entry) for entry in state["lineage"]]
    parent = state.get("parent")
    return [] if parent is None else [StageRecord.from_json(parent)]


def lineage_from(parent: Path, sha256: str | None = None) -> list[dict[str, Any]]:
    """Return `lineage` for the `ltu_state.json` of a checkpoint that starts from `parent`.

    Args:
        parent: the checkpoint folder.
        sha256: of its weights, if it was computed before.

    Returns:
        The stages before the parent, oldest first, and the parent.

    Raises: as `read_stage`.
    """
    stages = read_lineage(read_state(parent))
    stages.append(read_stage(parent, sha256))
    return [stage.to_json() for stage in stages]


# --- settings

# Of config.json, what the output of a model depends on besides its weights.
MODEL_SETTINGS = (
    "audio_config",
    "language_model_sha256",
    "lora",
    "projector_layer_norm_eps",
    "prompt_template",
)
# Of processor_config.json, names that may differ between machines for the same model.
MODEL_NAMES = ("whisper_model", "transcription_model")


def hash_settings(folder: Path) -> str:
    """Return the sha256 of all that a checkpoint folder holds besides weights and names.

    Two folders with the same weights and the same hash compute the same loss.

    Raises:
        FileNotFoundError: the folder has no config.
        ValueError: a file is no JSON.
    """
    config = json.loads((folder / "config.json").read_bytes())
    settings: dict[str, Any] = {name: config.get(name) for name in MODEL_SETTINGS}
    for name in ("processor_config.json", "tokenizer.json"):
        path = folder / name
        settings[name] = json.loads(path.read_bytes()) if path.is_file() else None
    extractor = (settings["processor_config.json"] or {}).get("feature_extractor", {})
    for name in MODEL_NAMES:
        extractor.pop(name, None)
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


# --- arguments


def is_local_path(value: str) -> bool:
    """Return whether a value is an absolute path, or one that begins with a dot or a tilde.

    A relative path such as exp/run cannot be told from a hub id.
    """
    is_absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    return is_absolute or value.startswith((".", "~"))


def _last_part(path: str) -> str:
    # PureWindowsPath takes both separators.
    name = PureWindowsPath(path).name
    # The path may end with "..": then its last part says nothing.
    return "" if name == ".." else name


def public_value(value: Any) -> Any:
    """Return a value in which each absolute path, and each path with `..`, is its last part.

    Args:
        value: of JSON; lists and objects are searched.
    """
    if isinstance(value, Mapping):
        return public_arguments(value)
    if isinstance(value, list | tuple):
        return [public_value(item) for item in value]
    if isinstance(value, str):
        has_parents = ".." in PureWindowsPath(value).parts
        if "://" not in value and (is_local_path(value) or has_parents):
            return _last_part(value)
    return value


def public_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments that others may read: without tokens and without folders of this machine.

    A value whose name ends with `token` is replaced by "<hidden>". An absolute path, or one with
    `..`, becomes its last part. Relative paths and hub ids stay.
    """
    public = {}
    for name, value in arguments.items():
        if name.endswith("token") and isinstance(value, str):
            public[name] = "<hidden>"
        else:
            public[name] = public_value(value)
    return public


# --- versions


@cache
def code_version() -> str:
    """Return the version of this code.

    It is the git commit (40 hex digits), with "+changes" if files of the packages differ from it,
    where the packages are in a git checkout of their own. Else it is the version of the installed
    package, or "unknown".
    """
    commit = _git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    if commit:
        changes = _git("status", "--porcelain", "--", "ltu", "ltu_as")
        if changes is not None:
            return f"{commit}+changes" if changes else commit
    return library_versions().get("ltu", "unknown")


def _git(*arguments: str) -> str | None:
    """Return what git prints about the checkout of this code, None if it cannot say."""
    git = shutil.which("git")
    if git is None:
        return None
    # Variables such as GIT_DIR, which git sets for hooks, would name another repository.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            [git, "-C", str(ROOT), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # It fails, or takes too long.
        return None
    return done.stdout.strip()


@cache
def library_versions() -> dict[str, str]:
    """Return the version of this package and of the libraries that train the model, by name."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
