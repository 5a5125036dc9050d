# SPDX-License-Identifier: Apache-2.0
"""On this machine, before another one boots: the modules that the job imports. Each of its processes would take minutes
there to do it anew.

needs.py FILE
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import training

from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.verifying import verify

if __name__ == "__main__":
    training.without_dynamo()
    with tempfile.TemporaryDirectory() as folder:
        training.session(f"{folder}/checkpoints", lambda text: None, 3)
        training.come_back(f"{folder}/checkpoints", True)
        verify(Catalogue(f"{folder}/checkpoints"))
    Path(sys.argv[1]).write_text(json.dumps([name for name in sys.modules if name != "__main__"]))
