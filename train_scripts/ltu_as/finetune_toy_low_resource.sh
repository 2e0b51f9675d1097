#!/usr/bin/env bash
# finetune_toy.sh on several small GPUs: one process, the layers of its language model spread over them.
# Slower (authors' losses with theirs: 0.6051, 0.5754, 0.5488): the GPUs work one after the other.
# On a single small GPU: finetune_toy.sh --micro_batch_size 1 --gradient_checkpointing.
export NPROC=1
bash "$(dirname "$0")/finetune_toy.sh" --output_dir "${EXP:-exp/ltu_as}/finetune_toy_low_resource" --device_map auto \
    --micro_batch_size 2 "$@"
