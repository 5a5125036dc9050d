# SPDX-License-Identifier: Apache-2.0
"""Sections: what checkpoints cost on the device, beside others in the same run. They return their figures too."""

from __future__ import annotations

import gc
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gpu.training import Kit
from layerwise_dist import _native
from layerwise_dist.bench.figures import Chart, Spread
from layerwise_dist.bench.model import GPT, QUICK, SHAPES, Shape, adamw, windows
from layerwise_dist.bench.modes import MODES, Mode
from layerwise_dist.capture import stage

_MODES = ("layerwise", "layerwise-monitor", "dcp-async", "torch-checkpointing")
_EVERY = (1, 10)


class _Training:
    def __init__(self, kit: Kit, shape: Shape) -> None:
        torch.manual_seed(0)
        self._kit, self._shape = kit, shape
        self.model: Any = GPT(shape).to(kit.device.kind)
        self.optimizer: Any = adamw(self.model.parameters(), "fused")
        self.iterate(Mode(self.model, self.optimizer, 1, 1), 1)  # makes the optimizer's state

    def iterate(self, mode: Mode, step: int) -> float:
        """Seconds until the device has done all of the iteration."""
        began = time.perf_counter()
        self.model(windows(self._shape, 1).to(self._kit.device.kind)).backward()
        mode.update()
        self.optimizer.zero_grad()
        mode.end_iteration(step)
        self._kit.device.synchronize()
        return time.perf_counter() - began

    def block(self, name: str, every: int, steps: int, folder: Path) -> dict[str, Any]:
        """Mean seconds a step, and seconds of stall for each checkpoint."""
        mode = (Mode if name == "none" else MODES[name])(self.model, self.optimizer, every, 1)
        warm = every if self._kit.quick else mode.warm_steps()
        folder.mkdir()
        mode.start(folder)
        took: list[float] = []
        before = 0.0
        for step in range(1, warm + steps + 1):
            if step == warm + 1:
                before = mode.stalled()
            seconds = self.iterate(mode, step)
            if step > warm:
                took.append(seconds)
            mode.between(step)
        stalled = mode.stalled() - before
        mode.finish()
        gc.collect()
        shutil.rmtree(folder)
        return {"step_s": sum(took) / len(took), "stall_s": stalled / (steps // every)}


def cost(kit: Kit) -> tuple[str, list[Chart], dict[str, Any]]:
    """Step and stall under this engine, DCP async and torch_checkpointing; each block between two of plain steps."""
    shape = QUICK if kit.quick else SHAPES["98M"]
    every_of = _EVERY[:1] if kit.quick else _EVERY
    rounds, steps = (1, 2) if kit.quick else (3, 20)
    modes = ("layerwise", "dcp-async") if kit.quick else _MODES
    training = _Training(kit, shape)
    rows: list[dict[str, Any]] = []
    chart = Chart(
        f"Training of {shape.parameters / 1e6:.1f}M parameters",
        ["", "every", "step ÷ plain", "stall, ms a checkpoint"], 1,
    )  # fmt: skip
    problems = []
    for name in modes:
        for every in every_of:
            ratios, stalls = [], []
            try:
                before = training.block("none", every, steps, kit.folder / "block")["step_s"]
                for _ in range(rounds):
                    mine = training.block(name, every, steps, kit.folder / "block")
                    after = training.block("none", every, steps, kit.folder / "block")["step_s"]
                    ratios.append(2 * mine["step_s"] / (before + after))
                    stalls.append(mine["stall_s"])
                    before = after
            except Exception as error:
                if name.startswith("layerwise"):
                    raise
                problems.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
                shutil.rmtree(kit.folder / "block", ignore_errors=True)
                break
            ratio, stall = Spread.of(ratios), Spread.of(stalls)
            rows.append({"mode": name, "every": every, "ratio_to_plain": ratio.data(), "stall_s": stall.data()})
            chart.rows.append([MODES[name].name, str(every), ratio.text(1, 3), stall.text(1e3, 1)])
    remark = f"{len(rows)} rows" + (f"; not run: {'; '.join(problems)}" if problems else "")
    return remark, [chart], {"parameters": shape.parameters, "results": rows, "not_run": problems}


def bandwidth(kit: Kit) -> tuple[str, list[Chart], dict[str, Any]]:
    """Staging into the pool against one copy of as many bytes into page-locked memory."""
    nbytes, tensors, rounds = (1 << 20, 4, 2) if kit.quick else (1 << 30, 256, 7)
    each = nbytes // tensors
    pinned = kit.device.cuda
    sources = [torch.empty(each, dtype=torch.uint8, device=kit.device.kind) for _ in range(tensors)]
    whole = torch.empty(nbytes, dtype=torch.uint8, device=kit.device.kind)
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
    pool = _native.BufferPool(nbytes + (1 << 20))
    held = stage.Stage(pool, pinned=pinned)
    buffer = held.room(nbytes, time.monotonic() + 10)
    views = torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes).split(each)
    copies = stage.copies_for(sources[0].device)
    staged_s, raw_s = [], []
    for _ in range(rounds):
        kit.device.synchronize()
        began = time.perf_counter()
        target.copy_(whole, non_blocking=True)
        kit.device.synchronize()
        raw_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        copies.copy(list(zip(views, sources, strict=True)))
        copies.record().synchronize()
        staged_s.append(time.perf_counter() - began)
    del views
    buffer.release()
    held.close(10)
    ratios = Spread.of([raw / mine for raw, mine in zip(raw_s, staged_s, strict=True)])
    speed, raw_speed = nbytes / median(staged_s), nbytes / median(raw_s)
    chart = Chart("Device to host", ["", "GB/s", "÷ one page-locked copy"], 1)
    chart.rows = [["staging", f"{speed / 1e9:.2f}", ratios.text()], ["one copy", f"{raw_speed / 1e9:.2f}", "1"]]
    data = {"bytes": nbytes, "tensors": tensors, "bytes_per_s": speed, "raw_bytes_per_s": raw_speed,
            "ratio_to_raw": ratios.data()}  # fmt: skip
    return f"{speed / 1e9:.2f} GB/s, {ratios.text()} of one copy", [chart], data
