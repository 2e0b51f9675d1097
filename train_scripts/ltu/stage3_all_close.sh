#!/usr/bin/env bash
# Stage 3 of 4: trains the audio encoder, the projection and LoRA on all closed-ended questions
# (paper: 1,917,894 examples, 7,491 steps).
# DATA: folder of stage3.json. EXP: output folder, which has the stage before.
source "$(dirname "$0")/../functions.sh"

finetune \
    --base_model "${EXP:-exp/ltu}/stage2_all_cla" \
    --data_path "${DATA:-data/openaqa}/stage3.json" \
    --output_dir "${EXP:-exp/ltu}/stage3_all_close" \
    --trainable_params all \
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 \
    --micro_batch_size 4 \
    --num_epochs 1 \
    --learning_rate 1e-4 \
    "$@"
