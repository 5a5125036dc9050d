#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/native.sh [--build] [--long] [plain] [address] [thread]: builds and runs the native tests (csrc/tests), by
# default three times: as they are, under ASan and UBSan, and under TSan. Sweeps are whole in the first run and shorter
# under the sanitizers; with --long they are whole there too. With --build it only builds. Needs what launch/setup.sh
# installs. Build folders: build/native-*.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n '/SPDX/!s/^# //p' "${BASH_SOURCE[0]}"
  exit 0
fi
# A report of a sanitizer ends the test with an error, whatever the environment says.
export ASAN_OPTIONS=detect_leaks=1:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1

build() {
  local kind=$1 build=build/native-$1 generator=() sanitize=$1
  [ "$kind" != plain ] || sanitize=
  mkdir -p "$build"
  # tests/vm/run.sh may want the same at the same time.
  exec 9>"$build/lock"
  if command -v flock >/dev/null; then flock 9; fi
  if [ ! -e "$build/CMakeCache.txt" ] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
  if ! { cmake -S csrc -B "$build" "${generator[@]}" -DLAYERWISE_TESTS=ON -DLAYERWISE_SANITIZE="$sanitize" &&
    cmake --build "$build" --parallel "$(nproc)"; } >"$build/build.log" 2>&1; then
    tail -n 40 "$build/build.log"
    echo "native tests ($kind): not built; the whole output is in $build/build.log"
    return 1
  fi
  exec 9>&-
}

run() {
  local kind=$1 short=()
  build "$kind" || return 1
  [ -z "$only_build" ] || return 0
  if [ "$kind" != plain ] && [ -z "$long" ]; then short=(LAYERWISE_TEST_SHORT=4); fi
  echo "native tests ($kind):"
  env "${short[@]}" ctest --test-dir "build/native-$kind" --output-on-failure --no-tests=error
}

only_build=
long=
kinds=()
for argument in "$@"; do
  case $argument in
    --build) only_build=yes ;;
    --long) long=yes ;;
    *) kinds+=("$argument") ;;
  esac
done
[ ${#kinds[@]} -gt 0 ] || kinds=(plain address thread)
failed=()
for kind in "${kinds[@]}"; do
  case $kind in
    plain | address | thread) run "$kind" || failed+=("$kind") ;;
    *)
      echo "unknown: $kind; allowed are plain, address, thread" >&2
      exit 2
      ;;
  esac
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: native tests: ${failed[*]}"
  exit 1
fi
