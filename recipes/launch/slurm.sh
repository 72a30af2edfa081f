#!/bin/bash
# sbatch recipes/launch/slurm.sh recipes/paper.yaml
# Two nodes of four GPUs, a process a GPU. Five minutes before the time is up Slurm sends SIGUSR1 to every process: the
# run saves after its step and stops, and the same command goes on from there.
#SBATCH --job-name=voxkrikri
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300

set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=29500
export WORLD_SIZE=$SLURM_NTASKS

# Without a launcher between Slurm and Python, which would not hand the signal on.
srun bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec python train.py "$@"' train "$@"
