# Sourced by the stage scripts; paths are then relative to the repository root.
# finetune FLAGS...: $MODEL.finetune (ltu) on NPROC processes (all visible GPUs, else 1), unless its --output_dir is finished.
# Of a flag that comes twice the last counts. PYTHON: another interpreter than .venv's. Several machines: run the same
# script on each, with NNODES (how many) and RDZV_ENDPOINT (HOST:PORT of one of them); slurm.sh does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# step WORDS...: a headline with the minutes and seconds so far.
step() { printf '\n== %d:%02d %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

finetune() {
    local python=${PYTHON:-.venv/bin/python} nproc=${NPROC:-1} output_dir="" previous="" flag
    for flag in "$@"; do
        if [ "$previous" = --output_dir ]; then output_dir=$flag; fi
        case $flag in --output_dir=*) output_dir=${flag#*=} ;; esac
        previous=$flag
    done
    if grep -qs '"finished": true' "$output_dir/ltu_state.json"; then
        echo "$output_dir is finished; remove it to train it again"
        return
    fi
    if ! command -v "$python" > /dev/null; then
        echo "error: no $python; bash quickstart.sh or bash run_tests.sh makes it, or set PYTHON" >&2
        return 1
    fi
    if [ -z "${NPROC:-}" ] && command -v nvidia-smi > /dev/null; then
        nproc=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
    fi
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
    if [ "${NNODES:-1}" -gt 1 ]; then
        : "${RDZV_ENDPOINT:?NNODES=$NNODES needs RDZV_ENDPOINT=HOST:PORT, a machine that all of them reach}"
        "$python" -m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$nproc" --rdzv_id "${RDZV_ID:-ltu}" \
            --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" -m "${MODEL:-ltu}.finetune" "$@"
    elif [ "$nproc" -gt 1 ]; then
        "$python" -m torch.distributed.run --standalone --nproc_per_node "$nproc" -m "${MODEL:-ltu}.finetune" "$@"
    else
        "$python" -m "${MODEL:-ltu}.finetune" "$@"
    fi
}
