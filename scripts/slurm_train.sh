#!/usr/bin/env bash
# One SLURM job, one task per GPU on every node:
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 scripts/slurm_train.sh train_lisat.py --config lisat_7b
# Submit again (or let --requeue do it): training goes on from the latest checkpoint as if it had not stopped.
#SBATCH --job-name lisat
#SBATCH --cpus-per-task 8
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
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

# ranks are read from SLURM's variables; USR1 reaches every task five minutes before the time is up, and the
# engine saves and ends
exec srun --kill-on-bad-exit=1 "$python" "$@"
