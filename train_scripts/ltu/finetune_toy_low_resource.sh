#!/usr/bin/env bash
# Runs finetune_toy.sh on several small GPUs: one process spreads the layers of the language model
# over them. This is slower, because the GPUs work one after the other.
# On a single small GPU: finetune_toy.sh --rows_per_pass 1 --gradient_checkpointing.
export NPROC=1
exec bash "$(dirname "$0")/finetune_toy.sh" --output_dir "${EXP:-exp/ltu}/finetune_toy_low_resource" \
    --device_map auto --micro_batch_size 2 "$@"
