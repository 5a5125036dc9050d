# SPDX-License-Identifier: Apache-2.0
"""A model check of the commit: the real decisions, on a simulated clock, network, disk and set of processes.

`Simulation` makes one transition after the other, drawn from a seed: a rank trains on, a disk does one operation, a
message arrives, time passes, something breaks, a job starts again. Coordinator, Ledger, Committer, Keeper, Owner,
CheckpointMetadataManager and the start of a session are the engine's own; the disk is a MemoryEnv, which forgets what
was not flushed. Each rule is checked at the moment at which it could break, and raises `Broken`.

`world` has time, chance and disks (`disk`), `network` the messages. A `job` has its ranks (`rank`) and the coordinator;
`starting` and `restoring` are how it comes by what it goes on from. `failures` is what breaks, `rules` what must hold,
judged by the `history` of what was written. `simulation` draws. `broken_rules` are mutations of the engine.
"""

from kit.commit_model.rules import Broken
from kit.commit_model.simulation import Simulation, walk

__all__ = ["Broken", "Simulation", "walk"]
