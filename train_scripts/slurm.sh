#!/usr/bin/env bash
#SBATCH --job-name=ltu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.log
# A stage script as a job, from the repository root; flags of sbatch stand before the file and override those above:
# sbatch --nodes=2 train_scripts/slurm.sh train_scripts/ltu/stage1_proj_cla.sh --wandb_project ltu
# One task a node starts the processes of its GPUs; several nodes meet at the first one (torchrun's c10d rendezvous).
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export NNODES=$SLURM_JOB_NUM_NODES RDZV_ID=$SLURM_JOB_ID
RDZV_ENDPOINT=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))
export RDZV_ENDPOINT
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it over from sbatch.
srun bash "$@"
