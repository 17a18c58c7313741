#!/usr/bin/env bash
# Run the tests; makes .venv first if it is missing. Extra arguments go to pytest: bash test.sh -k metrics
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup_env.sh
exec "$PYTHON_VENV" -m pytest "$@"
