#!/usr/bin/env bash
# Stage 3 of 3 on OpenASQA v2, instead of stage3_all_mix_v2.sh: trains the audio encoder, the
# projection and the whole language model (the released ltu_as_full: 40,000 steps, without
# unanswerable questions). The learning rate is that of LTU's full fine-tuning. The LoRA of stage 2
# is merged first. A 7B model needs 110 GB for weights, gradients and optimizer; its folder has
# 27 GB. DATA, EXP, FEATURES: see stage 1.
source "$(dirname "$0")/../functions.sh"

MODEL=ltu_as finetune \
    --base_model "${EXP:-exp/ltu_as}/stage2_all_cla" \
    --data_path "${DATA:-data/openasqa}/stage3.json" \
    --output_dir "${EXP:-exp/ltu_as}/stage3_full_finetune" \
    --trainable_params full \
    --lora_target_modules '["dummy"]' \
    --micro_batch_size 4 \
    --num_epochs 1 \
    --learning_rate 2e-5 \
    --cutoff_len 160 \
    ${FEATURES:+--feature_root "$FEATURES"} \
    "$@"
