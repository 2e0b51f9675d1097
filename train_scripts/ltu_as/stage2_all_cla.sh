#!/usr/bin/env bash
# Stage 2 of 3: trains the audio encoder, the projection and LoRA on the same examples.
# DATA, EXP, FEATURES: see stage 1.
# The run behind the released models had micro-batches of 6 and up to 128 text tokens: on 4 GPUs,
# 240 examples a step and 17,270 steps (--batch_size 240 --micro_batch_size 6 --cutoff_len 128).
# The paper's table has a learning rate of 2e-4, that run had 1e-4.
source "$(dirname "$0")/../functions.sh"

MODEL=ltu_as finetune \
    --base_model "${EXP:-exp/ltu_as}/stage1_proj_cla" \
    --data_path "${DATA:-data/openasqa}/stage2.json" \
    --output_dir "${EXP:-exp/ltu_as}/stage2_all_cla" \
    --trainable_params all \
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 \
    --micro_batch_size 8 \
    --num_epochs 2 \
    --learning_rate 1e-4 \
    ${FEATURES:+--feature_root "$FEATURES"} \
    "$@"
