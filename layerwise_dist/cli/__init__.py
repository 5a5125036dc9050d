"""The `layerwise` command: looks at checkpoint directories and machines. Needs no stopped job.

But for `verify`, `bench` and `selftest` it imports no torch.

`doctor` and `bench` write, in a folder of their own that they remove; all others read only.
"""

from layerwise_dist.cli.app import main

__all__ = ["main"]
