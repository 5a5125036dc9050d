#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/coverage.sh [--native | pytest arguments]: which lines and branches tests run, and what is left.
#
# Of csrc/src and csrc/include by the native tests, of csrc/bindings by the Python tests (gcov); of the rooms storage,
# commit, capture, restore and engine by the Python tests and the jobs that they start (coverage.py). By default all
# tests; with arguments the native tests and these Python tests, as in `bash tests/coverage.sh tests/test_engine.py`;
# with --native no Python tests.
#
# The tables go to standard output, and to build/coverage/table.md with all that is left. While Python tests run, the
# package in the virtual environment has a native core that counts; launch/setup.sh puts the usual one back at the end, or
# at its next run if this one is killed. A process that is killed counts nothing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n '3,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
cd "$root"
bash launch/setup.sh
venv=${LAYERWISE_VENV:-$root/.venv}
python=$venv/bin/python
out=$root/build/coverage
mkdir -p "$out"
"$python" -c 'import coverage, gcovr' 2>/dev/null ||
  "$python" -m pip --disable-pip-version-check install -q "coverage>=7.10" "gcovr>=8"
export COVERAGE_RCFILE=$root/tests/coverage.ini LAYERWISE_COVERAGE=$out
flags="--coverage -fprofile-update=atomic -fprofile-abs-path"
failed=()

quietly() {
  "$@" >"$out/build.log" 2>&1 </dev/null && return
  tail -n 30 "$out/build.log"
  echo "not built; the whole output is in $out/build.log" >&2
  return 1
}

# Counts of an earlier run belong to an earlier source.
find "$out" \( -name '*.gcda' -o -name 'python.*' -o -name '*.json' \) -delete

generator=()
if [ ! -e "$out/native/CMakeCache.txt" ] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
quietly cmake -S csrc -B "$out/native" "${generator[@]}" -DLAYERWISE_TESTS=ON -DCMAKE_BUILD_TYPE=Debug \
  -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_EXE_LINKER_FLAGS=-Wl,--undefined=__gcov_dump # for children (Leave in answers.h)
quietly cmake --build "$out/native" --parallel "$(nproc)"
ctest --test-dir "$out/native" --output-on-failure --no-tests=error || failed+=("native tests")

if [ "${1:-}" != --native ]; then
  rm -f "$venv/.layerwise_dist" # what launch/setup.sh knows the usual core by
  trap 'bash launch/setup.sh' EXIT
  quietly "$python" -m pip --disable-pip-version-check install --no-build-isolation --no-deps \
    -C build-dir="$out/module" -C cmake.build-type=Debug -C cmake.define.LAYERWISE_TESTING=ON \
    -C cmake.define.CMAKE_CXX_FLAGS="$flags" -e "$root"
  "$python" -m coverage run -m pytest -q -n "$(nproc)" --dist worksteal --timeout 1200 "$@" ||
    failed+=("Python tests (pytest exit code $?)")
  "$python" -m coverage combine --quiet
  "$python" -m coverage json --quiet -o "$out/python.json"
fi
# The module is compiled otherwise than the native tests' program: of csrc/src it has some hundred further branches, which
# no source has. It counts for the bindings, which only Python uses.
gcov() {
  "$python" -m gcovr --root "$root" --exclude-throw-branches --exclude-unreachable-branches \
    --gcov-ignore-parse-errors=all --merge-mode-functions=merge-use-line-min "$@"
}
gcov --filter csrc/src/ --filter csrc/include/ --json "$out/core.json" "$out/native"
added=(--add-tracefile "$out/core.json")
if [ "${1:-}" != --native ]; then
  gcov --filter csrc/bindings/ --exclude csrc/bindings/testing_module.cc --json "$out/bindings.json" "$out/module"
  added+=(--add-tracefile "$out/bindings.json")
fi
"$python" -m gcovr --root "$root" --merge-mode-functions=merge-use-line-min "${added[@]}" --json "$out/csrc.json"
"$python" tests/coverage_table.py "$out"
if [ ${#failed[@]} -gt 0 ]; then
  for what in "${failed[@]}"; do echo "FAILED: $what"; done
  exit 1
fi
