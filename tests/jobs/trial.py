# SPDX-License-Identifier: Apache-2.0
"""One launch of a drawn job (tests/kit/trial_plan.py), or what it must be held against. Ranks tell in OUT/<rank>.jsonl.

    trial.py SPEC

SPEC is JSON with `wrapper`, `optimizer`, `total`, `out`, and either

    dir, config     of a launch with checkpoints; `rules` of its disk (broken_disk.py); `cut`, the rank that loses its
                    connections, and the step before which it does; `pause_s` of each step
    starts          plain training, begun anew for each of these steps: 0, or one whose global form is at
                    <golden>_<step>.safetensors. From 0 it puts its own there.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from job_kit import process_group, teller
from matrix import ASIDE, BUILD
from matrix_wrappers import Job, Replicated, compared
from safetensors.torch import load_file, save_file

from layerwise_dist.commit.transports import store
from layerwise_dist.engine import assembly
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.monitor import process

sys.path.insert(0, str(Path(__file__).parents[1]))
from kit.digests import digest  # noqa: E402


def digests(job: Job) -> dict[str, str]:
    """Of all that this rank holds: buffers, which another number of ranks takes from rank 0, by themselves."""
    groups = [sorted(compared(group).items()) for group in job.hyper_groups()]
    buffers = [buffer for _, buffer in sorted(job.buffers().items())]
    return {"hash": digest([*held(job), *groups]), "buffers": digest(buffers)}


def held(job: Job) -> Iterator[Any]:
    """Parameters and optimizer state of this rank, in an order that does not depend on who made them first."""
    holders = list(job.model.parameters())
    if hasattr(job, "units"):
        yield from of_zero(job)
        return
    yield from holders
    for holder in holders:
        for key, value in sorted(job.state.get(holder, {}).items()):
            yield from (key, value)


def of_zero(job: Any) -> Iterator[Any]:
    """The same of a DeepSpeed engine, parameter by parameter: what pads its flat tensors is nobody's."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    for fqn, param, _, state in job.by_param():
        yield fqn
        if job.stage == 3:
            length = param.partition_numel()
            mine = slice(0, max(0, min(length, param.ds_numel - job.rank * length)))
            yield from (param.ds_tensor.data[mine], safe_get_local_fp32_param(param).flatten()[mine])
            for key, value in sorted(state.items()):
                if isinstance(value, torch.Tensor) and value.ndim:
                    value = safe_get_local_optimizer_state(param, key).flatten()[mine]
                yield from (key, value)
            continue
        yield param
        if job.has_part(param) and job.stage:
            fragment = param._hp_mapping
            yield fragment.get_hp_fragment()
            at = fragment.hp_fragment_address
            for key, value in sorted(state.items()):
                flat = isinstance(value, torch.Tensor) and value.ndim
                yield from (key, value.narrow(0, at.start, at.numel) if flat else value)


# -- plain training ---------------------------------------------------------------------------------------------------


def plain(spec: dict[str, Any], tell: Any) -> None:
    for start in spec["starts"]:
        job = BUILD[spec["wrapper"]](spec["optimizer"], 1)
        if start:
            give_state(job)
            job.put(load_file(f"{spec['golden']}_{start}.safetensors"))
        tell(start=start, **digests(job))
        for step in range(start, spec["total"]):
            job.train(step)
            whole = global_form(job)
            tell(step=step + 1, whole={name: digest([value]) for name, value in whole.items()}, **digests(job))
            if start == 0 and job.rank == 0:
                save_file(whole, f"{spec['golden']}_{step + 1}.safetensors")
    tell(end=spec["total"])


def global_form(job: Job) -> dict[str, torch.Tensor]:
    if getattr(job, "stage", 0) in (1, 2):
        # By itself DeepSpeed does it in the first update, before all of its units have state.
        job.engine.optimizer._hp_optimizer_states_linked = False
        job.engine.optimizer._lazy_init_hp_params_optimizer_state()
    return {name: value.contiguous() for name, value in job.take().items()}


def give_state(job: Job) -> None:
    """So that there is some to be filled. Under DDP without a forward: after the first, DDP makes its buckets anew, and
    sums up in another order; a job that restores has that still before it.
    """
    if not isinstance(job, Replicated):
        job.train(ASIDE)
        return
    for param in job.net.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    job.optimizer.step()
    job.optimizer.zero_grad()


# -- a launch ---------------------------------------------------------------------------------------------------------


def break_disk(rules: list[dict[str, Any]]) -> None:
    from broken_disk import armed

    sound = assembly.environment
    assembly.environment = lambda config: armed(sound(config), rules)
    process.COMMAND = [sys.executable, str(Path(__file__).with_name("broken_disk.py")), json.dumps(rules)]


def connections() -> list[Any]:
    """Lines to other ranks, once there are some."""
    lines: list[Any] = []
    connect = store.over_tcp

    def noted(rank: int, world_size: int, met: Any) -> Any:
        lines.extend(met.lines.values())
        return connect(rank, world_size, met)

    store.over_tcp = noted
    return lines


def launched(spec: dict[str, Any], rank: int, tell: Any) -> None:
    if spec["rules"]:
        break_disk(spec["rules"])
    lines = connections()
    job: Any = None
    ckpt: Any = None
    try:
        job = BUILD[spec["wrapper"]](spec["optimizer"], 1)
        ckpt = job.attach(spec["dir"], **spec["config"])
        if spec["config"]["mode"] == "monitor":
            tell(monitor=workings_of(ckpt).adapter.link.process.pid)
        tell(start=ckpt.restore(), **digests(job))
        for step in ckpt.steps(spec["total"]):
            if [rank, step] == spec["cut"]:
                for line in lines:
                    if line.sock.fileno() >= 0:
                        line.sock.shutdown(socket.SHUT_RDWR)
            job.train(step)
            tell(step=step + 1, committed=ckpt.committed_step, **digests(job))
            time.sleep(spec["pause_s"])
        ckpt.close()
        tell(end=ckpt.completed, committed=ckpt.committed_step)
    except SystemExit as left:
        tell(left=left.code, at=ckpt.completed, committed=ckpt.committed_step)
        raise
    except Exception as error:
        tell(error=type(error).__name__, named=isinstance(error, LayerwiseError), message=str(error)[:2000])
        raise
    finally:
        job = ckpt = None  # before the process groups are torn down


def main() -> None:
    spec = json.loads(sys.argv[1])
    tell = teller(Path(spec["out"], f"{os.environ['RANK']}.jsonl"))
    tell(launched=True, pid=os.getpid())
    with process_group() as rank:
        if spec["wrapper"].startswith("zero"):
            import matrix_zero

            matrix_zero.prepare()
        if "starts" in spec:
            plain(spec, tell)
        else:
            launched(spec, rank, tell)


if __name__ == "__main__":
    main()
