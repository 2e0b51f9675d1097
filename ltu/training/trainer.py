"""Builds a trainer from the flags of `ltu.finetune`.

The logged learning rate is the one after the step, and the epoch counts micro-batches, as in the
original's logs.
"""

import dataclasses
import json
import logging
import os
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoProcessor, TrainingArguments, set_seed

from ltu.data.audio import AudioError
from ltu.data.check_examples import check_audio, check_num_errors, read_examples
from ltu.files import replace_file
from ltu.models.locate_checkpoint import CHECKPOINT_FILES, find_checkpoint, sha256_of_weights
from ltu.models.processing_ltu import IGNORED, LtuProcessor
from ltu.training.arguments import DataArguments, ModelArguments, OneGpuArguments, RunArguments
from ltu.training.batch_sampler import MicroBatchSampler, total_steps
from ltu.training.collator import LtuCollator
from ltu.training.dataset import QaDataset
from ltu.training.dataset_index import IndexedExamples, find_index
from ltu.training.model_setup import device_has_bf16, open_to_train
from ltu.training.sharding import ShardedTrainer

logger = logging.getLogger(__name__)

ORDER_ARGUMENTS = ("seed", "batch_size", "val_set_size")


class LtuTrainer(ShardedTrainer):
    """The Trainer of transformers with the original's order of examples, steps and logs.

    Args:
        micro_batches: the batch sampler of this rank, over all epochs.
        record: how the model is trained, which `save_model` writes into `ltu_state.json`.
    """

    def __init__(self, *args: Any, micro_batches: MicroBatchSampler, record: dict, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.micro_batches = micro_batches
        self.record = record

        # A forked process cannot use a GPU, so load the audio in this one.
        if self.processing_class.front_end.needs_gpu:
            self.args.dataloader_num_workers = 0

        # With layers on several devices, the positions of the logits to keep can be on another
        # device than the hidden states, so that indexing fails.
        parameters = signature(self.model.language_model.forward).parameters
        device_map = getattr(self.model, "hf_device_map", {})
        is_on_one_device = len(set(device_map.values())) <= 1
        self.takes_logits_to_keep = "logits_to_keep" in parameters and is_on_one_device

    def get_train_dataloader(self) -> DataLoader:
        # accelerate does not prepare this loader: the batch sampler knows its rank, and its epochs
        # end where the original's do.
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.micro_batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss of a micro-batch.

        Logits are computed only from the position before the first label on, because audio tokens
        and masked questions carry no loss.
        """
        if self.takes_logits_to_keep:
            labels = inputs["labels"]  # (batch, tokens + text)
            labelled = (labels != IGNORED).any(0).nonzero()  # (columns with a label, 1)
            first = int(labelled[0]) if len(labelled) else 0
            # Pass positions instead of a count: a count makes transformers slice, and the slice is
            # not contiguous. Its product with the vocabulary would then take a slow path on CPUs
            # that copies the weight for every position.
            start = max(first - 1, 0)
            keep = torch.arange(start, labels.shape[1], device=labelled.device)
            inputs = inputs | {"labels": labels[:, keep], "logits_to_keep": keep}
        inputs = inputs | {"use_cache": False}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log metrics with the learning rate after the step, and the epoch by micro-batches."""
        if "learning_rate" in logs:
            logs["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        if self.model.training or "loss" in logs:
            num_batches = self.state.global_step * self.args.gradient_accumulation_steps
            self.state.epoch = num_batches / self.micro_batches.per_epoch
        super().log(logs, *args, **kwargs)

    def gather_skipped(self) -> None:
        """Merge the skipped examples of all ranks into the dataset of every rank."""
        is_bad = self.train_dataset.is_bad
        counts = self.accelerator.reduce(is_bad.int().to(self.args.device), "sum")
        is_bad |= counts.cpu().bool()

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model, and with it `ltu_state.json`: how it was trained, and how far."""
        super().save_model(output_dir, *args, **kwargs)
        if not self.args.should_save:
            return
        record = self.record | {
            "step": self.state.global_step,
            "finished": self.state.global_step >= self.state.max_steps,
        }
        if self.model.config.language_model is None:
            record["language_model"] = "in this folder"
        record["skipped"] = self.train_dataset.skipped
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "ltu_state.json", f"{json.dumps(record, indent=1)}\n".encode())


def training_arguments(
    run: RunArguments, steps: int, accumulation: int, bf16: bool, has_held_out: bool
) -> TrainingArguments:
    """Return the arguments of the Trainer.

    With held-out examples, the model is evaluated whenever it is saved, and after the last step.

    The optimizer is the original's: AdamW with betas 0.9 and 0.999 and epsilon 1e-8, no weight
    decay, gradients clipped at 1.0, and a linear schedule. The flags give the rest.
    """
    reports = []
    if run.wandb_project:
        reports.append("wandb")
        os.environ["WANDB_PROJECT"] = run.wandb_project
        if run.wandb_watch:
            os.environ["WANDB_WATCH"] = run.wandb_watch
        if run.wandb_log_model:
            # The original's "true" is of an older transformers.
            is_original = run.wandb_log_model == "true"
            os.environ["WANDB_LOG_MODEL"] = "end" if is_original else run.wandb_log_model
    if run.tensorboard:
        reports.append("tensorboard")

    return OneGpuArguments(
        output_dir=run.output_dir,
        run_name=run.wandb_run_name or None,
        per_device_train_batch_size=run.micro_batch_size,
        per_device_eval_batch_size=run.micro_batch_size,
        eval_strategy="steps" if has_held_out else "no",
        eval_steps=run.save_steps,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=run.learning_rate,
        warmup_steps=run.warmup_steps,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        logging_steps=run.logging_steps,
        logging_nan_inf_filter=False,  # A loss that is not a number must be visible.
        save_steps=run.save_steps,
        save_total_limit=run.save_total_limit,
        dataloader_num_workers=run.num_workers,
        remove_unused_columns=False,
        # The audio encoder has norms that are not used, and a batch may have no audio.
        ddp_find_unused_parameters=True,
        report_to=reports or "none",
        seed=run.seed,
        # transformers 5.24 warns of any value but None; 5.17 lacks the new name of the argument.
        gradient_checkpointing=run.gradient_checkpointing or None,
        fsdp=run.fsdp,
        fsdp_config=run.fsdp_config,
    )


def make_datasets(
    data: DataArguments, run: RunArguments, processor: LtuProcessor
) -> tuple[QaDataset, Dataset | None]:
    """Open the dataset file, or its index, and split it.

    Returns:
        The training examples, and the held-out ones or None. The training examples are in the
        order of the file if none are held out.

    Raises:
        ValueError: the dataset file, its index or, with `--check_audio`, a clip is not valid, or
            `--val_set_size` leaves no example to train on.
    """
    examples = _open_examples(data, processor)
    if data.check_audio:
        check_num_errors(check_audio(examples), data.data_path)
    num_train = len(examples) - data.val_set_size
    if num_train <= 0:
        raise ValueError(
            f"--val_set_size {data.val_set_size} leaves none of the {len(examples)} examples of "
            f"{data.data_path}."
        )

    # All examples in the order of the file, or a random split.
    numbers = torch.arange(len(examples))  # (examples,)
    if data.val_set_size > 0:
        generator = torch.Generator().manual_seed(run.seed)
        numbers = torch.randperm(len(examples), generator=generator)
    train, held_out = numbers.split([num_train, data.val_set_size])
    train_set = _take_examples(examples, train, data, processor)
    held_out_set = None
    if data.val_set_size > 0:
        held_out_set = _take_examples(examples, held_out, data, processor)

    if run.group_by_length and train_set.lengths is None:
        logger.warning(
            "%d examples without an index: their order is random, not grouped by length. "
            "For --group_by_length, first: python -m ltu.index_dataset %s --base_model DIR",
            len(train_set),
            data.data_path,
        )
    return train_set, held_out_set


def _open_examples(data: DataArguments, processor: LtuProcessor) -> list[dict] | IndexedExamples:
    """Return the examples of the index, if there is one, or of the dataset file."""
    indexed = find_index(data.data_path, data.audio_root)
    if indexed is not None:
        indexed.check(processor, data.cutoff_len, data.train_on_inputs)
        return indexed
    examples = read_examples(data.data_path, data.audio_root)
    errors: dict[str, AudioError] = {}
    examples = processor.front_end.add_transcripts(examples, errors)
    check_num_errors(errors, data.data_path, data.max_bad)
    return examples


def _take_examples(
    examples: list[dict] | IndexedExamples,
    numbers: torch.Tensor,
    data: DataArguments,
    processor: LtuProcessor,
) -> QaDataset:
    """Return the dataset of the examples with these numbers, (n,)."""
    lengths = None
    if isinstance(examples, IndexedExamples):
        part = examples.take(numbers)
        lengths = part.num_tokens.clamp(max=data.cutoff_len)  # (n,)
    else:
        part = [examples[number] for number in numbers.tolist()]
    encode = partial(
        processor.encode_example,
        cutoff_len=data.cutoff_len,
        train_on_inputs=data.train_on_inputs,
    )
    return QaDataset(
        part,
        encode=encode,
        load_features=processor.front_end.load_features,
        max_bad=data.max_bad,
        lengths=lengths,
        numbers=numbers,
    )


def make_trainer(model_args: ModelArguments, data: DataArguments, run: RunArguments) -> LtuTrainer:
    """Open the checkpoint and the dataset, and return a trainer that is ready to train."""
    set_seed(run.seed)

    # The processor and the datasets.
    parent = find_checkpoint(model_args.base_model, CHECKPOINT_FILES)
    processor = AutoProcessor.from_pretrained(parent)
    processor.front_end.configure(**data.front_end)
    train_set, held_out = make_datasets(data, run, processor)

    # The model.
    bf16 = device_has_bf16() if run.bf16 == "auto" else run.bf16 == "True"
    model = open_to_train(model_args, bf16)

    # The number of steps, and the micro-batches of this rank.
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    accumulation = run.batch_size // run.micro_batch_size // world_size
    if run.max_steps > 0:
        steps = run.max_steps
    else:
        steps = total_steps(
            len(train_set), run.micro_batch_size, accumulation, world_size, run.num_epochs
        )
    batches = MicroBatchSampler(
        len(train_set),
        micro_batch_size=run.micro_batch_size,
        accumulation=accumulation,
        epochs=run.num_epochs,
        lengths=train_set.lengths if run.group_by_length else None,
        seed=run.seed,
        rank=rank,
        world_size=world_size,
    )
    # --max_steps may need more epochs than --num_epochs.
    epochs_of_steps = -(-steps * accumulation // batches.per_epoch)
    batches.epochs = max(run.num_epochs, epochs_of_steps)

    arguments = {}
    for part in (model_args, data, run):
        arguments |= dataclasses.asdict(part)
    arguments |= arguments.pop("front_end")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    record = {
        "stage": Path(run.output_dir).name,
        "parent": {"name": parent.name, "sha256": sha256_of_weights(parent)},
        "parameters": {"trainable": trainable, "all": model.num_parameters()},
        "num_examples": len(train_set),
        "grouped": run.group_by_length and train_set.lengths is not None,
        "accumulation": accumulation,
        "examples_per_step": run.micro_batch_size * accumulation * world_size,
        "batches_per_epoch": batches.per_epoch,
        "total_steps": steps,
        "arguments": arguments,
    }
    return LtuTrainer(
        model=model,
        args=training_arguments(run, steps, accumulation, bf16, held_out is not None),
        data_collator=LtuCollator(processor, data.original_positions),
        train_dataset=train_set,
        eval_dataset=held_out,
        processing_class=processor,
        micro_batches=batches,
        record=record,
    )


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def find_resumed(run: RunArguments, record: dict) -> str | None:
    """Return the checkpoint to resume from, or None for a new run.

    Raises:
        ValueError: the checkpoint does not exist, or was trained with another number or order of
            examples, so that some would never be used.
    """
    folder = run.resume_from_checkpoint
    if folder is None:
        return None
    if folder == "last":
        # A checkpoint without trainer_state.json is not complete.
        states = Path(run.output_dir).glob("checkpoint-*/trainer_state.json")
        folders = sorted((state.parent for state in states), key=_step_of)
        folder = str(folders[-1]) if folders else None
    if folder is None or not Path(folder, "trainer_state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint: {folder or run.output_dir} holds no checkpoint of a run."
        )

    state = Path(folder, "ltu_state.json")
    stored = json.loads(state.read_text()) if state.is_file() else {}
    # The order of the examples, and which of them are held out, depend on these.
    names = ("num_examples", "grouped", "examples_per_step")
    trained = {key: stored[key] for key in names if key in stored}
    order_arguments = ORDER_ARGUMENTS
    if record["grouped"]:  # Examples are grouped by their lengths within the cutoff.
        order_arguments += ("cutoff_len",)
    arguments = stored.get("arguments", {})
    trained |= {name: arguments[name] for name in order_arguments if name in arguments}
    for key, value in trained.items():
        wanted = record[key] if key in record else record["arguments"][key]
        if value != wanted:
            raise ValueError(
                f"{folder} was trained with {key}: {value}, this run has {wanted}. Start a new run."
            )
    return folder
