#!/usr/bin/env bash
# Score what pred_lisat_vqa.py wrote: bash eval_captioning.sh [flags of eval_captioning.py]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$here/.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" "$here/eval_captioning.py" "$@"
