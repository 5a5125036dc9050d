# SPDX-License-Identifier: Apache-2.0
"""Starts jobs with torchrun's own agent out of a process that has already imported torch, which takes most of a start.

    warm.py [MODULE...]

imports the modules too. Requests come as JSON lines on standard input: {"script", "nproc", "args", "env", "folder",
"log", "max_restarts", "options", "node", "whole_exit"}. Options are for LaunchConfig; the node, if there is one, is
what `enter` takes. Answers: {"pid": ...} when the agent runs, in a session of its own together with its ranks. The
agent's exit code is written to `<log>.rc`.

{"branch": the name of an abstract Unix socket, "modules", "env", "log"} makes a server of its own out of this one,
which imports the modules and takes its requests from that socket: what is imported here need not be imported again.

With "nproc" 0 the script runs without an agent, as `python SCRIPT ARGS` does. It ends as a rank of the agent's does:
once threads and exit handlers are done, the process is gone. With "whole_exit" it ends as an interpreter does, which
takes longer.
"""

import atexit
import ctypes
import encodings.idna  # noqa: F401
import faulthandler
import gc
import importlib
import json
import mmap
import multiprocessing.popen_fork  # noqa: F401
import multiprocessing.queues  # noqa: F401
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings

import numpy
import torch
import torch._dynamo  # noqa: F401
import torch.distributed.elastic.rendezvous.c10d_rendezvous_backend  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import torch.distributed.run  # noqa: F401
import torch.nn.parallel  # noqa: F401
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import layerwise_dist.cli.verifying  # noqa: F401
import layerwise_dist.engine.assembly  # noqa: F401

_RESTARTS, _RANKS = 64, 64
_NEWNS, _NEWUTS, _NEWNET = 0x20000, 0x4000000, 0x40000000  # of clone(2)
_BIND, _REC, _PRIVATE = 4096, 16384, 1 << 18  # of mount(2)


def enter(node: dict[str, str]) -> None:
    """This process, and what it starts, is on a node: {"network", a namespace of `ip netns`; "name"; "disk", a folder
    that is at "mounted"}.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *args: object) -> None:
        if getattr(libc, name)(*(arg.encode() if isinstance(arg, str) else arg for arg in args)):
            raise OSError(ctypes.get_errno(), f"{name}{args}: {os.strerror(ctypes.get_errno())}")

    with open(f"/run/netns/{node['network']}") as network:
        call("setns", network.fileno(), _NEWNET)
    call("unshare", _NEWNS | _NEWUTS)
    call("mount", None, "/", None, ctypes.c_ulong(_REC | _PRIVATE), None)
    call("mount", node["disk"], node["mounted"], None, ctypes.c_ulong(_BIND), None)
    socket.sethostname(node["name"])


def wait_for_all_forks(begun: mmap.mmap) -> None:
    """`begun` is what an agent and its ranks share: of each restart, which of its ranks were forked.

    A rank that connects makes the agent's store look up its name. A rank that is forked meanwhile has the locks of
    that look-up, held by nobody: it would wait for them in its own connect.
    """
    place = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) * _RANKS
    begun[place + int(os.environ["LOCAL_RANK"])] = 1
    while not all(begun[place : place + int(os.environ["LOCAL_WORLD_SIZE"])]):
        time.sleep(0.001)


def run(begun: mmap.mmap, path: str, args: list[str]) -> None:
    wait_for_all_forks(begun)
    run_alone(path, args)


def run_alone(path: str, args: list[str]) -> None:
    # A rank that torchrun starts is a new program. A forked one has the agent's handlers, which Python runs only
    # between two bytecodes: within a collective that waits for a dead rank, SIGTERM would be put off for ever.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [path, *args]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(path, run_name="__main__")


def hurry() -> None:
    """An agent's rendezvous asks inspect for the names of its own functions, for its log, which looks at the files of
    all modules there are: half a second. And it waits for up to 0.3 s, so that agents of a large job ask one by one.
    """
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name
    delay = dynamic_rendezvous._delay
    dynamic_rendezvous._delay = lambda seconds: delay(seconds) if seconds != (0, 0.3) else None


def agent(request: dict) -> int:
    if request["nproc"] == 0:
        return program(request)
    options = {
        "min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0",
        "run_id": str(os.getpid()),
        "rdzv_configs": {"timeout": 60}, **request["options"],
    }  # fmt: skip
    config = LaunchConfig(
        nproc_per_node=request["nproc"], max_restarts=request["max_restarts"], monitor_interval=0.05,
        start_method="fork", **options,
    )  # fmt: skip
    try:
        elastic_launch(config, run)(mmap.mmap(-1, _RESTARTS * _RANKS), request["script"], request["args"])
        return 0
    except BaseException as error:  # noqa: BLE001
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1


def end(code: object) -> None:
    """What sys.exit(code) does, without taking all modules apart: that is half a second for a child of this process."""
    threading._shutdown()
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def program(request: dict) -> int:
    """Runs the script in a child. Its exit code, or less than 0 for a signal."""
    pid = os.fork()
    if pid == 0:
        # As in a new interpreter: a script that seeds nothing has other random numbers each time.
        torch.seed()
        numpy.random.seed()
        random.seed()
        tempfile.tempdir = None
        os.chdir(request["folder"])
        try:
            run_alone(request["script"], request["args"])
        except SystemExit as asked:
            if request["whole_exit"]:
                raise
            end(asked.code)
        except Exception:
            if request["whole_exit"]:
                raise
            sys.excepthook(*sys.exc_info())
            end(1)
        if not request["whole_exit"]:
            end(None)
        sys.exit()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def imported(names: list[str]) -> None:
    for name in names:
        importlib.import_module(name)
    hurry()
    gc.collect()
    gc.freeze()  # what each rank would walk, and so copy, at each collection


def branch(request: dict) -> None:
    """This process, a fork of a server, is one itself from now on."""
    log = os.open(request["log"], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    os.dup2(log, 1)  # what modules print as they are imported is no answer
    os.dup2(log, 2)
    if request["env"].get("PYTHONWARNINGS") == "ignore":  # an interpreter looks at it when it starts
        warnings.simplefilter("ignore")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\0" + request["branch"])
        imported(request["modules"])
        sys.stdout.flush()
        os.dup2(connection.fileno(), 0)
        os.dup2(connection.fileno(), 1)


def main() -> None:
    torch.set_num_threads(1)
    imported(sys.argv[1:])
    while line := sys.stdin.readline():
        request = json.loads(line)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.environ.update(request["env"])
            if "branch" in request:
                branch(request)
                continue
            log = os.open(request["log"], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            # Of the ranks too: where they are, if the test has waited for too long.
            faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
            if request["node"] is not None:
                enter(request["node"])
            code = agent(request)
            with open(request["log"] + ".rc.tmp", "w") as file:
                file.write(str(code))
            os.rename(request["log"] + ".rc.tmp", request["log"] + ".rc")
            os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    main()
