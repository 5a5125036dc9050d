#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/versions.sh [--keep] VERSION...: runs the core tests with each of these versions of torch, on CPU.
#
#   bash tests/versions.sh 2.9.1 2.11.0 2.13.0 2.14.1
#
# For each version it makes build/versions/VERSION, a virtual environment with that torch and whatever else .venv has,
# and removes it after the tests unless --keep is given; a later call with that version then uses it again. Where pip's
# index has builds with CUDA only, a version downloads up to 4 GB and takes up to 12 GB of disk, all of it below
# build/versions/. Each download is shown with its size before it starts. The core tests are the `quick` ones, and jobs of
# each wrapper that train, are killed, resume and change their cut: 6 minutes on two cores. The table goes to standard
# output, as docs/tables/versions.md has it; logs are in build/versions/. Exits with 1 if a test failed or a version was
# not tried.
#
#   LAYERWISE_VERSIONS_GB   the free disk space to ask for, in GB (default: 12; 2 are enough for CPU builds)
#   LAYERWISE_WORKERS       how many tests run at a time (default: 2)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
keep=
[ "${1:-}" != --keep ] || { keep=yes; shift; }
if [ $# = 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  [ $# != 0 ] || exit 2
  exit 0
fi
cd "$root"
gigabytes=${LAYERWISE_VERSIONS_GB:-12}
workers=${LAYERWISE_WORKERS:-2}
main=${LAYERWISE_VENV:-$root/.venv}
# What starts jobs, and is not marked quick.
jobs=(tests/test_{wrappers,kill,resumes,layered,dcp}.py)
mapfile -t quick < <(grep -l 'pytest\.mark\.quick' tests/test_*.py)

say() { printf 'versions: %s\n' "$*" >&2; }
for version in "$@"; do
  case $version in *[!0-9a-zA-Z.+]* | '' | .*) say "not a version: $version"; exit 2 ;; esac
done
for number in "$gigabytes" "$workers"; do
  case $number in *[!0-9]* | '') say "not a number: $number"; exit 2 ;; esac
done
mkdir -p build/versions

# Whether build/versions/ has room for one more version. Says what is there and what is needed if not.
has_room() {
  local free
  free=$(df --output=avail -B 1000000000 build/versions | tail -n 1)
  [ "$free" -lt "$gigabytes" ] || return 0
  say "$root/build/versions has ${free// /} GB free, and a version takes up to $gigabytes GB: free some," \
    "or set LAYERWISE_VERSIONS_GB=2 if pip takes CPU builds here"
  return 1
}

# The environment of one version. pip's wheels are unpacked from a folder beside it, and not kept.
make_environment() {
  local version=$1 venv=$2 log=$3 wheels=$2.wheels
  has_room || return 1
  say "torch $version: downloading it and what it needs to build/versions/"
  rm -rf "$venv" "$wheels"
  mkdir "$wheels"
  "$main/bin/python" -m venv "$venv"
  TMPDIR=$wheels "$venv/bin/python" -m pip install --no-cache-dir --progress-bar off "torch==$version" 2>&1 </dev/null |
    tee -a "$log" | { grep --line-buffered -E '^ *(Downloading|Processing|Installing)' || true; } >&2 || {
    say "torch $version can't be installed; the end of $log:"
    tail -n 5 "$log" >&2
    rm -rf "$venv" "$wheels"
    return 1
  }
  rm -rf "$wheels"
  # All but torch is what .venv has, this package with its native core included: they do not depend on torch's version.
  "$main/bin/python" -c 'import sysconfig; print(f"import site; site.addsitedir({sysconfig.get_path('"'purelib'"')!r})")' \
    >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
  "$venv/bin/python" - "$version" >>"$log" 2>&1 <<'PYTHON' ||
import sys, torch

wanted, found = (text.partition("+")[0] for text in (sys.argv[1], torch.__version__))
sys.exit(f"torch {found} was imported in place of {wanted}" if found != wanted else 0)
PYTHON
    { say "torch $version was installed, and can't be imported; the end of $log:"; tail -n 5 "$log" >&2; return 1; }
  touch "$venv/whole"
  say "torch $version: $(du -sh "$venv" | cut -f 1) on disk"
}

# Runs one of the two sets of tests: the file for its counts, then what pytest takes.
tests() {
  local counts=$1
  shift
  CUDA_VISIBLE_DEVICES='' timeout -k 60 5400 "$venv/bin/python" -m pytest -q -n "$workers" --dist worksteal \
    --junitxml "$counts" "$@" 2>&1 </dev/null | tee -a "$log" | { grep --line-buffered -E '\[ *[0-9]+%\]$' || true; } >&2 || true
}

# One row of the table, from what pytest counted in its files.
row() {
  "$1/bin/python" - "${@:2}" <<'PYTHON'
import importlib.metadata, platform, sys
from pathlib import Path
from xml.etree import ElementTree

counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
for path in sys.argv[1:]:
    if not Path(path).exists():
        sys.exit(f"versions: pytest left no {path}: it was ended, or failed to start")
    for suite in ElementTree.parse(path).iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
bad = counts["failures"] + counts["errors"]
good = counts["tests"] - bad - counts["skipped"]
found = importlib.metadata.version("torch").partition("+")[0]
print("|", " | ".join([found, platform.python_version(), str(good), str(bad), str(counts["skipped"])]), "|")
sys.exit(bool(bad) or not good)
PYTHON
}

has_room || exit 1
trap 'rm -rf build/versions/*.wheels' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
bash launch/setup.sh >&2
failed=()
printf '%s\n' '| torch | Python | passed | failed | left out |' '|---|---|---|---|---|'
for version in "$@"; do
  venv=$root/build/versions/$version
  log=$venv.log
  : >"$log"
  SECONDS=0
  if [ ! -e "$venv/whole" ] && ! make_environment "$version" "$venv" "$log"; then
    failed+=("$version (not tried)")
    continue
  fi
  rm -f "$venv".{quick,jobs}.xml
  say "torch $version: the quick tests"
  tests "$venv.quick.xml" -m "quick and not slow" "${quick[@]}"
  say "torch $version: jobs of each wrapper"
  tests "$venv.jobs.xml" -m "not quick" "${jobs[@]}"
  row "$venv" "$venv.quick.xml" "$venv.jobs.xml" || failed+=("$version")
  grep -aE '^(FAILED|ERROR) tests/' "$log" >&2 || true
  say "torch $version: $((SECONDS / 60)) min $((SECONDS % 60)) s; log: $log"
  [ -n "$keep" ] || rm -rf "$venv"
done
if [ ${#failed[@]} -gt 0 ]; then
  IFS=,
  say "FAILED: ${failed[*]}"
  exit 1
fi
