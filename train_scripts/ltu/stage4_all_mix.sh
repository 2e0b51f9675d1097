#!/usr/bin/env bash
# Stage 4 of 4: trains the audio encoder, the projection and LoRA on closed-ended and open-ended
# questions (paper: 5,681,708 examples, 22,194 steps).
# DATA: folder of stage4.json. EXP: output folder, which has the stage before.
source "$(dirname "$0")/../functions.sh"

finetune \
    --base_model "${EXP:-exp/ltu}/stage3_all_close" \
    --data_path "${DATA:-data/openaqa}/stage4.json" \
    --output_dir "${EXP:-exp/ltu}/stage4_all_mix" \
    --trainable_params all \
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 \
    --micro_batch_size 4 \
    --num_epochs 1 \
    --learning_rate 1e-4 \
    "$@"
