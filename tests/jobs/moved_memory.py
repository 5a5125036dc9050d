# SPDX-License-Identifier: Apache-2.0
"""A job whose tensors take other memory while they are read in place: in every way, at every moment of an iteration.

moved_memory.py DIR BACKEND MOMENTS [unheld]: prints a line for each way and moment with how many checkpoints were
committed, how many given up, and what is wrong in those that were committed. MOMENTS: the last so many of an
iteration's. `unheld`: nothing holds the memory (a mutation).
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import torch
from safetensors.torch import load_file
from torch import multiprocessing, nn

from layerwise_dist._native import PosixEnv
from layerwise_dist.capture import held
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly

torch.set_num_threads(1)
SIZE, LAYERS, STEPS = 256, 3, 6  # a tensor has 256 KiB
FROM = 4  # the first checkpoints are audited in full, and the very first is written before its boundary is over
LATER: list[Any] = []  # what was freed is used again by others
HOLES: list[Any] = []  # what fills those that imports have left in the heap


def unmapped_when_freed() -> None:
    """Whatever is freed is unmapped at once, so that a read of it ends the process."""
    mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3  # of malloc.h
    for which in (trim_threshold, mmap_threshold):
        assert mallopt(which, 65536) == 1
    for _ in range(1000):
        tensor = torch.empty(SIZE, SIZE)
        at = tensor.data_ptr()
        del tensor
        if not is_mapped(at):
            return
        HOLES.append(torch.empty(SIZE, SIZE))
    raise AssertionError("what is freed stays mapped")


def is_mapped(at: int) -> bool:
    spans = [line.split(None, 1)[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(int(begin, 16) <= at < int(end, 16) for begin, end in spans)


def reused() -> None:
    LATER.append([torch.full((SIZE, SIZE), 1e9) for _ in range(2)])


def larger_storage(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(2 * tensor.untyped_storage().nbytes())


def larger_tensor(tensor: torch.Tensor) -> None:
    tensor.detach().resize_(3 * tensor.untyped_storage().nbytes() // 4)


def offloaded(tensor: torch.Tensor) -> None:
    kept, storage = tensor.detach().clone(), tensor.untyped_storage()
    storage.resize_(0)
    reused()
    storage.resize_(kept.untyped_storage().nbytes())
    tensor.data.copy_(kept)


def written_to(tensor: torch.Tensor) -> None:
    """As operations with `out=` do, in C++: more elements, and other values."""
    torch.cat([tensor.detach().flatten().clone()] * 2, out=tensor.detach().view(-1))


def queued(tensor: torch.Tensor) -> None:
    queue = multiprocessing.SimpleQueue()
    queue.put(tensor.detach())
    LATER.append(queue.get())


def shared_otherwise(tensor: torch.Tensor) -> None:
    """Shared memory moves as well, when it is shared in another way."""
    before = multiprocessing.get_sharing_strategy()
    try:
        multiprocessing.set_sharing_strategy("file_system" if before == "file_descriptor" else "file_descriptor")
        tensor.share_memory_()
    finally:
        multiprocessing.set_sharing_strategy(before)
    tensor.share_memory_()


def other_storage(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.set_(tensor.detach().clone())


def other_data(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone()


# And whether it raises the version counter, so that what is being read may have changed.
WAYS: dict[str, tuple[Callable[[torch.Tensor], Any], bool]] = {
    "storage.resize_": (larger_storage, False),
    "tensor.resize_": (larger_tensor, True),
    "offloaded": (offloaded, False),
    "out=": (written_to, True),
    "share_memory_": (torch.Tensor.share_memory_, False),
    "shared otherwise": (shared_otherwise, False),
    "queue": (queued, False),
    "set_": (other_storage, True),
    "data": (other_data, False),
}
MOMENTS = ("after the update", "before the update")


def run(folder: Path, backend: str, move: Callable[[torch.Tensor], Any], moment: str) -> str:
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(SIZE, SIZE)) for _ in range(LAYERS)])
    # One more that nothing updates: read in place for its base.
    model.append(nn.Parameter(torch.randn(2 * SIZE, 2 * SIZE), requires_grad=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    env = testing.FaultEnv(PosixEnv())
    env.delay("write", "*rank_*", 0.002)
    config = load_config(
        {"dir": str(folder), "keep_last": 100, "writer": {"queue_depth": 1, "block_kb": 64, "backend": backend}}
        | {"commit": {"raise_after": 100}}
    )
    ckpt = assembly.assemble(model, optimizer, config, LocalTransport(LocalHub(1), 0), env)
    at: dict[int, dict[str, torch.Tensor]] = {}

    def here(now: str, step: int) -> None:
        if now == moment and step >= FROM:
            # Every other time half of them, so that there are those that moved and those that did not.
            for number, param in enumerate(model):
                if step % 2 or number % 2:
                    for tensor in (param, *optimizer.state.get(param, {}).values()):
                        move(tensor)
                        reused()

    for step in ckpt.steps(STEPS):
        for param in model[:LAYERS]:
            param.grad = torch.full((SIZE, SIZE), 0.5)
        here("before the update", step)
        optimizer.step()
        here("after the update", step)
        at[step + 1] = {f"param/{name}": param.detach().clone() for name, param in model.named_parameters()} | {
            f"momentum_buffer/{name}": optimizer.state[param]["momentum_buffer"].clone()
            for name, param in list(model.named_parameters())[:LAYERS]
        }
        LATER.clear()
    ckpt.close()
    wrong, committed, based = [], 0, 0
    for shard in sorted(folder.glob("step_*/rank_*.safetensors")):
        step = int(shard.parent.name.split("_")[1].split("-")[0])
        committed += 1
        found = load_file(shard)
        wrong += [f"{name} of step {step}" for name in at[step] if name in found and not equal(found, at[step], name)]
        wrong += [f"no {name} in step {step}" for name in at[step] if name not in found and name != f"param/{LAYERS}"]
    for shard in folder.glob("base/**/rank_*.safetensors"):
        # Never trained: what it has is right of every step.
        found = load_file(shard)
        wrong += [f"{name} in a base" for name in found if name in at[STEPS] and not equal(found, at[STEPS], name)]
        based += 1
    wrong += [] if based else ["no base"]
    return f"committed {committed}, aborted {ckpt.stats()['checkpoints_aborted']}, wrong {wrong[:3]}"


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], name: str) -> bool:
    return torch.equal(found[name].flatten(), wanted[name].flatten())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    unmapped_when_freed()
    root, backend = Path(sys.argv[1]), sys.argv[2]
    if sys.argv[4:] == ["unheld"]:
        held.Holder.hold = lambda self, tensors: ([each.data_ptr() for each in tensors], None)  # type: ignore[method-assign]
    for number, (way, (move, changes)) in enumerate(WAYS.items()):
        for moment in MOMENTS[-int(sys.argv[3]) :]:
            folder = root / f"{number}-{moment.split()[-1]}-{moment.split()[0]}"
            print(
                f"MOVED {way}, {moment}{', changes' if changes else ''}:",
                run(folder, backend, move, moment),
                flush=True,
            )
