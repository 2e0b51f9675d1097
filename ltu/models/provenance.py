"""Records where a checkpoint is from: its stages, the code that wrote it, and its arguments.

`ltu_state.json` of a checkpoint folder has the stages before it as `lineage`, oldest first, so that
the record is whole when the folders of these stages are gone.
"""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ltu.files import read_json_object, replace_file
from ltu.models.locate_checkpoint import sha256_of_weights

STATE = "ltu_state.json"
TRAINER_STATE = "trainer_state.json"  # The log of a run, as the Trainer names it.
LIBRARIES = ("ltu", "torch", "transformers", "peft", "accelerate")
ROOT = Path(__file__).parents[2]
GIT_TIMEOUT = 5  # seconds; a slow file system must not hold up a training run


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `ltu_state.json`, {} if it has none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / STATE
    return read_json_object(path) if path.is_file() else {}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a folder's `ltu_state.json`."""
    replace_file(folder / STATE, f"{json.dumps(record, indent=1)}\n".encode(), is_synced=True)


# --- stages


@dataclass(frozen=True)
class StageRecord:
    """One stage of a checkpoint, as far as it is known.

    Attributes:
        name: of its folder, or of the file that was converted.
        sha256: of its weights.
        stage: as `ltu_state.json` names it.
        language_model: the hub id, or the name of the folder.
        trainable_params: the flag `--trainable_params`.
        data: the dataset, as `ltu.training.open_dataset.DatasetSummary` describes it.
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
    trainable_params: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    num_examples: int | None = None
    examples_per_step: int | None = None
    learning_rate: float | None = None
    step: int | None = None
    total_steps: int | None = None


def read_stage(folder: Path, sha256: str | None = None) -> StageRecord:
    """Return the record of the stage that wrote a checkpoint folder.

    Args:
        folder: the checkpoint folder.
        sha256: of its weights, if it was computed before.

    Raises:
        ValueError: `ltu_state.json` is damaged.
        FileNotFoundError: the folder has no weights.
    """
    record = read_record(folder)
    arguments = record.get("arguments", {})
    language_model = read_json_object(folder / "config.json").get("language_model")
    return StageRecord(
        name=folder.resolve().name,
        sha256=sha256 or sha256_of_weights(folder),
        stage=record.get("stage"),
        language_model=public_value(language_model),
        trainable_params=arguments.get("trainable_params"),
        data=record.get("data", {}),
        num_examples=record.get("num_examples"),
        examples_per_step=record.get("examples_per_step"),
        learning_rate=arguments.get("learning_rate"),
        step=record.get("step"),
        total_steps=record.get("total_steps"),
    )


def read_lineage(record: Mapping[str, Any]) -> list[StageRecord]:
    """Return the stages before a checkpoint, oldest first, by its `ltu_state.json`.

    A record without `lineage`, as earlier versions wrote it, has at most the direct parent.
    """
    entries = record.get("lineage")
    if entries is None:
        parent = record.get("parent")
        entries = [] if parent is None else [parent]
    names = {entry.name for entry in fields(StageRecord)}
    stages = []
    for entry in entries:
        # Ignore the keys of later versions.
        stages.append(StageRecord(**{name: entry[name] for name in names & entry.keys()}))
    return stages


def lineage_from(parent: Path, sha256: str | None = None) -> list[dict[str, Any]]:
    """Return `lineage` for the `ltu_state.json` of a checkpoint that starts from `parent`.

    Args:
        parent: the checkpoint folder.
        sha256: of its weights, if it was computed before.

    Returns:
        The stages before the parent, oldest first, and the parent.

    Raises: as `read_stage`.
    """
    stages = [*read_lineage(read_record(parent)), read_stage(parent, sha256)]
    return [asdict(stage) for stage in stages]


# --- settings

# Of config.json, what the output of a model depends on besides its weights.
MODEL_SETTINGS = (
    "audio_config",
    "encoder_lora",
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
        ValueError: a file is damaged.
    """
    config = read_json_object(folder / "config.json")
    settings: dict[str, Any] = {}
    for name in MODEL_SETTINGS:
        settings[name] = config.get(name)
    if settings["encoder_lora"] is None:
        del settings["encoder_lora"]  # Older versions had none.
    if isinstance(settings["audio_config"], dict):
        settings["audio_config"].pop("encoder", None)  # Its hash stays.
    for name in ("processor_config.json", "tokenizer.json"):
        path = folder / name
        settings[name] = read_json_object(path) if path.is_file() else None
    processor = settings["processor_config.json"] or {}
    processor.pop("auto_map", None)  # Code for processes without this package.
    extractor = processor.get("feature_extractor", {})
    for name in MODEL_NAMES:
        extractor.pop(name, None)
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


# --- what others may read


def is_local_path(value: str) -> bool:
    """Return whether a value is an absolute path, or one that begins with a dot or a tilde.

    A relative path such as exp/run cannot be told from a hub id.
    """
    is_absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    return is_absolute or value.startswith((".", "~"))


def public_value(value: Any, name: str = "") -> Any:
    """Return a value that others may read: without tokens and without folders of this machine.

    An absolute path, or one with `..`, becomes its last part. Relative paths and hub ids stay.

    Args:
        value: of JSON; lists and objects are searched.
        name: of the value. If it ends with `token`, a text is replaced by "<hidden>".
    """
    if isinstance(value, Mapping):
        return {key: public_value(item, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public_value(item) for item in value]
    if not isinstance(value, str):
        return value
    if name.endswith("token"):
        return "<hidden>"
    path = PureWindowsPath(value)  # It takes both separators.
    if "://" not in value and (is_local_path(value) or ".." in path.parts):
        return path.name
    return value


# --- versions


@cache
def code_version() -> str:
    """Return the version of this code.

    It is the git commit (40 hex digits), with "+changes" if files of the packages differ from it,
    where the packages are in a git checkout of their own. Else it is the version of the installed
    package, or "unknown".
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", "ltu", "ltu_as")
    if commit is None or changes is None:
        return library_versions().get("ltu", "unknown")
    return f"{commit}+changes" if changes else commit


def _git(*arguments: str) -> str | None:
    """Return what git prints about the checkout of this code, None if it cannot say."""
    # Name the folders: a hook of git sets GIT_DIR, and a parent folder may be another checkout.
    checkout = [f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *checkout, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # No git, no checkout, or it takes too long.
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
