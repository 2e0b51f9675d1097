#!/usr/bin/env bash
# Runs one fold of the toy experiment with LTU-AS: builds the dataset, Whisper's features and
# transcripts and the initial checkpoint, trains the stages, and generates answers for held-out
# clips.
# bash train_scripts/quickstart/toy_fold_as.sh FOLD SEED DIR [FLAGS of ltu_as.finetune]
#   STAGES        names of stage scripts in order; the default is all three
#   NUM_EXAMPLES  numbers of examples of stages 1 to 3; the default is that of data.toy.build
# Finished work is skipped.
source "$(dirname "$0")/../functions.sh"
fold=$1 seed=$2
export EXP=$3
shift 3
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
export NPROC=${NPROC:-1} PYTHON=${PYTHON:-.venv/bin/python}
export DATA=$EXP/data BASE=$EXP/init FEATURES=$EXP/features
WHISPER=pretrained_mdls/whisper-tiny.en/whisper.pt
stages=${STAGES:-stage1_proj_cla stage2_all_cla stage3_all_mix_v2}
last_stage=${stages##* }

# Names of held-out sets about sounds, and about speech.
sound_sets="right wrong none"
speech_sets="show speech_gender speech_gender_empty speech_words_right speech_words_whisper"
speech_sets="$speech_sets speech_words_wrong speech_words_none speech_pitch speech_speed"

if [ ! -f "$DATA/finished" ]; then
    step "Toy data: clips of sounds and speech, training examples, held-out questions"
    "$PYTHON" -m data.toy.build --kind ltu_as --fold "$fold" --seed "$seed" \
        --output_dir "$DATA" ${NUM_EXAMPLES:+--num_examples "$NUM_EXAMPLES"}
    touch "$DATA/finished"
fi
if [ ! -f "$FEATURES/finished" ]; then
    step "Whisper's features and transcripts of every clip"
    "$PYTHON" -m ltu_as.extract_whisper_feature --whisper "$WHISPER" --feature_precision fp16 \
        --output_dir "$FEATURES" --data_path "$DATA"/stage*.json "$DATA"/heldout*.json \
        "$DATA"/speech*.json "$DATA"/show.json
    touch "$FEATURES/finished"
fi
if [ ! -f "$BASE/ltu_state.json" ]; then
    "$PYTHON" -m ltu_as.convert_checkpoint --init --llm pretrained_mdls/smollm2-135m-instruct \
        --whisper "$WHISPER" --standardize_on "$DATA/stage2.json" --feature_root "$FEATURES" \
        --seed "$seed" --output_dir "$BASE"
fi
for stage in $stages; do
    step "$stage"
    answers=$EXP/$stage/answers
    is_new=""
    if ! grep -qs '"finished": true' "$EXP/$stage/ltu_state.json"; then is_new=yes; fi
    stage_flags=""
    case $stage in stage3_*) stage_flags="--learning_rate 5e-4" ;; esac
    bash "train_scripts/ltu_as/$stage.sh" --seed "$seed" $(grep -v '^#' train_scripts/quickstart/toy.args) \
        --cutoff_len 160 $stage_flags "$@"

    # After stage 1 the model does not generate well-formed answers yet.
    case $stage in stage1_*) continue ;; esac

    data_paths=() output_paths=() last_output=""
    for name in $sound_sets; do
        data_paths+=("$DATA/heldout_$name.json")
        output_paths+=("$answers/$name.json")
        last_output=$answers/$name.json
    done
    # Only after the last stage, because generating answers takes minutes.
    if [ "$stage" = "$last_stage" ]; then
        for name in $speech_sets; do
            data_paths+=("$DATA/$name.json")
            output_paths+=("$answers/$name.json")
            last_output=$answers/$name.json
        done
    fi
    if [ -n "$is_new" ] || [ ! -f "$last_output" ]; then
        "$PYTHON" -m ltu_as.inference_batch --model "$EXP/$stage" --feature_root "$FEATURES" \
            --batch_size 34 --max_new_tokens 60 --data_path "${data_paths[@]}" \
            --output_path "${output_paths[@]}"
        "$PYTHON" -m eval.toy --folds "$EXP" --no_probe
        if [ "$stage" = "$last_stage" ]; then
            "$PYTHON" -m eval.toy_speech --run "$EXP/$stage"
        fi
    fi
done
