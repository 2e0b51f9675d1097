"""Builds a trainer from the flags of `ltu.finetune`.

The logged learning rate is the one after the step, and the epoch counts micro-batches, as in the
original's logs.
"""

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoProcessor, set_seed
from transformers.trainer_utils import rotate_checkpoints

from ltu.models.locate_checkpoint import CHECKPOINT_FILES, find_checkpoint, sha256_of_weights
from ltu.models.model_card import write_model_card
from ltu.models.processing_ltu import LtuProcessor
from ltu.models.provenance import (
    code_version,
    hash_settings,
    library_versions,
    lineage_from,
    public_value,
    write_record,
)
from ltu.training.arguments import DataArguments, ModelArguments, RunArguments
from ltu.training.batch_sampler import MicroBatchSampler, StepPlan
from ltu.training.collator import LtuCollator
from ltu.training.compiled_layers import CompilingTrainer, chooses_compilation, find_layers
from ltu.training.dataset import QaDataset
from ltu.training.encoder_cache import CacheFiller
from ltu.training.model_setup import apply_liger, open_to_train
from ltu.training.open_dataset import DatasetSummary, make_datasets
from ltu.training.run_folder import complete_checkpoint, complete_run
from ltu.training.stop_signal import ignore_stop_signals
from ltu.training.worker_count import MAX_WORKERS, choose_num_workers, count_cores

MAX_LISTED_EXAMPLES = 20  # Examples in an error message.
ROWS_AHEAD = 64  # Examples that are loaded ahead for a GPU.


class NonFiniteError(ValueError):
    """A loss or a gradient norm that is NaN or infinite."""


def cannot_write(folder: str | Path, error: Exception) -> OSError:
    """Return the error of a folder that cannot be written, for example to a full disk."""
    return OSError(
        f"{folder} cannot be written ({error}). If the disk is full, free it; then continue with "
        "--resume_from_checkpoint last."
    )


class LtuTrainer(CompilingTrainer):
    """The Trainer of transformers with the original's order of examples, steps and logs.

    Training ends at the first loss or gradient norm that is not finite, before it changes the
    weights. SIGTERM ends it after the current step, with a checkpoint.

    Args:
        micro_batches: the batch sampler of this rank, over all epochs.
        record: how the model is trained, which `save_model` writes into `ltu_state.json`.

    Attributes:
        is_stopping: whether training ends after the current step.
        notes: lines that a run prints at its start.
        data_wait: seconds for which this rank has waited for batches since training began.
    """

    def __init__(self, *args: Any, micro_batches: MicroBatchSampler, record: dict, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.micro_batches = micro_batches
        self.record = record
        self.is_stopping = False
        self.notes: list[str] = []
        self.data_wait = 0.0

        # The stock method deletes old checkpoints before the new one is known to be complete.
        self.save_total_limit = self.args.save_total_limit
        self.args.save_total_limit = None

        # A forked process cannot use a GPU, so load the audio in this one.
        if self.processing_class.front_end.needs_gpu:
            self.args.dataloader_num_workers = 0

    def get_train_dataloader(self) -> DataLoader:
        # accelerate does not prepare this loader: the batch sampler knows its rank, and its epochs
        # end where the original's do.
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.micro_batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available() and self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self._choose_prefetch_factor(),
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
            worker_init_fn=ignore_stop_signals,
        )

    def _choose_prefetch_factor(self) -> int | None:
        """Return the number of micro-batches that each worker loads ahead.

        On a GPU, all workers together load those of a large pass, which takes them at once.
        """
        given = self.args.dataloader_prefetch_factor
        num_workers = self.args.dataloader_num_workers
        if given is not None or num_workers == 0 or self.args.device.type == "cpu":
            return given
        num_micro_batches = ceil(ROWS_AHEAD / self.args.micro_batch_size)
        return max(2, ceil(num_micro_batches / num_workers))

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super().get_eval_dataloader(*args, **kwargs)
        # accelerate puts the loader whose workers are started into one of its own.
        getattr(loader, "base_dataloader", loader).worker_init_fn = ignore_stop_signals
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], *args: Any, **kwargs: Any
    ) -> Any:
        return super().get_batch_samples(self._time_loading(epoch_iterator), *args, **kwargs)

    def _time_loading(self, loaded: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Yield micro-batches, and add up how long each is waited for."""
        while True:
            start = time.perf_counter()
            micro_batch = next(loaded, None)
            self.data_wait += time.perf_counter() - start
            if micro_batch is None:
                return
            yield micro_batch

    def stop(self) -> None:
        """End training after the current step, with a checkpoint."""
        self.is_stopping = True

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer, with groups of the parts that have a learning rate of their own.

        Raises:
            ValueError: the optimizer does not hold the weights of such a part in groups.
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = {
            "projector": (self.args.projector_learning_rate, self.model.multi_modal_projector),
            "encoder": (self.args.encoder_learning_rate, self.model.audio_tower),
        }
        for name, (rate, part) in rates.items():
            if rate is not None:
                weights = {weight for weight in part.parameters() if weight.requires_grad}
                self._set_learning_rate(optimizer, f"--{name}_learning_rate", weights, rate)
        return optimizer

    def _set_learning_rate(
        self, optimizer: Any, flag: str, weights: set[torch.nn.Parameter], rate: float
    ) -> None:
        """Move weights into groups of their own with this learning rate.

        Args:
            optimizer: the optimizer, which is changed.
            flag: the flag that gives the rate.
            weights: the weights, all of which are trained.
            rate: the learning rate after the warm-up.

        Raises:
            ValueError: the optimizer does not hold them in groups.
        """
        num_found = 0
        for group in list(optimizer.param_groups):
            own = [weight for weight in group["params"] if weight in weights]
            others = [weight for weight in group["params"] if weight not in weights]
            num_found += len(own)
            if own and others:
                group["params"] = others
                optimizer.add_param_group({**group, "params": own, "lr": rate})
            elif own:
                group["lr"] = rate
        if num_found < len(weights):
            raise ValueError(
                f"{flag} with --optim {self.args.optim.value}, which has no groups of weights: "
                "leave one of them out."
            )

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the learning-rate scheduler.

        Raises:
            ValueError: it needs other `--lr_scheduler_kwargs`.
        """
        try:
            return super().create_scheduler(*args, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"--lr_scheduler_type {self.args.lr_scheduler_type.value} with "
                f"--lr_scheduler_kwargs {self.args.lr_scheduler_kwargs}: {error}"
            ) from error

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Return the gradient norm of a step, if it and all losses of the step are finite.

        The Trainer calls this between the last backward pass of a step and the optimizer.

        Raises:
            NonFiniteError: they are not.
        """
        norm = super()._get_grad_norm(*args, **kwargs)
        value = norm.full_tensor() if isinstance(norm, DTensor) else norm
        losses = torch.stack(self.step_losses)  # (parts,)
        numbers = self.step_numbers
        self.step_losses = []
        self.step_numbers = []
        is_finite = bool(losses.isfinite().all())
        if value is not None:  # DeepSpeed does not always know it.
            value = float(value)
            is_finite = is_finite and math.isfinite(value)
        # All ranks must agree on whether they go on.
        flags = torch.tensor([not is_finite, self.is_stopping], device=losses.device).int()
        num_bad, num_stopping = self.accelerator.reduce(flags, "sum").tolist()
        if num_bad:
            bad = [False] * self.args.gradient_accumulation_steps
            for number, is_bad in zip(numbers, (~losses.isfinite()).tolist(), strict=True):
                bad[number] |= is_bad
            self._raise_non_finite(bad, value)
        if num_stopping:
            self.is_stopping = True
            self.control.should_save = True
            self.control.should_training_stop = True
        return norm

    def _raise_non_finite(self, bad: list[bool], norm: float | None) -> None:
        """Raise the error of a step, with the examples of micro-batches without a finite loss.

        If all losses are finite, it names all examples of the step. Every rank must call this.

        Args:
            bad: whether the loss of each micro-batch of this rank is not finite.
            norm: the gradient norm.
        """
        step = self.state.global_step
        batches = self.micro_batches.step_batches(step)
        dataset = self.train_dataset
        names = []
        for batch, is_bad in zip(batches, bad, strict=True):
            if is_bad:
                names += [dataset.name_of(index) for index in batch]
        names = gather_object(names)
        bad = gather_object(bad)  # Of all ranks.
        if not names:
            names = gather_object([dataset.name_of(index) for index in sum(batches, [])])
        if not self.is_world_process_zero():
            sys.exit(1)
        listed = ", ".join(names[:MAX_LISTED_EXAMPLES])
        if len(names) > MAX_LISTED_EXAMPLES:
            listed += f" and {len(names) - MAX_LISTED_EXAMPLES} more"
        raise NonFiniteError(
            f"Step {step + 1} of {self.state.max_steps}: the losses of {sum(bad)} of its "
            f"{len(bad)} micro-batches are NaN or infinite, and the gradient norm is {norm}. "
            f"Training ends; the checkpoints in {self.args.output_dir} are of earlier steps. Lower "
            f"{self._list_learning_rates()}, or look at these examples: {listed}"
        )

    def _list_learning_rates(self) -> str:
        """Return the flags of the learning rates that are given, with their values."""
        listed = f"--learning_rate (now {self.args.learning_rate})"
        for name in ("projector_learning_rate", "encoder_learning_rate"):
            rate = getattr(self.args, name)
            if rate is not None:
                listed += f" or --{name} (now {rate})"
        return listed

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log metrics with the learning rate after the step, and the epoch by micro-batches."""
        if "learning_rate" in logs:
            logs["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        if self.model.training or "loss" in logs:
            num_batches = self.state.global_step * self.args.gradient_accumulation_steps
            self.state.epoch = num_batches / self.micro_batches.per_epoch
        if "train_runtime" in logs:  # At the end of training, on all ranks.
            logs["data_wait_fraction"] = self._data_wait_fraction(logs["train_runtime"])
        super().log(logs, *args, **kwargs)

    def _data_wait_fraction(self, seconds: float) -> float:
        """Return the fraction of the training time that a rank waited for data, at most.

        Every rank must call this.

        Args:
            seconds: the training time.
        """
        wait = torch.tensor([self.data_wait], device=self.args.device)
        longest = float(self.accelerator.gather(wait).max())
        return round(longest / seconds, 4) if seconds else 0.0

    def _datasets(self) -> list[QaDataset]:
        """Return the examples to train on, and those that are held out, if any."""
        datasets = [self.train_dataset]
        if self.eval_dataset is not None:
            datasets.append(self.eval_dataset)
        return datasets

    @property
    def skipped(self) -> list[str]:
        """The examples that were skipped so far, also of those that are held out."""
        names = []
        for dataset in self._datasets():
            names += dataset.skipped
        return names

    def gather_skipped(self) -> None:
        """Merge the skipped examples of all ranks into the datasets of every rank."""
        for dataset in self._datasets():
            counts = dataset.is_bad.int().to(self.args.device)  # (examples,)
            counts = self.accelerator.reduce(counts, "sum")
            dataset.is_bad |= counts.cpu().bool()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and with it `ltu_state.json`: how it was trained, and how far.

        In a checkpoint, `_save_checkpoint` writes this file, after all others. With
        `--push_to_hub`, the folder is uploaded when it is whole.

        Raises:
            OSError: a file cannot be written, for example to a full disk.
        """
        try:
            super().save_model(output_dir, True)  # Without an upload.
        except SafetensorError as error:
            raise cannot_write(output_dir or self.args.output_dir, error) from error
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # A pickle of the arguments, with the token of the hub; `ltu_state.json` has them too.
            (folder / "training_args.bin").unlink(missing_ok=True)
            if not _internal_call:
                # The card says what the record says. Only then, the record says that all is
                # written.
                record = self._current_record()
                write_record(folder, record)
                write_model_card(folder)
                complete_run(folder, record)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card before an upload, where the Trainer would: `save_model` wrote ours."""

    def _current_record(self) -> dict[str, Any]:
        """Return the content of `ltu_state.json` at the current step."""
        record = self.record | {
            "step": self.state.global_step,
            "finished": self.state.global_step >= self.state.max_steps,
            "skipped": self.skipped,
            "rows_per_pass": self.rows_per_pass,
            "compiled_layers": self.has_compiled_layers,
        }
        if self.args.load_best_model_at_end and record["finished"]:
            record["weights_of_step"] = self.state.best_global_step
        if self.model.config.language_model is None:
            record["language_model"] = "in this folder"
        return record

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint, mark it as complete, and delete the oldest ones.

        Raises:
            OSError: it cannot be written, for example to a full disk.
        """
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)  # An incomplete one of that step.
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise cannot_write(checkpoint, error) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            complete_checkpoint(checkpoint, self._current_record())
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


@dataclass
class RunSetup:
    """What a run is made of, before its model is opened.

    Attributes:
        parent: the folder of `--base_model`.
        processor: its processor.
        train_set, held_out: the examples to train on, and those to evaluate, if any.
        dataset: what both together contain.
        steps: the sizes of the run.
        record: what the run is, as in `ltu_state.json`. It lacks the parent in a process that does
            not write it, and with `--plan` and `--show_batch`.
    """

    parent: Path
    processor: LtuProcessor
    train_set: QaDataset
    held_out: QaDataset | None
    dataset: DatasetSummary
    steps: StepPlan
    record: dict[str, Any]


def prepare_run(model_args: ModelArguments, data: DataArguments, run: RunArguments) -> RunSetup:
    """Open the processor and the dataset of a run, and plan its steps.

    Raises:
        ValueError: the processor is of another model, the dataset is not valid, or a step needs
            more examples than there are.
    """
    set_seed(run.seed)
    parent = find_checkpoint(model_args.base_model, CHECKPOINT_FILES)
    processor = AutoProcessor.from_pretrained(parent)
    processor.check_config(AutoConfig.from_pretrained(parent))
    processor.front_end.configure(**data.front_end)
    train_set, held_out, dataset = make_datasets(data, run, processor)
    steps = StepPlan(
        num_examples=len(train_set),
        micro_batch_size=run.micro_batch_size,
        accumulation=run.gradient_accumulation_steps,
        world_size=run.world_size,
        epochs=run.num_epochs,
        max_steps=run.max_steps,
    )
    steps.check(run.batch_size)

    arguments: dict[str, Any] = dataclasses.asdict(model_args) | dataclasses.asdict(data)
    arguments |= arguments.pop("front_end")
    arguments |= run.to_dict()
    record = {
        "stage": Path(run.output_dir).name,
        "data": dataclasses.asdict(dataset),
        "num_examples": len(train_set),
        "grouped": run.group_by_length and train_set.lengths is not None,
        "accumulation": steps.accumulation,
        "examples_per_step": steps.examples_per_step,
        "ranks_of_order": steps.ranks_of_order,
        "batches_per_epoch": steps.batches_per_epoch,
        "total_steps": steps.total_steps,
        "warmup_steps": run.get_warmup_steps(steps.total_steps),
        "versions": library_versions(),
        "code": code_version(),
        # As they are after they were written and read.
        "arguments": json.loads(json.dumps(public_value(arguments), default=str)),
    }
    # Weights of 27 GB are hashed in a minute, so only by a process that writes the record.
    if run.should_save and not (data.plan or data.show_batch):
        sha256 = sha256_of_weights(parent)
        record["parent"] = {
            "name": parent.name,
            "sha256": sha256,
            "settings": hash_settings(parent),
        }
        record["lineage"] = lineage_from(parent, sha256)
    return RunSetup(parent, processor, train_set, held_out, dataset, steps, record)


def make_sampler(setup: RunSetup, run: RunArguments, rank: int | None = None) -> MicroBatchSampler:
    """Return the micro-batches of a rank, by default of this one."""
    steps = setup.steps
    return MicroBatchSampler(
        len(setup.train_set),
        micro_batch_size=steps.micro_batch_size,
        accumulation=steps.accumulation,
        epochs=steps.epochs_needed,
        lengths=setup.train_set.lengths if run.group_by_length else None,
        seed=run.seed if run.data_seed is None else run.data_seed,
        rank=run.process_index if rank is None else rank,
        world_size=steps.world_size,
        total_batches=steps.total_batches,
    )


def make_trainer(
    model_args: ModelArguments,
    data: DataArguments,
    run: RunArguments,
    setup: RunSetup | None = None,
) -> LtuTrainer:
    """Open the model, and return a trainer that is ready to train.

    Args:
        setup: what `prepare_run` returned for the same flags, if it was called already.
    """
    setup = setup or prepare_run(model_args, data, run)
    model = open_to_train(model_args, run.bf16, data.text_only)
    setup.record["parameters"] = {
        "trainable": model.num_parameters(only_trainable=True),
        "all": model.num_parameters(),
    }
    run.max_steps = setup.steps.total_steps
    if run.use_liger_kernel:
        apply_liger(model, run.liger_kernel_config)
    num_examples = setup.steps.total_steps * setup.steps.examples_per_step
    is_compiled = chooses_compilation(model_args, run, num_examples, run.device)
    layers = find_layers(model) if is_compiled else []
    if run.compile_layers == "true" and not find_layers(model.language_model):
        raise ValueError(
            f"--compile_layers: a {model.language_model.config.model_type} has no layers that can "
            "be compiled one by one. Leave the flag out."
        )
    lengths = setup.train_set.lengths
    trainer = LtuTrainer(
        model=model,
        args=run,
        data_collator=LtuCollator(setup.processor, data.original_positions),
        train_dataset=setup.train_set,
        eval_dataset=setup.held_out,
        processing_class=setup.processor,
        micro_batches=make_sampler(setup, run),
        record=setup.record,
        longest_text=data.cutoff_len if lengths is None else int(lengths.max()),
        layers_to_compile=layers,
    )
    if data.encoder_cache:
        fill_encoder_cache(trainer, data.encoder_cache, setup)
    if run.num_workers == "auto":
        choice = choose_num_workers(
            setup.train_set,
            chain.from_iterable(trainer.micro_batches),
            has_accelerator=run.device.type != "cpu",
            needs_gpu=setup.processor.front_end.needs_gpu,
        )
        run.dataloader_num_workers = choice.num_workers
        trainer.notes.append(choice.describe())
    return trainer


def fill_encoder_cache(trainer: LtuTrainer, folder: str, setup: RunSetup) -> None:
    """Encode the clips of a run that the cache lacks, and let its datasets read the cache.

    Every rank must call this.

    Args:
        folder: of `--encoder_cache`.

    Raises:
        OSError: the disk is full, or cannot be written.
        ValueError: the stored features of a clip are those of other audio.
    """
    run = trainer.args
    num_workers = run.dataloader_num_workers
    if run.num_workers == "auto":
        num_workers = min(MAX_WORKERS, count_cores())
    front_end = setup.processor.front_end
    if front_end.needs_gpu:
        num_workers = 0
    used: set[int] = set()  # Examples of all ranks.
    for rank in range(setup.steps.world_size):
        used.update(chain.from_iterable(make_sampler(setup, run, rank)))
    datasets = [setup.train_set]
    indices: list[Iterable[int]] = [sorted(used)]
    if setup.held_out is not None:
        datasets.append(setup.held_out)
        indices.append(range(len(setup.held_out)))
    filler = CacheFiller(folder, trainer.model, front_end, run, num_workers)
    filled = filler.fill(datasets, indices)
    for dataset in datasets:
        dataset.read_encoded = filled.clips.read
    trainer.notes.append(filled.describe())
