#!/usr/bin/env bash
# Installs this checkout into a virtual environment, once: scripts/launch/install.sh tpu|cuda
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
EXTRA=${1:?install.sh: which extra of setup.py, tpu or cuda?}
PYTHON=${PYTHON:-python3.11}
VENV=${VENV:-$root/.venv}

stamp=$VENV/.launch-$EXTRA-$(cat "$root/setup.py" "$root/constraints.txt" | cksum | cut -d' ' -f1)
[[ ! -e $stamp ]] || exit 0
command -v "$PYTHON" >/dev/null || {
  echo "install.sh: no $PYTHON on PATH; install Python 3.11 or newer with its venv module, or set" \
    "PYTHON to one" >&2
  exit 2
}
[[ -x $VENV/bin/python ]] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install -q -e "${root}[$EXTRA]" 'etils[epath-gcs]' -c "$root/constraints.txt"
touch "$stamp"
