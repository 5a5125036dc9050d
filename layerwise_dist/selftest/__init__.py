# SPDX-License-Identifier: Apache-2.0
"""`layerwise selftest`: does it work on this machine? A job is killed, resumed, and compared with one that was not."""

from layerwise_dist.selftest.trial import Check, Trial, TrialFailed

__all__ = ["Check", "Trial", "TrialFailed"]
