#!/usr/bin/env bash
# Predict, score and bootstrap: bash eval_lisat.sh [flags of eval_lisat.py, without --cmd]
# One process per GPU; NPROC=4 bash eval_lisat.sh ... starts four processes wherever they run.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$here/.venv/bin/python"
[ -x "$python" ] || python=python3

if [ -z "${NPROC:-}" ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        NPROC="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)"
    elif command -v nvidia-smi >/dev/null; then
        NPROC="$(nvidia-smi -L | grep -c ^GPU || true)"
    fi
fi
NPROC="${NPROC:-1}"

if [ "$NPROC" -gt 1 ]; then
    "$python" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" \
        "$here/eval_lisat.py" --cmd inference "$@"
else
    "$python" "$here/eval_lisat.py" --cmd inference "$@"
fi
"$python" "$here/eval_lisat.py" --cmd bootstrap_metrics "$@"
