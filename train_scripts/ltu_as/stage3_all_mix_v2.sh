#!/usr/bin/env bash
# Stage 3 of 3 on OpenASQA v2 (10,324,230 examples), which has more joint audio and speech
# questions. It replaces stage3_all_mix_v1.sh and also starts from stage 2. The original's README
# calls it stage4_all_mix_v2.sh. DATA, EXP, FEATURES: see stage 1.
# The run behind the default model had two epochs of 9,397,025 examples, without unanswerable
# questions: --num_epochs 2.
source "$(dirname "$0")/../functions.sh"

MODEL=ltu_as finetune \
    --base_model "${EXP:-exp/ltu_as}/stage2_all_cla" \
    --data_path "${DATA:-data/openasqa}/stage3.json" \
    --output_dir "${EXP:-exp/ltu_as}/stage3_all_mix_v2" \
    --trainable_params all \
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 \
    --micro_batch_size 4 \
    --num_epochs 1 \
    --learning_rate 2e-4 \
    --cutoff_len 160 \
    ${FEATURES:+--feature_root "$FEATURES"} \
    "$@"
