# SPDX-License-Identifier: Apache-2.0
"""Examines one directory: what it is, what the kernel allows there, and how it writes.

Writes only below a folder `.layerwise-doctor-*` of its own, and removes that on every way out that Python sees.
"""

from __future__ import annotations

import errno
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from layerwise_dist import _native
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.doctor import findings, kernel, place, speed
from layerwise_dist.doctor.findings import Finding
from layerwise_dist.storage import filenames
from layerwise_dist.storage.exposure import exposed, exposed_above
from layerwise_dist.storage.mounts import mount_of
from layerwise_dist.storage.retention import staying
from layerwise_dist.units import size

SCRATCH = ".layerwise-doctor-"
_WAY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ROOM = 16 << 20  # beside the measured data: small files, metadata
_USABLE_ALIGN = 4096  # the writer takes no direct I/O that wants more


@dataclass(frozen=True, slots=True)
class Questions:
    """What to look for. `state_bytes`: one checkpoint of all ranks, None to ask the newest one in the directory;
    `nbytes`: data of one measurement, a multiple of 4096; `flushes` and `rounds`: how many of each.
    """

    config: LayerwiseConfig
    state_bytes: int | None = None
    nbytes: int = 256 << 20
    flushes: int = 50
    rounds: int = 3


@dataclass
class Report:
    """`looked_at` is the directory itself, or its nearest existing parent."""

    directory: str
    looked_at: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return all(finding.verdict != "bad" for finding in self.findings)


def examine(directory: str, plan: Questions, progress: Callable[[str], None] = lambda text: None) -> Report:
    """What is wrong with the directory is a finding, and not raised.

    Raises NotADirectoryError for a file, PermissionError for a path that cannot be followed.
    """
    looked_at = place.nearest(directory)
    report = Report(os.path.abspath(os.path.expanduser(directory)), looked_at)
    mount = mount_of(looked_at)
    device = place.device_of(mount) if mount else None
    here = os.path.isdir(report.directory)
    shape = speed.Shape(plan.config.writer.queue_depth, plan.config.writer.block_kb << 10)

    progress("looking at the file system")
    add = report.findings.append
    owned = here and kernel.is_locked(os.path.join(looked_at, filenames.OWNER))
    add(findings.of_directory(report.directory, looked_at, here, owned))
    add(findings.of_access(_access(looked_at, here)))
    report.findings += findings.of_file_system(mount, device, kernel.flushes_are_hooked())
    state, held = plan.state_bytes, findings.Used(0, 0)
    source = "as given"
    if here:
        try:
            found, held = _checkpoints(looked_at, plan.config.keep_every_n_steps, plan.config.keep_tags)
            if state is None:
                state, source = found, "the newest checkpoint"
        except OSError as error:
            text = f"The checkpoints here cannot be read: {_said(error)}."
            add(Finding("checkpoints", "bad", text, "Check who owns them, and run this as the user of the job."))
    space = place.space_of(looked_at)
    add(findings.of_space(space, held, state, source, plan.config))
    refusal = kernel.uring_refusal()
    backend = _backend(plan.config, refusal)
    add(findings.of_uring(refusal, plan.config))
    add(findings.of_lockable(kernel.lockable_bytes(), shape, backend))

    needed = 2 * plan.nbytes + _ROOM
    if space.free < needed:
        text = f"Nothing was measured: it needs {size(needed)}, and {size(space.free)} are free."
        add(Finding("measured", "bad", text, "Free some, or give a smaller --bytes.", {"needed": needed}))
        return report
    try:
        with _scratch(looked_at) as folder:
            aligns = _native.PosixEnv().direct_io(folder)
            if aligns is not None and max(aligns) > _USABLE_ALIGN:
                aligns = None
            add(findings.of_direct_io(aligns, mount, plan.config))
            dax = kernel.has_dax(folder)
            add(findings.of_dax(dax, plan.config))
            if backend == "nvm" and not dax:
                backend = None
            direct = aligns is not None and plan.config.writer.direct_io == "auto"
            progress("flushing")
            add(findings.of_flushes(speed.flush_times(folder, direct, plan.flushes), mount, device))
            manner = speed.Manner(backend, plan.config.hash, plan.config.writer.recycle) if backend else None
            rates = speed.write_rates(
                folder, nbytes=plan.nbytes, shape=shape, direct=direct, manner=manner, rounds=plan.rounds,
                progress=progress,
            )  # fmt: skip
            add(findings.of_bandwidth(rates, shape, plan.nbytes))
            add(findings.of_reads(rates, plan.config))
            if manner is not None:
                add(findings.of_writer(rates, manner, state, plan.config))
    except OSError as error:
        add(_failed(error))
    return report


def _access(looked_at: str, here: bool) -> list[str]:
    try:
        return [*(exposed(looked_at) if here else ()), *exposed_above(looked_at)]
    except OSError as error:
        return [f"{_said(error)}: cannot tell who may write there"]


def _backend(config: LayerwiseConfig, refusal: str | None) -> str | None:
    """What the engine would write with; None where it would refuse to start."""
    wanted = config.writer.backend
    if wanted == "auto":
        return "uring" if refusal is None else "posix"
    return None if wanted == "uring" and refusal is not None else wanted


def _checkpoints(root: str, keep_every: int | None, keep_tags: int | None) -> tuple[int | None, findings.Used]:
    """(bytes of the newest commit of the lineage, what lies on the disk). Raises OSError.

    Damaged commits, and lineages that a fresh start left, are not counted: nothing ever removes them.
    """
    inventory = CheckpointMetadataManager(_native.PosixEnv(), root).inventory()
    lineage, family = inventory.lineage(), inventory.family()
    stay = staying(lineage, family, keep_every_n_steps=keep_every, keep_tags=keep_tags, above=inventory.newest_damage)
    commits = {commit.seq: _on_disk(os.path.join(root, commit.attempt_id.folder)) for commit in family}
    bases = sum(_on_disk(os.path.join(root, filenames.base_folder(base))) for base in inventory.bases)
    unfinished = sum(_on_disk(os.path.join(root, attempt.folder)) for attempt in inventory.unfinished)
    held = findings.Used(sum(commits.values()) + bases + unfinished, bases + sum(commits[seq] for seq in stay))
    return (lineage[0].nbytes if lineage else None), held


def _on_disk(folder: str) -> int:
    """Bytes that its files take."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return 0  # a job that runs retired it meanwhile, or it is no folder


def _failed(error: OSError) -> Finding:
    advice = "Fix that, or use another directory."
    if error.errno in (errno.EACCES, errno.EPERM):
        advice = "Give the user of the job the right to write there: chown or chmod."
    elif error.errno == errno.EROFS:
        advice = "Mount it read-write."
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "Free some space or quota, or give a smaller --bytes."
    figures = {"errno": error.errno}
    return Finding("measured", "bad", f"Nothing more was measured: {_said(error)}.", advice, figures)


def _said(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


@contextmanager
def _scratch(parent: str) -> Iterator[str]:
    """A way to a new folder that stays the same whatever others put in its name's place."""
    name = f"{SCRATCH}{os.getpid()}-{secrets.token_hex(4)}"
    with _signals_raise(), ExitStack() as stack:
        above = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, above)
        try:
            os.mkdir(name, 0o700, dir_fd=above)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.path.join(parent, name)) from None
        held: list[int] = []
        try:
            held.append(os.open(name, _WAY, dir_fd=above))
            stack.callback(os.close, held[0])
            way = f"/proc/self/fd/{held[0]}"
            yield way if os.path.isdir(way) else os.path.join(parent, name)
        except OSError as error:
            _rename(error, held, os.path.join(parent, name))
            raise
        finally:
            _remove(name, above, held)


def _rename(error: OSError, held: list[int], folder: str) -> None:
    """The error names the path that the user knows."""
    way = f"/proc/self/fd/{held[0]}" if held else folder
    if isinstance(error.filename, str) and error.filename.startswith(way):
        error.filename = folder + error.filename[len(way) :]


def _remove(name: str, above: int, held: list[int]) -> None:
    """Not to be interrupted: a second Ctrl-C would leave the data behind."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        for folder in held:
            _empty(folder)
        os.rmdir(name, dir_fd=above)
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _empty(folder: int) -> None:
    """Removes all that is in an open folder, and follows no link."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if not is_folder:
            os.unlink(name, dir_fd=folder)
            continue
        inner = os.open(name, _WAY, dir_fd=folder)
        try:
            _empty(inner)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=folder)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process by an exception, so that the folder is removed then too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
