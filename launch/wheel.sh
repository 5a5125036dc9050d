#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash launch/wheel.sh [-o DIR] [PYTHON...]: builds a wheel for each of these interpreters (default: the one of .venv)
# into DIR (default: dist).
#
# The wheel needs no package of the system where it is installed: auditwheel checks that, bundles what is not linked
# statically, and names the oldest glibc that it runs with in the file's name (manylinux_2_35 as built on Debian 12).
# launch/setup.sh comes first; for other interpreters pip downloads the build's tools.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n '3,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
venv=${LAYERWISE_VENV:-$root/.venv}
[ -x "$venv/bin/auditwheel" ] || { echo "wheel: error: $venv has no auditwheel: run launch/setup.sh" >&2; exit 1; }
cd "$root"
out=dist
[ "${1:-}" != -o ] || { out=$2; shift 2; }
plain=$(mktemp -d)
trap 'rm -rf "$plain"' EXIT
isolation=()
[ $# -gt 0 ] || { set -- "$venv/bin/python"; isolation=(--no-build-isolation); }
for python in "$@"; do
  "$venv/bin/python" -m pip --python "$python" wheel -q "${isolation[@]}" --no-deps -w "$plain" .
done
for wheel in "$plain"/*.whl; do
  PATH=$venv/bin:$PATH auditwheel repair -w "$out" "$wheel"
done
