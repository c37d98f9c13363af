#!/usr/bin/env bash
# Runs a command until it is done: scripts/launch/retry.sh npr-jax papo CONFIG --output DIR
#
# 0 is done, 4 done with lines left out; 2, a user's error, and 3, a plan that does not fit, another
# try would only repeat. Anything else is tried again, for a run goes on where it stopped: 143 (it
# was told to stop, and has saved) without limit, a crash RETRIES times. SIGTERM and Ctrl-C are
# handed on, and end the retrying too.
set -euo pipefail

RETRIES=${RETRIES:-20}
RETRY_DELAY=${RETRY_DELAY:-60}  # seconds, in which the other hosts notice that one is gone

(($#)) || { echo "retry.sh: no command given, for example: retry.sh npr-jax papo CONFIG" >&2; exit 2; }

child='' stopped=''
stop() {
  stopped=yes
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

crashes=0
while true; do
  "$@" &
  child=$!
  [[ ! $stopped ]] || stop  # it came before there was a child
  status=0
  wait "$child" || status=$?
  while [[ $stopped ]] && kill -0 "$child" 2>/dev/null; do  # the signal has ended the wait only
    status=0
    wait "$child" || status=$?
  done
  child=''
  case $status in
    0 | 2 | 3 | 4 | 126 | 127 | 130) exit "$status" ;;  # 126, 127: no such command; 130: Ctrl-C
    143) ;;
    *) crashes=$((crashes + 1)) ;;
  esac
  [[ ! $stopped ]] || exit "$status"
  if ((crashes > RETRIES)); then
    echo "retry.sh: given up after $crashes crashes (RETRIES=$RETRIES); the last exit code: $status" >&2
    exit "$status"
  fi
  echo "retry.sh: exit code $status, again in $RETRY_DELAY s" >&2
  sleep "$RETRY_DELAY" &  # a signal ends the wait at once, but not a sleep in the foreground
  child=$!
  [[ ! $stopped ]] || stop
  wait "$child" || true
  [[ ! $stopped ]] || exit 143
done
