# SPDX-License-Identifier: Apache-2.0
"""Paths and names of a checkpoint directory. Every name comes from integers; nothing else is ever deleted.

    <dir>/identity.json
    <dir>/owner
    <dir>/branch_<seq>.json
    <dir>/spare_<attempt>_<rank>
    <dir>/step_<step>-<attempt>/rank_<rank>.safetensors[.partial]
    <dir>/step_<step>-<attempt>/manifest.json[.tmp]
    <dir>/step_<step>-<attempt>/pinned
    <dir>/base/<attempt>/rank_<rank>.safetensors[.partial]

An attempt's id is sixteen hexadecimal digits: the epoch of the session that made it (eight) and its seq (eight).
The epoch is counted up under the owner lock at each start, so no id is ever used twice.

Numbers end before their digits do. A name beyond these ends is nobody's: it is neither read, counted nor removed, and
`odd` names it. So no entry of a directory can bring a session to the end of its numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

IDENTITY = "identity.json"
OWNER = "owner"
MANIFEST = "manifest.json"
MANIFEST_TMP = "manifest.json.tmp"
PIN = "pinned"
PARTIAL = ".partial"
BASES = "base"  # folder of the folders of frozen parameters, each named after the attempt that wrote it

# Epochs and seqs are 1 to below this; what a session may begin with leaves it sixteen million.
NUMBERS_END = 0xFF000000
BEGIN_BELOW = NUMBERS_END - (1 << 24)
STEPS_END = 99 * 10**8  # a step has ten digits
RANKS_END = 10**5  # a rank has five

_STEP_DIR = re.compile(r"step_([0-9]{10})-([0-9a-f]{8})([0-9a-f]{8})\Z")
_SHARD = re.compile(r"rank_([0-9]{5})\.safetensors(\.partial)?\Z")
_BRANCH = re.compile(r"branch_([0-9]{10})\.json(\.tmp)?\Z")
_PROBE = re.compile(r"probe_[0-9a-f]{32}_[0-9]{5}\Z")
_SPARE = re.compile(r"spare_([0-9a-f]{8})([0-9a-f]{8})_[0-9]{5}\Z")
_BASE = re.compile(r"([0-9a-f]{8})([0-9a-f]{8})\Z")
_LIKE_OURS = re.compile(r"(step|branch|spare|probe)_", re.IGNORECASE)


@dataclass(frozen=True, slots=True, order=True)
class AttemptId:
    """One try at one checkpoint. `epoch` and `seq` are 1 to below `NUMBERS_END`, `step` is below `STEPS_END`."""

    epoch: int
    seq: int
    step: int

    @property
    def text(self) -> str:
        return f"{self.epoch:08x}{self.seq:08x}"

    @property
    def folder(self) -> str:
        return f"step_{self.step:010d}-{self.text}"


def parse_folder(name: str) -> AttemptId | None:
    """The attempt that a folder's name says, or None for a name that is not ours."""
    match = _STEP_DIR.match(name)
    if match is None:
        return None
    found = AttemptId(int(match[2], 16), int(match[3], 16), int(match[1]))
    return found if is_number(found.epoch) and is_number(found.seq) and found.step < STEPS_END else None


def is_number(value: int) -> bool:
    """Whether it is an epoch or a seq that a session may have."""
    return 0 < value < NUMBERS_END


def odd(name: str) -> str | None:
    """What is wrong with the name of an entry of the directory that is like ours, and is not; None for all others."""
    ours = parse_folder(name) is not None or parse_branch(name) is not None or is_leftover(name)
    if ours or not _LIKE_OURS.match(name):
        return None
    if _STEP_DIR.match(name) or _BRANCH.match(name) or _SPARE.match(name):
        return "no session uses such numbers"
    return "this package does not write such names"


def shard_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def spare_file(attempt: AttemptId, rank: int) -> str:
    """A rank's shard of a retired attempt, between two lives."""
    return f"spare_{attempt.text}_{rank:05d}"


def is_spare(name: str) -> bool:
    match = _SPARE.match(name)
    return match is not None and is_number(int(match[1], 16)) and is_number(int(match[2], 16))


def base_folder(attempt: str) -> str:
    """The folder, below the directory, of the frozen parameters that the attempt of this id wrote."""
    return os.path.join(BASES, attempt)


def parse_base(name: str) -> tuple[int, int] | None:
    """Epoch and seq of the attempt that a folder of frozen parameters is named after, or None."""
    match = _BASE.match(name)
    found = (int(match[1], 16), int(match[2], 16)) if match else None
    return found if found is not None and all(map(is_number, found)) else None


def branch_file(seq: int) -> str:
    return f"branch_{seq:010d}.json"


def parse_branch(name: str) -> int | None:
    """The seq of a finished branch record's name, or None."""
    match = _BRANCH.match(name)
    return int(match[1]) if match and not match[2] and is_number(int(match[1])) else None


def parse_unfinished_branch(name: str) -> int | None:
    """The seq of a branch record that was being written, or None."""
    match = _BRANCH.match(name)
    return int(match[1]) if match and match[2] and is_number(int(match[1])) else None


def is_shard_file(name: str) -> bool:
    """Whether it is a rank's file, finished or not: of an attempt, or of frozen parameters."""
    return _SHARD.match(name) is not None


def parse_shard(name: str) -> int | None:
    """The rank of a finished shard's name, or None."""
    match = _SHARD.match(name)
    return int(match[1]) if match and match[2] is None else None


def is_attempt_file(name: str) -> bool:
    """Whether a file inside an attempt's folder was named by this package (so that collection may delete it)."""
    return name in (MANIFEST, MANIFEST_TMP, PIN) or is_shard_file(name)


def is_leftover_in_commit(name: str) -> bool:
    """Names that may lie in a committed folder after a crash and mean nothing there."""
    return name == MANIFEST_TMP or is_partial(name)


def is_partial(name: str) -> bool:
    """Whether it is a rank's file that was not finished."""
    match = _SHARD.match(name)
    return match is not None and match[2] is not None


def probe_file(token: str, rank: int) -> str:
    """What a rank makes for the others to look for, to find out who shares a directory; `token` is 32 hex digits."""
    return f"probe_{token}_{rank:05d}"


def is_leftover(name: str) -> bool:
    """Names that may lie in the directory itself after a crash and mean nothing to the next session."""
    unfinished = parse_unfinished_branch(name) is not None
    return unfinished or is_spare(name) or _PROBE.match(name) is not None or name == IDENTITY + ".tmp"


def in_order(names: Iterable[str]) -> list[str]:
    """Names in a checkpoint directory, those of records in the order in which they were made."""

    def seq(name: str) -> int:
        attempt, branch = parse_folder(name), parse_branch(name)
        return attempt.seq if attempt is not None else branch or 0

    return sorted(names, key=seq)
