# SPDX-License-Identifier: Apache-2.0
"""`python -m layerwise_dist.monitor SOCKET MEMORY PID`: started by a training process only, with two descriptors."""

from __future__ import annotations

import os
import sys

from layerwise_dist.monitor.serving import serve


def main() -> None:
    if len(sys.argv) != 4 or not all(word.isdigit() for word in sys.argv[1:]):
        sys.exit(f"usage: {__doc__}")
    code = 1
    try:
        serve(*map(int, sys.argv[1:]))
        code = 0
    finally:
        # A thread may be in the kernel, in a flush that does not return, and hold up an orderly exit.
        os._exit(code)


if __name__ == "__main__":
    main()
