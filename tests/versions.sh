#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/versions.sh [--keep] VERSION...: runs a core of the tests with each of these versions of torch.
#
#   bash tests/versions.sh 2.9.1 2.11.0 2.13.0 2.14.1
#
# For each version it makes build/versions/VERSION, a virtual environment with that torch, all else being what .venv has,
# and removes it after the tests unless --keep is given. That is gigabytes of downloads and up to 8 GB of disk a version
# where pip's index has builds with CUDA only. The tests are the `quick` ones, and jobs of each wrapper that train, are
# killed, resume and change their cut. The table goes to standard output, as docs/tables/versions.md has it; logs are in
# build/versions/. Ends with 1 if a test failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
keep=
[ "${1:-}" != --keep ] || { keep=yes; shift; }
if [ $# = 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  sed -n '3,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  [ $# != 0 ] || exit 2
  exit 0
fi
cd "$root"
bash launch/setup.sh >&2
main=${LAYERWISE_VENV:-$root/.venv}
mkdir -p build/versions
# What starts jobs, and is not marked quick.
jobs=(tests/test_{wrappers,kill,resumes,layered,dcp}.py)
mapfile -t quick < <(grep -l 'pytest\.mark\.quick' tests/test_*.py)

say() { printf 'versions: %s\n' "$*" >&2; }

# One row of the table, from what pytest counted in its files.
row() {
  "$1/bin/python" - "${@:2}" <<'PYTHON'
import importlib.metadata, platform, sys
from xml.etree import ElementTree

counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
for path in sys.argv[1:]:
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

failed=()
printf '%s\n' '| torch | Python | passed | failed | left out |' '|---|---|---|---|---|'
for version in "$@"; do
  case $version in *[!0-9a-zA-Z.+]* | '') say "not a version: $version"; exit 2 ;; esac
  venv=$root/build/versions/$version
  log=$venv.log
  : >"$log"
  SECONDS=0
  if [ ! -e "$venv/lib/"python*/site-packages/others.pth ]; then
    say "torch $version: making $venv"
    "$main/bin/python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install "torch==$version" >>"$log" 2>&1 </dev/null ||
      { say "torch $version can't be installed; the end of $log:"; tail -n 5 "$log" >&2; failed+=("$version"); continue; }
    # All but torch is what .venv has, this package with its native core included: they do not depend on torch's version.
    "$main/bin/python" -c 'import sysconfig; print(f"import site; site.addsitedir({sysconfig.get_path('"'purelib'"')!r})")' \
      >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
  fi
  say "torch $version: the tests"
  "$venv/bin/python" -m pytest -q -n 2 --dist worksteal -m "quick and not slow" --junitxml "$venv.quick.xml" \
    "${quick[@]}" >>"$log" 2>&1 </dev/null || true
  "$venv/bin/python" -m pytest -q -n 2 --dist worksteal -m "not quick" --junitxml "$venv.jobs.xml" \
    "${jobs[@]}" >>"$log" 2>&1 </dev/null || true
  row "$venv" "$venv.quick.xml" "$venv.jobs.xml" || failed+=("$version")
  grep -E '^(FAILED|ERROR) ' "$log" >&2 || true
  say "torch $version: $((SECONDS / 60)) min $((SECONDS % 60)) s"
  [ -n "$keep" ] || rm -rf "$venv"
done
if [ ${#failed[@]} -gt 0 ]; then
  say "FAILED: ${failed[*]}"
  exit 1
fi
