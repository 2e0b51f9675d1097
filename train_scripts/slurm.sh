#!/usr/bin/env bash
#SBATCH --job-name=ltu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=48:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Runs a stage script as a Slurm job, from the repository root. Flags of sbatch come before this
# file and override those above:
# sbatch --nodes=2 train_scripts/slurm.sh train_scripts/ltu/stage1_proj_cla.sh --wandb_project ltu
# Each node has one task, which starts a process per GPU. Several nodes meet at the first one
# (torchrun's c10d rendezvous).
#
# The training gets SIGTERM 600 seconds before the time limit: it must finish a step and write a
# checkpoint in this time. Then the job is requeued and continues, until the stage is finished.
# A job that fails, or that scancel ends, is not requeued; nor is one that got SIGTERM at its start,
# because --time is not longer than these 600 seconds.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
: "${1:?name a stage script: sbatch train_scripts/slurm.sh train_scripts/ltu/stage1_proj_cla.sh}"
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES=$SLURM_JOB_NUM_NODES RDZV_ID=$SLURM_JOB_ID
export RDZV_ENDPOINT=$first_node:$((20000 + SLURM_JOB_ID % 20000))
# srun does not inherit --cpus-per-task of sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
status=0
# With --kill-on-bad-exit=1, an error on one node would give the others the status of SIGTERM.
srun --kill-on-bad-exit=0 bash "$@" || status=$?
if [ "$status" -eq 143 ] && [ "$SECONDS" -lt 120 ]; then
    echo "SIGTERM in the first 2 minutes: not requeued. Is --time longer than --signal?" >&2
elif [ "$status" -eq 143 ]; then
    echo "The training was stopped by SIGTERM: job $SLURM_JOB_ID is requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
