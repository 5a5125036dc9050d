# SPDX-License-Identifier: Apache-2.0
"""Runs a command that takes what processor time others leave, in a session of its own.

    python tests/beside.py NICE COMMAND...

Where the kernel shares the processor out by sessions (`sched_autogroup`, sched(7)), a nice value counts within one
only, and each job of a test is a session: the session gets the value too. To be started as no leader of a process
group, so that its number is the session's and the group's.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    nice, command = int(sys.argv[1]), sys.argv[2:]
    os.setsid()
    try:
        with open("/proc/self/autogroup", "w") as session:
            session.write(str(nice))
    except OSError:
        pass  # no such kernel, or not allowed: the other value is what there is
    os.nice(nice)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell without job control lets it be ignored
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
