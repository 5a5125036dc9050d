# SPDX-License-Identifier: Apache-2.0
"""Any byte of a checkpoint directory is changed: it is found and named, or an older commit is taken with a warning, or
what is restored is the same bit for bit.

Without `--long` a sample; with it every byte of a small directory, and 10,000 of a larger one.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.cli import call
from kit.shards import Tensors, differing
from kit.swept import Told

import layerwise_dist as lwd
from layerwise_dist.capture import survey
from layerwise_dist.errors import DamageError, LayerwiseError
from layerwise_dist.storage import reader, typed_json

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _bases_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)


class Job:
    """A training with a frozen layer, which checkpoints share."""

    def __init__(self, root: Path, width: int) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.Linear(8, width))
        self.model[0].requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model[1].parameters(), lr=0.1)
        self.place = {"step": 0}
        self.width = width
        config = {"dir": str(root), "keep_last": 2, "writer": {"queue_depth": 1}}
        self.ckpt = lwd.attach(self.model, self.optimizer, config, state={"place": self.place})

    def to(self, step: int) -> None:
        for now in self.ckpt.steps(step):
            self.model(torch.full((2, self.width), 1.0 + now)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.place["step"] = now + 1
        self.ckpt.drain()

    def state(self) -> Tensors:
        found = {f"param/{name}": value.detach().clone() for name, value in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{kind}/{name}"] = torch.as_tensor(value).clone()
        return found | {"place": torch.tensor(self.place["step"]), "rng": torch.get_rng_state()}


@dataclass
class Saved:
    """A directory with two commits, the newer one under a tag, on a branch that goes on from an older step. `read` is
    what each step holds, by way of reading it; `trained` what the job held then.
    """

    root: Path
    width: int
    read: dict[int, tuple[Tensors, bytes]]
    trained: dict[int, Tensors]

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())


def make(root: Path, width: int) -> Saved:
    job, trained = Job(root, width), {}
    job.ckpt.restore()
    job.to(2)
    job.ckpt.restore(step=1)
    job.to(2)
    job.ckpt.save(tag="kept")
    trained[2] = job.state()
    job.to(3)
    trained[3] = job.state()
    job.ckpt.close()
    saved = Saved(root, width, {}, trained)
    for step in trained:
        found = looked(root, step)
        assert isinstance(found, tuple)
        saved.read[step] = found[1]
        assert not differing(restored(saved, root)[1], trained[3])
    assert list(root.glob("base/*/rank_*")) and list(root.glob("branch_*")) and len(list(root.glob("step_*"))) == 2
    return saved


Read = tuple[int, tuple[Tensors, bytes]]


def looked(root: Path, step: int | None = None) -> Read | LayerwiseError:
    """What a reader gets: the step, all tensors, and what was sealed with them."""
    try:
        with lwd.open_checkpoint(root, step) as ckpt:
            tensors = {name: ckpt[name][...] for name in ckpt}
            return ckpt.step, (tensors, b"".join(map(bytes, typed_json.dumps(ckpt.sealed(), path="sealed"))))
    except LayerwiseError as error:
        return error


def restored(saved: Saved, root: Path) -> tuple[int, Tensors]:
    """What a job gets that starts again there. Raises LayerwiseError."""
    job = Job(root, saved.width)
    try:
        step = job.ckpt.restore()
        return step, job.state()
    finally:
        job.ckpt.close()


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture
def warned() -> Iterator[list[str]]:
    handler, log = Warnings(), logging.getLogger("layerwise_dist")
    log.addHandler(handler)
    yield handler.said
    log.removeHandler(handler)


def names(path: Path) -> tuple[str, ...]:
    """What a message about this file may call it."""
    return (str(path), path.name) if path.name.startswith(("branch_", "identity", "owner")) else (str(path),)


def judged(
    saved: Saved, path: Path, found: tuple[int, Any] | LayerwiseError, same: Callable[[int, Any], bool],
    said: list[str],
) -> str:  # fmt: skip
    """ "harmless", "fallback" or "named"; AssertionError for anything else."""
    if isinstance(found, LayerwiseError):
        assert isinstance(found, DamageError), f"{path}: {type(found).__name__}: {found}"
        words = [str(found), *(said if "see the warnings" in str(found) else [])]
        assert any(name in line for name in names(path) for line in words), f"{path} is not named: {words}"
        return "named"
    step, what = found
    assert same(step, what), f"{path}: step {step} was taken, and is not what was saved"
    if step == max(saved.trained):
        return "harmless"
    assert any(name in line for name in names(path) for line in said), f"{path}: step {step}, and not a word: {said}"
    return "fallback"


def changed(path: Path, at: int, mask: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ mask]), at)


def places(saved: Saved) -> list[tuple[Path, int]]:
    return [(path, at) for path in saved.files() for at in range(path.stat().st_size)]


def read_with(saved: Saved, path: Path, at: int, mask: int, said: list[str]) -> str:
    """The verdict with this byte changed, which is changed back."""
    said.clear()
    changed(path, at, mask)
    try:
        found = looked(saved.root)

        def same(step: int, what: tuple[Tensors, bytes]) -> bool:
            return not differing(what[0], saved.read[step][0]) and what[1] == saved.read[step][1]

        return judged(saved, path, found, same, said)
    finally:
        changed(path, at, mask)


def start_with(saved: Saved, path: Path, at: int, mask: int, copy: Path, said: list[str]) -> str:
    """The same of a job that starts again, in a copy. `layerwise verify` says that something is damaged, or it is
    harmless.
    """
    said.clear()
    shutil.copytree(saved.root, copy)
    there = copy / path.relative_to(saved.root)
    changed(there, at, mask)
    verified = call("verify", copy)[0]
    found: tuple[int, Tensors] | LayerwiseError
    try:
        found = restored(saved, copy)
    except LayerwiseError as error:
        found = error
    verdict = judged(saved, there, found, lambda step, what: not differing(what, saved.trained[step]), said)
    assert verified == 1 or verdict == "harmless", f"{path} at {at}: verify calls it sound, and a restore does not"
    shutil.rmtree(copy)
    return verdict


def counts(what: str, verdicts: Counter[str]) -> str:
    found = ", ".join(f"{count:,} {verdict}" for verdict, count in sorted(verdicts.items()))
    return f"corruption, {what}: {verdicts.total():,} bytes changed: {found}, 0 violations"


def test_each_byte_of_a_small_directory_is_found_or_harmless(
    tmp_path: Path, long: bool, warned: list[str], told: Told
) -> None:
    saved, draw = make(tmp_path / "ckpt", 4), random.Random()
    all_places = places(saved)
    chosen = all_places if long else [*sampled(saved, draw, 40), *draw.sample(all_places, 120)]
    verdicts = Counter(read_with(saved, path, at, draw.randrange(1, 256), warned) for path, at in chosen)
    told.say(counts(f"read, of {len(all_places):,} of a small directory", verdicts))
    assert verdicts.total() == len(chosen) and set(verdicts) == {"harmless", "fallback", "named"}


def sampled(saved: Saved, draw: random.Random, of_each: int) -> list[tuple[Path, int]]:
    """Of each kind of file, the first of it: a shard of some kilobytes would else be all that is drawn."""
    kinds = {path.name if path.parts[-3] != "base" else "base": path for path in saved.files()}
    return [(path, draw.randrange(path.stat().st_size)) for path in kinds.values() for _ in range(of_each // 4)]


def test_a_job_starts_again_beside_any_changed_byte_as_a_reader_reads_it(
    tmp_path: Path, long: bool, warned: list[str], told: Told
) -> None:
    saved, draw = make(tmp_path / "ckpt", 4), random.Random()
    of_each = 400 if long else 8
    verdicts: Counter[str] = Counter()
    for number, (path, at) in enumerate(sampled(saved, draw, of_each)):
        verdicts[start_with(saved, path, at, draw.randrange(1, 256), tmp_path / f"copy{number}", warned)] += 1
    told.say(counts("a job starts again, small directory", verdicts))


def test_random_bytes_of_a_larger_directory_are_found_or_harmless(
    tmp_path: Path, long: bool, warned: list[str], told: Told
) -> None:
    saved, draw = make(tmp_path / "ckpt", 60_000 if long else 6_000), random.Random()
    files = [path for path in saved.files() if path.stat().st_size]
    weights = [path.stat().st_size for path in files]
    verdicts: Counter[str] = Counter()
    for path in draw.choices(files, weights, k=10_000 if long else 60):
        verdicts[read_with(saved, path, draw.randrange(path.stat().st_size), draw.randrange(1, 256), warned)] += 1
    told.say(counts(f"read, of {sum(weights):,} of a larger directory", verdicts))


def test_mutation_a_reader_that_does_not_compare_hashes_is_found(
    tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = make(tmp_path / "ckpt", 4)
    newest = max(saved.root.glob("step_*3-*/rank_*"), key=lambda path: path.parent.name)
    with lwd.open_checkpoint(saved.root) as ckpt:
        ((begin, end),) = [(shard_entry.begin, shard_entry.end) for shard_entry in entries(ckpt, "param/1.weight")]
    assert read_with(saved, newest, (begin + end) // 2, 0x10, warned) == "named"
    unhashed(monkeypatch)
    with pytest.raises(AssertionError, match="is not what was saved"):
        read_with(saved, newest, (begin + end) // 2, 0x10, warned)


def entries(ckpt: lwd.Checkpoint, name: str) -> list[Any]:
    return [entry for found in ckpt.whole.tensors[name] for _, entry in found.parts]


def unhashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads takes the bytes as they are."""
    verified = reader.read_verified

    def unverified(native: Any, blocks: Any, hashes: Any, spans: Any) -> Any:
        return verified(native, blocks, [None] * len(hashes), spans)

    monkeypatch.setattr(reader, "read_verified", unverified)


@pytest.mark.parametrize("command", ["show", "cp", "diff"])
def test_a_command_that_takes_an_older_checkpoint_than_the_newest_says_so(
    tmp_path: Path, warned: list[str], command: str
) -> None:
    saved = make(tmp_path / "ckpt", 4)
    (manifest,) = saved.root.glob("step_*3-*/manifest.json")
    changed(manifest, 20, 1)
    warned.clear()
    other = {"show": (), "cp": (tmp_path / "copy",), "diff": (saved.root,)}[command]
    assert call(command, saved.root, *other)[0] == 0
    assert any(str(manifest) in line for line in warned)
