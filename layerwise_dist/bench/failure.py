# SPDX-License-Identifier: Apache-2.0
"""The error of a benchmark that could not measure what it was asked to."""


class BenchFailed(Exception):
    """A process that was to be measured ended badly; says with what."""
