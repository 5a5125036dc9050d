#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/chroot.sh [PYTHON...]: the wheel in an empty root, without compilers and packages for development.
#
#   bash tests/chroot.sh /usr/bin/python3 /opt/python3.10/bin/python3.10
#
# For each interpreter (default: /usr/bin/python3) it builds the wheel (launch/wheel.sh), makes a root with debootstrap
# that has this interpreter and nothing to build with, installs the wheel there from files, without a network, and runs
# `layerwise selftest`, which trains, kills and resumes. An interpreter of the system is Debian's own package in that
# root; of any other its whole prefix is copied. Needs root, debootstrap, and pip's index for torch: gigabytes where that
# has builds with CUDA only. The table goes to standard output, logs are in build/chroot/. Nothing stays mounted.
#
#   LAYERWISE_TORCH   the version of torch (default: what .venv has)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n '3,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
fail() { printf 'chroot: error: %s\n' "$*" >&2; exit 1; }
say() { printf 'chroot: %s\n' "$*" >&2; }
[ "$(id -u)" = 0 ] || fail "only root may make and enter another root"
command -v debootstrap >/dev/null || fail "debootstrap is missing (Debian: apt-get install debootstrap)"
cd "$root"
[ $# -gt 0 ] || set -- /usr/bin/python3
venv=${LAYERWISE_VENV:-$root/.venv}
torch=${LAYERWISE_TORCH:-$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch").partition("+")[0])')}
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE)' "Codename: $suite" | awk '{print $1; exit}')
# What an interpreter that was built on this system may be linked to. None of it is for development.
libraries=libssl3,libffi8,libsqlite3-0,zlib1g,libbz2-1.0,liblzma5,libreadline8,libncursesw6,libstdc++6,libgcc-s1,libuuid1
logs=build/chroot
mkdir -p "$logs"
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

# Runs a command in the root, in namespaces of its own: what it mounts and starts ends with it.
inside() {
  # shellcheck disable=SC2016
  unshare --mount --pid --fork --kill-child bash -euc '
    mount -t proc proc "$1/proc"
    mount --bind /dev "$1/dev"
    mount -t tmpfs tmpfs "$1/dev/shm"
    mount -t tmpfs tmpfs "$1/tmp"
    root=$1; shift
    exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LANG=C.UTF-8 chroot "$root" "$@"' - "$place/root" "$@"
}

try() {
  local python=$1 log=$2 include=$libraries base
  base=$("$python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')
  [ "$base" != /usr ] || include+=,python3,python3-venv
  rm -rf "$place/root" "$place/wheels" "$place/name"
  mkdir "$place/wheels"
  say "$python: the wheel, and what it needs"
  bash launch/wheel.sh -o "$place/wheels" "$python" >>"$log" 2>&1
  basename "$place"/wheels/*.whl .whl >"$place/name"
  "$venv/bin/python" -m pip --python "$python" download -q -d "$place/wheels" "torch==$torch" \
    "$place"/wheels/layerwise_dist-*.whl >>"$log" 2>&1
  say "$python: the root"
  debootstrap --variant=minbase --include="$include" "$suite" "$place/root" ${mirror:+"$mirror"} >>"$log" 2>&1
  if [ "$base" != /usr ]; then
    mkdir -p "$place/root$base"
    cp -a "$base/." "$place/root$base/"
  fi
  mv "$place/wheels" "$place/root/wheels"
  printf '127.0.0.1 localhost %s\n' "$(hostname)" >"$place/root/etc/hosts"
  # That it is what it should be.
  inside sh -c '! command -v cc c++ gcc g++ clang cmake ninja make' >>"$log" || { say "the root has a compiler"; return 1; }
  ! inside dpkg-query -W -f '${Package}\n' | grep -E -- '-dev$|^liburing' >>"$log" ||
    { say "the root has packages that the wheel should do without"; return 1; }
  say "$python: the install and the self-test"
  inside "$base/bin/$(basename "$(realpath "$python")")" -m venv /venv >>"$log" 2>&1
  inside /venv/bin/pip install -q --no-index --find-links /wheels layerwise_dist >>"$log" 2>&1
  mkdir "$place/root/disk"
  inside /venv/bin/layerwise selftest /disk >>"$log" 2>&1
}

failed=()
printf '%s\n' '| Python | its build | wheel | torch | selftest |' '|---|---|---|---|---|'
for python in "$@"; do
  version=$("$python" -c 'import platform; print(platform.python_version())')
  build=$("$python" -c 'import sys; print("Debian" if sys.base_prefix == "/usr" else "own")')
  log=$logs/$version.log
  : >"$log"
  verdict=passed
  # Not as a condition, where `set -e` would not count.
  (set -e; try "$python" "$log") &
  wait $! || { verdict=FAILED; failed+=("$version"); say "the end of $log:"; tail -n 5 "$log" >&2; }
  tag=$(sed 's/.*-//' "$place/name" 2>/dev/null || echo none)
  printf '| %s | %s | %s | %s | %s |\n' "$version" "$build" "$tag" "$torch" "$verdict"
done
[ ${#failed[@]} = 0 ] || fail "failed: ${failed[*]}"
