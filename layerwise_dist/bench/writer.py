# SPDX-License-Identifier: Apache-2.0
"""`bench writer`: durable throughput of the native writer, against plain direct writes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerwise_dist import _native
from layerwise_dist.bench import machine
from layerwise_dist.bench.figures import Chart, Findings, Spread
from layerwise_dist.bench.progress import Bar, bar
from layerwise_dist.bench.raw import RawFile, has_fio
from layerwise_dist.bench.workplace import workplace
from layerwise_dist.capture.pages import back_by_huge_pages
from layerwise_dist.scheduler import BLOCKS_A_BATCH, LayerSize, LayerwiseCheckpointScheduler
from layerwise_dist.storage.shard_layout import ShardLayout, Source
from layerwise_dist.tensors.slices import Slice
from layerwise_dist.units import size

_TENSORS_A_LAYER = 12  # what a transformer's block has
_SPARE = 64 << 20
_DEADLINE_S = 600.0
_USES = ("first", "steady")


@dataclass(frozen=True, slots=True)
class WriterBench:
    """Sizes and blocks in bytes; `tensors` are the numbers of tensors that the same bytes are cut into."""

    sizes: Sequence[int]
    tensors: Sequence[int]
    backends: Sequence[str]
    rounds: int
    depth: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Case:
    """`use` is "first" (a new file) or "steady" (over the file that the round before wrote)."""

    nbytes: int
    tensors: int
    backend: str
    use: str


def backends(depth: int, block_bytes: int) -> dict[str, Callable[[], _native.WriterPool]]:
    """What this machine can write with, by the name in `writer.backend`: makes a pool of `depth` blocks in flight."""

    def pool(name: str) -> Callable[[], _native.WriterPool]:
        return lambda: _native.WriterPool(depth, name, _native.BufferPool(depth * block_bytes), block_bytes)

    there = ["posix", *(["uring"] if _native.WriterPool.probe_uring() is None else [])]
    return {name: pool(name) for name in there}


def run(bench: WriterBench, directory: str, command: str) -> Findings:
    """Raises TooLittleRoom, OSError, and ValueError for a backend that this machine does not have."""
    there = backends(bench.depth, bench.block_bytes)
    chosen = list(there) if list(bench.backends) == ["all"] else list(bench.backends)
    for name in chosen:
        if name not in there:
            raise ValueError(f"backend {name!r}: this machine has {', '.join(there)}")
    cases = [
        Case(nbytes, tensors, backend, use)
        for nbytes in bench.sizes
        for tensors in bench.tensors
        for backend in chosen
        for use in _USES
    ]
    files = 1 + len(cases) // len(bench.sizes)  # of one size at a time: the raw one, and one for each case
    largest = max(bench.sizes)
    space = workplace(
        directory, disk_bytes=files * largest + _SPARE, memory_bytes=len(bench.tensors) * largest + _SPARE
    )
    with space as folder, bar((bench.rounds + 1) * len(cases)) as progress:
        about = machine.describe(str(folder))
        measured = [_Size(bench, nbytes, cases, there, folder, progress) for nbytes in bench.sizes]
        for one in measured:
            one.measure()
    return _findings(bench, command, about, measured)


class _Size:
    """All cases of one size, and what was measured of each: bytes a second, one number a round."""

    def __init__(
        self, bench: WriterBench, nbytes: int, cases: list[Case], pools: dict[str, Callable[[], _native.WriterPool]],
        folder: Path, progress: Bar,
    ) -> None:  # fmt: skip
        self.nbytes = nbytes
        self.cases = [case for case in cases if case.nbytes == nbytes]
        self.speeds: dict[Case, list[float]] = {case: [] for case in self.cases}
        self.raw: list[float] = []
        self.by_tool: dict[str, list[float]] = {"loop": [], **({"fio": []} if has_fio() else {})}
        self._bench, self._pools, self._folder, self._progress = bench, pools, folder, progress

    def measure(self) -> None:
        """Raw and then each case, round by round. A first round, in which memory and files are new, is not counted."""
        block = self._bench.block_bytes
        env = _native.PosixEnv()
        aligns = env.direct_io(str(self._folder))
        direct = aligns is not None and max(aligns) <= 4096
        counts = {case.tensors for case in self.cases}
        shards = {count: Shard(self.nbytes, count, aligns[0] if direct and aligns else 1, block) for count in counts}
        pools = {name: self._pools[name]() for name in {case.backend for case in self.cases}}
        raw = RawFile(self._folder / "raw", self.nbytes, block_bytes=block, depth=self._bench.depth)
        try:
            for number in range(self._bench.rounds + 1):
                self._progress.now(f"{size(self.nbytes)}, raw")
                self._measure_raw(raw, counted=number > 0)
                for case in self.cases:
                    self._progress.now(f"{size(self.nbytes)}, {case.tensors} tensors, {case.backend}, {case.use}")
                    path = self._folder / f"{case.backend}-{case.tensors}-{case.use}"
                    seconds = shards[case.tensors].write(env, pools[case.backend], path, direct=direct, use=case.use)
                    if number > 0:
                        self.speeds[case].append(self.nbytes / seconds)
                    self._progress.advance()
        finally:
            raw.close()
            for pool in pools.values():
                pool.close()
            for path in self._folder.iterdir():
                path.unlink()

    def _measure_raw(self, raw: RawFile, *, counted: bool) -> None:
        speeds = {"loop": raw.write(), "fio": raw.fio()}
        if counted:
            self.raw.append(max(speed for speed in speeds.values() if speed is not None))
            for tool, speed in speeds.items():
                if speed is not None:
                    self.by_tool[tool].append(speed)

    def ratios(self, case: Case) -> list[float]:
        return [speed / raw for speed, raw in zip(self.speeds[case], self.raw, strict=True)]


class Shard:
    """Random tensors of equal size, where torch allocates them, written again and again.

    As under an engine, which asks for them for what it leases, they lie in huge pages where the kernel gives them.
    """

    def __init__(self, nbytes: int, tensors: int, memory_align: int, block_bytes: int) -> None:
        each = max(1, nbytes // tensors // 4)
        noise = torch.randint(-(2**31), 2**31 - 1, (min(each, 16 << 20),), dtype=torch.int32)
        self._tensors = [torch.empty(each, dtype=torch.int32) for _ in range(tensors)]
        for tensor in self._tensors:
            for part in tensor.split(len(noise)):
                part.copy_(noise[: len(part)])
        back_by_huge_pages((tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in self._tensors)
        sources = [
            Source(Slice.whole("param", f"tensor_{index}", "I32", (each,)), tensor.data_ptr() % memory_align)
            for index, tensor in enumerate(self._tensors)
        ]
        cuts = range(0, tensors, _TENSORS_A_LAYER)
        layers = {f"layer_{begin}": sources[begin : begin + _TENSORS_A_LAYER] for begin in cuts}
        arranged = LayerwiseCheckpointScheduler(batch_bytes=BLOCKS_A_BATCH * block_bytes).arrange(
            [LayerSize(name, sum(source.slice.nbytes for source in layer)) for name, layer in layers.items()]
        )
        batches = [(names[0], [source for name in names for source in layers[name]]) for names in arranged]
        self._layout = ShardLayout(batches, memory_align, block_bytes)
        self._plan = _native.Plan(self._layout.blocks, self._layout.segments, self._layout.tensors, self._layout.end)
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def write(self, env: _native.Env, pool: _native.WriterPool, path: Path, *, direct: bool, use: str) -> float:
        """Seconds from the first block queued to the end of fdatasync, the header included.

        `use` is a case's: "steady" goes over the file that the last call left there, as a retired shard is reused.
        """
        retired = None
        if use == "steady" and path.exists():
            retired = path.with_suffix(".retired")
            path.rename(retired)
            self._blank(retired)
        path.unlink(missing_ok=True)
        writer = _native.ShardWriter.order(
            env, pool, self._plan, str(path.parent), str(path), 0o700, 0o600, direct, True,
            reuse=None if retired is None else str(retired),
        )  # fmt: skip
        try:
            writer.set_addresses(self._addresses)
            if not writer.wait(_DEADLINE_S):
                raise TimeoutError(f"{path}: not made within {_DEADLINE_S:g} s")
            if error := writer.reuse_refused() or writer.error():
                raise error
            began = time.perf_counter()
            writer.submit(0, self._plan.blocks)
            if not writer.wait(_DEADLINE_S):
                raise TimeoutError(f"{path}: not written within {_DEADLINE_S:g} s")
            if error := writer.error():
                raise error
            writer.finish(
                self._layout.header(
                    attempt="bench",
                    step=1,
                    rank=0,
                    world_size=1,
                    hashes=writer.hashes_hex(),
                    state=(0, 0),
                    state_hash="0" * 16,
                )  # fmt: skip
            )
            return time.perf_counter() - began
        finally:
            writer.abort()

    def _blank(self, retired: Path) -> None:
        """What must have happened before a shard is overwritten: no header of it is left, not after a crash either."""
        with open(retired, "r+b", buffering=0) as file:
            file.write(bytes(self._layout.header_bytes))
            os.fdatasync(file.fileno())


def _findings(bench: WriterBench, command: str, about: dict[str, Any], measured: list[_Size]) -> Findings:
    rows: list[dict[str, Any]] = []
    many: list[dict[str, Any]] = []
    raws: list[dict[str, Any]] = []
    chart = Chart("Durable throughput", ["size", "tensors", "backend", "file", "GB/s", "÷ raw"], 4)
    few = min(bench.tensors)
    for one in measured:
        raw = Spread.of(one.raw)
        tools = {tool: Spread.of(values).data() for tool, values in one.by_tool.items() if values}
        raws.append({"bytes": one.nbytes, "bytes_per_s": raw.data(), "by_tool": tools})
        chart.rows.append([size(one.nbytes), "-", "raw", "written", raw.text(1e-9), "1"])
        for case in one.cases:
            speed, ratio = Spread.of(one.speeds[case]), Spread.of(one.ratios(case))
            about_case = {
                "bytes": case.nbytes, "tensors": case.tensors, "backend": case.backend, "use": case.use,
            }  # fmt: skip
            rows.append({**about_case, "bytes_per_s": speed.data(), "ratio_to_raw": ratio.data()})
            cells = [size(case.nbytes), f"{case.tensors:,}", case.backend, case.use, speed.text(1e-9), ratio.text()]
            chart.rows.append(cells)
            if case.tensors != few:
                base = one.speeds[Case(case.nbytes, few, case.backend, case.use)]
                share = Spread.of([a / b for a, b in zip(one.speeds[case], base, strict=True)])
                many.append({**about_case, "to_tensors": few, "ratio": share.data()})
    against = Chart(f"The same bytes in more tensors ÷ in {few:,}", ["size", "tensors", "backend", "file", "ratio"], 4)
    for item in many:
        found = Spread.read(item["ratio"]).text()
        against.rows.append([size(item["bytes"]), f"{item['tensors']:,}", item["backend"], item["use"], found])
    notes = [
        f"Blocks of {size(bench.block_bytes, binary=True)}, {bench.depth} in flight; {bench.rounds} rounds, "
        "one more before them is not counted. Median (least–greatest).",
        "raw: direct writes of the same block and depth over an already written file, then fdatasync: "
        + ("the better of a loop of pwritev threads and fio." if has_fio() else "a loop of pwritev threads."),
        "The writer's time goes from the first block queued to the end of fdatasync; hashes and header included.",
    ]
    data = {"raw": raws, "results": rows, "many_tensors": many, "rounds": bench.rounds, "depth": bench.depth,
            "block_bytes": bench.block_bytes, "fio": has_fio()}  # fmt: skip
    return Findings(command, about, data, [chart, *([against] if many else [])], notes)
