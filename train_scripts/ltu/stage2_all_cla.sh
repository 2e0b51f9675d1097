#!/usr/bin/env bash
# Stage 2 of 4: trains the audio encoder, the projection and LoRA on classification
# (paper: the examples of stage 1, 9,300 steps).
# DATA: folder of stage2.json. EXP: output folder, which has the stage before.
source "$(dirname "$0")/../functions.sh"

finetune \
    --base_model "${EXP:-exp/ltu}/stage1_proj_cla" \
    --data_path "${DATA:-data/openaqa}/stage2.json" \
    --output_dir "${EXP:-exp/ltu}/stage2_all_cla" \
    --trainable_params all \
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 \
    --micro_batch_size 4 \
    --num_epochs 2 \
    --learning_rate 1e-4 \
    "$@"
