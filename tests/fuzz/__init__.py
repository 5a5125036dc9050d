# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of what reads files: `fuzz.py` for Python, `native.sh` for the shard reader."""
