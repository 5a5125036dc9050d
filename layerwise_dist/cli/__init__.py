"""The `layerwise` command: looks at checkpoint directories. Needs no stopped job, and but for `bench` and `selftest` imports no torch.

`doctor` and `bench` write, in a folder of their own that they remove; all others read only.
"""

from layerwise_dist.cli.app import main

__all__ = ["main"]
