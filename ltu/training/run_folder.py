"""Decides whether a run starts, continues or is refused, and which checkpoint it continues from.

A run has an identity: a random id, and everything that changes the loss or the order of examples
(the weights it starts from, the contents of its dataset file, its flags but `FREE_FLAGS`). The
identity is in `ltu_state.json`, in the folder of the run from its start on and in every checkpoint.

A checkpoint is complete if its `ltu_state.json` lists its files with their sizes, which is written
after all of them are on the disk, and the files have these sizes. So a run that was killed while it
wrote a checkpoint continues from the one before.
"""

import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, TypeVar
from uuid import uuid4

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from ltu.files import check_regular_file, lock_file, read_json_object, sync_files
from ltu.models.audio_front_end import list_place_flags
from ltu.models.locate_checkpoint import list_checkpoints
from ltu.models.provenance import STATE, TRAINER_STATE, read_record, write_record
from ltu.training.arguments import DataArguments, ModelArguments, RunArguments

T = TypeVar("T")

LOCK = "_run.lock"  # The stock upload to the hub leaves out names that begin with "_".
# What would be lost if another run began in a folder.
RESULTS = (TRAINER_STATE, "model*.safetensors*", "checkpoint-*")
# Files without which training cannot continue from a checkpoint.
NEEDED = (TRAINER_STATE, "scheduler.pt", "optimizer*", "rng_state*.pth")
# Files without which the folder of a finished run cannot be opened.
MODEL_FILES = ("config.json", "model*.safetensors*")

# Flags that change neither the loss nor the order of examples. Where they name files, the contents
# of these files are compared instead. (Loss means: but for the rounding of floating point numbers.)
FREE_FLAGS = {
    # Places.
    "base_model",
    "data_path",
    "audio_root",
    "output_dir",
    "llm",
    "encoder_cache",
    # What is checked, printed, logged, evaluated and uploaded.
    "check_audio",
    "max_bad",
    "text_only",
    "ignored_keys",
    "prompt_template_name",
    "plan",
    "gpu_memory",
    "show_batch",
    "disable_tqdm",
    "report_to",
    "tensorboard",
    "run_name",
    "project",
    "debug",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "prediction_loss_only",
    "bf16_full_eval",
    "fp16_full_eval",
    "per_device_eval_batch_size",
    "skip_memory_metrics",
    "push_to_hub",
    # Without an effect here.
    "add_eos_token",
    # How the folder of the run is used.
    "overwrite",
    "resume_from_checkpoint",
    "restore_callback_states_from_checkpoint",
    "skip_finished",
    # How the work is spread over devices and processes. The examples of a step are compared.
    "device_map",
    "compile_layers",
    "num_workers",
    "rows_per_pass",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "batch_size",
    "use_cpu",
    "torch_empty_cache_steps",
    "parallelism_config",
    "fsdp",
    "fsdp_config",
    "deepspeed",
}
FREE_PREFIXES = ("wandb_", "logging_", "log_", "save_", "eval_", "hub_", "trackio_", "ddp_")
FREE_PREFIXES += ("dataloader_", "batch_eval_")

# Flags that are compared if evaluations choose the learning rate, or the weights that are kept.
EVALUATION_FLAGS = {
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "per_device_eval_batch_size",
    "save_strategy",
    "save_steps",
}
EVALUATION_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")


@dataclass
class Start:
    """How a run starts.

    Attributes:
        run_id: the id of the run.
        checkpoint: the checkpoint from which it continues, or None.
        is_finished: whether it has trained all its steps already.
        notes: what the user should know.
    """

    run_id: str
    checkpoint: str | None = None
    is_finished: bool = False
    notes: list[str] = field(default_factory=list)


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's `ltu_state.json`, or None if it has none that is whole."""
    try:
        return read_record(folder) or None
    except (OSError, ValueError):
        return None


def depends_on_evaluation(flags: dict[str, Any]) -> bool:
    """Return whether evaluations choose the learning rate, or the weights that are kept."""
    if flags.get("load_best_model_at_end"):
        return True
    return flags.get("lr_scheduler_type") in EVALUATION_SCHEDULERS


def is_compared(flag: str, with_evaluation: bool = False) -> bool:
    """Return whether runs that differ in this flag are different runs.

    Args:
        flag: its name.
        with_evaluation: whether the run depends on its evaluations.
    """
    if with_evaluation and flag in EVALUATION_FLAGS:
        return True
    is_free = flag in FREE_FLAGS or flag in list_place_flags()
    return not is_free and not flag.startswith(FREE_PREFIXES)


def find_differences(stored: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Return the differences between two runs in what changes the loss or the order of examples.

    Args:
        stored: the `ltu_state.json` of the run that exists.
        record: that of the run that is to be trained.
    """
    contents = {
        "the weights of --base_model": ("parent", "sha256"),
        "the settings in --base_model": ("parent", "settings"),
        "the contents of --data_path": ("data", "sha256"),
        "the examples to train on": ("num_examples",),
        "the examples of a step": ("examples_per_step",),
        "the number of processes, on which the order depends": ("ranks_of_order",),
        "grouping by length": ("grouped",),
    }
    differences = []
    for name, keys in contents.items():
        old: Any = stored
        new: Any = record
        for key in keys:
            old = (old or {}).get(key)
            new = (new or {}).get(key)
        if old != new:
            differences.append(f"{name}: {_shorten(old)} there, {_shorten(new)} here")
    old_flags = stored.get("arguments", {})
    new_flags = record["arguments"]
    with_evaluation = depends_on_evaluation(new_flags)
    # A run that was recorded before there was a flag had its default. Another version of
    # transformers may have other flags, which are not compared.
    missing = {name: default for name, default in defaults().items() if name in new_flags}
    old_flags = missing | old_flags
    for name in old_flags.keys() & new_flags.keys():
        if is_compared(name, with_evaluation) and old_flags[name] != new_flags[name]:
            differences.append(f"--{name}: {old_flags[name]} there, {new_flags[name]} here")
    return sorted(differences)


def defaults() -> dict[str, Any]:
    """Return the defaults of the flags that are None if they are not given, without the Trainer's.

    Only for these is it certain what an older run did: as if there were no such flag.
    """
    trainer_flags = {field.name for field in fields(TrainingArguments)}
    found = {}
    for kind in (ModelArguments, DataArguments, RunArguments):
        for flag in fields(kind):
            if flag.init and flag.name not in trainer_flags and flag.default is None:
                found[flag.name] = None
    return found


def _shorten(value: Any) -> str:
    """Return a value as text, of a hash its beginning."""
    return str(value)[:12]


def check_same_run(folder: Path, stored: dict[str, Any], record: dict[str, Any]) -> None:
    """Raise a ValueError if the run of a folder is another one than the run to be trained."""
    differences = find_differences(stored, record)
    if differences:
        raise ValueError(
            f"{folder} is of another run: {'; '.join(differences)}. Continue it with its own "
            "settings, give another --output_dir, or delete it with --overwrite."
        )


def find_damage(folder: Path, state: dict[str, Any]) -> str | None:
    """Return which file of a folder is missing or has another size than its state says, or None."""
    if not isinstance(state.get("files"), dict):
        return f"{STATE} is missing or lists no files, so the folder was not written to the end"
    for name, size in state["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def what_is_incomplete(checkpoint: Path) -> str | None:
    """Return why training cannot continue from a checkpoint, or None if it can."""
    damage = find_damage(checkpoint, read_state(checkpoint) or {})
    if damage is not None:
        return damage
    for pattern in NEEDED:
        if not any(checkpoint.glob(pattern)):
            return f"it has no {pattern} (--save_only_model writes none)"
    try:
        read_json_object(checkpoint / TRAINER_STATE)
    except ValueError as error:
        return str(error).rstrip(".")
    # A file of torch.save is a zip archive, whose entries have check sums.
    for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]):
        try:
            check_regular_file(path)
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError, RuntimeError, ValueError) as error:
            return f"{path.name} is damaged ({error})"
        if damaged is not None:
            return f"{path.name} is damaged ({damaged})"
    return None


def complete_checkpoint(checkpoint: Path, record: dict[str, Any]) -> None:
    """Mark a checkpoint as complete: sync its files, then write its state, which lists them."""
    _write_state_of(checkpoint, ("**/*",), record)


def complete_run(folder: Path, record: dict[str, Any]) -> None:
    """Mark the model in the folder of a run as complete, as `complete_checkpoint` does."""
    _write_state_of(folder, MODEL_FILES, record)


def _write_state_of(folder: Path, patterns: tuple[str, ...], record: dict[str, Any]) -> None:
    """Sync the files of a folder that match, then write its state, which lists their sizes."""
    files = {}
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and path != folder / STATE:
                files[str(path.relative_to(folder))] = path.stat().st_size
    sync_files(folder / name for name in files)
    write_record(folder, record | {"files": files})


def on_main_process(decide: Callable[[], T], rank: int, world_size: int) -> T:
    """Return on every rank what `decide` returns on rank 0.

    If it raises an error there, rank 0 raises it, and the others exit without a message.
    """
    if world_size == 1:
        return decide()
    results: list[Any] = [None]
    error: ValueError | OSError | None = None
    if rank == 0:
        try:
            results = [decide()]
        except (ValueError, OSError) as raised:
            error = raised
    broadcast_object_list(results)
    if error is not None:
        raise error
    if results[0] is None:
        sys.exit(1)
    return results[0]


def _describe_content(folder: Path, stored: dict[str, Any] | None) -> str:
    """Return what a used folder holds, in a few words."""
    if stored is None or "run_id" not in stored:
        return "a model or an older run"
    if not stored.get("finished"):
        return "a run that is not finished"
    damage = find_damage(folder, stored)
    if damage is not None:
        return f"a run that is finished, but {damage}"
    return "a run that is finished"


class RunFolder:
    """The folder of a run. It belongs to one process at a time, which is rank 0.

    Args:
        run: the flags.
        record: what the run is, as in `ltu_state.json`.
        inputs: the files and folders that the run reads, by the names of their flags.
    """

    def __init__(
        self,
        run: RunArguments,
        record: dict[str, Any],
        inputs: Mapping[str, str | Path | None] | None = None,
    ):
        self.run = run
        self.record = record
        self.inputs = inputs or {}
        self.folder = Path(run.output_dir)
        self.lock: IO[bytes] | None = None

    def open(self) -> Start:
        """Lock the folder and decide how the run starts.

        Raises:
            ValueError: another process trains there; the folder holds another run, or one that the
                flags do not continue; there is no checkpoint to continue from; or the run would
                delete what it reads.
            OSError: the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"--output_dir {self.folder} is no folder, and cannot be made ({error.strerror})."
            ) from error
        self._check_inputs()
        self.lock = lock_file(self.folder / LOCK, self.folder)
        # A worker that the run forks may outlive it, and must not hold the lock then.
        os.register_at_fork(after_in_child=self.lock.close)
        return self._decide()

    def begin(self, start: Start) -> None:
        """Write the identity of the run into its folder, and delete what an older run has left.

        Until then, a run that cannot start changes nothing.
        """
        self.record["run_id"] = start.run_id
        write_record(self.folder, self.record | {"step": 0, "finished": False})
        if start.checkpoint is not None:
            return
        for pattern in RESULTS:
            for path in self.folder.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def close(self) -> None:
        """Release the folder."""
        if self.lock is not None:
            (self.folder / LOCK).unlink(missing_ok=True)
            self.lock.close()

    def _check_inputs(self) -> None:
        """Check that the run does not replace or delete what it reads.

        Raises:
            ValueError: it does.
        """
        folder = self.folder.resolve()
        for flag, value in self.inputs.items():
            if value is None or not Path(value).exists():  # A name on the hub.
                continue
            path = Path(value).resolve()
            if path == folder:
                raise ValueError(
                    f"--output_dir {self.folder} is also --{flag}, which the run would replace. "
                    "Give another --output_dir."
                )
            if not self.run.overwrite:
                continue
            for pattern in RESULTS:
                for result in self.folder.glob(pattern):
                    if path.is_relative_to(result.resolve()):
                        raise ValueError(
                            f"--overwrite would delete {result}, but --{flag} {value} is read from "
                            "there. Give another --output_dir."
                        )

    def _decide(self) -> Start:
        resumed = self.run.resume_from_checkpoint
        stored = read_state(self.folder)
        new_run = Start(uuid4().hex)
        is_used = any(any(self.folder.glob(pattern)) for pattern in RESULTS)
        if self.run.overwrite or (not is_used and resumed in (None, "auto")):
            return new_run
        if resumed not in (None, "last", "auto"):
            return self._continue_from(Path(resumed))

        continues = resumed is not None
        skipped: list[str] = []
        if (continues or self.run.skip_finished) and stored and stored.get("finished"):
            check_same_run(self.folder, stored, self.record)
            damage = find_damage(self.folder, stored)
            if damage is None:
                return Start(stored.get("run_id", ""), is_finished=True)
            skipped.append(f"the finished model in {self.folder} is written again: {damage}")
        is_run = stored is not None and "run_id" in stored
        if is_used and not continues:
            content = _describe_content(self.folder, stored)
            raise ValueError(
                f"{self.folder} holds {content}. Give another --output_dir, continue a run with "
                "--resume_from_checkpoint last, or delete it with --overwrite."
            )
        if is_run:
            check_same_run(self.folder, stored, self.record)
        run_id = stored["run_id"] if is_run else None
        start = self._continue_from_newest(run_id, skipped)
        if start is not None:
            return start
        # The run was stopped before its first checkpoint was complete.
        if resumed == "auto" and is_run:
            new_run.notes = skipped
            return new_run
        reasons = "; ".join(skipped) or "it has none"
        raise ValueError(
            f"--resume_from_checkpoint {resumed}: {self.folder} holds no complete checkpoint of a "
            f"run ({reasons}). Give another --output_dir, or start again with --overwrite."
        )

    def _continue_from_newest(self, run_id: str | None, skipped: list[str]) -> Start | None:
        """Continue from the newest complete checkpoint in the folder; None if there is none.

        Args:
            run_id: of the run in the folder, or None if it is not known.
            skipped: notes, to which those on skipped checkpoints are added.
        """
        for checkpoint in list_checkpoints(self.folder):
            reason = what_is_incomplete(checkpoint)
            state = read_state(checkpoint) or {}
            if reason is None and run_id not in (None, state["run_id"]):
                reason = "it is of an older run"
            if reason is None:
                check_same_run(checkpoint, state, self.record)
                return Start(state["run_id"], str(checkpoint), notes=skipped)
            skipped.append(f"{checkpoint} is skipped: {reason}")
        return None

    def _continue_from(self, checkpoint: Path) -> Start:
        """Continue from a checkpoint that the flags name."""
        hint = (
            "Give the path of a checkpoint-N, last for the newest of --output_dir, or auto, which "
            "starts the run if there is none."
        )
        if not self.run.resume_from_checkpoint or not checkpoint.is_dir():
            raise ValueError(
                f"--resume_from_checkpoint {self.run.resume_from_checkpoint}: there is no such "
                f"folder. {hint}"
            )
        if not checkpoint.name.startswith("checkpoint-"):
            raise ValueError(f"--resume_from_checkpoint {checkpoint} is no checkpoint. {hint}")
        reason = what_is_incomplete(checkpoint)
        if reason is not None:
            raise ValueError(f"{checkpoint} is not complete: {reason}.")
        stored = read_state(checkpoint) or {}
        check_same_run(checkpoint, stored, self.record)
        own = read_state(self.folder)
        if own is not None and own.get("run_id") != stored["run_id"]:
            raise ValueError(
                f"{checkpoint} is of another run than {self.folder}. Give another --output_dir."
            )
        return Start(stored["run_id"], str(checkpoint))
