#!/usr/bin/env bash
# One SLURM job, one process per GPU on every node:
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm_train.sh train_lisat.py --config lisat_7b --global_batch_size 96
# Submit again (or let --requeue do it): training goes on from the latest checkpoint as if it had not stopped.
#SBATCH --job-name lisat
#SBATCH --ntasks-per-node 1
#SBATCH --cpus-per-task 32
#SBATCH --time 24:00:00
#SBATCH --signal USR1@300
#SBATCH --requeue
#SBATCH --open-mode append
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch scripts/slurm_train.sh <script.py> [flags]" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-.}"
python=.venv/bin/python
[ -x "$python" ] || python=python3

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT python
GPUS="${SLURM_GPUS_ON_NODE:-1}"
export GPUS

# one torchrun per node; it starts the processes of its node. USR1 comes five minutes before the time is up:
# srun hands it to every process, the engine saves and ends
srun --kill-on-bad-exit=1 bash -c 'exec "$python" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$GPUS" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"' bash "$@"
