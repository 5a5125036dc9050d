"""Frameworks: what is a layer here, which slices this rank holds, and in which tensors they live."""

from layerwise_dist.frameworks.base import Framework, ParamView
from layerwise_dist.frameworks.detect import detect

__all__ = ["Framework", "ParamView", "detect"]
