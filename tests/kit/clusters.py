# SPDX-License-Identifier: Apache-2.0
"""Nodes of a cluster: network namespaces with an address and a cable to a switch, mount namespaces, host names."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from functools import cache
from pathlib import Path

from kit.kill import KEEP
from kit.runners import Warm, WarmJob

TOTAL = 60
COLLECTIVE_S = 8  # deadline of the training's own collectives: who is cut off hears nothing, not even an end


def why_no_nodes() -> str:
    """Why this machine cannot have them; empty if nothing is known against it."""
    if os.geteuid() or shutil.which("ip") is None or shutil.which("unshare") is None:
        return "nodes of namespaces need root, iproute2 and util-linux"
    return ""


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, timeout=20, capture_output=True)


class Cluster:
    """Nodes `0` to `count - 1` at 10.213.78.1 and up. Their disks are `folder`/disk-<node>, all mounted on `root`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._tag = f"lw{os.getpid()}"
        self._switch = f"{self._tag}s"
        self.folder = self.root = Path()

    def build(self) -> None:
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        ip("-n", self._switch, "link", "set", "switch", "up")
        for node in range(self.count):
            name = self.name(node)
            ip("netns", "add", name)
            port = f"port{node}"
            ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "net0", "netns", name)
            ip("-n", self._switch, "link", "set", port, "master", "switch", "up")
            ip("-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "net0")
            for link in ("lo", "net0"):
                ip("-n", name, "link", "set", link, "up")

    def remove(self) -> None:
        for name in (*map(self.name, range(self.count)), self._switch):
            ip("netns", "del", name, check=False)

    def name(self, node: int) -> str:
        return f"{self._tag}n{node}"

    def address(self, node: int) -> str:
        return f"10.213.78.{node + 1}"

    def cable(self, node: int, state: str) -> None:
        ip("-n", self._switch, "link", "set", f"port{node}", state)

    def use(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "ckpt"
        self.root.mkdir(parents=True)
        for node in range(self.count):
            self.disk(node).mkdir()

    def disk(self, node: int) -> Path:
        return self.folder / f"disk-{node}"

    def inside(self, node: int, command: list[str]) -> list[str]:
        """`command` on that node."""
        script = 'hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"'
        return [
            "ip", "netns", "exec", self.name(node), "unshare", "--mount", "--uts", "sh", "-c", script, "sh",
            f"node{node}", str(self.disk(node)), str(self.root), *command,
        ]  # fmt: skip

    def torchrun(self, warm: Warm, launch: int) -> list[WarmJob]:
        """The agents of all nodes, each with one rank."""
        port = 29_000 + random.randrange(2_000)  # of a network where nobody else is
        env = {"LAUNCH": str(launch), "GLOO_SOCKET_IFNAME": "net0", "COLLECTIVE_S": str(COLLECTIVE_S)}
        running = []
        for node in range(self.count):
            place = {
                "network": self.name(node), "name": f"node{node}",
                "disk": str(self.disk(node)), "mounted": str(self.root),
            }  # fmt: skip
            running.append(
                warm.start(
                    "kill.py", 1, "fsdp2", self.root, self.folder, "--total", TOTAL, "--keep", KEEP, env=env,
                    node=place, min_nodes=self.count, max_nodes=self.count, run_id="job", rdzv_backend="static",
                    rdzv_endpoint=f"{self.address(0)}:{port}", rdzv_configs={"rank": node, "timeout": 60},
                    local_addr=self.address(node),
                )
            )  # fmt: skip
        return running


@cache
def can_make_nodes() -> bool:
    if why_no_nodes():
        return False
    nodes = Cluster(1)
    try:
        nodes.build()
    except subprocess.CalledProcessError:
        return False
    finally:
        nodes.remove()
    return True
