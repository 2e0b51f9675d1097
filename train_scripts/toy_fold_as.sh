#!/usr/bin/env bash
# One fold of the toy experiment with LTU-AS: rows, a start, Whisper's features and words, the stages, and what they taught.
# bash train_scripts/toy_fold_as.sh FOLD SEED DIR [FLAGS of ltu_as.finetune]
# STAGES: names of stage scripts in order (all three). ROWS: rows of stages 1 to 3 (data.toy.build_as's own).
# What is finished is not done again.
source "$(dirname "$0")/run.sh"
fold=$1 seed=$2
export EXP=$3
shift 3
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false NPROC=${NPROC:-1} PYTHON=${PYTHON:-.venv/bin/python}
export DATA=$EXP/data BASE=$EXP/init FEATURES=$EXP/features
WHISPER=pretrained_mdls/whisper-tiny.en/whisper.pt
stages=${STAGES:-stage1_proj_cla stage2_all_cla stage3_all_mix_v2}
sounds="right wrong none"
spoken="show speech_gender speech_gender_empty speech_words_right speech_words_whisper speech_words_wrong speech_words_none
    speech_pitch speech_speed"

if [ ! -f "$DATA/finished" ]; then
    step "Toy data: sounds and voices, rows, held-out questions"
    "$PYTHON" -m data.toy.build_as --fold "$fold" --seed "$seed" --output_dir "$DATA" ${ROWS:+--rows "$ROWS"}
    touch "$DATA/finished"
fi
if [ ! -f "$FEATURES/finished" ]; then
    step "Whisper's layers and words of every clip"
    "$PYTHON" -m ltu_as.extract_whisper_feature --whisper "$WHISPER" --feature_precision fp16 --output_dir "$FEATURES" \
        --data_path "$DATA"/stage*.json "$DATA"/heldout*.json "$DATA"/speech*.json "$DATA"/show.json
    touch "$FEATURES/finished"
fi
if [ ! -f "$BASE/ltu_state.json" ]; then
    "$PYTHON" -m ltu_as.convert_checkpoint --init --llm pretrained_mdls/smollm2-135m-instruct --whisper "$WHISPER" \
        --standardize_on "$DATA/stage2.json" --feature_root "$FEATURES" --seed "$seed" --output_dir "$BASE"
fi
for stage in $stages; do
    step "$stage"
    answers=$EXP/$stage/answers trained=""
    if ! grep -qs '"finished": true' "$EXP/$stage/ltu_state.json"; then trained=yes; fi
    rate=""
    case $stage in stage3_*) rate="--learning_rate 5e-4" ;; esac
    bash "train_scripts/ltu_as/$stage.sh" --seed "$seed" $(grep -v '^#' train_scripts/tiny.args) \
        --cutoff_len 160 $rate "$@"
    case $stage in stage1_*) continue ;; esac  # It has not learned to answer in form yet.
    # About voices and words only after the last stage: asking costs minutes.
    if [ "$stage" != "${stages##* }" ]; then others=""; else others=$spoken; fi
    last=$(printf '%s\n' $sounds $others | tail -n 1)
    if [ -n "$trained" ] || [ ! -f "$answers/$last.json" ]; then
        "$PYTHON" -m ltu_as.inference_batch --model "$EXP/$stage" --feature_root "$FEATURES" --batch_size 34 \
            --max_new_tokens 60 --data_path $(printf "$DATA/heldout_%s.json " $sounds) ${others:+$(printf "$DATA/%s.json " $others)} \
            --output_path $(printf "$answers/%s.json " $sounds $others)
        "$PYTHON" -m eval.toy --folds "$EXP" --no_probe
        if [ -n "$others" ]; then "$PYTHON" -m eval.toy_speech --run "$EXP/$stage"; fi
    fi
done
