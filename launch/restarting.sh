# SPDX-License-Identifier: Apache-2.0
# Read by deepspeed.sh, mpirun.sh and slurm.sbatch. `restarting ARGUMENTS...` calls `start PORT ARGUMENTS...`, which the
# caller defines, and again after a failure, at most LAYERWISE_RESTARTS times. A port of its own for each start: the last
# one's may still be taken. Interrupted or terminated, it ends the job and starts no other.

restarting() {
  local attempt code child port stopped=
  set -m # each start is a process group of its own, so that all of it can be told to end
  trap 'stopped=130; kill -TERM -- "-$child" 2>/dev/null' INT
  trap 'stopped=143; kill -TERM -- "-$child" 2>/dev/null' TERM
  for ((attempt = 1; attempt <= ${LAYERWISE_RESTARTS:-3} + 1; attempt++)); do
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    start "$port" "$@" </dev/null &
    child=$!
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" || code=$?; done # a signal had only ended the wait
    [ -z "$stopped" ] || return "$stopped"
    [ "$code" != 0 ] || return 0
    echo "$(basename "$0"): the job ended with $code (start $attempt)" >&2
  done
  return "$code"
}
