#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/quick.sh [STEP...]: what to run after each change; under a minute on two cores.
#
# Steps, side by side; all of them by default:
#   ruff     the rules of pyproject.toml, and the format
#   mypy     the types of the whole package
#   native   the native tests, without sanitizers (tests/native.sh plain)
#   tests    the Python tests that are marked `quick`: no job of several ranks, about a second each at most (`slow` ones of
#            the same files are left to tests/run.sh)
#
# launch/setup.sh runs first. The first run takes some minutes more, since it builds the native tests and lets mypy read
# torch; later ones build what has changed. What fails is printed whole, and the script ends with 1. Each step's output is
# also in build/quick/. Everything else, jobs of several ranks first of all, is in tests/run.sh: run that before you push.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n '3,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
cd "$root"
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(ruff mypy native tests)
for step in "${steps[@]}"; do
  case $step in
    ruff | mypy | native | tests) ;;
    *)
      echo "unknown step: $step; there are ruff, mypy, native, tests" >&2
      exit 2
      ;;
  esac
done
SECONDS=0
bash launch/setup.sh
bin=${LAYERWISE_VENV:-$root/.venv}/bin
logs=build/quick
mkdir -p "$logs"
for step in "${steps[@]}"; do rm -f "$logs/$step".*; done

check_style() { "$bin/ruff" check && "$bin/ruff" format --check; }
check_types() { "$bin/python" -m mypy; }
test_natively() { nice -n 5 bash tests/native.sh plain; }
# Only the files that have some: the others take longer to import than these tests take. Three workers for two processors:
# these tests wait for the disk about as long as they compute.
test_quickly() {
  local files
  mapfile -t files < <(grep -l 'pytest\.mark\.quick' tests/test_*.py)
  "$bin/python" -m pytest -q -m "quick and not slow" -n 3 --dist worksteal "${files[@]}"
}

# A line when it is over, and a file that says so if it failed.
run() {
  local step=$1 began=$EPOCHREALTIME verdict=ok took
  shift
  "$@" >"$logs/$step.log" 2>&1 </dev/null || verdict=FAILED
  took=$((${EPOCHREALTIME/[.,]/} - ${began/[.,]/}))
  [ $verdict = ok ] || touch "$logs/$step.failed"
  printf '%-7s %-6s %3d.%d s  %s\n' "$step" $verdict $((took / 1000000)) $((took / 100000 % 10)) \
    "$(grep -v '^ *$' "$logs/$step.log" | tail -n 1)"
}

# Process groups of their own: Ctrl-C ends all of it.
set -m
running=()
for step in "${steps[@]}"; do
  case $step in
    ruff) run ruff check_style & ;;
    mypy) run mypy check_types & ;;
    native) run native test_natively & ;;
    tests) run tests test_quickly & ;;
  esac
  running+=("-$!")
done
set +m
trap 'kill -- "${running[@]}" 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
wait

failed=()
for step in "${steps[@]}"; do
  if [ -e "$logs/$step.failed" ]; then
    failed+=("$step")
    printf '\n=== %s\n' "$step"
    cat "$logs/$step.log"
  fi
done
echo "total time: $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all passed"
