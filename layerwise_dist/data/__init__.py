# SPDX-License-Identifier: Apache-2.0
"""Divides an epoch's data among ranks, so that their number may change within it."""

from layerwise_dist.data.sampler import ElasticDistributedSampler

__all__ = ["ElasticDistributedSampler"]
