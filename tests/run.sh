#!/usr/bin/env bash
# bash tests/run.sh [--long] [pytest arguments]: sets everything up, then runs the native and the Python tests.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n 's/^# //p' "${BASH_SOURCE[0]}"
  exit 0
fi
cd "$root"
echo "running: set-up, native tests (cmake and ctest on csrc/), Python tests (pytest -q $*)"
SECONDS=0
bash launch/setup.sh
python=${LAYERWISE_VENV:-$root/.venv}/bin/python
failed=()

native_tests() {
  local build=build/native-tests generator=()
  if [ ! -e "$build/CMakeCache.txt" ] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
  mkdir -p "$build"
  if ! { cmake -S csrc -B "$build" "${generator[@]}" -DLAYERWISE_TESTS=ON &&
    cmake --build "$build" --parallel "$(nproc)"; } >"$build/build.log" 2>&1; then
    tail -n 40 "$build/build.log"
    echo "native tests: not built; the whole output is in $build/build.log"
    return 1
  fi
  ctest --test-dir "$build" --output-on-failure --no-tests=error
}

native_tests || failed+=("native tests")
"$python" -m pytest -q "$@" || failed+=("Python tests (pytest exit code $?)")

echo "total time: $((SECONDS / 60)) min $((SECONDS % 60)) s"
if [ ${#failed[@]} -gt 0 ]; then
  for what in "${failed[@]}"; do echo "FAILED: $what"; done
  exit 1
fi
echo "all passed"
