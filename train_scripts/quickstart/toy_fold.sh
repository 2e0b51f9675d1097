#!/usr/bin/env bash
# Runs one fold of the toy experiment: builds the dataset and the initial checkpoint (for LTU-AS
# also Whisper's features and transcripts), trains the stages, and generates answers for held-out
# clips after each of them.
# bash train_scripts/quickstart/toy_fold.sh ltu|ltu_as FOLD SEED DIR [FLAGS of finetune]
#   STAGES        names of stage scripts in order; the default is all of them
#   NUM_EXAMPLES  numbers of examples of the stages, with commas; the default is that of
#                 data.toy.build
#   AUDIO_ENCODER folder or hub id of another audio encoder for LTU; the default is YAMNet's
#   AUDIO_TOKENS  audio tokens of a clip; the default is 8 of 1.28 s for LTU, 5 of 2 s for LTU-AS
#   SHORT_CLIPS   what follows a short clip in the features of LTU-AS: loop, the default, repeats
#                 it; pad is silence
#   LORA_TARGETS  the layers that get LoRA, such as [q_proj,v_proj]; the default is all linear ones
#   ENCODER_RATE  the learning rate of the audio encoder from stage 2 on; by default it stays frozen
#   LORA_RANK     the rank of LoRA; the default is 32. Alpha is twice the rank
#   BUILD_FLAGS   flags of data.toy.build
#   FEATURES      folder of Whisper's features, which several folders DIR may share
#   QUESTIONS     all: LTU-AS is also asked about pitch and speed, about the gender with a
#                 transcript, and about the words with a wrong transcript and without one;
#                 last: after the last stage only; few: as last, but only labels of sounds and
#                 gender, and no losses with another clip or none
# Finished work is skipped.
source "$(dirname "$0")/../functions.sh"
kind=$1 fold=$2 seed=$3
export EXP=$4
shift 4
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
export NPROC=${NPROC:-1} PYTHON=${PYTHON:-.venv/bin/python}
export DATA=$EXP/data BASE=$EXP/init
stages="stage1_proj_cla stage2_all_cla"

# What differs between the two models. heldout_*.json are questions about sounds; show.json of
# LTU-AS is about sounds and speech.
case $kind in
    ltu)
        stages="$stages stage3_all_close stage4_all_mix"
        init_flags=(--audio_encoder "${AUDIO_ENCODER:=pretrained_mdls/yamnet}")
        if [ "$AUDIO_ENCODER" = pretrained_mdls/yamnet ]; then : "${AUDIO_TOKENS:=8}"; fi
        init_flags+=(${AUDIO_TOKENS:+--num_audio_tokens "$AUDIO_TOKENS"})
        cutoff_len=108
        front_end_flags=()
        generate_flags=(--max_new_tokens 60)
        question_sets="heldout_right heldout_open heldout_wrong heldout_none heldout_show"
        last_question_sets=""
        ;;
    ltu_as)
        export FEATURES=${FEATURES:-$EXP/features}
        whisper=pretrained_mdls/whisper-tiny.en/whisper.pt
        stages="$stages stage3_all_mix_v2"
        tltr=$EXP/tltr.safetensors
        init_flags=(--whisper "$whisper" --audio_encoder "$tltr")
        extract_flags=(--num_audio_tokens "${AUDIO_TOKENS:=5}")
        # Without the loop, most audio tokens of the short clips would be silence.
        case ${SHORT_CLIPS:=loop} in
            loop) extract_flags+=(--loop_short_clips) ;;
            pad) ;;
            *) echo "error: SHORT_CLIPS=$SHORT_CLIPS: choose loop or pad" >&2; exit 2 ;;
        esac
        cutoff_len=160
        front_end_flags=(--feature_root "$FEATURES")
        generate_flags=(--max_new_tokens 60 "${front_end_flags[@]}")
        question_sets="heldout_right heldout_open heldout_wrong heldout_none"
        # Only after the last stage, because generating answers takes minutes.
        last_question_sets="show speech_gender_empty speech_words_right speech_words_whisper"
        if [ "${QUESTIONS:-}" = all ]; then
            last_question_sets+=" speech_gender speech_pitch speech_speed"
            last_question_sets+=" speech_words_wrong speech_words_none"
        fi
        ;;
    *) echo "error: $kind: the first argument is ltu or ltu_as" >&2; exit 2 ;;
esac
# With so few steps, LoRA on all linear layers learns more than on the query and value projections.
lora_targets=${LORA_TARGETS:-[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]}
lora_rank=${LORA_RANK:-32}
conditions="right wrong none"
case ${QUESTIONS:-} in
    '' | all | last) ;;
    few)
        question_sets="heldout_right" conditions=right
        if [ "$kind" = ltu_as ]; then last_question_sets="speech_gender speech_gender_empty"; fi
        ;;
    *) echo "error: QUESTIONS=$QUESTIONS: choose all, last or few" >&2; exit 2 ;;
esac
stages=${STAGES:-$stages}
last_stage=${stages##* }

# What the folder is made of. The training itself compares its flags with those of a run that it
# continues.
built="$kind, fold $fold, seed $seed, ${NUM_EXAMPLES:-default} examples ${BUILD_FLAGS:-}"
data_files=(data/toy/*.json data/toy/*.jsonl data/toy/*.py)
if [ "$kind" = ltu_as ]; then data_files+=(data/toy/speech/*.json data/toy/speech/*.jsonl); fi
built+=" of data $(cat "${data_files[@]}" | cksum | cut -d ' ' -f 1)"
built+=", audio encoder ${AUDIO_ENCODER:-TLTR}, ${AUDIO_TOKENS:-all} audio tokens"
if [ "$kind" = ltu_as ]; then built+=", short clips $SHORT_CLIPS, features $FEATURES"; fi
if [ ! -f "$DATA/finished" ]; then
    step "Toy data: clips, training examples, held-out questions"
    "$PYTHON" -m data.toy.build --kind "$kind" --fold "$fold" --seed "$seed" \
        --output_dir "$DATA" ${NUM_EXAMPLES:+--num_examples "$NUM_EXAMPLES"} ${BUILD_FLAGS:-}
    echo "$built" > "$DATA/finished"
elif [ "$(cat "$DATA/finished")" != "$built" ]; then
    echo "error: $DATA is of $(cat "$DATA/finished"), not of $built; give another DIR" >&2
    exit 2
fi
if [ "$kind" = ltu_as ] && [ ! -f "$EXP/features_finished" ]; then
    step "Whisper's features and transcripts of every clip"
    "$PYTHON" -m ltu_as.extract_whisper_feature --whisper "$whisper" --feature_precision fp16 \
        "${extract_flags[@]}" \
        --output_dir "$FEATURES" --data_path "$DATA"/stage*.json "$DATA"/heldout*.json \
        "$DATA"/speech*.json "$DATA/show.json"
    touch "$EXP/features_finished"
fi
if [ "$kind" = ltu_as ] && [ ! -f "$tltr" ]; then
    step "TLTR learns to name the labels of the training clips"
    "$PYTHON" -m ltu_as.pretrain_tltr --data_path "$DATA/audio_labels.json" \
        --feature_root "$FEATURES" --output_path "$tltr" --seed "$seed"
fi
if [ ! -f "$BASE/ltu_state.json" ]; then
    "$PYTHON" -m "$kind.convert_checkpoint" --init --llm pretrained_mdls/smollm2-135m-instruct \
        "${init_flags[@]}" --seed "$seed" --output_dir "$BASE"
fi

for stage in $stages; do
    step "$stage"
    stage_flags=(--cutoff_len "$cutoff_len")
    # The last stage adds open-ended questions, at half of the learning rates. At the full ones, the
    # model would name fewer labels exactly. LTU-AS has half of them and a longer warm-up from stage
    # 2 on, because its loss jumped otherwise (docs/toy_experiment.md).
    half_rates=(--learning_rate 1e-3 --projector_learning_rate 4e-3)
    case $kind/$stage in
        ltu/stage4_*) stage_flags+=("${half_rates[@]}") ;;
        ltu_as/stage[23]_*) stage_flags+=("${half_rates[@]}" --warmup_steps 30) ;;
    esac
    # LTU's audio encoder encodes each clip once for all stages, unless it is trained.
    if [ -n "${ENCODER_RATE:-}" ] && [ "${stage%%_*}" != stage1 ]; then
        stage_flags+=(--freeze_audio_tower False --encoder_learning_rate "$ENCODER_RATE")
    elif [ "$kind" = ltu ]; then
        stage_flags+=(--encoder_cache "$EXP/encoder_cache")
    fi
    case $stage in
        stage1_*) ;;
        *)
            stage_flags+=(--lora_target_modules "$lora_targets")
            stage_flags+=(--lora_r "$lora_rank" --lora_alpha $((2 * lora_rank)))
            ;;
    esac
    bash "train_scripts/$kind/$stage.sh" --seed "$seed" @train_scripts/quickstart/toy.args \
        "${stage_flags[@]}" "$@"

    case ${QUESTIONS:-} in
        last | few) if [ "$stage" != "$last_stage" ]; then continue; fi ;;
    esac

    # The losses of the reference answers, with the right clip, another one and none.
    questions=() losses=()
    for condition in $conditions; do
        questions+=("$DATA/heldout_$condition.json")
        last_losses=$EXP/$stage/answers/loss_$condition.json
        losses+=("$last_losses")
    done
    if [ "$EXP/$stage/model.safetensors" -nt "$last_losses" ]; then
        "$PYTHON" -m eval.answer_loss --model "$EXP/$stage" \
            ${front_end_flags[@]+"${front_end_flags[@]}"} \
            --data_path "${questions[@]}" --output_path "${losses[@]}"
    fi

    questions=() answers=()
    names=$question_sets
    # After stage 1, no answer has the trained form yet.
    case $stage in stage1_*) names="heldout_right heldout_open" ;; esac
    if [ "$stage" = "$last_stage" ]; then names="$names $last_question_sets"; fi
    for name in $names; do
        questions+=("$DATA/$name.json")
        last_answers=$EXP/$stage/answers/${name#heldout_}.json
        answers+=("$last_answers")
    done
    # The files of answers are written one after the other: if the last one is older than the model,
    # or is not there, answers are missing.
    if [ "$EXP/$stage/model.safetensors" -nt "$last_answers" ]; then
        "$PYTHON" -m "$kind.inference_batch" --model "$EXP/$stage" --batch_size 34 \
            "${generate_flags[@]}" --data_path "${questions[@]}" --output_path "${answers[@]}"
        "$PYTHON" -m eval.toy --folds "$EXP" --no_probe
        if [ "$kind/$stage" = "ltu_as/$last_stage" ]; then
            "$PYTHON" -m eval.toy_speech --run "$EXP/$stage"
        fi
    fi
done
