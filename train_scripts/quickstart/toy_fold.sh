#!/usr/bin/env bash
# Runs one fold of the toy experiment with LTU: builds the dataset and the initial checkpoint,
# trains the stages, and generates answers for held-out clips after each of them.
# bash train_scripts/quickstart/toy_fold.sh FOLD SEED DIR [FLAGS of ltu.finetune]
#   STAGES        names of stage scripts in order; the default is all four
#   NUM_EXAMPLES  numbers of examples of stages 1 to 4; the default is that of data.toy.build
# Finished work is skipped.
source "$(dirname "$0")/../functions.sh"
fold=$1 seed=$2
export EXP=$3
shift 3
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
export NPROC=${NPROC:-1} PYTHON=${PYTHON:-.venv/bin/python}
export DATA=$EXP/data BASE=$EXP/init
stages=${STAGES:-stage1_proj_cla stage2_all_cla stage3_all_close stage4_all_mix}

if [ ! -f "$DATA/finished" ]; then
    step "Toy data: 246 clips, training examples, held-out questions"
    "$PYTHON" -m data.toy.build --fold "$fold" --seed "$seed" --output_dir "$DATA" \
        ${NUM_EXAMPLES:+--num_examples "$NUM_EXAMPLES"}
    touch "$DATA/finished"
fi
if [ ! -f "$BASE/ltu_state.json" ]; then
    "$PYTHON" -m ltu.convert_checkpoint --init --llm pretrained_mdls/smollm2-135m-instruct \
        --audio_encoder pretrained_mdls/yamnet --seed "$seed" --output_dir "$BASE"
fi
for stage in $stages; do
    step "$stage"
    answers=$EXP/$stage/answers
    is_new=""
    if ! grep -qs '"finished": true' "$EXP/$stage/ltu_state.json"; then is_new=yes; fi

    # Stage 4 adds open-ended questions, at a quarter of the learning rate. At the full one, the
    # model would name fewer labels exactly.
    stage_flags=""
    case $stage in stage4_*) stage_flags="--learning_rate 5e-4" ;; esac
    bash "train_scripts/ltu/$stage.sh" --seed "$seed" $(grep -v '^#' train_scripts/quickstart/toy.args) \
        $stage_flags "$@"

    if [ -n "$is_new" ] || [ ! -f "$answers/show.json" ]; then
        "$PYTHON" -m ltu.inference_batch --model "$EXP/$stage" --batch_size 34 \
            --max_new_tokens 40 --data_path "$DATA"/heldout_{right,wrong,none,show}.json \
            --output_path "$answers"/{right,wrong,none,show}.json
        "$PYTHON" -m eval.toy --folds "$EXP" --no_probe
    fi
done
