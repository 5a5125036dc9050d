# SPDX-License-Identifier: Apache-2.0
"""The sealed state: members that are missing, of another type, unknown, or of a value that no job has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attacks.kit import Attack, Make, compact, each

EDITED: dict[str, Any] = {
    "step": "3", "updates": -1, "boundary": [], "objects": 5, "client_state": [], "optimizer": None, "gradients": {},
    "extra_state": [],
}  # fmt: skip
INSIDE: dict[str, Any] = {
    "boundary.kind": "nonsense", "boundary.rng": {}, "boundary.rng_event": 5, "boundary.rng_after": 5,
    "boundary.at": "loader", "boundary.loaders": [], "boundary.loaders.loader.kind": "other",
    "boundary.loaders.loader.iterating": 1, "boundary.loaders.loader.draws": -1, "boundary.loaders.loader.start": 5,
    "boundary.loaders.loader.first": [], "boundary.loaders.loader.later": [], "boundary.loaders.loader.again": 0,
    "boundary.loaders.loader.now": None, "boundary.loaders.loader.now.own": [],
    "boundary.loaders.loader.now.epochs": {"sampler": "1"},
    "optimizer.class": 5, "optimizer.groups": {}, "optimizer.groups.0": [], "optimizer.groups.0.params": "a",
    "optimizer.scalars": [], "optimizer.order": [], "optimizer.order.0": 5,
}  # fmt: skip


NOTHING = {"!": "tensor", "dtype": "uint8", "shape": [0], "offset": 0, "bytes": 0}


def edit(change: Callable[[dict[str, Any]], Any]) -> Make:
    return lambda target: target.newest.edit_state(change)


def at(path: str, value: Any = None, *, remove: bool = False) -> Make:
    def change(tree: Any) -> None:
        *way, last = path.split(".")
        for key in way:
            tree = tree[int(key)] if isinstance(tree, list) else tree[key]
        if remove:
            del tree[last]
        elif isinstance(tree, list):
            tree[int(last)] = value
        else:
            tree[last] = value

    return edit(change)


def whole(text: str, blob: bytes | None = None) -> Make:
    return lambda target: target.newest.put_state(text, blob)


def rng(name: str, value: Any) -> Make:
    return at(f"boundary.rng.{name}", value)


def _python(change: Callable[[list[Any]], Any]) -> Make:
    """Of `random.getstate()`: a tuple of its version, a vector in the blob, and a float or None."""
    return edit(lambda tree: change(tree["boundary"]["rng"]["python"]["v"]))


def attacks() -> list[Attack]:
    return [
        *each("state without", {name: at(name, remove=True) for name in (*EDITED, "wrapper")}),
        *each("state without", {name: at(name, remove=True) for name in (
            "boundary.kind", "boundary.rng", "boundary.rng.torch", "boundary.rng.cuda", "boundary.rng.python",
            "boundary.loaders.loader.draws", "optimizer.class", "optimizer.groups", "optimizer.groups.0.params",
        )}),
        *each("state with a wrong", {name: at(name, value) for name, value in EDITED.items()}),
        *each("state with a wrong", {name: at(name, value) for name, value in INSIDE.items()}),
        *each("state with an unknown member", {path or "of its own": at(f"{path}.more".lstrip("."), 1) for path in (
            "", "boundary", "boundary.rng", "boundary.loaders.loader", "boundary.loaders.loader.now", "optimizer",
        )}),
        *each("state", {
            "of nothing": whole("", b""),
            "that is null": whole("null", b""),
            "that is a list": whole("[]", b""),
            "that is no JSON": whole("{", b""),
            "that is no UTF-8": lambda target: target.newest.put_state(b'{"\xff":1}', b""),
            "with a member twice": lambda target: target.newest.put_state(
                target.newest.state()[0].replace(b'{"step":3', b'{"step":3,"step":3')),
            "with Infinity": lambda target: target.newest.put_state(
                target.newest.state()[0].replace(b'{"step":3', b'{"step":Infinity')),
            "with a number that is infinite": lambda target: target.newest.put_object("1e999"),
            "of another step": at("step", 2),
            "of an endless step": at("step", 10**4000),
            "of endless updates": edit(lambda tree: tree.update(updates=10**30)),
            "with a step that is true": at("step", True),
            "with a blob that is too long": lambda target: target.newest.put_state(
                target.newest.state()[0], target.newest.state()[1] + bytes(64)),
            "with a blob that is too short": lambda target: target.newest.put_state(
                target.newest.state()[0], target.newest.state()[1][:-1]),
            "without a blob": lambda target: target.newest.put_state(target.newest.state()[0], b""),
            "with order of what there is not": edit(
                lambda tree: tree["optimizer"]["order"].update({"0.weight": ["nothing"]})),
            "with order of lists": edit(lambda tree: tree["optimizer"]["order"].update({"0.weight": [[]]})),
            "with a gradient of a number": at("gradients", [5]),
            "with draws without number": at("boundary.loaders.loader.draws", 10**40),
        }),
        *each("random numbers", {
            "of torch that are null": rng("torch", None),
            "of torch that are a list": rng("torch", [1, 2, 3]),
            "of torch that are short": rng("torch", NOTHING),
            "of torch of another type": edit(lambda tree: tree["boundary"]["rng"]["torch"].update(
                dtype="int8")),
            "of Python of another version": _python(lambda v: v.__setitem__(0, 99)),
            "of Python that are short": _python(lambda v: v.__setitem__(1, {"!": "tuple", "v": [1, 2]})),
            "of Python without numbers": _python(lambda v: v.__setitem__(1, {"!": "tuple", "v": []})),
            "of Python that are words": _python(lambda v: v.__setitem__(1, "abc")),
            "of numpy that are null": rng("numpy", None),
            "of numpy that are a number": rng("numpy", 5),
            "of numpy that are nobody's": rng("numpy", {"!": "tuple", "v": ["XX", 1, 2, 3, 4.0]}),
            "of numpy that are short": rng("numpy", {"!": "tuple", "v": ["MT19937", [], 0, 0, 0.0]}),
            "of numpy that are a dict": rng("numpy", {"bit_generator": "MT19937"}),
            "of cuda of words": rng("cuda", {"a": 1}),
            "of a loader's own": at("boundary.loaders.loader.now.own", {"sampler": 5}),
        }),
        *each("objects", {
            "that lack one": at("objects.scheduler", remove=True),
            "with one more": at("objects.more", 1),
            "with a dict that is a list": at("objects.extra", [1]),
            "with a dict that is a number": at("objects.extra", 5),
        }, expect="any"),
        # Only the object itself can tell.
        *each("objects with a scheduler", {
            "that is a number": at("objects.scheduler", 5), "that is null": at("objects.scheduler", None),
        }, expect="named", quiet=True),
        Attack("state with a parameter that there is not", edit(
            lambda tree: tree["optimizer"]["groups"][0]["params"].append("nobody")), "named", says="param/nobody"),
        *each("optimizer", {
            "of another class": at("optimizer.class", "SGD"),
            "of no groups": at("optimizer.groups", []),
            "of groups with words for lr": at("optimizer.groups.0.lr", "fast"),
            "with scalars for a parameter that is not": at("optimizer.scalars", {"nobody": {"x": 1}}),
            "by name": edit(lambda tree: tree["optimizer"].update(optimizers={"a": {"class": "A", "groups": []}})),
            "with lacking parameters": edit(lambda tree: tree["optimizer"].update(lacking=["0.weight"])),
            "with told": edit(lambda tree: tree["optimizer"].update(told={"x": 1})),
            "with state under strings": edit(lambda tree: tree["optimizer"].update(state={"x": 1})),
            "with an optimizer inside": edit(lambda tree: tree["optimizer"].update(inside={"x": 1})),
        }, expect="any"),
    ]  # fmt: skip


__all__ = ["attacks", "compact"]
