# SPDX-License-Identifier: Apache-2.0
"""How the data of an epoch are dealt out to ranks, so that their number may change within it."""

from layerwise_dist.data.sampler import ElasticDistributedSampler

__all__ = ["ElasticDistributedSampler"]
