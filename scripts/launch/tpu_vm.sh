#!/usr/bin/env bash
# One TPU VM: run this on it, in a checkout. The arguments are those of npr-jax.
#   scripts/launch/tpu_vm.sh papo qwen3_4b_papo --output runs/papo
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VENV=${VENV:-$here/../../.venv}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/npr_jax/compiled}

(($#)) || { echo "tpu_vm.sh: no arguments for npr-jax, for example: papo qwen3_4b_papo" >&2; exit 2; }
VENV=$VENV "$here/install.sh" tpu
exec "$here/retry.sh" "$VENV/bin/npr-jax" "$@"
