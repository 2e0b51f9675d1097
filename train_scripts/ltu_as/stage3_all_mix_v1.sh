#!/usr/bin/env bash
# Stage 3 of 3 on the paper's data (OpenASQA v1, 9,641,740 examples): all kinds of questions.
# DATA, EXP, FEATURES: see stage 1.
# The run whose log was released had 280 examples a step and 34,434 steps:
# --batch_size 280 --micro_batch_size 7.
source "$(dirname "$0")/../functions.sh"

MODEL=ltu_as finetune \
    --base_model "${EXP:-exp/ltu_as}/stage2_all_cla" \
    --data_path "${DATA:-data/openasqa}/stage3.json" \
    --output_dir "${EXP:-exp/ltu_as}/stage3_all_mix_v1" \
    --trainable_params all \
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 \
    --micro_batch_size 8 \
    --num_epochs 1 \
    --learning_rate 2e-4 \
    ${FEATURES:+--feature_root "$FEATURES"} \
    "$@"
