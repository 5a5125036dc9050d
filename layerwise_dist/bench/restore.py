# SPDX-License-Identifier: Apache-2.0
"""`bench restore`: from files to a model and optimizer in memory, against other loaders and raw reads. Each from a cold
disk, and with the files in the page cache.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import layerwise_dist as lwd
from layerwise_dist.bench import machine, raw
from layerwise_dist.bench.cold import make_cold, make_warm
from layerwise_dist.bench.figures import Chart, Findings, Spread
from layerwise_dist.bench.model import GPT, Shape, adamw, windows
from layerwise_dist.bench.progress import bar
from layerwise_dist.bench.restoring import BESIDE, beside, restored
from layerwise_dist.bench.workplace import workplace
from layerwise_dist.units import size

_WAYS = {
    "raw-direct": "raw direct reads",
    "raw-buffered": "raw reads with read-ahead",
    "layerwise": "layerwise restore()",
    "torch-load": "torch.load",
    "dcp-load": "dcp.load",
}
_RAW = ("raw-direct", "raw-buffered")
_Seconds = dict[tuple[str, str], list[float]]  # by where the files are, and by way
# Where the files are, in words, and what brings them there.
_PLACES = {"cold": ("from a cold disk", make_cold), "warm": ("from the page cache", make_warm)}


@dataclass(frozen=True, slots=True)
class RestoreBench:
    """`depth` reads of `block_bytes` are in flight in the raw reads and in ours."""

    shape: Shape
    rounds: int
    depth: int
    block_bytes: int


def run(bench: RestoreBench, directory: str, command: str) -> Findings:
    """Raises TooLittleRoom, OSError, and BenchFailed where the page cache cannot be emptied."""
    state = 12 * bench.shape.parameters
    space = workplace(directory, disk_bytes=4 * state + (64 << 20), memory_bytes=4 * state + (1 << 30))
    with space as folder, bar((bench.rounds + 1) * len(_WAYS) * len(_PLACES)) as progress:
        about = machine.describe(str(folder))
        loads = _Loads(bench, folder)
        seconds: _Seconds = {(place, way): [] for place in _PLACES for way in _WAYS}
        attached: dict[str, list[float]] = {place: [] for place in _PLACES}
        for number in range(bench.rounds + 1):
            for place, (_, bring) in _PLACES.items():
                for way in _WAYS:
                    progress.now(f"{_WAYS[way]}, {place}")
                    gc.collect()
                    bring(loads.files[way])
                    took = loads.load(way, bring)
                    if number > 0:
                        seconds[place, way].append(took)
                    progress.advance()
                if number > 0:
                    attached[place].append(loads.attach_s)
        nbytes = {way: sum(path.stat().st_size for path in loads.files[way]) for way in _WAYS}
    return _findings(bench, command, about, seconds, attached, nbytes)


class _Loads:
    """One state on disk in three formats, and a model to load it into."""

    def __init__(self, bench: RestoreBench, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp

        self._bench, self._folder = bench, folder
        self._model = GPT(bench.shape)
        self._optimizer = adamw(self._model.parameters(), "foreach")
        with self._attached() as engine:
            engine.restore()
            engine.explicit()
            self._model(windows(bench.shape, 1)).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            engine.end_step()
        torch.save(self._state(), folder / "torch.pt")
        with _one_process():
            dcp.save(self._state(), checkpoint_id=str(folder / "dcp"), no_dist=True)
        shards = sorted((folder / "layerwise").rglob("*.safetensors"))
        self.files = {
            "raw-direct": shards, "raw-buffered": shards, "layerwise": shards, "torch-load": [folder / "torch.pt"],
            "dcp-load": [path for path in (folder / "dcp").rglob("*") if path.is_file()],
        }  # fmt: skip
        self.attach_s = 0.0  # of the last load by layerwise

    def _attached(self) -> Any:
        writer = {"queue_depth": self._bench.depth, "block_kb": self._bench.block_bytes >> 10}
        return lwd.attach(self._model, self._optimizer, dir=str(self._folder / "layerwise"), writer=writer)

    def _state(self) -> dict[str, Any]:
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, way: str, bring: Callable[[list[Path]], None]) -> float:
        """Seconds. `bring` brings files to where they are to be read from."""
        calls: dict[str, Callable[[], float]] = {
            "raw-direct": self._raw, "raw-buffered": lambda: self._raw(direct=False),
            "layerwise": lambda: self._layerwise(bring), "torch-load": self._torch_load, "dcp-load": self._dcp_load,
        }  # fmt: skip
        return calls[way]()

    def _raw(self, *, direct: bool = True) -> float:
        began = time.perf_counter()
        for path in self.files["raw-direct"]:
            raw.read(path, block_bytes=self._bench.block_bytes, depth=self._bench.depth, direct=direct)
        return time.perf_counter() - began

    def _layerwise(self, bring: Callable[[list[Path]], None]) -> float:
        began = time.perf_counter()
        with self._attached() as engine:
            self.attach_s = time.perf_counter() - began
            bring(self.files["layerwise"])
            return restored(engine)

    def _torch_load(self) -> float:
        began = time.perf_counter()
        torch.load(self.files["torch-load"][0], weights_only=True)
        return time.perf_counter() - began

    def _dcp_load(self) -> float:
        import torch.distributed.checkpoint as dcp

        state = self._state()
        with _one_process():
            began = time.perf_counter()
            dcp.load(state, checkpoint_id=str(self._folder / "dcp"), no_dist=True)
            return time.perf_counter() - began


@contextmanager
def _one_process() -> Iterator[None]:
    """DCP warns that it is used without torch.distributed, which is what is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _findings(
    bench: RestoreBench, command: str, about: dict[str, Any], seconds: _Seconds, attached: dict[str, list[float]],
    nbytes: dict[str, int],
) -> Findings:  # fmt: skip
    rows: list[dict[str, Any]] = []
    charts: list[Chart] = []
    starting = Chart("attach() and restore() beside the reading", ["", *BESIDE], 1)
    starts: list[dict[str, Any]] = []
    for place, (where, _) in _PLACES.items():
        speeds = {way: [nbytes[way] / took for took in seconds[place, way]] for way in _WAYS}
        best = [max(pair) for pair in zip(*(speeds[way] for way in _RAW), strict=True)]
        chart = Chart(f"Restore {where}", ["", "seconds", "GB/s", "÷ raw", "÷ dcp.load"], 1)
        charts.append(chart)
        for way, title in _WAYS.items():
            to_raw = Spread.of([a / b for a, b in zip(speeds[way], best, strict=True)])
            to_dcp = Spread.of([a / b for a, b in zip(speeds[way], speeds["dcp-load"], strict=True)])
            took, speed = Spread.of(seconds[place, way]), Spread.of(speeds[way])
            rows.append({
                "files": place, "way": way, "title": title, "bytes": nbytes[way], "seconds": took.data(),
                "bytes_per_s": speed.data(), "ratio_to_raw": to_raw.data(), "ratio_to_dcp_load": to_dcp.data(),
            })  # fmt: skip
            chart.rows.append([title, took.text(1, 3), speed.text(1e-9), to_raw.text(), to_dcp.text()])
        read = [nbytes["layerwise"] / speed for speed in best]
        parts = beside(attached[place], seconds[place, "layerwise"], read)
        starts.append({"files": place, **{name: spread.data() for name, spread in parts.items()}})
        starting.rows.append([where, *(spread.text(1, 3) for spread in parts.values())])
    notes = [
        f"{bench.shape.parameters / 1e6:.1f}M parameters with AdamW's state, {size(nbytes['layerwise'])}; "
        f"{bench.rounds} rounds, one more before them is not counted. Median (least–greatest). Ratios are of GB/s.",
        "Before each load its files are taken out of the page cache (posix_fadvise) or read into it, and mincore says "
        "that they are.",
        f"raw: our shard, {size(bench.block_bytes, binary=True)} at a time on {bench.depth} threads. Ratios are to the "
        "faster of the two in the same round. restore() and dcp.load fill tensors that exist, torch.load makes new "
        "ones. Only restore() verifies hashes.",
        "The rest: seconds of attach() and restore() together, less raw's.",
    ]
    data = {"results": rows, "starts": starts, "rounds": bench.rounds, "depth": bench.depth,
            "block_bytes": bench.block_bytes, "parameters": bench.shape.parameters}  # fmt: skip
    return Findings(command, about, data, [*charts, starting], notes)
