#!/usr/bin/env bash
# Make or update .venv from requirements.txt. Needs Python 3.11 or newer and nothing else. Usage: source this file
# from the repository root; afterwards $PYTHON_VENV is the interpreter to use.
set -euo pipefail

PYTHON_VENV="$PWD/.venv/bin/python"
stamp=.venv/requirements.sha256
wanted=$(sha256sum requirements.txt | cut -d' ' -f1)

if [ ! -x "$PYTHON_VENV" ]; then
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            chosen=$candidate
            break
        fi
    done
    if [ -z "${chosen:-}" ]; then
        echo "No Python 3.11 or newer found. Install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
        exit 1
    fi
    echo "Making .venv with $("$chosen" --version)"
    "$chosen" -m venv .venv
fi

if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    echo "Installing requirements.txt into .venv (several minutes and about 6 GB the first time)"
    "$PYTHON_VENV" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    echo "$wanted" >"$stamp"
fi
export PYTHON_VENV PATH="$PWD/.venv/bin:$PATH"
