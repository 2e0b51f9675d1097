"""Trains one stage.

    python -m ltu.finetune --base_model exp/init --data_path data.json --output_dir exp/stage1
    torchrun --nproc_per_node 4 -m ltu.finetune ...     the same global batch on four GPUs
    python -m ltu.finetune ... --show_batch             print a batch as the model gets it, and stop
    python -m ltu.finetune ... --plan                   print steps, sizes and parameters, and stop
    python -m ltu.finetune ... --plan --gpu_memory 24   print what a GPU of 24 GiB can train

The flags are those of the original, by name, and those of the Trainer of transformers.
`--base_model` is a checkpoint folder that `ltu.convert_checkpoint` or the stage before has written.
The folder determines the audio encoder, the rank of LoRA and the prompt template; a flag that
contradicts it is an error.

The logged learning rate is the one after the step, and the epoch counts micro-batches, as in the
original's logs.

Exit status: 0 when the run is finished; 1 for an error, also for a loss that is not finite; 2 for a
wrong flag; 143 when SIGTERM has ended the run early, with a checkpoint. torchrun exits with 1 then,
and gives the ranks 30 seconds; `python -m train_scripts.torchrun`, which the stage scripts use,
exits with 143 and waits.
"""

import sys

from transformers import AutoConfig

from ltu.files import run_command
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.training.arguments import DataArguments, RunArguments, parse_args
from ltu.training.collator import LtuCollator, describe_batch
from ltu.training.encoder_cache import describe_size
from ltu.training.memory_plan import MemoryPlanner, describe_memory
from ltu.training.model_setup import open_to_train
from ltu.training.run_folder import RunFolder, Start, on_main_process
from ltu.training.stop_signal import STOPPED, kill_workers_at_exit, on_sigterm
from ltu.training.trainer import LtuTrainer, RunSetup, make_sampler, make_trainer, prepare_run


def print_plan(setup: RunSetup, data: DataArguments, run: RunArguments) -> None:
    """Print what a run is going to do."""
    for line in [*setup.dataset.describe(), *setup.steps.describe(run.batch_size)]:
        print(line)
    if data.encoder_cache:
        config = AutoConfig.from_pretrained(setup.parent)
        print(describe_size(data.encoder_cache, config, setup.dataset.num_clips))
    warmup_steps = setup.record["warmup_steps"]
    if warmup_steps >= setup.steps.total_steps:
        print(
            f"note: the warm-up of {warmup_steps} steps is as long as the run or longer, so the "
            "learning rate does not reach --learning_rate and fall again"
        )
    print(f"bf16: {run.bf16}, {run.device}")


def print_parameters(model: LtuForConditionalGeneration) -> None:
    """Print the number of trainable parameters, in the words of peft."""
    trainable = model.num_parameters(only_trainable=True)
    total = model.num_parameters()
    print(
        f"trainable params: {trainable} || all params: {total} || "
        f"trainable%: {100 * trainable / total}"
    )


def train(trainer: LtuTrainer, start: Start) -> int:
    """Train to the end, or until SIGTERM; return the exit status."""
    output = trainer.train(resume_from_checkpoint=start.checkpoint)
    if trainer.is_world_process_zero():
        print(f"waiting for data: {output.metrics['data_wait_fraction']:.2%} of the training time")
    step = trainer.state.global_step
    if step < trainer.state.max_steps:
        if trainer.is_world_process_zero():
            print(
                f"SIGTERM: stopped at step {step} of {trainer.state.max_steps}. Continue with "
                f"--resume_from_checkpoint last ({trainer.args.output_dir}/checkpoint-{step})",
                file=sys.stderr,
            )
        return STOPPED

    trainer.gather_skipped()
    trainer.save_state()
    trainer.save_model()
    skipped = trainer.skipped
    if skipped and trainer.is_world_process_zero():
        print(f"examples skipped ({len(skipped)}): {skipped[:10]}", file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    model_args, data, run = parse_args(argv)
    is_main = run.process_index == 0
    setup = prepare_run(model_args, data, run)
    if is_main:
        print_plan(setup, data, run)
    if data.gpu_memory is not None:
        planner = MemoryPlanner(model_args, data.cutoff_len, run)
        for line in describe_memory(planner, data.gpu_memory):
            print(line)
        return 0
    if data.plan:
        print_parameters(open_to_train(model_args, run.bf16))
        return 0
    if data.show_batch:
        batches = make_sampler(setup, run)
        examples = [setup.train_set[index] for index in next(iter(batches))]
        collate = LtuCollator(setup.processor, data.original_positions)
        print(describe_batch(collate(examples), setup.processor))
        return 0

    inputs = {"base_model": setup.parent, "data_path": data.data_path, "llm": model_args.llm}
    inputs["encoder_cache"] = data.encoder_cache or None
    folder = RunFolder(run, setup.record, inputs)
    try:
        start = on_main_process(folder.open, run.process_index, run.world_size)
        if is_main:
            for note in start.notes:
                print(f"note: {note}", file=sys.stderr)
        if start.is_finished:
            if is_main:
                print(f"{run.output_dir} is finished; --overwrite trains it again")
            return 0
        setup.record["run_id"] = start.run_id
        kill_workers_at_exit()
        trainer = make_trainer(model_args, data, run, setup)
        if is_main:
            folder.begin(start)
            print_parameters(trainer.model)
            for note in trainer.notes:
                print(note)
            if start.checkpoint is not None:
                print(f"continues from {start.checkpoint}")
        with on_sigterm(trainer.stop):
            status = train(trainer, start)
            # Wait for all processes: one that exits while others still write would abort, and with
            # it the rendezvous of several machines.
            trainer.accelerator.wait_for_everyone()
            trainer.accelerator.end_training()
    finally:
        folder.close()
    return status


if __name__ == "__main__":
    run_command(main)
