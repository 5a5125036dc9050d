# SPDX-License-Identifier: Apache-2.0
"""The real classes fit the protocols of `storage/protocols.py`: by types (mypy reads this file too), and by names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import layerwise_native_testing
import pytest

from layerwise_dist import _native
from layerwise_dist.bench.light import LightWrite
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.monitor.connection import MonitorLink
from layerwise_dist.monitor.messages import Opened
from layerwise_dist.monitor.staging import StagedWrite, StagingAdapter
from layerwise_dist.storage import protocols
from layerwise_dist.storage.adapter import PCCheckAdapter, ShardWrite, Unbegun
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.shard_layout import Source
from layerwise_dist.tensors.slices import Slice

pytestmark = pytest.mark.quick

ATTEMPT = AttemptId(1, 1, 1)


def check_types(
    env: _native.Env, lock: _native.FileLock, direct: PCCheckAdapter, staging: StagingAdapter, write: ShardWrite,
    staged: StagedWrite, light: LightWrite, unbegun: Unbegun,
) -> None:  # fmt: skip
    """Never called: what it assigns is for mypy."""
    _env: protocols.Env = env
    _lock: protocols.FileLock = lock
    _adapters: list[protocols.ShardWriterAdapter] = [direct, staging]
    _bases: protocols.BaseWriter = direct
    _writes: list[protocols.ShardWrite] = [write, staged]
    _in_place: protocols.InPlaceWrite = write
    _light: list[protocols.Write] = [light, write, staged]
    _leftovers: list[protocols.Leftover] = [unbegun, light, write, staged]


def members(protocol: type) -> Iterator[tuple[str, object]]:
    """Of a protocol and of those that it builds on; None for one that is not in the class but annotated there."""
    for base in protocol.__mro__:
        if getattr(base, "_is_protocol", False):
            for name in base.__annotations__:
                yield name, None
            for name, member in vars(base).items():
                if not name.startswith("_"):
                    yield name, member


def misfits(thing: object, protocol: type) -> list[str]:
    """What `thing` has not of the protocol, and which calls it takes by other names of arguments."""
    found = []
    for name, member in members(protocol):
        own = getattr(type(thing), name, None)
        if not hasattr(thing, name):
            found.append(f"{type(thing).__name__} has no {name}")
        elif inspect.isfunction(member) and inspect.isfunction(own):  # of the core's, test_stub.py holds the names
            wanted = inspect.signature(member).parameters
            if all(each.kind is not each.POSITIONAL_ONLY for each in wanted.values()):
                takes = list(inspect.signature(own).parameters)
                if takes[: len(wanted)] != list(wanted):
                    found.append(f"{type(thing).__name__}.{name} takes {takes}, the protocol says {list(wanted)}")
    return found


@pytest.fixture
def adapters() -> Iterator[tuple[PCCheckAdapter, StagingAdapter]]:
    env = layerwise_native_testing.MemoryEnv()
    env.make_dir("/ckpt")
    direct = PCCheckAdapter(env, "/ckpt", rank=0, world_size=1)
    direct.allocate_staging_buffer(8)
    link = SimpleNamespace(rank=0, on=lambda *_: None, on_lost=lambda _: None, send=lambda _: None, close=lambda: None)
    facts: Opened = {"info": {}, "direct": False, "memory_align": 64}
    yield direct, StagingAdapter(cast(MonitorLink, link), LayerwiseConfig(), facts, lambda *_: None)
    direct.close(10)


def test_both_adapters_and_their_writes_have_what_engine_and_capture_ask(
    adapters: tuple[PCCheckAdapter, StagingAdapter],
) -> None:
    layers = [("layer", [Source(Slice.whole("param", "weight", "F32", (4,)))])]
    for adapter in adapters:
        laid = adapter.lay_out(layers, [0])
        write = adapter.begin(ATTEMPT, laid.shard, laid.plan)
        assert misfits(adapter, protocols.ShardWriterAdapter) == []
        assert misfits(write, protocols.ShardWrite) == []
        write.abort()
        assert (write.in_place is None) == adapter.pooled == (adapter.bases is None)
    direct, _ = adapters
    assert misfits(direct, protocols.BaseWriter) == []
    assert misfits(write, protocols.InPlaceWrite) != []
    assert misfits(direct.begin(ATTEMPT, laid.shard, direct.lay_out(layers, [0]).plan), protocols.InPlaceWrite) == []


def test_what_a_commit_is_told_of_has_what_it_asks(
    adapters: tuple[PCCheckAdapter, StagingAdapter], tmp_path: Path
) -> None:
    assert misfits(LightWrite(_native.PosixEnv(), str(tmp_path), ATTEMPT, 0), protocols.Write) == []
    assert misfits(adapters[0].unbegun(ATTEMPT), protocols.Leftover) == []


def test_an_env_of_the_core_and_its_lock_have_what_python_asks(tmp_path: Path) -> None:
    env = _native.PosixEnv()
    assert misfits(env, protocols.Env) == []
    lock = env.lock(str(tmp_path / "owner"))
    assert misfits(lock, protocols.FileLock) == []
    lock.release()


def test_what_lacks_a_call_or_names_its_arguments_otherwise_is_found() -> None:
    class Short:
        attempt = ATTEMPT

        def abort(self, timeout_s: float) -> None: ...
        def persist(self, seconds: float) -> None: ...

    found = misfits(Short(), protocols.Write)
    assert found == [
        "Short.persist takes ['self', 'seconds'], the protocol says ['self', 'timeout_s']",
        "Short has no discard",
    ]
