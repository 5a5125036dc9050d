# SPDX-License-Identifier: Apache-2.0
"""On each file system, what `layerwise doctor` says, and a job that saves, is killed, comes
back and goes on. Prints a row of docs/tables/filesystems.md for each, and what is wrong.

filesystems.py local | shared NEEDS

NEEDS is what needs.py wrote. `shared` are those that are tried in a virtual machine. The disks are $SMALL_DISK, with
sectors of 512 bytes, and $LARGE_DISK, of 4096.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import places
import training
from system import ChildError, import_all, in_child, tool

from layerwise_dist import _native
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.doctoring import QUICK
from layerwise_dist.cli.verifying import verify
from layerwise_dist.config import load_config
from layerwise_dist.doctor import Questions, examine
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.storage.recycling import recycles

KILLED, LAST = 5, 12
_TROUBLE = re.compile(r"csum|[Cc]orrupt|I/O error|BUG:|WARNING:|hung_task|EXT4-fs error")
_QUOTA = 900 << 10  # less than a checkpoint and the next one


def main() -> int:
    which, needs = sys.argv[1:]
    training.without_dynamo()
    import_all(json.loads(Path(needs).read_text()))
    states = in_child(partial(training.states, LAST + 1))
    wrong = 0
    os.makedirs(places.TOP, exist_ok=True)
    try:
        for name, made_by, place in places.LOCAL if which == "local" else places.SHARED:
            wrong += not tried(name, made_by, place, states)
        if which == "shared":
            wrong += not tried_quota(states)
    finally:
        places.remove_points()
    return 1 if wrong else 0


def tried(name: str, made_by: str, place: places.Place, states: list[str]) -> bool:
    before = set(tool("dmesg").splitlines())
    began = time.monotonic()
    try:
        with place() as top:
            told = in_child(partial(look, top))
            found = unlike_an_open(top, told)
            found += life(f"{top}/checkpoints", states) + disturbance(f"{top}/disturbed")
            places.empty(top)
    except (OSError, RuntimeError, ChildError) as error:
        found, told = [f"it ended with {error}"], {}
    found += [line for line in tool("dmesg").splitlines() if line not in before and _TROUBLE.search(line)]
    row(name, made_by, told, "; ".join(found) or "to the bit")
    for line in found:
        print(f"WRONG: {name}: {line}", flush=True)
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return not found


def look(top: str) -> dict[str, Any]:
    report = examine(top, Questions(load_config(None, dir=top), **QUICK))
    told: dict[str, Any] = {each.name: [each.verdict, each.text] for each in report.findings}
    told["recycles"] = recycles(_native.PosixEnv(), top, "auto")
    return told


def unlike_an_open(top: str, told: dict[str, Any]) -> list[str]:
    """What is wrong if O_DIRECT is refused here in an open, and doctor calls direct I/O good."""
    path = f"{top}/opened"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        verdict, text = told["direct_io"]
        return [] if verdict == "warn" else [f"an open with O_DIRECT is refused, but: {text}"]
    finally:
        if os.path.exists(path):  # some file systems have created it by then
            os.unlink(path)
    return []


def life(folder: str, states: list[str]) -> list[str]:
    """What is wrong after a job that is killed, comes back, and rolls back."""
    run = partial(training.session, folder, lambda text: None)
    in_child(partial(run, KILLED, die=True), dies=True)
    found = compared(in_child(partial(training.come_back, folder, False)), states, range(KILLED - 2, KILLED + 1))
    in_child(partial(run, 9))
    in_child(partial(run, LAST, back_by=1))
    found += compared(in_child(partial(training.come_back, folder, True)), states, (LAST,))
    return found + in_child(partial(unsound, folder))


def disturbance(folder: str) -> list[str]:
    """What is wrong after a job that changes memory which is being written: file systems that keep checksums may then
    have one of other bytes.
    """
    digests = in_child(partial(training.disturbed, folder, 8))
    found = in_child(partial(training.come_back, folder, False))
    same = found["step"] in (7, 8) and found["digest"] == digests[str(found["step"])]
    return in_child(partial(unsound, folder)) + ([] if same else [f"disturbed: step {found['step']} is another one"])


def unsound(folder: str) -> list[str]:
    found = verify(Catalogue(folder))
    return [] if found.good else [json.dumps(found.data)[:2000]]


def compared(found: dict[str, Any], states: list[str], steps: Any) -> list[str]:
    if found["step"] not in steps:
        return [f"step {found['step']} was restored, not one of {[*steps]}"]
    each = [found, *([found["next"]] if "next" in found else [])]
    return [f"step {one['step']} came back with other contents" for one in each if one["digest"] != states[one["step"]]]


def tried_quota(states: list[str]) -> bool:
    """A quota that lets no second checkpoint through: named, and once there is room, the job goes on."""
    name, made_by = "ext4 with a quota", "mke2fs -O quota, mount -o usrquota"
    try:
        with places.quota(0) as top:
            told = in_child(partial(look, top))
            places.allow(_QUOTA)
            folder = f"{top}/checkpoints"
            said = in_child(partial(refused, folder))
            places.allow(0)
            found = [] if os.strerror(errno.EDQUOT) in said else [f"it is not named: {said}"]
            found += compared(in_child(partial(training.come_back, folder, True)), states, range(LAST + 1))
            found += in_child(partial(unsound, folder))
            places.empty(top)
    except (OSError, RuntimeError, ChildError) as error:
        found, told = [f"it ended with {error}"], {}
    refusal = f"a full quota is a CommitError (`{os.strerror(errno.EDQUOT)}`); with room again, to the bit"
    row(name, made_by, told, "; ".join(found) or refusal)
    for line in found:
        print(f"WRONG: {name}: {line}", flush=True)
    return not found


def refused(folder: str) -> str:
    places.without_exemption()
    try:
        training.session(folder, lambda text: None, LAST)
    except (LayerwiseError, OSError) as error:
        return str(error)
    return "nothing: every checkpoint went through"


def row(name: str, made_by: str, told: dict[str, Any], outcome: str) -> None:
    if not told:
        print(f"ROW | {name} | `{made_by}` | | | | {outcome} |", flush=True)
        return
    direct = re.search(r"aligned to (\d+) bytes in memory and (\d+) in the file", told["direct_io"][1])
    how = f"direct, {direct[1]}/{direct[2]}" if direct else "page cache"
    verdict, text = told["file_system"]
    doctor = verdict if verdict == "ok" else f"{verdict}: {text.replace(places.TOP, '')}"
    reused = "reused" if told["recycles"] else "removed"
    print(f"ROW | {name} | `{made_by}` | {doctor} | {how} | {reused} | {outcome} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
