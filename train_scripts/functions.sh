# Functions of quickstart.sh and the stage scripts, which source this file. Paths are then relative
# to the repository root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# step TEXT...: prints a headline with the minutes and seconds since the start.
step() { printf '\n== %d:%02d %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

# finetune FLAGS...: runs $MODEL.finetune with the flags of curriculum.args and then these, as the
# last command of a script: it replaces the shell, so that SIGTERM to the script stops the training.
# If a flag is given twice, the last one counts. After SIGTERM the exit status is 143.
#   MODEL          ltu (the default) or ltu_as
#   NPROC          number of processes; the default is one per visible GPU, or one
#   PYTHON         the interpreter; the default is that of .venv
#   NNODES         number of machines; run the same script on each of them, as slurm.sh does
#   RDZV_ENDPOINT  HOST:PORT of one of the machines
#   RDZV_ID        name of the run, the same on all machines; the default is ltu
finetune() {
    local python=${PYTHON:-.venv/bin/python} nproc=${NPROC:-1}
    if ! command -v "$python" > /dev/null; then
        echo "error: no $python; run bash quickstart.sh or bash run_tests.sh, or set PYTHON" >&2
        return 1
    fi
    if [ -z "${NPROC:-}" ] && command -v nvidia-smi > /dev/null; then
        nproc=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
    fi
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
    local launcher=("$python")
    if [ "${NNODES:-1}" -gt 1 ]; then
        : "${RDZV_ENDPOINT:?NNODES=$NNODES needs RDZV_ENDPOINT=HOST:PORT, which all machines reach}"
        launcher+=(-m train_scripts.torchrun --nnodes "$NNODES" --nproc_per_node "$nproc")
        launcher+=(--rdzv_id "${RDZV_ID:-ltu}" --rdzv_backend c10d)
        launcher+=(--rdzv_endpoint "$RDZV_ENDPOINT")
    elif [ "$nproc" -gt 1 ]; then
        launcher+=(-m train_scripts.torchrun --standalone --nproc_per_node "$nproc")
    fi
    exec "${launcher[@]}" -m "${MODEL:-ltu}.finetune" @train_scripts/curriculum.args "$@"
}
