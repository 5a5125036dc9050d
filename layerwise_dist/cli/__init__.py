# SPDX-License-Identifier: Apache-2.0
"""The `layerwise` command: inspects checkpoint directories and machines. Jobs may run meanwhile.

It imports torch only for `verify`, `diff`, `show --values`, `export`, `import`, `bench` and `selftest`.

`pin`, `unpin` and `prune` change a checkpoint directory, `cp` and `import` make one, `export` writes beside it.
`doctor`, `selftest` and `bench` write in a folder of their own that they remove. All others read only.
"""

from layerwise_dist.cli.app import main

__all__ = ["main"]
