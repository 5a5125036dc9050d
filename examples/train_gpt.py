# SPDX-License-Identifier: Apache-2.0
"""Trains a small byte-level GPT on the Python standard library's own sources, with a checkpoint every step.

    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py --steps 100 --dir checkpoints/gpt

Kill it at any moment and start the same command again: it resumes at the newest committed step, bit for bit. What
that takes is marked CHECKPOINT below; the rest is an ordinary training script. Without torchrun it trains in one
process.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt_model import GPT, VOCABULARY
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

DATASET_CAP = 16 << 20  # bytes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=positive, default=100, help="optimizer steps in all, earlier runs included")
    add_shape_arguments(parser, dim=320, layers=8, heads=5, context=128)
    parser.add_argument("--batch", type=positive, default=4, help="windows of text a step and rank")
    parser.add_argument("--optimizer", choices=["foreach", "fused"], default="foreach", help="AdamW's implementation")
    parser.add_argument(
        "--wrapper", choices=["fsdp2", "ddp", "plain"], help="default: fsdp2 under torchrun, else plain"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the dropout and the data")
    parser.add_argument("--dir", default="checkpoints/gpt", help="directory of the checkpoints")
    parser.add_argument("--every", type=positive, default=1, help="a checkpoint every so many steps")
    parser.add_argument("--no-checkpoints", action="store_true", help="train without the library")
    parser.add_argument("--result", type=Path, help="write losses, hashes and timings there (JSON); see ResultLog")
    args = parser.parse_args()
    if args.dim % args.heads:
        parser.error(f"--heads {args.heads} does not divide --dim {args.dim}")
    distributed = "WORLD_SIZE" in os.environ
    args.wrapper = args.wrapper or ("fsdp2" if distributed else "plain")
    if args.wrapper != "plain" and not distributed:
        parser.error(f"--wrapper {args.wrapper} needs torchrun; see --help")
    if args.wrapper == "plain" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("--wrapper plain is for one process: its ranks would train different models")
    return args


def add_shape_arguments(parser: argparse.ArgumentParser, *, dim: int, layers: int, heads: int, context: int) -> None:
    """The model's size, with these defaults; `examples/deepspeed/train.py` has it too."""
    parser.add_argument("--dim", type=positive, default=dim, help="width of the model")
    parser.add_argument("--layers", type=positive, default=layers, help="transformer blocks")
    parser.add_argument("--heads", type=positive, default=heads, help="attention heads; must divide the width")
    parser.add_argument("--context", type=positive, default=context, help="bytes of text that the model sees at once")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number


def join_process_group(backend: str = "gloo") -> tuple[int, int]:
    """(rank, world size). Without torchrun: (0, 1) and no group.

    torchrun's store outlives a restart of the workers, with the keys of the dead ones in it, which now and then keeps
    the new group from forming; a prefix for each attempt keeps them apart.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    store, rank, world_size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return rank, world_size


def standard_library() -> Tensor:
    """The sources of Python's standard library in the order of their names, at most DATASET_CAP bytes: (n,) uint8."""
    text = bytearray()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        text += path.read_bytes()
        if len(text) >= DATASET_CAP:
            break
    if len(text) < 1 << 20:
        raise SystemExit(f"{root}: {len(text)} bytes of Python sources, too few to train on")
    return torch.frombuffer(text[:DATASET_CAP], dtype=torch.uint8)


class RandomWindows:
    """Batches of random windows of a text: inputs (batch, context) and the bytes that follow them, both int64."""

    def __init__(self, text: Tensor, batch: int, context: int, seed: int) -> None:
        self._text, self._batch = text, batch
        self._window = torch.arange(context + 1)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        last = len(self._text) - len(self._window)
        starts = torch.randint(last + 1, (self._batch, 1), generator=self.generator)
        windows = self._text[starts + self._window].long()
        return windows[:, :-1], windows[:, 1:]


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if wrapper == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def adamw(model: nn.Module, implementation: str) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), **{implementation: True})


def warmup_then_cosine(optimizer: torch.optim.Optimizer, steps: int) -> SequentialLR:
    warmup = max(1, steps // 10)
    rise = LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup), eta_min=1e-4)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def mean_over_ranks(value: Tensor, world_size: int) -> float:
    value = value.detach().clone()
    if world_size > 1:
        dist.all_reduce(value)
    return value.item() / world_size


def hashes(model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> dict[str, str]:
    """SHA-256 of all that this rank holds of the parameters and the optimizer's state, and of its random numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters, moments, draws = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for parameter, name in names.items():
        _add(parameters, name, parameter)
        for key, value in sorted(optimizer.state[parameter].items()):
            _add(moments, f"{name}.{key}", value)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    moments.update(repr(groups).encode())
    _add(draws, "torch", torch.get_rng_state())
    _add(draws, "windows", generator.get_state())
    return {"parameters": parameters.hexdigest(), "optimizer": moments.hexdigest(), "random": draws.hexdigest()}


def _add(digest: hashlib._Hash, name: str, value: object) -> None:
    if isinstance(value, Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        digest.update(f"{name} {local.dtype} {tuple(local.shape)}\n".encode())
        digest.update(local.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        digest.update(f"{name} {value!r}\n".encode())


class ResultLog:
    """What a run did, for whoever compares runs (rank 0 writes; launch/demo.py reads).

    `<result>.<n>.jsonl` is new for each start of the script and has one line a step as soon as it is done, so that the
    losses before a kill are known; losses also as hexadecimal floats, which tell every bit. `<result>` itself comes at
    the end: hashes and the library's counters of every rank.
    """

    def __init__(self, path: Path | None, rank: int) -> None:
        self._path = path if rank == 0 else None
        self._file = None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            number = 0
            while self._file is None:
                try:
                    self._file = open(f"{self._path}.{number}.jsonl", "x", encoding="utf-8", buffering=1)
                except FileExistsError:
                    number += 1
        self._mark = time.perf_counter()

    def started(self, at_step: int, parameters: int) -> None:
        self._line({"start": at_step, "parameters": parameters})
        self._mark = time.perf_counter()

    def stepped(self, step: int, loss: float) -> None:
        """The seconds are those since the step before, so that they hold whatever happens between two iterations."""
        now = time.perf_counter()
        self._line({"step": step, "loss": loss, "hex": loss.hex(), "seconds": now - self._mark})
        self._mark = now

    def finished(self, ranks: list[dict[str, object]]) -> None:
        if self._path is not None:
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_text(json.dumps({"ranks": ranks}, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self._path)

    def _line(self, record: dict[str, object]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")


def main() -> None:
    args = arguments()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    rank, world_size = join_process_group()

    torch.manual_seed(args.seed)  # the same weights on every rank ...
    model = GPT(dim=args.dim, layers=args.layers, heads=args.heads, context=args.context, dropout=0.1)
    size = sum(parameter.numel() for parameter in model.parameters())
    model = wrap(model, args.wrapper)
    torch.manual_seed(args.seed + 1 + rank)  # ... and other dropout and other text on each
    windows = RandomWindows(standard_library(), args.batch, args.context, args.seed + 1 + rank)

    optimizer = adamw(model, args.optimizer)
    scheduler = warmup_then_cosine(optimizer, args.steps)
    log = ResultLog(args.result, rank)

    ckpt, start, steps = None, 0, range(args.steps)
    # CHECKPOINT: all that the library needs is here, and close() below.
    if not args.no_checkpoints:
        import layerwise_dist as lwd

        ckpt = lwd.attach(model, optimizer, dir=args.dir, every_n_steps=args.every,
                          state={"scheduler": scheduler, "windows": windows.generator})  # fmt: skip
        start = ckpt.restore()
        steps = ckpt.steps(args.steps)
    # CHECKPOINT ends.

    if rank == 0:
        print(f"{size / 1e6:.1f}M parameters, {args.wrapper} on {world_size} rank(s), {start} steps done", flush=True)
    log.started(start, size)
    model.train()
    for step in steps:
        inputs, targets = windows.draw()
        loss = F.cross_entropy(model(inputs).view(-1, VOCABULARY), targets.reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        mean = mean_over_ranks(loss, world_size)
        log.stepped(step + 1, mean)
        if rank == 0:
            print(f"step {step + 1:5d}  loss {mean:.4f}", flush=True)

    counters = None
    if ckpt is not None:
        ckpt.close()  # CHECKPOINT: waits until the last one is committed.
        counters = ckpt.stats()

    mine = {"rank": rank, "hashes": hashes(model, optimizer, windows.generator), "stats": counters}
    everyone: list = [mine]
    if world_size > 1:
        everyone = [None] * world_size
        dist.all_gather_object(everyone, mine)
    log.finished(everyone)

    # FSDP's threads must be gone before the interpreter goes.
    del model, optimizer, scheduler, ckpt, steps
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
