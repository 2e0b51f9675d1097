#!/usr/bin/env bash
# Stage 4 of 4, instead of stage4_all_mix.sh: trains the audio encoder, the projection and the whole
# language model (paper: learning rate 2e-5, 20,000 steps; the released ltu_full). The LoRA of
# stage 3 is merged first. The language model is trained in fp32, so a 7B model needs 110 GB for
# weights, gradients and optimizer, and its folder has 27 GB.
# DATA: folder of stage4.json. EXP: output folder, which has the stage before.
source "$(dirname "$0")/../functions.sh"

finetune \
    --base_model "${EXP:-exp/ltu}/stage3_all_close" \
    --data_path "${DATA:-data/openaqa}/stage4.json" \
    --output_dir "${EXP:-exp/ltu}/stage4_full_finetune" \
    --trainable_params full \
    --lora_target_modules '["dummy"]' \
    --micro_batch_size 4 \
    --num_epochs 1 \
    --learning_rate 2e-5 \
    "$@"
