# SPDX-License-Identifier: Apache-2.0
"""The likeliest reason why two runs diverge: of what differs, the first thing in an iteration causes the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from layerwise_dist.errors import named
from layerwise_dist.rehearsal.contents import Contents
from layerwise_dist.rehearsal.story import Divergence, Rank, loaders

_LISTED = 4


@dataclass(frozen=True)
class Reason:
    """`key` is stable, for programs; `text` says what is wrong, `advice` what to do."""

    key: str
    text: str
    advice: str


def of_starts(divergence: Divergence | None, contents: Contents, *, first_step: bool, by_hash_order: bool) -> Reason:
    """Why two runs of one command differ that nothing interrupted. `by_hash_order`: they do not when Python hashes
    texts alike in both.
    """
    if by_hash_order:
        return Reason(
            "hash-order", "the order of a set, or of a dict made from one, decides something: it differs between "
            "processes (PYTHONHASHSEED)",
            "sort before iterating, or use a list or a dict with a fixed insertion order",
        )  # fmt: skip
    if divergence is not None and (own := _of_kind(divergence, "generator")) and divergence.given:
        return Reason("unseeded", f"a generator that nothing seeds: {own}", "give it a seed that the script knows")
    if divergence is not None and first_step and divergence.weights:
        return Reason(
            "unseeded", f"the model starts with different values: {_some(divergence.weights)}",
            "seed before the model is made: torch.manual_seed(), and numpy's and Python's generators if they are used",
        )  # fmt: skip
    if divergence is not None and divergence.given:
        unseeded = f" (the global generators differ too: {_some(divergence.rng)})" if divergence.rng else ""
        return Reason(
            "data", f"the forward gets different data: {_some(divergence.given, 'argument ')}{unseeded}. They come "
            "from a clock, os.urandom, an unseeded generator, or the order of files",
            "compute data from seeds, step and epoch only; seed random and numpy.random; sort what a directory lists",
        )  # fmt: skip
    if divergence is not None and divergence.gives:
        return Reason(
            "op", "the forward gets the same inputs but returns something else: an operation in it is not "
            "deterministic",
            "torch.use_deterministic_algorithms(True) names such operations in torch",
        )  # fmt: skip
    if divergence is not None and divergence.gradients:
        return Reason(
            "op", "the forwards agree but the gradients do not: the loss depends on something else, or an "
            f"operation of the backward is not deterministic ({_some(divergence.gradients)})",
            "torch.use_deterministic_algorithms(True) names such operations in torch",
        )  # fmt: skip
    return Reason(
        "update", f"the update itself, or what follows it, differs: {_some(contents.names())}",
        "look at what changes these between the backward and the iteration's end",
    )  # fmt: skip


def of_resume(divergence: Divergence | None, contents: Contents, rank: Rank, *, restored: int) -> Reason:
    """Why a run that was killed and went on after step `restored` differs from one that was not."""
    if divergence is not None:
        found = (
            _written(divergence, restored) or _object_outside(divergence) or _data(divergence, rank)
            or _hidden(divergence) or _random(divergence, rank) or _inside(divergence)
        )  # fmt: skip
        if found is not None:
            return found
    return _sealed(contents)


def _written(divergence: Divergence, restored: int) -> Reason | None:
    if not divergence.weights:
        return None
    when = "between restore() and the first forward" if divergence.step == restored + 1 else "between two iterations"
    return Reason(
        "write", f"something writes into the model {when}, as every start does: {_some(divergence.weights)}",
        "do it before restore(), or only where restore() returned 0",
    )  # fmt: skip


def _object_outside(divergence: Divergence) -> Reason | None:
    wanted = ("generator", "object", "optimizer", "schedule", "model")
    if not divergence.given:
        wanted = ("optimizer", "schedule", "model", "object", "generator")
    for kind in wanted:
        if names := _of_kind(divergence, kind):
            return Reason(f"{kind}-outside", f"{_WHAT[kind]} that no checkpoint has: {names}", _HOW[kind])
    return None


_WHAT = {
    "generator": "a random number generator", "object": "an object with a state, or a part of one,",
    "optimizer": "an optimizer", "schedule": "an LR scheduler", "model": "a model",
}  # fmt: skip
_HOW = {
    "generator": "name it in attach(state={...})",
    "object": "name it in attach(state={...}); if it is in there, its state_dict() leaves something out",
    "optimizer": "attach both: attach(models=..., optimizers={...})",
    "schedule": "name it in attach(state={...})",
    "model": "give it in attach(models={...}), or name it in attach(state={...})",
}


def _data(divergence: Divergence, rank: Rank) -> Reason | None:
    if not divergence.given:
        return None
    what = f"the forward gets different data ({_some(divergence.given, 'argument ')})"
    doubts = [text for text in rank.warned if "a resume may not be exact" in text]
    if doubts:
        key = "workers" if any("worker" in text for text in doubts) else "loader"
        return Reason(key, f"{what}; its loader: {doubts[0]}", "see docs/guide.md, state=")
    attached = rank.attached[-1]["loaders"]
    if not attached and (loose := loaders(rank, divergence.step)):
        return Reason(
            "loader-outside", f"{what}, from a loader whose position no checkpoint has: {_some(loose)}",
            "name it in attach(state={...})",
        )  # fmt: skip
    for name, told in attached.items():
        if told["workers"]:
            return Reason(
                "workers", f"{what}: loader {name!r} has {told['workers']} worker(s), whose own random numbers no "
                "checkpoint has", "draw from generators that are seeded by the sample's index",
            )  # fmt: skip
        if told["by_epoch"]:
            return Reason(
                "set-epoch", f"{what}: loader {name!r} is at the right position, but in another order. "
                "set_epoch() is called after iter(), or with an epoch that a restart counts from 0",
                "keep the epoch in state=, and call set_epoch() with it before each iter()",
            )  # fmt: skip
        return Reason(
            "dataset", f"{what}: loader {name!r} is at the right position, so its dataset {told['data']} "
            "has state of its own",
            "draw from generators that are seeded by the sample's index, or name them in attach(state={...})",
        )  # fmt: skip
    hints = [f"{name} was {one} and is {other}" for name, (one, other) in divergence.values.items()]
    counted = f"; variables that differ: {_some(hints)}" if hints else ""
    return Reason(
        "data", f"{what}, from something that no checkpoint has: a counter, an iterator, a file's position{counted}",
        "name it in attach(state={...}), or compute it from the step",
    )  # fmt: skip


def _hidden(divergence: Divergence) -> Reason | None:
    if not (divergence.hidden and (divergence.gives or divergence.gradients)):
        return None
    return Reason(
        "hidden", f"attributes of modules that are neither parameters nor buffers: {_some(divergence.hidden)}",
        "use register_buffer(), or get_extra_state() and set_extra_state()",
    )  # fmt: skip


def _random(divergence: Divergence, rank: Rank) -> Reason | None:
    if not divergence.rng or divergence.forward is None or not (divergence.gives or divergence.gradients):
        return None
    if not rank.attached[-1]["loaders"] and (loose := loaders(rank, divergence.step)):
        return Reason(
            "loader-outside", f"a loader that state= does not name starts at another position: {_some(loose)}; it "
            "draws from the global generators", "name it in attach(state={...})",
        )  # fmt: skip
    return Reason(
        "random-numbers", f"the global random numbers differ before the forward: {_some(divergence.rng)}. "
        "Something draws from them, or seeds them, in only one of the two runs",
        "seed before restore(), and end iterations by steps() or end_step()",
    )  # fmt: skip


def _inside(divergence: Divergence) -> Reason | None:
    if divergence.count:
        return Reason(
            "forwards", "the iteration runs a different number of forwards", "keep what sets that number in state="
        )
    if divergence.gives:
        return Reason(
            "forward", "the forward gets the same inputs but returns something else: it depends on something outside "
            "the model", "keep that in a buffer of the model, or name it in attach(state={...})",
        )  # fmt: skip
    if divergence.gradients:
        return Reason(
            "loss", f"the forwards agree but the gradients do not ({_some(divergence.gradients)}): the loss "
            "depends on something that no checkpoint has", "name it in attach(state={...})",
        )  # fmt: skip
    return None


def _sealed(contents: Contents) -> Reason:
    objects = [path for path in contents.paths if path.startswith("objects")]
    if objects and not contents.tensors:
        return Reason(
            "object", f"an object in state= does not come back unchanged: {_some(objects)}",
            "compare its state_dict() before and after load_state_dict()",
        )  # fmt: skip
    groups = [path for path in contents.paths if path.startswith("optimizer.") and "groups" in path]
    if groups:
        return Reason(
            "schedule-outside", f"hyper-parameters of the optimizer: {_some(groups)}",
            "name what sets them, such as an LR scheduler, in attach(state={...})",
        )  # fmt: skip
    return Reason(
        "update", f"the update itself, or what follows it, differs: {_some(contents.names())}",
        "name what it depends on in attach(state={...})",
    )  # fmt: skip


def _of_kind(divergence: Divergence, kind: str) -> str:
    return _some(name for name, each in divergence.objects.items() if each == kind)


def _some(names: Iterable[str], before: str = "") -> str:
    return named((f"{before}{name}" for name in names), _LISTED)
