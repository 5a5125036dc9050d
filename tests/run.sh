#!/usr/bin/env bash
# bash tests/run.sh [--long] [pytest arguments]: sets everything up, then runs the native and the Python tests.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n 's/^# //p' "${BASH_SOURCE[0]}"
  exit 0
fi
cd "$root"
echo "running: set-up, native tests (tests/native.sh: as they are, with ASan and UBSan, with TSan; tests/vm/run.sh: in a virtual machine), Python tests (pytest -q $*)"
SECONDS=0
bash launch/setup.sh
python=${LAYERWISE_VENV:-$root/.venv}/bin/python
failed=()

bash tests/native.sh || failed+=("native tests")
bash tests/vm/run.sh || failed+=("native tests in a virtual machine")
"$python" -m pytest -q "$@" || failed+=("Python tests (pytest exit code $?)")

echo "total time: $((SECONDS / 60)) min $((SECONDS % 60)) s"
if [ ${#failed[@]} -gt 0 ]; then
  for what in "${failed[@]}"; do echo "FAILED: $what"; done
  exit 1
fi
echo "all passed"
