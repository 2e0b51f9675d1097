"""Train one stage.

    python -m ltu.finetune --base_model exp/init --data_path data.json --output_dir exp/stage1 --trainable_params proj
    torchrun --nproc_per_node 4 -m ltu.finetune ...          the same global batch on four GPUs
    python -m ltu.finetune ... --show_batch                  a batch as the model gets it; no training
    python -m ltu.finetune ... --plan                        steps, sizes and what is trained; no training

Notable:
- The original's flags by name. `--base_model` is a checkpoint folder: of `ltu.convert_checkpoint`, or of the stage
  before.
- What the folder says (ear, LoRA's rank, prompt template) is not typed again; a flag that contradicts it is an error.
- The logged learning rate is the one after the step, and the epoch counts micro-batches, as in the original's logs.
"""

import sys

from ltu.files import run_command
from ltu.training.arguments import parse_args
from ltu.training.collator import describe_batch
from ltu.training.trainer import find_resumed, make_trainer


def main(argv: list[str] | None = None) -> None:
    model_args, data, run = parse_args(argv)
    trainer = make_trainer(model_args, data, run)
    record = trainer.record
    if trainer.is_world_process_zero():
        percent = 100 * record["parameters"]["trainable"] / record["parameters"]["all"]
        print(
            f"trainable params: {record['parameters']['trainable']} || all params: {record['parameters']['all']} || "
            f"trainable%: {percent}"
        )
        print(
            f"{record['rows']} rows, {record['total_steps']} steps of {run.batch_size}, bf16: {trainer.args.bf16}, "
            f"{trainer.args.device}"
        )
    if data.plan:
        return
    if data.show_batch:
        print(describe_batch(next(iter(trainer.get_train_dataloader())), trainer.processing_class))
        return
    trainer.train(resume_from_checkpoint=find_resumed(run, record))
    trainer.gather_skipped()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero() and trainer.train_dataset.skipped:
        skipped = trainer.train_dataset.skipped
        print(f"{len(skipped)} rows skipped: {skipped[:10]}", file=sys.stderr)
    # A process that leaves while others still write would abort, and take the rendezvous of several nodes with it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
