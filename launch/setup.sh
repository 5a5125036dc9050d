#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up all that the demo and the tests need: system packages where it may install them, a virtual environment, torch
# where that has none, the native core and the package (editable). Runs again in a moment when nothing has changed, and
# then needs no network. Called by launch/demo.sh and tests/run.sh.
#
#   LAYERWISE_VENV    where the virtual environment is (default: .venv in the root of the repository)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${LAYERWISE_VENV:-$root/.venv}
mkdir -p "$root/build"
log=$root/build/setup.log

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

# Runs a command quietly; its output goes to the log, whose end is shown when the command fails.
quietly() {
  printf '\n$ %s\n' "$*" >>"$log"
  "$@" >>"$log" 2>&1 </dev/null && return
  printf 'setup: failed: %s\nsetup: the end of %s:\n' "$*" "$log" >&2
  tail -n 25 "$log" | sed 's/^/    /' >&2
  return 1
}

exec 9>"$root/build/setup.lock"
if command -v flock >/dev/null && ! flock -n 9; then
  say "another set-up is running here, waiting for it"
  flock -w 1800 9 || fail "the other set-up still runs after 30 minutes"
fi

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.10; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
}

can_compile() { printf '#include <%s>\n' "$1" | c++ -std=c++20 -E -x c++ - >/dev/null 2>&1; }

# The Debian packages of the tools that are not there. It asks for what a package brings, not for the package.
missing_packages() {
  local python
  python=$(find_python)
  if [ -z "$python" ]; then
    echo python3 python3-venv python3-dev
  else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
      echo python3-dev
  fi
  command -v c++ >/dev/null || echo g++
  command -v cmake >/dev/null || echo cmake
  command -v ninja >/dev/null || echo ninja-build
  can_compile xxhash.h || echo libxxhash-dev
  can_compile liburing.h || echo liburing-dev
  can_compile doctest/doctest.h || echo doctest-dev
  command -v mpirun >/dev/null || echo openmpi-bin
}

install_packages() {
  local as_root=()
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || return 1
    as_root=(sudo -n)
  fi
  command -v apt-get >/dev/null || return 1
  say "installing by apt: $*"
  quietly "${as_root[@]}" apt-get update || say "apt-get update failed; trying with the lists that are here"
  quietly "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

system_packages() {
  local missing
  missing=$(missing_packages | tr '\n' ' ')
  [ -n "${missing// /}" ] || return 0
  # shellcheck disable=SC2086
  install_packages $missing || true
  local package required=()
  for package in $(missing_packages); do
    case $package in
      doctest-dev) say "doctest is missing: the native tests cannot be built (Debian: apt-get install doctest-dev)" ;;
      openmpi-bin) say "mpirun is missing: tests over MPI are left out (Debian: apt-get install openmpi-bin)" ;;
      ninja-build) say "ninja is missing: make is used instead (Debian: apt-get install ninja-build)" ;;
      python3) fail "Python 3.10 or newer is needed, found: $(python3 --version 2>&1 || true)" ;;
      *) required+=("$package") ;;
    esac
  done
  [ ${#required[@]} = 0 ] ||
    fail "missing, and this user may not install it; on Debian: sudo apt-get install ${required[*]}"
}

# What the installed package was made from. Python sources are read in place: of them only which there are counts.
fingerprint() {
  {
    "$venv/bin/python" -c 'import sys; print(sys.version)'
    printf '%s\n' "$root"
    cd "$root"
    sha256sum pyproject.toml launch/setup.sh
    find csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    find layerwise_dist -name '*.py' | LC_ALL=C sort
  } | sha256sum | cut -d' ' -f1
}

python_module() { "$venv/bin/python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"; }

# Whether the package that is installed is this one: another checkout may share the virtual environment.
installed() {
  [ "$(cat "$venv/.layerwise_dist" 2>/dev/null)" = "$1" ] && [ -x "$venv/bin/layerwise" ] &&
    python_module torch deepspeed layerwise_native_testing
}

make_venv() {
  if [ -e "$venv" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] || fail "$venv is there and is no virtual environment"
    say "the virtual environment $venv is broken, making it anew"
    quietly "$(find_python)" -m venv --clear "$venv"
  elif [ ! -e "$venv" ]; then
    say "making the virtual environment $venv with $("$(find_python)" --version)"
    quietly "$(find_python)" -m venv "$venv"
  fi
  "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$venv has $("$venv/bin/python" --version); 3.10 or newer is needed: remove it and run this again"
}

# Already done: no tools are looked for, so that a machine that lost its compiler still runs what it built.
if [ -x "$venv/bin/python" ] && installed "$(fingerprint)"; then
  say "up to date"
  exit 0
fi

: >"$log"
system_packages
make_venv
pip=("$venv/bin/python" -m pip --disable-pip-version-check install)
if ! python_module torch; then
  say "installing torch 2.13.0 (large; some minutes)"
  # First and by its exact version: a range would let pip take the newest build with all of CUDA.
  quietly "${pip[@]}" torch==2.13.0 ||
    fail "torch 2.13.0 could not be installed; install any torch >= 2.9 into $venv yourself and run this again"
fi
if ! python_module deepspeed; then
  say "installing DeepSpeed"
  # After torch, which its set-up imports; without its operators, since the tests and examples need none.
  quietly "${pip[@]}" wheel setuptools ninja packaging &&
    DS_BUILD_OPS=0 quietly "${pip[@]}" deepspeed --no-build-isolation ||
    fail "DeepSpeed could not be installed; the whole output is in $log"
fi
if command -v mpirun >/dev/null && ! python_module mpi4py; then
  quietly "${pip[@]}" mpi4py || say "mpi4py could not be installed: launch/mpirun.sh cannot be tried"
fi
python_module scikit_build_core nanobind || quietly "${pip[@]}" "scikit-build-core>=1.1" "nanobind>=3.1"
mark=$(fingerprint)
say "building the native core and installing layerwise_dist"
# With the module that only tests import (csrc/testing).
CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} \
  quietly "${pip[@]}" --no-build-isolation -C build-dir="build/{wheel_tag}" -C cmake.define.LAYERWISE_TESTING=ON \
    -e "$root[dev]" ||
  fail "layerwise_dist could not be built; the whole output is in $log"
printf '%s\n' "$mark" >"$venv/.layerwise_dist"
say "done: $venv"
