#!/usr/bin/env bash
# Merge a training run into one folder: bash merge_lora_weight.sh [run folder] [folder to write] [more flags]
# Further flags go to merge_lora_weights.py, for example --version ./LISAt_PRE-7b --precision bf16.
set -euo pipefail
cd "$(dirname "$0")"
RUN="${1:-runs/lisat}"
OUT="${2:-$RUN/hg_model}"
PYTHON=.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=python3

WEIGHT="$RUN"
DEEPSPEED="$RUN/ckpt_model" # where the published training program leaves its DeepSpeed folder
if [ ! -e "$RUN/checkpoints" ] && [ ! -e "$RUN/trainable.safetensors" ] && [ -f "$DEEPSPEED/zero_to_fp32.py" ]; then
  WEIGHT="$(mktemp -d "$RUN/.consolidated.XXXXXX")"
  trap 'rm -rf "$WEIGHT"' EXIT
  "$PYTHON" "$DEEPSPEED/zero_to_fp32.py" "$DEEPSPEED" "$WEIGHT"
fi
"$PYTHON" merge_lora_weights.py --weight "$WEIGHT" --save_path "$OUT" "${@:3}"
