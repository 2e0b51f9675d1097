#!/usr/bin/env bash
# Fine-tunes a trained LTU-AS on the authors' toy set (8,769 examples, 34 steps), or on your data:
# bash train_scripts/ltu_as/finetune_toy.sh --data_path mine.json --output_dir exp/mine
# BASE: a checkpoint folder of any stage. DATA: folder of the toy set. FEATURES: see stage 1.
# EXP: output folder.
# Compare the losses with the authors' own, which differ by 0.03 from run to run:
# python -m ltu.compare_log exp/ltu_as/finetune_toy --expected 10:0.6029,20:0.5805,30:0.5397
source "$(dirname "$0")/../functions.sh"

MODEL=ltu_as finetune \
    --base_model "${BASE:-pretrained_mdls/ltu_as_long_noqa_a6}" \
    --data_path "${DATA:-data/openasqa_toy}/openasqa_toy.json" \
    --output_dir "${EXP:-exp/ltu_as}/finetune_toy" \
    --trainable_params all \
    --micro_batch_size 4 \
    --num_epochs 1 \
    --learning_rate 2e-4 \
    --cutoff_len 160 \
    ${FEATURES:+--feature_root "$FEATURES"} \
    --save_steps 10 \
    "$@"
