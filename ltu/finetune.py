"""Trains one stage.

    python -m ltu.finetune --base_model exp/init --data_path data.json --output_dir exp/stage1
    torchrun --nproc_per_node 4 -m ltu.finetune ...     the same global batch on four GPUs
    python -m ltu.finetune ... --show_batch             print a batch as the model gets it, and stop
    python -m ltu.finetune ... --plan                   print steps, sizes and parameters, and stop

The flags have the names of the original's. `--base_model` is a checkpoint folder that
`ltu.convert_checkpoint` or the stage before has written. The folder determines the audio encoder,
the rank of LoRA and the prompt template; a flag that contradicts it is an error.

The logged learning rate is the one after the step, and the epoch counts micro-batches, as in the
original's logs.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ltu.files import run_command
from ltu.models.locate_checkpoint import find_checkpoint, sha256_of_weights
from ltu.training.arguments import parse_args
from ltu.training.collator import describe_batch
from ltu.training.trainer import find_resumed, make_trainer

# Flags that decide what is trained.
DECISIVE_FLAGS = (
    "base_model",
    "data_path",
    "trainable_params",
    "cutoff_len",
    "batch_size",
    "num_epochs",
    "max_steps",
    "learning_rate",
    "seed",
)


def is_finished(output_dir: str, flags: dict[str, Any]) -> bool:
    """Return whether a run with these flags has trained all its steps, by the state that it wrote.

    Raises:
        ValueError: the finished run had other flags, or its base model has other weights now.
    """
    state = Path(output_dir, "ltu_state.json")
    if not state.is_file():
        return False
    try:
        record = json.loads(state.read_bytes())
    except ValueError:  # A power failure can leave an incomplete file.
        return False
    if not record.get("finished", False):
        return False
    hint = "Give another --output_dir, or remove the folder to train again."
    stored = record.get("arguments", {})
    for name in DECISIVE_FLAGS:
        if name in stored and stored[name] != flags[name]:
            raise ValueError(
                f"{output_dir} has a finished run with --{name} {stored[name]}, not "
                f"{flags[name]}. {hint}"
            )
    parent = record.get("parent")
    if parent is not None:
        base_model = find_checkpoint(flags["base_model"])
        if sha256_of_weights(base_model) != parent["sha256"]:
            raise ValueError(
                f"{output_dir} has a finished run from other weights than {base_model} has now. "
                f"{hint}"
            )
    return True


def main(argv: list[str] | None = None) -> None:
    model_args, data, run = parse_args(argv)
    trains = not (data.plan or data.show_batch)
    flags = vars(model_args) | vars(data) | vars(run)
    if trains and run.skip_finished and is_finished(run.output_dir, flags):
        if os.environ.get("RANK", "0") == "0":
            print(f"{run.output_dir} is finished; remove it to train again")
        return
    trainer = make_trainer(model_args, data, run)
    record = trainer.record
    if trainer.is_world_process_zero():
        trainable = record["parameters"]["trainable"]
        total = record["parameters"]["all"]
        print(
            f"trainable params: {trainable} || all params: {total} || "
            f"trainable%: {100 * trainable / total}"
        )
        print(
            f"{record['num_examples']} examples, {record['total_steps']} steps of "
            f"{record['examples_per_step']}, bf16: {trainer.args.bf16}, {trainer.args.device}"
        )
    if data.plan:
        return
    if data.show_batch:
        batch = next(iter(trainer.get_train_dataloader()))
        print(describe_batch(batch, trainer.processing_class))
        return

    trainer.train(resume_from_checkpoint=find_resumed(run, record))
    trainer.gather_skipped()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        skipped = trainer.train_dataset.skipped
        if skipped:
            print(f"{len(skipped)} examples skipped: {skipped[:10]}", file=sys.stderr)

    # Wait for all processes: one that exits while others still write would abort, and with it the
    # rendezvous of several machines.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
