# SPDX-License-Identifier: Apache-2.0
"""Crafted checkpoint directories: one maker for each way in which what is on the disk can be wrong.

The bytes are what somebody who knows the format would write: hashes and sizes agree everywhere, unless that is the
point. `worker.py` runs the commands and `restore()` on each; `python tests/attacks` prints the figures.
"""

from attacks import directories, ends, frozen, headers, names, records, sealed, sizes, terminal, typed
from attacks.kit import Attack

THEMES: dict[str, list[Attack]] = {
    module.__name__.rpartition(".")[2]: module.attacks()
    for module in (records, ends, headers, names, sizes, sealed, typed, frozen, directories, terminal)
}
