#!/usr/bin/env bash
# A TPU pod slice, from your own machine: the same command runs on every host of it.
#   export TPU=my-pod ZONE=us-east5-a
#   ACCELERATOR=v5p-128 RUNTIME=v2-alpha-tpuv5 SPOT=1 scripts/launch/tpu_pod.sh create
#   scripts/launch/tpu_pod.sh copy     # what is committed here, to ~/npr_jax on every host
#   scripts/launch/tpu_pod.sh start papo qwen3_4b_papo --output runs/papo \
#     --set checkpoints=gs://BUCKET/papo --set mesh.tensor=4
#   scripts/launch/tpu_pod.sh logs | stop | delete
set -euo pipefail

: "${TPU:?tpu_pod.sh: set TPU to the name of the TPU}"
: "${ZONE:?tpu_pod.sh: set ZONE to its zone, for example us-east5-a}"
verb=${1:?tpu_pod.sh: create, copy, start, logs, stop or delete?}
shift

tpu() { gcloud compute tpus tpu-vm "$1" "$TPU" --zone="$ZONE" "${@:2}"; }
on() { tpu ssh --worker="$1" --command="$2"; }

case $verb in
  create)
    : "${ACCELERATOR:?tpu_pod.sh: set ACCELERATOR, for example v5litepod-16, v5p-128 or v6e-256}"
    : "${RUNTIME:?tpu_pod.sh: set RUNTIME: v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p) or v2-alpha-tpuv6e}"
    tpu create --accelerator-type="$ACCELERATOR" --version="$RUNTIME" ${SPOT:+--spot}
    ;;
  copy)
    archive=$(mktemp -d)/npr_jax.tar.gz
    trap 'rm -r "${archive%/*}"' EXIT
    git -C "$(dirname "${BASH_SOURCE[0]}")/../.." archive --format=tar.gz -o "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:" --zone="$ZONE" --worker=all
    on all 'mkdir -p npr_jax && tar -xzf npr_jax.tar.gz -C npr_jax'
    ;;
  start)
    (($#)) || { echo "tpu_pod.sh: no arguments for npr-jax, for example: papo qwen3_4b_papo" >&2; exit 2; }
    [[ $* == *checkpoints=* ]] || {
      echo "tpu_pod.sh: no checkpoints=gs://BUCKET/DIR among the arguments (beta: fit.checkpoints=);" \
        "all hosts write one checkpoint, and each has a disk of its own" >&2
      exit 2
    }
    [[ " $* " == *" --distributed "* ]] || set -- "$@" --distributed
    settings=''
    for name in JAX_COMPILATION_CACHE_DIR PYTHON RETRIES RETRY_DELAY; do
      [[ ! ${!name:-} ]] || settings+=$(printf '%s=%q ' "$name" "${!name}")
    done
    # The lock refuses a second run on the same chips, and goes when the first one does.
    on all "cd npr_jax && { flock -n ../npr-jax.lock true || { echo npr-jax runs already >&2; exit 1; }; } &&
      { ${settings}setsid flock -n ../npr-jax.lock sh -c 'echo \$\$ > ../npr-jax.pid; exec \"\$@\"' - \
        scripts/launch/tpu_vm.sh $(printf '%q ' "$@")>> ../npr-jax.log 2>&1 < /dev/null & }"
    ;;
  logs) on 0 'tail -n 100 -f npr-jax.log' ;;
  stop) on all 'xargs kill -TERM < npr-jax.pid' ;;  # it saves, and exits with 143
  delete) tpu delete --quiet ;;
  *)
    echo "tpu_pod.sh: $verb? It is create, copy, start, logs, stop or delete" >&2
    exit 2
    ;;
esac
