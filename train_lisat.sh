#!/usr/bin/env bash
# Train LISAT: bash train_lisat.sh {ReferSeg|ReasonSeg} <include, e.g. localhost:0,1> <master port> [more flags]
# The include names the GPUs; on a machine without one it says how many CPU processes to start.
# Paths: VERSION (base), SAM (its file), TOWER, DATASET_DIR in the environment, or flags at the end of the line.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
type=$1 include=$2 port=$3
shift 3
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$here/.venv/bin/python"
[ -x "$python" ] || python=python3

case "$type" in
ReferSeg)
    data="refer_seg||correct_refer_seg||vqa||neg_refer_seg"
    rates="12,2,2,1"
    ;;
ReasonSeg)
    data="sem_seg||refer_seg||correct_refer_seg||vqa||neg_refer_seg||reason_seg||geo_reason_seg"
    rates="15,15,2,30,1,1,36"
    ;;
*)
    echo "unknown type $type; choose ReferSeg or ReasonSeg" >&2
    exit 2
    ;;
esac

flags=(--version "${VERSION:-./LISAt_PRE-7b}" --vision_pretrained "${SAM:-./sam_vit_h_4b8939.pth}"
    --dataset_dir "${DATASET_DIR:-./dataset}" --dataset "$data" --sample_rates "$rates" --exp_name lisat
    --batch_size 3 --grad_accumulation_steps 4 --num_classes_per_sample 3)
[ -z "${TOWER:-}" ] || flags+=(--vision_tower "$TOWER")

if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q ^GPU; then
    exec "$python" -m deepspeed.launcher.runner --include="$include" --master_port="$port" \
        "$here/train_lisat.py" "${flags[@]}" "$@"
fi
processes=1 # localhost:0,1 -> 2
[[ "$include" == *:* ]] && processes=$(tr ',' '\n' <<<"${include#*:}" | grep -c .)
echo "no GPU here: starting $processes CPU process(es)" >&2
export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m torch.distributed.run --nproc_per_node "$processes" --master_port "$port" \
    "$here/train_lisat.py" "${flags[@]}" "$@"
