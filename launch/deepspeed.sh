#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash launch/deepspeed.sh RANKS [arguments of the script]: trains under the deepspeed launcher on this machine.
# The launcher ends when a rank dies; this script starts it again, and the job resumes.
#
#   LAYERWISE_HOSTFILE     train on its machines instead, RANKS on each (see launch/hostfile.example)
#   LAYERWISE_SCRIPT       the training script (default: examples/deepspeed/train.py)
#   LAYERWISE_RESTARTS     how often the job is started again (default: 3)
#   LAYERWISE_VENV         the virtual environment (default: .venv in the root of the repository)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { sed -n '/SPDX/!s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
ranks=$1
shift
python=${LAYERWISE_VENV:-$root/.venv}/bin/python
where=()
[ -z "${LAYERWISE_HOSTFILE:-}" ] || where=(--hostfile "$LAYERWISE_HOSTFILE")
source "$root/launch/restarting.sh"
start() {
  exec "$python" "$(dirname "$python")/deepspeed" ${where[@]+"${where[@]}"} --num_accelerators "$ranks" --master_port "$1" \
    "${LAYERWISE_SCRIPT:-$root/examples/deepspeed/train.py}" "${@:2}"
}
restarting "$@"
