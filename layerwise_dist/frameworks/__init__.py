# SPDX-License-Identifier: Apache-2.0
"""Frameworks: what a layer is, which slices this rank holds, and which tensors hold them."""

from layerwise_dist.frameworks.deepspeed import accumulating, config_block, is_engine
from layerwise_dist.frameworks.detect import find_framework, find_optimizer
from layerwise_dist.frameworks.framework import Framework, ParamView

__all__ = ["Framework", "ParamView", "accumulating", "config_block", "find_framework", "find_optimizer", "is_engine"]
