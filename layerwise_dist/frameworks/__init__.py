"""Frameworks: what is a layer here, which slices this rank holds, and in which tensors they live."""

from layerwise_dist.frameworks.base import Framework, ParamView
from layerwise_dist.frameworks.deepspeed import accumulating, config_block, is_engine
from layerwise_dist.frameworks.detect import adapt, detect

__all__ = ["Framework", "ParamView", "accumulating", "adapt", "config_block", "detect", "is_engine"]
