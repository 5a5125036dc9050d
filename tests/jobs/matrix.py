# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints of one layout (a wrapper on a number of ranks), or restores those of others into one.

    matrix.py TASKS OUT

TASKS is a JSON file with a list of tasks, done in order; OUT gets one JSON line for each, {"task": its number,
"verdict": "ok" or what is wrong}, and {"task": ..., "begun": true} before. A task has `do`, `wrapper`, and

    write   case, into                   trains, saves in INTO/ckpt, and puts down the global form beside it
    read    case, source                 fills its memory with noise, restores what `write` left, compares;
                                         "rounded" if that took `cast="target"`
    load    case, source, how            the same without an engine: `into` live tensors, into a model on the `meta`
                                         device, or by `dcp`, which reads an export
    leg     case, dir, step, before, into   one leg of a tour: restores, trains one step, and compares with a job that
                                         got the state of BEFORE by hand; leaves the global form in INTO

A case is an optimizer and what its tensors hold, `adamw-numbers`: `trained` as training left them, or `numbers`, where
each element of the whole state has a number of its own. With `sabotage` a task spoils what it restored.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from job_kit import process_group
from matrix_wrappers import (
    Flat,
    FlatOriginal,
    Global,
    Hybrid,
    Job,
    OnMeta,
    Redundant,
    Replicated,
    Sharded,
    TensorParallel,
    label,
)
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import layerwise_dist as lwd
from layerwise_dist.capture import survey
from layerwise_dist.errors import MismatchError
from layerwise_dist.exporting.export import export
from layerwise_dist.reading.meta import is_meta

STEPS, ASIDE = 3, 500  # an iteration whose batch is none of the others
STATE = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
CONFIG = {"commit": {"timeout_s": 30.0, "on_failure": "raise"}, "pool_mb": 8, "writer": {"block_kb": 4}}
STEP_OF = {"block": 5.0, "rest": 7.0}  # in `numbers`: what becomes one flat tensor counts alike


def zero(stage: int, dtype: torch.dtype = torch.float32) -> Callable[[str, int], Job]:
    def build(optimizer: str, seed: int) -> Job:
        import matrix_zero

        kind = (matrix_zero.Zero, matrix_zero.Zero1, matrix_zero.Zero2, matrix_zero.Zero3)[stage]
        return low(kind, dtype)(optimizer, seed)

    return build


def low(kind: type[Job], dtype: torch.dtype = torch.bfloat16) -> type[Job]:
    """The same job in another precision."""
    return type(kind.__name__, (kind,), {"dtype": dtype})


BUILD: dict[str, Callable[[str, int], Job]] = {
    "plain": lambda optimizer, seed: Job(optimizer, seed, frozen_too=True),
    "ddp": lambda optimizer, seed: Replicated(optimizer, seed, frozen_too=True),
    "ddp-zero": Redundant,
    "fsdp1": lambda optimizer, seed: Flat(optimizer, seed, turned=True),
    "fsdp1-orig": FlatOriginal,
    "fsdp2": lambda optimizer, seed: Sharded(optimizer, seed, turned=True),
    "hsdp": lambda optimizer, seed: Hybrid(optimizer, seed, frozen_too=True),
    "tp-fsdp2": TensorParallel,
    "zero0": zero(0), "zero1": zero(1), "zero2": zero(2), "zero3": zero(3),
    "ddp-bf16": lambda optimizer, seed: low(Replicated)(optimizer, seed, frozen_too=True),
    "fsdp2-bf16": lambda optimizer, seed: low(Sharded)(optimizer, seed, turned=True),
    "zero1-bf16": zero(1, torch.bfloat16), "zero2-fp16": zero(2, torch.float16), "zero3-bf16": zero(3, torch.bfloat16),
}  # fmt: skip


# -- what all ranks know ---------------------------------------------------------------------------------------------


def shared(value: Any) -> Any:
    """Rank 0's."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def everywhere(problem: str) -> str:
    """The same on all ranks: "" if no rank has a problem, or what those say that have one."""
    told = [""] * dist.get_world_size()
    dist.all_gather_object(told, problem)
    if len({*told}) == 1:
        return told[0]
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(told) if text)


def tried(action: Callable[[], Any]) -> str:
    """The error of it on this rank, "" for none."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:3000]}"
    return ""


# -- the global form -------------------------------------------------------------------------------------------------


def numbered(like: Global) -> Global:
    """Each element of all tensors has a number of its own, below 2^24, so that fp32 has it exactly."""
    made, at = {}, 1
    for name, value in sorted(like.items()):
        kind, _, fqn = name.partition("/")
        if kind == "step":
            made[name] = torch.full_like(value, STEP_OF[label(fqn)])
        elif not value.is_floating_point():
            made[name] = torch.full_like(value, 11)
        else:
            made[name] = torch.arange(at, at + value.numel(), dtype=value.dtype).reshape(value.shape)
            at += value.numel()
    assert at < 1 << 24
    return made


def differs(name: str, found: torch.Tensor, wanted: torch.Tensor) -> str:
    """In what a tensor is not the other to the bit; "" if it is."""
    if name.startswith("step/"):  # a tensor or a number, as the optimizer has it
        found, wanted = found.double(), wanted.double()
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return f"{name} is {found.dtype} of {list(found.shape)}, not {wanted.dtype} of {list(wanted.shape)}"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    wrong = found.contiguous().view(bits) != wanted.contiguous().view(bits)
    if not wrong.any():
        return ""
    at = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ, first {list(at)}: {found[at].item()!r}, not "
        f"{wanted[at].item()!r}"
    )


def difference(found: Global, golden: Mapping[str, torch.Tensor], rank: int) -> str:
    """What is wrong with what `rank` found: the first tensor, and how many there are. "" if nothing is.

    Each buffer of `golden` is there for each rank that had its own: that one's or rank 0's is right, on rank 0 its own.
    """
    wrong = []
    for name in sorted(found):
        kind, _, fqn = name.partition("/")
        right = [golden[each] for each in ([f"buffer@0/{fqn}", f"buffer@{rank}/{fqn}"] if kind == "buffer" else [name])
                 if each in golden]  # fmt: skip
        if not right:
            wrong.append(f"{name} is there and should not be")
        elif all(each := [differs(name, found[name], one) for one in right]):
            wrong.append(each[0])
    if rank == 0:
        wrong += [f"{name} is missing" for name in golden if "@" not in name and name not in found]
    return said(wrong)


def with_rank(whole: Global) -> Global:
    """Its buffers as those of rank 0, as `difference` wants them."""
    return {f"buffer@0/{name[7:]}" if name.startswith("buffer/") else name: value for name, value in whole.items()}


def said(wrong: list[str]) -> str:
    return f"{len(wrong)} wrong; {wrong[0]}" if len(wrong) > 1 else "".join(wrong)


def unlike(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Hyper-parameters: those that both optimizers have."""
    wrong = [
        f"{fqn}: {key} is {value!r}, not {wanted[fqn][key]!r}"
        for fqn, group in found.items()
        for key, value in group.items()
        if key in wanted[fqn] and value != wanted[fqn][key]
    ]
    return said(wrong or [f"no hyper-parameters of {fqn}" for fqn in wanted if fqn not in found])


def keep(job: Job, path: Path) -> None:
    """Puts a job's global form down, with each rank's buffers where they may differ."""
    held, told = job.take(), [{}] * dist.get_world_size()
    dist.all_gather_object(told, job.buffers())
    hyper = job.hyper()
    if dist.get_rank():
        return
    ranks = 1 if isinstance(job, Replicated) else len(told)
    golden = {name: value.contiguous() for name, value in held.items() if not name.startswith("buffer/")}
    golden |= {
        name.replace("/", f"@{rank}/", 1): value.contiguous()
        for rank, buffers in enumerate(told[:ranks])
        for name, value in buffers.items()
    }
    save_file(golden, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(hyper))


def kept(path: str) -> tuple[Global, dict[str, Any]]:
    return load_file(f"{path}.safetensors"), json.loads(Path(f"{path}.json").read_text())


# -- tasks -----------------------------------------------------------------------------------------------------------


class Tasks:
    """All that one launch does. Jobs that read stay, by wrapper and optimizer."""

    def __init__(self, scratch: str) -> None:
        self._scratch = scratch
        self._jobs: dict[tuple[str, str], Job] = {}

    def write(self, number: int, wrapper: str, case: str, into: str) -> str:
        optimizer, _, fill = case.partition("-")
        numbers = fill == "numbers"
        survey.LEAST_BASE_BYTES = 1 << 20 if numbers else 1  # with `trained` the frozen layer is in a file of its own
        job = BUILD[wrapper](optimizer, 1)
        every = {"every_n_steps": None, "save_last": False} if numbers else {}
        with job.attach(f"{into}/ckpt", keep_last=1, audit="always", **every, **CONFIG) as ckpt:
            for step in ckpt.steps(STEPS):
                job.train(step)
            if numbers:
                wanted = shared(numbered(job.take()))
                job.put(wanted)
                if wrong := everywhere(difference(job.take(), with_rank(wanted), job.rank)):
                    return f"the numbers were not put in: {wrong}"
                ckpt.save("numbers")
        keep(job, Path(into, "golden"))
        return "ok"

    def read(
        self, number: int, wrapper: str, case: str, source: str, sabotage: bool = False, from_masters: bool = False
    ) -> str:
        """`from_masters`: the source had fp32 masters of what it computed with."""
        optimizer = case.partition("-")[0]
        job = self._jobs.get((wrapper, optimizer))
        if job is None:  # the first restore is into an optimizer without state, all others into noise
            job = self._jobs[wrapper, optimizer] = BUILD[wrapper](optimizer, 2)
        else:
            if job.without_state():
                job.train(ASIDE)
            job.noise(number)
        folder = f"{self._scratch}/{number}"
        copied = tried(lambda: shutil.copytree(f"{source}/ckpt", folder)) if job.rank == 0 else ""
        if problem := everywhere(copied):
            return problem
        try:
            return self._restored(job, folder, source, sabotage, from_masters)
        finally:
            if job.rank == 0:
                shutil.rmtree(folder)

    def _restored(self, job: Job, folder: str, source: str, sabotage: bool, from_masters: bool) -> str:
        ckpt: Any = None

        def restore() -> None:
            nonlocal ckpt
            ckpt = job.attach(folder, every_n_steps=None, save_last=False, **CONFIG)
            if rounds:
                try:
                    ckpt.restore()
                except MismatchError as error:
                    assert 'restore(cast="target") rounds them' in str(error), error
                else:
                    raise AssertionError("values were rounded, and nobody had asked for it")
            step = ckpt.restore(cast="target") if rounds else ckpt.restore()
            assert step == STEPS, f"restored step {step}"

        golden, hyper = kept(f"{source}/golden")
        rounds = rounded(job, golden, made=from_masters)
        problem = everywhere(tried(restore))
        if not problem and sabotage:
            spoil(job.tensors())
        lacking = [] if problem else job.without_state()
        problem = problem or everywhere(f"no optimizer state of {lacking}" * bool(lacking))
        if not problem:
            golden = {name: value.to(dtype_of(job, name, golden)) for name, value in golden.items()}
            live = "what the model computes with: "
            wrong = difference(job.take(), golden, job.rank)
            wrong = wrong or (live + rest if (rest := difference_of_some(job.live(), golden)) else "")
            problem = everywhere(wrong or unlike(job.hyper(), hyper))
        if ckpt is not None:
            problem = everywhere(tried(ckpt.close)) or problem
        return problem or ("rounded" if rounds else "ok")

    def load(self, number: int, wrapper: str, case: str, source: str, how: str = "into") -> str:
        optimizer, folder = case.partition("-")[0], f"{source}/ckpt"
        made: list[Job] = []

        def loaded() -> None:
            if how == "meta":
                job = OnMeta(optimizer, 3, lambda net: lwd.load(net, folder))
                assert not any(map(is_meta, (*job.net.parameters(), *job.net.buffers())))
                assert job.net.head.weight is job.net.embed.weight
            else:
                job = BUILD[wrapper](optimizer, 3)
                job.train(ASIDE)
                job.noise(number)
            made.append(job)
            if how == "dcp":
                self._by_dcp(job, folder, f"{self._scratch}/{number}")
            else:
                own = job.engine.optimizer if isinstance(job.model, DeepSpeedEngine()) else job.optimizer
                report = lwd.load(job.model, folder, optimizer=own)
                assert report.step == STEPS

        problem = everywhere(tried(loaded))
        if problem:
            return problem
        golden, hyper = kept(f"{source}/golden")
        job = made[0]
        wrong = difference(job.take(), golden, job.rank)
        return everywhere(wrong or unlike(job.hyper(), hyper)) or "ok"

    def _by_dcp(self, job: Job, folder: str, out: str) -> None:
        if job.rank == 0:
            with lwd.open_checkpoint(folder) as ckpt:
                export(ckpt, out, "dcp")
        dist.barrier()
        model, optimizer = get_state_dict(job.model, job.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=out)
        set_state_dict(job.model, job.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    def leg(self, number: int, wrapper: str, case: str, dir: str, step: int, before: str | None, into: str) -> str:
        optimizer = case.partition("-")[0]
        survey.LEAST_BASE_BYTES = 1  # the frozen layer is in a file of its own, which no job of another cut refers to
        job = BUILD[wrapper](optimizer, 10 + step)
        if before is not None:
            job.train(ASIDE)
            job.noise(step)
        with job.attach(dir, keep_last=1, audit="always", **CONFIG) as ckpt:
            restored: list[int] = []
            if problem := everywhere(tried(lambda: restored.append(ckpt.restore()))):
                return problem
            if restored != [step]:
                return f"restored step {restored[0]}, not {step}"
            for each in ckpt.steps(step + 1):
                job.train(each)
        told: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(told, ckpt.stats()["bases_written"])
        if not sum(told):
            return "the frozen layer was not written anew"
        keep(job, Path(into))
        if before is None:
            return "ok"
        golden, _ = kept(before)
        by_hand = BUILD[wrapper](optimizer, 20 + step)
        by_hand.train(ASIDE)
        by_hand.put({name.replace("buffer@0/", "buffer/"): value for name, value in golden.items()})
        by_hand.train(step)
        wanted, found = by_hand.take(), job.take()
        if job.rank:  # running statistics are each rank's own
            found = {name: value for name, value in found.items() if not name.startswith("buffer/")}
        wrong = difference(found, with_rank(wanted), job.rank)
        return everywhere(wrong or unlike(job.hyper(), by_hand.hyper())) or "ok"


def dtype_of(job: Job, name: str, golden: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype in which a job has what is called so in a global form."""
    kind, _, fqn = name.partition("/")
    if kind == "step" or not golden[name].is_floating_point():
        return golden[name].dtype
    of_model = kind.startswith("buffer") or (kind == "param" and not trained(fqn, golden))
    return torch.float32 if job.masters and not of_model else job.dtype


def trained(fqn: str, golden: Mapping[str, torch.Tensor]) -> bool:
    return any(name.endswith(f"/{fqn}") and name.split("/", 1)[0] in STATE for name in golden)


def rounded(job: Job, golden: Mapping[str, torch.Tensor], *, made: bool) -> bool:
    """Whether a restore into it loses values, by the table in docs/format/ranks.md.

    `made`: a parameter is made of its master.
    """

    def loses(name: str) -> bool:
        was, now = golden[name].dtype, dtype_of(job, name, golden)
        kind, _, fqn = name.partition("/")
        if was == now or not was.is_floating_point or (made and kind == "param" and trained(fqn, golden)):
            return False
        there, here = torch.finfo(was), torch.finfo(now)
        return there.eps < here.eps or there.max > here.max

    return any(map(loses, golden))


def DeepSpeedEngine() -> Any:
    """Its class, of no object where DeepSpeed is not imported."""
    return getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", ())


def difference_of_some(found: Global, golden: Mapping[str, torch.Tensor]) -> str:
    return said([text for name, value in found.items() if (text := differs(name, value, golden[name].to(value.dtype)))])


def spoil(tensors: Iterable[torch.Tensor]) -> None:
    """Two elements change places, in the first tensor of this rank that has two."""
    for tensor in tensors:
        here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if here.numel() > 1 and here.is_floating_point():
            here.view(-1)[:2] = here.view(-1)[:2].flip(0)
            return


def main() -> None:
    tasks, out = json.loads(Path(sys.argv[1]).read_text()), open(sys.argv[2], "a", buffering=1)
    logging.getLogger("layerwise_dist").setLevel(logging.ERROR)
    with process_group() as rank, tempfile.TemporaryDirectory() as scratch:
        if any(task["wrapper"].startswith("zero") for task in tasks):
            import matrix_zero

            matrix_zero.prepare()
        doing = Tasks(shared(scratch))
        for number, task in enumerate(tasks):
            how = {key: value for key, value in task.items() if key != "do"}
            if rank == 0:
                out.write(json.dumps({"task": number, "begun": True}) + "\n")
            try:
                verdict = getattr(doing, task["do"])(number, **how)
            except BaseException:
                # At once: tearing the group down would wait for the others, and they for this rank.
                traceback.print_exc()
                os._exit(1)
            if rank == 0:
                out.write(json.dumps({"task": number, "verdict": verdict}) + "\n")
        dist.barrier()
        del doing


if __name__ == "__main__":
    main()
