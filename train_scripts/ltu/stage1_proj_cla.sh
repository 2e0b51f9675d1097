#!/usr/bin/env bash
# Stage 1 of 4: trains the projection on classification (paper: 1,190,489 examples, 9,300 steps).
# BASE: folder of ltu.convert_checkpoint --init. DATA: folder of stage1.json. EXP: output folder.
# Further flags go to ltu.finetune and override these:
# bash train_scripts/ltu/stage1_proj_cla.sh --micro_batch_size 4
# --encoder_cache DIR encodes each clip once, so that the second epoch decodes no audio. It needs
# 98 kB a clip (32 x 768 values), 98 GB for a million clips.
source "$(dirname "$0")/../functions.sh"

finetune \
    --base_model "${BASE:-pretrained_mdls/ltu_init}" \
    --data_path "${DATA:-data/openaqa}/stage1.json" \
    --output_dir "${EXP:-exp/ltu}/stage1_proj_cla" \
    --trainable_params proj \
    --lora_target_modules '["dummy"]' \
    --micro_batch_size 8 \
    --num_epochs 2 \
    --learning_rate 1e-3 \
    "$@"
