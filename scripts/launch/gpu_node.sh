#!/usr/bin/env bash
# One machine with NVIDIA GPUs, all of them in one process. The arguments are those of npr-jax.
#   scripts/launch/gpu_node.sh papo qwen3_4b_papo --output runs/papo
#
# Several machines without a scheduler: set on each of them NPR_COORDINATOR=HOST:PORT (a host and a
# free port of process 0), NPR_PROCESSES (how many) and NPR_PROCESS (0, 1, ...); add --distributed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VENV=${VENV:-$here/../../.venv}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/npr_jax/compiled}
# JAX would take three quarters of the memory. This much is what `plan` counts with; NCCL and
# the driver need the rest.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

(($#)) || { echo "gpu_node.sh: no arguments for npr-jax, for example: papo qwen3_4b_papo" >&2; exit 2; }
if [[ ${NPR_COORDINATOR:-}${NPR_PROCESSES:-}${NPR_PROCESS:-} ]]; then
  : "${NPR_COORDINATOR:?gpu_node.sh: set it to HOST:PORT of process 0}"
  : "${NPR_PROCESSES:?gpu_node.sh: set it to the number of machines}"
  : "${NPR_PROCESS:?gpu_node.sh: set it to the number of this machine, from 0}"
  [[ " $* " == *" --distributed "* ]] || {
    echo "gpu_node.sh: NPR_COORDINATOR is set, but --distributed is not given" >&2
    exit 2
  }
fi
command -v nvidia-smi >/dev/null || {
  echo "gpu_node.sh: no nvidia-smi on PATH: CUDA 13 needs an NVIDIA driver, release 580 or newer" >&2
  exit 2
}
VENV=$VENV "$here/install.sh" cuda
exec "$here/retry.sh" "$VENV/bin/npr-jax" "$@"
