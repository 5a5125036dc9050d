# SPDX-License-Identifier: Apache-2.0
"""Within the virtual machine: a training job on several file systems, and what its disk is told meanwhile.

record.py NEEDS NAME...

NEEDS is what needs.py wrote. A name is FILE_SYSTEM-SECTOR, or that with one of careless.CARELESS for a job that leaves
this flush out. The log of each is on the disk with this serial number. Then the job runs on one more disk for each file
system until the machine is killed; QEMU logs those. On the console: STATES, of the training alone, and SAID
FILE_SYSTEM, what the job begins and what it is promised.
"""

from __future__ import annotations

import json
import os
import sys
import termios
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import training
from careless import CARELESS
from kit.promises import BEGUN
from system import MAKE, import_all, in_child, mapped, mounted, size_of, tool, zero

LAST, ENDLESS = 12, 60


def device(serial: str) -> str:
    for path in Path("/sys/block").glob("vd*/serial"):
        if path.read_text().strip() == serial:
            return f"/dev/{path.parent.name}"
    raise RuntimeError(f"there is no disk {serial}")


def record(name: str) -> None:
    """A job that is killed in step 5, comes back, goes on to step 9, rolls back by a commit, and ends with `LAST`."""
    kind, sector, *left_out = name.split("-")
    disk, point = device(f"disk-{sector}"), f"/tmp/{name}"
    zero(disk)
    with mapped("disk", f"0 {size_of(disk) // 512} log-writes {disk} {device(name)}") as path:
        tool(*MAKE[kind], path)
        with mounted(path, point, kind):
            os.sync()
            mark(BEGUN)
            run = partial(session, left_out, f"{point}/checkpoints")
            in_child(partial(run, last=5, die=True), dies=True)
            in_child(partial(run, last=9))
            in_child(partial(run, last=LAST, back_by=1))
            mark("ended")
        if "logging_disabled" in tool("dmsetup", "status", "disk"):
            raise RuntimeError("the log is not whole: its disk is full")


def session(left_out: list[str], folder: str, *, last: int, die: bool = False, back_by: int = 0) -> None:
    settings = {key: value for each in left_out for key, value in CARELESS[each]().items()}
    training.session(folder, mark, last, die=die, back_by=back_by, **settings)


def mark(text: str) -> None:
    tool("dmsetup", "message", "disk", "0", "mark", text.replace(" ", "-"))


def run_on(kind: str) -> None:
    """The same job, and on, until the machine is killed."""
    disk, point = device(f"killed-{kind}"), f"/tmp/killed-{kind}"
    tool(*MAKE[kind], disk)
    with mounted(disk, point, kind):
        os.sync()
        run = partial(training.session, f"{point}/checkpoints", partial(say, kind))
        in_child(partial(run, 5, die=True), dies=True)
        in_child(partial(run, 9))
        in_child(partial(run, LAST, back_by=1))
        in_child(partial(run, ENDLESS))


def say(kind: str, text: str) -> None:
    """It has left the machine once this returns."""
    print(f"SAID {kind} {text}", flush=True)
    termios.tcdrain(sys.stdout.fileno())


def timed(what: str, body: Callable[[], None]) -> None:
    began = time.monotonic()
    body()
    print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    training.without_dynamo()
    import_all(json.loads(Path(sys.argv[1]).read_text()))
    print(f"imports: {time.monotonic():.0f} s after the start", flush=True)
    print("STATES " + json.dumps(in_child(partial(training.states, ENDLESS))), flush=True)
    for name in sys.argv[2:]:
        timed(f"RECORDED {name}", partial(record, name))
    kinds = dict.fromkeys(name.split("-")[0] for name in sys.argv[2:])
    children = [os.fork() or os._exit(_ends(partial(run_on, kind))) for kind in kinds]
    for child in children:
        os.waitpid(child, 0)
    raise RuntimeError("the machine was to be killed before the jobs ended")


def _ends(body: Callable[[], None]) -> int:
    try:
        body()
    except BaseException as error:
        print(f"FAILED {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    main()
