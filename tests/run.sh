#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/run.sh [--long] [pytest arguments]: sets everything up, then runs the native and the Python tests, ruff and
# mypy.
# bash tests/run.sh --soak MINUTES [--seed N] [--trials N] [--trial N] [--lanes N]: instead of these, drawn jobs to which
# drawn faults happen, compared bit for bit with plain training (tests/soak.py). Ctrl-C ends it in order.
# bash tests/run.sh --powercut: runs tests/vm/powercut.sh instead, with the arguments that follow.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n '3,/^set /s/^# //p' "${BASH_SOURCE[0]}"
  exit 0
fi
cd "$root"
# DeepSpeed would compile it in the first of its jobs, within that one's deadline.
operators() {
  [ -e "$("$1" -c 'import sys; print(sys.prefix)')/torch_extensions/deepspeed_shm_comm/deepspeed_shm_comm.so" ] ||
    "$1" tests/jobs/zero_ready.py >build/tests-operators.log 2>&1
}
if [ "${1:-}" = --soak ]; then
  shift
  bash launch/setup.sh
  python=${LAYERWISE_VENV:-$root/.venv}/bin/python
  operators "$python" || { echo "DeepSpeed's operators: build/tests-operators.log" >&2; exit 1; }
  # Where its mounts are its own and end with it, it fills small disks; elsewhere no disk is filled.
  alone=()
  for flags in -m -Urm; do
    if unshare "$flags" true 2>/dev/null; then
      alone=(unshare "$flags")
      break
    fi
  done
  exec "${alone[@]}" "$python" tests/soak.py "$@"
fi
if [ "${1:-}" = --powercut ]; then
  bash launch/setup.sh
  exec bash tests/vm/powercut.sh "${@:2}"
fi
# Workers wait for disks and for other processes more than they compute. More than four would take the time from each
# other on which the deadlines of tests were measured.
workers=$(nproc)
workers=$((workers < 2 ? 2 : workers > 4 ? 4 : workers))
echo "running: set-up, native tests (tests/native.sh: as they are, with ASan and UBSan, with TSan; tests/vm/run.sh: in a virtual machine), ruff and mypy (tests/quick.sh), Python tests beside them (pytest -q -n $workers --dist worksteal $*)"
SECONDS=0
# What is begun below has a process group of its own each: Ctrl-C ends all of it.
trap 'for each in $(jobs -pr); do kill -- "-$each" 2>/dev/null || true; done' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
bash launch/setup.sh
python=${LAYERWISE_VENV:-$root/.venv}/bin/python
# Each process that a test starts would compile them by itself where the environment forbids Python to write bytecode.
"$python" -m compileall -q layerwise_dist tests/jobs
failed=()
long=()
case " $* " in *" --long "*) long=(--long) ;; esac

# They take less of the processors than the Python tests, and have ended before these.
"$python" tests/beside.py 5 bash tests/native.sh "${long[@]}" >build/tests-native.log 2>&1 </dev/null &
native=$!
"$python" tests/beside.py 5 bash tests/vm/run.sh "${long[@]}" >build/tests-vm.log 2>&1 </dev/null &
machine=$!
"$python" tests/beside.py 5 bash tests/quick.sh ruff mypy >build/tests-static.log 2>&1 </dev/null &
static=$!

# One core takes a minute for it; the other has the native tests meanwhile.
operators "$python" || failed+=("DeepSpeed's operators: build/tests-operators.log")
"$python" -m pytest -q -n "$workers" --dist worksteal "$@" || failed+=("Python tests (pytest exit code $?)")
echo "Python tests: $((SECONDS / 60)) min $((SECONDS % 60)) s after the start"
wait "$static" || failed+=("ruff or mypy")
cat build/tests-static.log
wait "$native" || failed+=("native tests")
cat build/tests-native.log
wait "$machine" || failed+=("native tests in a virtual machine")
cat build/tests-vm.log

echo "total time: $((SECONDS / 60)) min $((SECONDS % 60)) s"
if [ ${#failed[@]} -gt 0 ]; then
  for what in "${failed[@]}"; do echo "FAILED: $what"; done
  exit 1
fi
echo "all passed"
