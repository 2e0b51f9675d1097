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

from ltu.files import run_command
from ltu.training.arguments import parse_args
from ltu.training.collator import describe_batch
from ltu.training.trainer import find_resumed, make_trainer


def is_finished(output_dir: str) -> bool:
    """Return whether a run has trained all its steps, by the state that it wrote."""
    state = Path(output_dir, "ltu_state.json")
    if not state.is_file():
        return False
    try:
        return json.loads(state.read_bytes()).get("finished", False)
    except ValueError:  # The process was killed while it wrote the file.
        return False


def main(argv: list[str] | None = None) -> None:
    model_args, data, run = parse_args(argv)
    if run.skip_finished and is_finished(run.output_dir):
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
            f"{run.batch_size}, bf16: {trainer.args.bf16}, {trainer.args.device}"
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
