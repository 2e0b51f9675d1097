#!/usr/bin/env bash
# Fine-tunes a trained LTU on the toy set (paper: 6,306 rows, 24 steps; loss 0.638 at step 10, 0.605 at 20), or on yours:
# bash train_scripts/ltu/finetune_toy.sh --data_path mine.json --output_dir exp/mine
# BASE: a checkpoint folder of any stage. DATA: folder of the toy set. EXP: where the result is written.
source "$(dirname "$0")/../run.sh"

finetune \
    --base_model "${BASE:-pretrained_mdls/ltu_ori_paper}" \
    --data_path "${DATA:-data/openaqa}/openaqa_toy_relative.json" \
    --output_dir "${EXP:-exp/ltu}/finetune_toy" \
    --trainable_params all \
    --lora_target_modules '[q_proj,v_proj]' \
    --batch_size 256 \
    --micro_batch_size 4 \
    --num_epochs 1 \
    --learning_rate 1e-4 \
    --warmup_steps 100 \
    --cutoff_len 100 \
    --train_on_inputs \
    --group_by_length \
    --original_positions \
    --save_steps 10 \
    "$@"
