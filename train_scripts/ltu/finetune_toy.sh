#!/usr/bin/env bash
# Fine-tunes a trained LTU on the authors' toy set (6,306 examples, 24 steps), or on your data:
# bash train_scripts/ltu/finetune_toy.sh --data_path mine.json --output_dir exp/mine
# BASE: a checkpoint folder of any stage. DATA: folder of the toy set. EXP: output folder.
# Compare the losses with the authors' own, which differ by 0.03 from run to run:
# python -m ltu.compare_log exp/ltu/finetune_toy --expected 10:0.6383,20:0.6052
source "$(dirname "$0")/../functions.sh"

finetune \
    --base_model "${BASE:-pretrained_mdls/ltu_ori_paper}" \
    --data_path "${DATA:-data/openaqa_toy}/openaqa_toy.json" \
    --output_dir "${EXP:-exp/ltu}/finetune_toy" \
    --trainable_params all \
    --micro_batch_size 4 \
    --num_epochs 1 \
    --learning_rate 1e-4 \
    --cutoff_len 100 \
    --save_steps 10 \
    "$@"
