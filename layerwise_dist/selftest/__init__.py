# SPDX-License-Identifier: Apache-2.0
"""`layerwise selftest`: kills a job, resumes it, and compares it with one that was not killed."""

from layerwise_dist.selftest.trial import Check, Trial, TrialFailed

__all__ = ["Check", "Trial", "TrialFailed"]
