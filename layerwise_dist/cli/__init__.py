"""The `layerwise` command: looks at checkpoint directories. Imports no torch, and needs no stopped job.

`doctor` writes, in a folder of its own that it removes; all others read only.
"""

from layerwise_dist.cli.app import main

__all__ = ["main"]
