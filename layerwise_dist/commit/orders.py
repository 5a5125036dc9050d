# SPDX-License-Identifier: Apache-2.0
"""The coordinator's orders, which `coordinator_thread.perform` carries out."""

from __future__ import annotations

from dataclasses import dataclass

from layerwise_dist.commit.messages import Durable, ToRanks
from layerwise_dist.storage.filenames import AttemptId


@dataclass(frozen=True, slots=True)
class Announce:
    """Send this to every rank, in order."""

    message: ToRanks


@dataclass(frozen=True, slots=True)
class WriteManifest:
    """Make this attempt's manifest durable, then say with `Coordinator.wrote` how that ended. `reports` are by rank."""

    seq: int
    step: int
    reports: list[Durable]


@dataclass(frozen=True, slots=True)
class ComposeManifest:
    """Make this attempt's manifest, but do not write it; then say `Coordinator.composed`."""

    seq: int
    step: int
    reports: list[Durable]


@dataclass(frozen=True, slots=True)
class RetireOld:
    """A commit is durable: remove the manifests that retention no longer keeps, then say `Coordinator.withdrawn`."""


@dataclass(frozen=True, slots=True)
class Retired:
    """This checkpoint's manifest is gone for good, wherever it was: what is left of it may go."""

    attempt: AttemptId


Output = Announce | WriteManifest | ComposeManifest | RetireOld | Retired
