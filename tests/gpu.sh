#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/gpu.sh [--wheels DIR] [--python PYTHON] [--device KIND] [--quick] [--json FILE] [SECTION...]: tries this
# library on one GPU, in less than eight minutes.
#
# It needs a PYTHON (default: python3) with torch for the device, and installs nothing in it: --wheels names a directory
# with a wheel of this library (bash launch/wheel.sh -o DIR makes it elsewhere) and of what else PYTHON lacks, which are
# unpacked into a temporary directory. No network and no compiler are needed. Without an accelerator it says so and ends.
#
# Each section is said as it ends; then there is one table, and with --json a file of all figures. --device cpu runs on a
# stand-in what can be: streams that are late, page-locking and replays are acted. --quick is small and short: its figures
# mean nothing. Ends with 1 if a section failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=python3 wheels=
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) sed -n '3,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --wheels) wheels=$(cd "$2" && pwd -P); shift 2 ;;
    --python) python=$2; shift 2 ;;
    --json) arguments+=(--json "$(realpath -m "$2")"); shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -n "$wheels" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" "$wheels"/*.whl
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "skipped: $python has no torch"
  exit 0
fi
# Two runs are compared bit for bit.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
cd "$root/tests"
"$python" -m gpu "${arguments[@]}"
