# SPDX-License-Identifier: Apache-2.0
"""Entries of the directory that nobody put there for this, and names that look like ours."""

from __future__ import annotations

import os
import shutil

from attacks.kit import Attack, Make, Target, each

STRAY = [
    "step_3", "step_backup", "step_", "steps", "branch_", "branch_1.json", "branch_0000000001.json.bak", "base2",
    "owner.lock", "identity.json.tmp.tmp", "manifest.json", "rank_00000.safetensors", "spare_", "probe_", "..x",
    "a" * 255, "b\nc", "d\x1b[31me", "-rf", "*", "~", "$HOME", "\u202egnp", "step_0000000003-000000010000000\u0663",
]  # fmt: skip


def _raw(name: bytes, *, folder: bool) -> Make:
    def make(target: Target) -> None:
        path = os.path.join(os.fsencode(target.root), name)
        if folder:
            os.mkdir(path)
        else:
            with open(path, "wb") as file:
                file.write(b"x")

    return make


def _in_folder(name: str) -> Make:
    return lambda target: (target.newest.folder / name).write_bytes(b"x") and None


def _renamed(change: str) -> Make:
    def make(target: Target) -> None:
        folder = target.newest.folder
        os.rename(folder, folder.with_name(change.format(folder.name)))

    return make


def _of_step_7(target: Target) -> None:
    folder = target.newest.folder
    os.rename(folder, folder.with_name("step_0000000007" + folder.name[15:]))


def _twice(target: Target) -> None:
    """A copy of the newest folder under a name of another step."""
    folder = target.newest.folder
    shutil.copytree(folder, folder.with_name(f"step_0000000099-{folder.name[16:]}"))


def attacks() -> list[Attack]:
    return [
        *each("a stray file called", {repr(name)[:40]: _raw(name.encode(), folder=False) for name in STRAY},
              expect="newest"),
        *each("a stray folder called", {repr(name)[:40]: _raw(name.encode(), folder=True) for name in STRAY},
              expect="newest"),
        *each("a name that is no UTF-8", {
            "of a file": _raw(b"\xff\xfe", folder=False),
            "of a folder": _raw(b"\xff\xfe", folder=True),
            "that looks like a commit's": _raw(b"step_0000000009-00000001000000\xff\xff", folder=True),
            "that looks like a branch's": _raw(b"branch_00000000\xff\xff.json", folder=False),
        }, expect="newest"),
        *each("in a commit's folder a file called", {
            name: _in_folder(name) for name in (
                "manifest.json.bak", "rank_00001.safetensors", "rank_00000.safetensors.partial", "manifest.json.tmp",
                "x\x1b[2J", "rank_99999.safetensors", "rank_\u0660\u0660\u0660\u0660\u0660.safetensors",
            )
        }, expect="newest"),
        *each("a commit's folder renamed to", {
            "a backup": _renamed("{}.bak"),
            "another step": _of_step_7,
        }),
        Attack("a commit's folder with something before its name", _renamed("old_{}"), quiet=True),
        Attack("a commit's folder twice, under another step", _twice, "newest", says="is the manifest of step 3"),
        Attack("an empty folder beside all", lambda target: (target.root / "step_0000000009-0000000100000009").mkdir(),
               "newest"),
    ]  # fmt: skip
