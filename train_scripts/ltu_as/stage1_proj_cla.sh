#!/usr/bin/env bash
# Stage 1 of 3: trains the projection on classification (2,072,481 examples, 16,190 steps).
# BASE: folder of ltu_as.convert_checkpoint --init. DATA: folder of stage1.json. EXP: output
# folder. FEATURES: folder of ltu_as.extract_whisper_feature; without it, Whisper runs on the fly.
# Further flags override these.
# --encoder_cache DIR runs TLTR once for each clip. It needs 128 kB a clip (25 x 1280 values), 128 GB
# for a million clips.
source "$(dirname "$0")/../functions.sh"

MODEL=ltu_as finetune \
    --base_model "${BASE:-pretrained_mdls/ltu_as_init}" \
    --data_path "${DATA:-data/openasqa}/stage1.json" \
    --output_dir "${EXP:-exp/ltu_as}/stage1_proj_cla" \
    --trainable_params proj \
    --lora_target_modules '["dummy"]' \
    --micro_batch_size 8 \
    --num_epochs 2 \
    --learning_rate 1e-3 \
    ${FEATURES:+--feature_root "$FEATURES"} \
    "$@"
