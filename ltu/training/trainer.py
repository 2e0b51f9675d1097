"""The trainer and what it needs before its first step.

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
from transformers import AutoProcessor, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ltu.data.examples import check_audio, read_rows
from ltu.models.checkpoint_folder import CHECKPOINT_FILES, find_checkpoint, sha256_of_weights
from ltu.models.processing_ltu import IGNORED, WHISPER_FLAGS, LtuProcessor
from ltu.training.arguments import DataArguments, ModelArguments, OneGpuArguments, RunArguments
from ltu.training.batch_sampler import MicroBatchSampler, total_steps
from ltu.training.collator import LtuCollator
from ltu.training.dataset import QaDataset
from ltu.training.dataset_index import IndexedRows, find_index
from ltu.training.model_setup import device_has_bf16, open_to_train

logger = logging.getLogger(__name__)


class LtuTrainer(Trainer):
    """The stock Trainer with the original's order of rows, count of steps and way of logging."""

    def __init__(self, *args: Any, micro_batches: MicroBatchSampler, record: dict, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.micro_batches = micro_batches
        self.record = record
        on_gpu = "cuda" in str(getattr(self.processing_class.feature_extractor, "device", ""))
        if on_gpu and self.processing_class.store is None:
            self.args.dataloader_num_workers = (
                0  # A Whisper on a GPU cannot be used from a process that was forked.
            )
        takes = signature(self.model.language_model.forward).parameters
        # Spread over several devices, places would be looked up on another one than they lie on.
        is_spread = len(set(getattr(self.model, "hf_device_map", {}).values())) > 1
        self.takes_logits_to_keep = "logits_to_keep" in takes and not is_spread

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by accelerate: the batch sampler knows its rank, and its epochs end where the original's do.
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
        """Logits are computed from the place before the first label on: audio, and masked questions, need none."""
        if self.takes_logits_to_keep:
            labelled = (inputs["labels"] != IGNORED).any(0).nonzero()  # (columns with a label, 1)
            first = int(labelled[0]) if len(labelled) else 0
            # Places, not a count: a slice would not be contiguous, and the product with the vocabulary then takes
            # a slow path on CPUs that copies the weight for every row.
            keep = torch.arange(
                max(first - 1, 0), inputs["labels"].shape[1], device=labelled.device
            )
            inputs = inputs | {"labels": inputs["labels"][:, keep], "logits_to_keep": keep}
        inputs = inputs | {"use_cache": False}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            logs["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        if self.model.training or "loss" in logs:
            done = self.state.global_step * self.args.gradient_accumulation_steps
            self.state.epoch = done / self.micro_batches.per_epoch
        super().log(logs, *args, **kwargs)

    def gather_skipped(self) -> None:
        """Every rank learns which rows the others skipped."""
        is_bad = self.train_dataset.is_bad
        is_bad |= self.accelerator.reduce(is_bad.int().to(self.args.device), "sum").cpu().bool()

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model, and beside it `ltu_state.json`: how it was trained, and how far."""
        super().save_model(output_dir, *args, **kwargs)
        if not self.args.should_save:
            return
        record = self.record | {
            "step": self.state.global_step,
            "finished": self.state.global_step >= self.state.max_steps,
        }
        if self.model.config.language_model is None:
            record["language_model"] = "in this folder"
        record["skipped"] = (
            self.train_dataset.skipped if isinstance(self.train_dataset, QaDataset) else []
        )
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ltu_state.json").write_text(json.dumps(record, indent=1) + "\n")


class EvaluateAtSave(TrainerCallback):
    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % state.save_steps == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True


def training_arguments(
    run: RunArguments, steps: int, accumulation: int, bf16: bool
) -> TrainingArguments:
    """What the original sets (AdamW 0.9/0.999/1e-8, no decay of weights, clip 1.0, linear schedule) and what the flags
    say."""
    if run.wandb_project:
        os.environ["WANDB_PROJECT"] = run.wandb_project
        os.environ |= {
            k: v
            for k, v in {
                "WANDB_WATCH": run.wandb_watch,
                "WANDB_LOG_MODEL": run.wandb_log_model,
            }.items()
            if v
        }
    reports = ["wandb"] * bool(run.wandb_project) + ["tensorboard"] * run.tensorboard
    return OneGpuArguments(
        output_dir=run.output_dir,
        run_name=run.wandb_run_name or None,
        per_device_train_batch_size=run.micro_batch_size,
        per_device_eval_batch_size=run.micro_batch_size,
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
        **({"gradient_checkpointing": True} if run.gradient_checkpointing else {}),
        logging_steps=run.logging_steps,
        logging_nan_inf_filter=False,  # A loss that is not a number must be seen.
        save_steps=run.save_steps,
        save_total_limit=run.save_total_limit,
        dataloader_num_workers=run.num_workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # Unused norms of the ear; batches without audio.
        report_to=reports or "none",
        seed=run.seed,
    )


def make_datasets(
    data: DataArguments, run: RunArguments, processor: LtuProcessor
) -> tuple[QaDataset, Dataset | None]:
    """Rows to train on, and the held-out ones if `--val_set_size` asks for some."""
    rows = find_index(data.data_path, data.audio_root)
    if rows is None:
        rows = processor.add_transcripts(read_rows(data.data_path, data.audio_root))
    else:
        rows.check(processor, data.cutoff_len, data.train_on_inputs)
    if data.check_audio and (bad := check_audio(rows)):
        shown = "\n".join(f"  {error}" for error in list(bad.values())[:20])
        raise ValueError(f"{len(bad)} clips of {data.data_path} cannot be heard:\n{shown}")
    if data.val_set_size >= len(rows):
        raise ValueError(
            f"--val_set_size {data.val_set_size} leaves none of the {len(rows)} rows of {data.data_path}."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.seed))
    train, held_out = order.split([len(rows) - data.val_set_size, data.val_set_size])
    is_indexed = isinstance(rows, IndexedRows)

    def make(numbers: torch.Tensor) -> QaDataset:
        part = rows.take(numbers) if is_indexed else [rows[number] for number in numbers.tolist()]
        return QaDataset(
            part,
            encode=partial(
                processor.encode_example,
                cutoff_len=data.cutoff_len,
                train_on_inputs=data.train_on_inputs,
            ),
            load_features=processor.load_features,
            max_bad=data.max_bad,
            lengths=part.num_tokens.clamp(max=data.cutoff_len) if is_indexed else None,
            numbers=numbers,
        )

    train_set = make(train if data.val_set_size > 0 else torch.arange(len(rows)))
    if run.group_by_length and train_set.lengths is None:
        logger.warning(
            "%d rows without an index: their order is random, not grouped by length. For --group_by_length, first: "
            "python -m ltu.index_dataset %s --base_model DIR",
            len(train_set),
            data.data_path,
        )
    return train_set, make(held_out) if data.val_set_size > 0 else None


def make_trainer(model_args: ModelArguments, data: DataArguments, run: RunArguments) -> LtuTrainer:
    """Everything that a run needs, before its first step."""
    set_seed(run.seed)
    parent = find_checkpoint(model_args.base_model, CHECKPOINT_FILES)
    processor = AutoProcessor.from_pretrained(parent)
    processor.use(**{name: getattr(data, name) for name in WHISPER_FLAGS})
    train_set, held_out = make_datasets(data, run, processor)
    bf16 = device_has_bf16() if run.bf16 == "auto" else run.bf16 == "True"
    model = open_to_train(model_args, bf16)
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    accumulation = run.batch_size // run.micro_batch_size // world_size
    steps = total_steps(
        len(train_set), run.micro_batch_size, accumulation, world_size, run.num_epochs
    )
    steps = run.max_steps if run.max_steps > 0 else steps
    sizes = (run.micro_batch_size, accumulation, run.num_epochs)
    order = (train_set.lengths if run.group_by_length else None, run.seed, rank, world_size)
    batches = MicroBatchSampler(len(train_set), *sizes, *order)
    batches.epochs = max(run.num_epochs, -(-steps * accumulation // batches.per_epoch))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    record = {
        "stage": Path(run.output_dir).name,
        "parent": {"name": parent.name, "sha256": sha256_of_weights(parent)},
        "parameters": {"trainable": trainable, "all": model.num_parameters()},
        "rows": len(train_set),
        "grouped": run.group_by_length and train_set.lengths is not None,
        "accumulation": accumulation,
        "batches_per_epoch": batches.per_epoch,
        "total_steps": steps,
        "arguments": {
            k: v for part in (model_args, data, run) for k, v in dataclasses.asdict(part).items()
        },
    }
    return LtuTrainer(
        model=model,
        args=training_arguments(run, steps, accumulation, bf16),
        data_collator=LtuCollator(processor, data.original_positions),
        train_dataset=train_set,
        eval_dataset=held_out,
        processing_class=processor,
        callbacks=[EvaluateAtSave()] if held_out else None,
        micro_batches=batches,
        record=record,
    )


def find_resumed(run: RunArguments, record: dict) -> str | None:
    """The folder to go on from.

    Raises:
        ValueError: it is not there, or had other rows or another order of them: some would never be seen.
    """
    if run.resume_from_checkpoint is None:
        return None
    folder = run.resume_from_checkpoint
    folder = get_last_checkpoint(run.output_dir) if folder == "last" else folder
    if folder is None or not Path(folder, "trainer_state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint: {folder or run.output_dir} holds no checkpoint of a run."
        )
    state = Path(folder, "ltu_state.json")
    before = json.loads(state.read_text()) if state.is_file() else {}
    for key in ("rows", "grouped"):
        if before.get(key, record[key]) != record[key]:
            raise ValueError(
                f"{folder} was trained with {key}: {before[key]}, this run has {record[key]}. Begin anew."
            )
    return folder
