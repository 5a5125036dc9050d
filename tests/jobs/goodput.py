# SPDX-License-Identifier: Apache-2.0
"""The ranks of `layerwise bench goodput`, for an agent that starts scripts.

goodput.py SPEC
"""

from layerwise_dist.bench.goodput_worker import main

if __name__ == "__main__":
    main()
