#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main demonstration: sets everything up, then trains, kills, resumes and compares. See launch/demo.py --help.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
bash "$here/setup.sh"
exec "${LAYERWISE_VENV:-$here/../.venv}/bin/python" "$here/demo.py" "$@"
