#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash launch/mpirun.sh RANKS [arguments of the script]: trains under mpirun (Open MPI, with mpi4py in the environment).
# mpirun ends all ranks when one dies; this script starts it again, and the job resumes.
#
#   LAYERWISE_HOSTFILE     the machines, as `mpirun --hostfile` takes them (launch/hostfile.example is for deepspeed)
#   LAYERWISE_SCRIPT       the training script (default: examples/deepspeed/train.py)
#   LAYERWISE_RESTARTS     how often the job is started again (default: 3)
#   LAYERWISE_VENV         the virtual environment (default: .venv in the root of the repository)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { sed -n '/SPDX/!s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
ranks=$1
shift
python=${LAYERWISE_VENV:-$root/.venv}/bin/python
options=(--bind-to none)
[ -z "${LAYERWISE_HOSTFILE:-}" ] || options+=(--hostfile "$LAYERWISE_HOSTFILE")
[ -n "${LAYERWISE_HOSTFILE:-}" ] || options+=(--oversubscribe) # more ranks than cores are meant, on one machine
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
source "$root/launch/restarting.sh"
start() {
  exec mpirun "${options[@]}" -np "$ranks" -x MASTER_PORT="$1" "$python" \
    "${LAYERWISE_SCRIPT:-$root/examples/deepspeed/train.py}" "${@:2}"
}
restarting "$@"
