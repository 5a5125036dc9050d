"""The `layerwise` command: looks at checkpoint directories. Reads only, imports no torch, and needs no stopped job."""

from layerwise_dist.cli.app import main

__all__ = ["main"]
