#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash launch/torchrun.sh RANKS [arguments of the script]: trains under torchrun, which starts all ranks again when one dies.
#
#   LAYERWISE_SCRIPT       the training script (default: examples/deepspeed/train.py)
#   LAYERWISE_RESTARTS     how often the job is started again (default: 3)
#   LAYERWISE_VENV         the virtual environment (default: .venv in the root of the repository)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { sed -n '/SPDX/!s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
ranks=$1
shift
exec "${LAYERWISE_VENV:-$root/.venv}/bin/python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
  --max-restarts "${LAYERWISE_RESTARTS:-3}" "${LAYERWISE_SCRIPT:-$root/examples/deepspeed/train.py}" "$@"
