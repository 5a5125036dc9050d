# SPDX-License-Identifier: Apache-2.0
"""Looks whether a directory is fit to hold checkpoints: what it is, what it takes, how fast and how durable it writes.

`examine` asks and measures (place, kernel, speed); findings.py judges what came out. The command prints it.
"""

from layerwise_dist.doctor.examination import Questions, Report, examine
from layerwise_dist.doctor.findings import Finding

__all__ = ["Finding", "Questions", "Report", "examine"]
