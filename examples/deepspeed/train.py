# SPDX-License-Identifier: Apache-2.0
"""Trains a small byte-level GPT with DeepSpeed, with a checkpoint every step.

    cd examples/deepspeed
    torchrun --standalone --nproc-per-node 2 train.py --deepspeed_config zero2.json
    deepspeed --num_accelerators 2 train.py --deepspeed_config zero3.json

Kill it at any moment and start the same command again: it resumes at the newest committed step, bit for bit. The
`layerwise_checkpoint` block of the configuration and the lines marked CHECKPOINT are what that takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt_model import GPT, VOCABULARY
from train_gpt import RandomWindows, add_shape_arguments, join_process_group, positive, standard_library

import layerwise_dist as lwd


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--deepspeed_config", type=Path, default=Path(__file__).with_name("zero2.json"), help="a ds_config"
    )
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher, not used")
    parser.add_argument("--steps", type=positive, default=30, help="iterations in all, earlier runs included")
    add_shape_arguments(parser, dim=256, layers=4, heads=4, context=64)
    parser.add_argument("--batch", type=positive, default=4, help="windows of text a micro-batch and rank")
    parser.add_argument("--dir", help="directory of the checkpoints, instead of the configuration's")
    parser.add_argument("--no-checkpoints", action="store_true", help="train without the library")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    # DeepSpeed would compile this for a minute; only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        join_process_group(backend)  # DeepSpeed takes the group that it finds
    else:  # mpirun: DeepSpeed asks MPI who is who
        deepspeed.init_distributed(backend, distributed_port=int(os.environ.get("MASTER_PORT", "29500")))
    config = json.loads(args.deepspeed_config.read_text())
    config["train_micro_batch_size_per_gpu"] = args.batch
    if args.no_checkpoints:
        config["layerwise_checkpoint"]["enabled"] = False

    torch.manual_seed(0)
    model = GPT(dim=args.dim, layers=args.layers, heads=args.heads, context=args.context, dropout=0.1)
    # CHECKPOINT: one group a layer, so that ZeRO's flat partitions are as many as layers.
    engine, *_ = deepspeed.initialize(model=model, model_parameters=lwd.param_groups(model), config=config)
    torch.manual_seed(1 + dist.get_rank())
    windows = RandomWindows(standard_library(), args.batch, args.context, seed=1 + dist.get_rank())

    # CHECKPOINT: what belongs to a step beside the engine; the configuration comes from the engine.
    overrides = {"dir": args.dir} if args.dir else {}
    ckpt = lwd.attach(engine, state={"windows": windows.generator}, **overrides)
    start = ckpt.restore()
    if dist.get_rank() == 0:
        print(f"starting at step {start}", flush=True)

    for step in ckpt.steps(args.steps):  # CHECKPOINT: an iteration is one accumulation window
        total = 0.0
        for _ in range(engine.gradient_accumulation_steps()):
            inputs, targets = (part.to(engine.device) for part in windows.draw())
            logits = engine(inputs).float()
            loss = F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))
            engine.backward(loss)
            engine.step()
            total += loss.item()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {total:.4f} ({total.hex()})", flush=True)

    ckpt.close()  # CHECKPOINT: the last ones are committed before the job ends
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
