# SPDX-License-Identifier: Apache-2.0
"""A worker of `layerwise bench`, for what starts scripts (kit/forked.py).

bench.py MODULE SPEC
"""

from __future__ import annotations

import importlib
import os
import sys

if __name__ == "__main__":
    if asked := os.environ.get("ASKED"):
        os.dup2(os.open(asked, os.O_RDONLY | os.O_CLOEXEC), 0)
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # as of a new interpreter
    importlib.import_module(sys.argv.pop(1)).main()
