# SPDX-License-Identifier: Apache-2.0
"""Judges the measurements: one sentence, a verdict, and what to change. Pure: measures nothing.

ok: nothing to do. warn: it works, slower or with less of a promise than it could. bad: checkpoints will not be
written, or not survive, or not fit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.doctor.place import Device, Space
from layerwise_dist.doctor.speed import Flushes, Manner, Rates, Shape, median
from layerwise_dist.percentiles import percentile
from layerwise_dist.storage.exposure import listed
from layerwise_dist.storage.mounts import Mount
from layerwise_dist.units import size

Verdict = Literal["ok", "warn", "bad"]

LYING = "A device may acknowledge a flush that it has not done, and no software can prove that it does not"
_QUICK_FLUSH_S = 50e-6
_SLOW_FLUSH_S = 0.1
_SLOW_RATE = 100e6
_NEARLY_FULL = 0.9
_WRITER_SHARE = 0.7
_CLEARLY_FASTER = 1.25
_FEW_FILES = 10_000
_WITHOUT_FLUSH = {"nobarrier", "barrier=0", "volatile"}
_SLOWING = {"sync", "dirsync", "data=journal"}


@dataclass(frozen=True, slots=True)
class Finding:
    """`text` is one sentence, `advice` says what to change, `figures` are numbers: bytes, seconds, bytes a second."""

    name: str
    verdict: Verdict
    text: str
    advice: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> dict[str, Any]:
        return asdict(self)


def of_directory(directory: str, looked_at: str, here: bool, locked: bool) -> Finding:
    figures = {"exists": here, "job_running": locked}
    if locked:
        text = f"{directory} is in use by a running job: the speeds below are what it leaves."
        return Finding("directory", "warn", text, "Run this again while no job writes there.", figures)
    if here:
        return Finding("directory", "ok", f"{directory} is there.", None, figures)
    text = f"{directory} does not exist yet: its nearest existing parent {looked_at} was checked."
    return Finding("directory", "ok", text, None, figures)


def of_access(exposed: list[str]) -> Finding:
    figures = {"exposed": exposed}
    if not exposed:
        return Finding("access", "ok", "Nobody but root may change what is there.", None, figures)
    who = f"{listed(exposed)}: others"
    text = f"{who} may change or remove checkpoints, put links there, or another directory in its place."
    advice = "chmod go-w, or the sticky bit above it; or a directory of the job's user below one that is nobody else's."
    return Finding("access", "warn", text, advice, figures)


def of_file_system(mount: Mount | None, device: Device | None, hooked: str | None) -> list[Finding]:
    if mount is None:
        return [Finding("file_system", "warn", "/proc/self/mountinfo does not say which file system this is.")]
    figures = {
        "type": mount.kind, "where": mount.where, "mount_point": mount.point, "source": mount.source,
        "options": list(mount.options), "device": asdict(device) if device else None,
    }  # fmt: skip
    on = f"{mount.kind} at {mount.point}" + (f" on {_named(device)}" if device else "")
    without = sorted(_WITHOUT_FLUSH.intersection(mount.options))
    slowing = sorted(_SLOWING.intersection(mount.options))
    verdict: Verdict = "ok"
    text, advice = f"{on}, a local file system.", None
    if "ro" in mount.options:
        verdict, text, advice = "bad", f"{on} is mounted read-only.", "Mount it read-write, or use another directory."
    elif mount.where == "memory" or (device is not None and device.memory):
        verdict, text = "bad", f"{on} is memory: nothing in it survives a restart of the machine."
        advice = "Use a directory on a disk. Memory is for tests only."
    elif without:
        verdict, text = "bad", f"{on} is mounted with {', '.join(without)}: flushes do not reach the device."
        advice = f"Mount it without {', '.join(without)}: with it, committed checkpoints do not survive power loss."
    elif mount.where == "network":
        verdict, text = (
            "warn",
            f"{on} is a network file system: its flushes are the server's, and locks can be lost.",
        )
        advice = "Prefer a local disk where the job can restart on the same node; with NFS, export it `sync`."
    elif mount.kind == "overlay":
        verdict, text = "warn", f"{on} is a container's layer: it is removed with the container."
        advice = "Mount a volume or a host directory into the container, and use that."
    elif slowing:
        verdict, text = "warn", f"{on} is mounted with {', '.join(slowing)}, which slows writes down."
        advice = f"Mount it without {', '.join(slowing)}: the engine flushes what must be flushed."
    elif mount.where == "other":
        verdict, text = "warn", f"{on} is not a file system known to flush and rename as it should."
        advice = "Prefer ext4 or xfs."
    found = [Finding("file_system", verdict, text, advice, figures)]
    if hooked:
        found.append(
            Finding(
                "preload",
                "bad",
                f"{hooked} is preloaded: fsync does nothing in this process.",
                "Unset LD_PRELOAD (or empty /etc/ld.so.preload) for the training job.",
                {"library": hooked},
            )  # fmt: skip
        )
    return found


@dataclass(frozen=True, slots=True)
class Used:
    """Bytes of checkpoints that are there already, and of those the ones that stay: under tags, multiples of
    `keep_every_n_steps`, frozen parameters.
    """

    nbytes: int
    staying: int


def of_space(space: Space, held: Used, state: int | None, source: str, config: LayerwiseConfig) -> Finding:
    """`state`: bytes of one checkpoint."""
    figures: dict[str, Any] = {
        "free": space.free, "total": space.total, "files_free": space.files, "held": held.nbytes,
        "staying": held.staying, "checkpoint": state, "needed": None, "peak": None,
    }  # fmt: skip
    there = f"{size(space.free)} free of {size(space.total)}"
    few = space.files is not None and space.files < _FEW_FILES
    inodes = Finding(
        "space", "warn", f"{there}, but room for only {space.files} files.",
        "Remove small files, or use a file system with more inodes.", figures,
    )  # fmt: skip
    if state is None and few:
        return inodes
    if state is None:
        advice = "Give --state-bytes or --params to check whether that is enough: no checkpoint is here to judge by."
        return Finding("space", "ok", f"{there}.", advice, figures)
    copies = config.keep_last + config.max_in_flight + 1
    needed, room = copies * state + held.staying, space.free + held.nbytes
    # Where steps are shorter than a commit, so many more retired files wait for the next shards (recycling.Recycler).
    spares = config.max_in_flight if config.writer.recycle is not False else 0
    figures["needed"], figures["peak"] = needed, needed + spares * state
    more = f", and {size(held.staying)} that stay (tags, keep_every_n_steps, frozen parameters)" if held.staying else ""
    text = (
        f"{there}{f' and {size(held.nbytes)} in checkpoints' if held.nbytes else ''}; retention needs {size(needed)}: "
        f"keep_last {config.keep_last} + max_in_flight {config.max_in_flight} + 1, times {size(state)} ({source})"
        f"{more}."
    )
    if room < needed:
        fits = (room - held.staying) // state - config.max_in_flight - 1
        lower = f"set keep_last to {fits}, " if fits >= 1 else ""
        advice = f"Free {size(needed - room)}, {lower}or use a larger disk."
        return Finding("space", "bad", text, advice[0].upper() + advice[1:], figures)
    if few:
        return inodes
    if config.keep_every_n_steps is not None:
        advice = (
            f"keep_every_n_steps {config.keep_every_n_steps} keeps checkpoints forever: the disk is full after "
            f"{(room - needed) // state} of them. Copy them elsewhere and remove them in time."
        )
        return Finding("space", "warn", text, advice, figures)
    if room < figures["peak"]:
        advice = (
            f"That is enough if steps take longer than a commit. If they are shorter, {spares} more retired files "
            f"may wait to be overwritten: free {size(figures['peak'] - room)}, or set writer.recycle to false."
        )
        return Finding("space", "warn", text, advice, figures)
    if needed > _NEARLY_FULL * room:
        return Finding("space", "warn", text, "That is nearly all the free space: other files may fill it.", figures)
    return Finding("space", "ok", text, None, figures)


def of_direct_io(aligns: tuple[int, int] | None, mount: Mount | None, config: LayerwiseConfig) -> Finding:
    if aligns is None:
        advice = "Use ext4 or xfs on a local disk"
        if mount is not None and "data=journal" in mount.options:
            advice = "Mount without data=journal"
        elif mount is not None and any(option.startswith("compress") for option in mount.options):
            advice = "Mount without compression"
        text = "Direct I/O is refused: checkpoints go through the page cache, which is slower and takes memory."
        return Finding("direct_io", "warn", text, f"{advice}.", {"memory_align": None, "offset_align": None})
    memory, offset = aligns
    figures = {"memory_align": memory, "offset_align": offset}
    text = f"Direct I/O works, aligned to {memory} bytes in memory and {offset} in the file."
    if config.writer.direct_io == "off":
        advice = "The configuration turns it off: set writer.direct_io to auto."
        return Finding("direct_io", "warn", text, advice, figures)
    return Finding("direct_io", "ok", text, None, figures)


def of_uring(refusal: str | None, config: LayerwiseConfig) -> Finding:
    wanted = config.writer.backend
    figures = {"available": refusal is None, "backend": wanted}
    unused = f"; writer.backend {wanted!r} does not use it" if wanted not in ("auto", "uring") else ""
    if refusal is None:
        return Finding("io_uring", "ok", f"io_uring is available{unused}.", None, figures)
    if unused:
        return Finding("io_uring", "ok", f"No io_uring: {refusal}{unused}.", None, figures)
    advice = "Set kernel.io_uring_disabled=0 by sysctl on the host"
    if "too old" in refusal:
        advice = "Use a newer kernel"
    elif "sysctl" not in refusal:
        advice = "Allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile"
    if wanted == "uring":
        text = f"No io_uring: {refusal}; attach() raises a ConfigError, since writer.backend is 'uring'."
        return Finding("io_uring", "bad", text, f"{advice}, or set writer.backend to auto.", figures)
    text = f"No io_uring: {refusal}; threads write instead, at more CPU time."
    return Finding("io_uring", "warn", text, f"{advice}.", figures)


def of_lockable(limit: int | None, shape: Shape, backend: str | None) -> Finding:
    """`backend` is what will write; only io_uring's buffers are locked."""
    needed = shape.depth * shape.block
    figures = {"limit": limit, "needed": needed}
    if backend != "uring":
        text = "No memory has to be locked: only io_uring registers buffers."
        return Finding("locked_memory", "ok", text, None, figures)
    if limit is None or limit >= needed:
        text = f"Enough memory may be locked for the writer's {size(needed)} of buffers."
        return Finding("locked_memory", "ok", text, None, figures)
    text = f"Only {size(limit)} of memory may be locked; the writer's {size(needed)} of buffers stay unregistered."
    return Finding("locked_memory", "warn", text, f"Raise `ulimit -l` to {-(-needed // 1024)} or more.", figures)


def of_dax(available: bool, config: LayerwiseConfig) -> Finding:
    figures = {"available": available}
    if available:
        text = "DAX works here: persistent memory can be written by mapping it."
        advice = None if config.writer.backend == "nvm" else "Set writer.backend to nvm to do so."
        return Finding("dax", "ok", text, advice, figures)
    if config.writer.backend == "nvm":
        text = "No DAX here: attach() raises a ConfigError, since writer.backend is 'nvm'."
        advice = "Use a directory on persistent memory that is mounted with -o dax, or set writer.backend to auto."
        return Finding("dax", "bad", text, advice, figures)
    return Finding("dax", "ok", "No DAX here, which matters only for persistent memory.", None, figures)


def of_flushes(times: Flushes, mount: Mount | None, device: Device | None) -> Finding:
    p50, p99, commit = median(times.flush), percentile(times.flush, 99), median(times.commit)
    figures = {"p50": p50, "p99": p99, "commit_p50": commit, "count": len(times.flush)}
    text = (
        f"A flush takes {_ms(p50)} (p50), {_ms(p99)} (p99); making a small file durable under its name {_ms(commit)}. "
        f"{LYING}."
    )
    if (mount is not None and mount.where == "memory") or (device is not None and device.memory):
        return Finding("flush", "ok", text, "In memory a flush does nothing.", figures)
    if p50 < _QUICK_FLUSH_S:
        if device is not None and device.virtual:
            advice = "Too fast for a virtual disk: make sure that the host's cache mode does not ignore flushes."
        elif device is not None and device.rotational:
            advice = "Too fast for a rotating disk: its cache is on, or its controller's; it must have a battery."
        elif device is None:
            advice = "That is suspiciously fast for an unknown device: find out what it does with flushes."
        else:
            advice = "Only a device whose cache survives power loss can be that fast: make sure that this one does."
            return Finding("flush", "ok", text, advice, figures)
        return Finding("flush", "warn", text, advice, figures)
    if p99 > _SLOW_FLUSH_S:
        advice = "Slow flushes delay commits, not training: check who else writes to this disk."
        return Finding("flush", "warn", text, advice, figures)
    if device is not None and device.volatile_cache is False:
        advice = "The kernel sends this device no flushes, since it claims to have no volatile cache; is that true?"
        return Finding("flush", "ok", text, advice, figures)
    return Finding("flush", "ok", text, None, figures)


def of_bandwidth(rates: Rates, shape: Shape, nbytes: int) -> Finding:
    """The disk alone: threads that only write."""
    rate, first = median(rates.raw), median(rates.first)
    figures = {
        "bytes": nbytes, "queue_depth": shape.depth, "block": shape.block, "raw": rate, "raw_rounds": rates.raw,
        "raw_first_use": first, "raw_first_use_rounds": rates.first,
        "deeper": _tried(shape.deeper, rates.deeper), "larger": _tried(shape.larger, rates.larger),
    }  # fmt: skip
    text = (
        f"The disk takes {size(rate)}/s over an already written file and {size(first)}/s into a new one, "
        f"{shape.depth} blocks of {shape.block >> 10} KiB at once."
    )
    better = [
        (median(tried), key, value)
        for tried, key, value in (
            (rates.deeper, "writer.queue_depth", shape.deeper.depth),
            (rates.larger, "writer.block_kb", shape.larger.block >> 10),
        )
        # Only what is faster in every round: one round says nothing on a busy machine.
        if len(tried) > 1 and min(tried) > max(rates.raw) and median(tried) > _CLEARLY_FASTER * rate
    ]
    if better:
        best, key, value = max(better)
        return Finding("bandwidth", "warn", text, f"Set {key} to {value}: {size(best)}/s in the same rounds.", figures)
    if rate < _SLOW_RATE:
        advice = "Use a faster disk, or a larger every_n_steps."
        return Finding("bandwidth", "warn", text, advice, figures)
    return Finding("bandwidth", "ok", text, None, figures)


def of_reads(rates: Rates, config: LayerwiseConfig) -> Finding:
    """What a restore waits for where the page cache does not hold the files."""
    figures: dict[str, Any] = {"direct_rounds": rates.read, "read_ahead_rounds": rates.read_ahead}
    if not rates.read:
        text = "Reads were not compared: there is no direct I/O, or writer.direct_io turns it off."
        return Finding("reads", "ok", text, None, {"direct": None, "read_ahead": None, **figures})
    direct, ahead = median(rates.read), median(rates.read_ahead)
    figures |= {"direct": direct, "read_ahead": ahead}
    text = f"From the disk come {size(direct)}/s by direct reads, and {size(ahead)}/s by the kernel's read-ahead."
    used, other = rates.read, rates.read_ahead
    way = "off"
    if config.reader.direct_io == "off":
        used, other, way = other, used, "auto"
    if len(used) > 1 and min(other) > max(used) and median(other) > _CLEARLY_FASTER * median(used):
        return Finding("reads", "warn", text, f"Set reader.direct_io to {way}, for restores.", figures)
    return Finding("reads", "ok", text, None, figures)


def of_writer(rates: Rates, manner: Manner, state: int | None, config: LayerwiseConfig) -> Finding:
    """The engine's own way, flushes included, over retired files and into new ones, each against a raw loop there."""
    first = median(rates.writer_first)
    share_first = first / median(rates.first)
    over = median(rates.writer) if rates.writer else None
    share = None if over is None else over / median(rates.raw)
    steady = first if over is None else over
    figures = {
        "backend": manner.backend, "hash": manner.hash, "recycles": over is not None,
        "rate": over, "rounds": rates.writer, "of_raw": share,
        "first_use": first, "first_use_rounds": rates.writer_first, "of_raw_first_use": share_first,
        "seconds_per_checkpoint": state / steady if state else None,
    }  # fmt: skip
    how = f"The writer ({manner.backend}, {'hashed' if manner.hash else 'without hashes'}, flushed) reaches "
    loop = "of a loop that only writes"
    if over is None or share is None:
        text = f"{how}{size(first)}/s into new files ({share_first:.0%} {loop}); retired files are not reused here."
    else:
        text = (
            f"{how}{size(over)}/s over retired files ({share:.0%} {loop}) and {size(first)}/s into new ones "
            f"({share_first:.0%})."
        )
    if state:
        text += f" A checkpoint of {size(state)} takes {state / steady:.2g} s of the disk."
    if (share_first if share is None else min(share, share_first)) < _WRITER_SHARE:
        spare_core = "Leave the writer a core that training does not use (OMP_NUM_THREADS one lower)."
        return Finding("writer", "warn", text, spare_core, figures)
    advice = None
    if state and type(config.every_n_steps) is int:
        advice = (
            f"Training waits for the disk where every_n_steps ({config.every_n_steps}) iterations take less: raise it."
        )
    return Finding("writer", "ok", text, advice, figures)


def _tried(shape: Shape, rates: list[float]) -> dict[str, Any]:
    return {"queue_depth": shape.depth, "block": shape.block, "rounds": rates}


def _named(device: Device) -> str:
    kind = "rotating" if device.rotational else "solid-state"
    # What a virtual disk says of its rotation is made up.
    return f"{device.name} ({'virtual' if device.virtual else kind} disk)"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
