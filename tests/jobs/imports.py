# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own checkpoints, and engines that go on from what was imported of them.

imports.py save OUT CASE...       OUT/<case>/ds: DeepSpeed's; OUT/<case>/ours: a commit of the same moment
imports.py restore DIR CASE       restores DIR into an engine of CASE, and saves that as it is
"""

from __future__ import annotations

import argparse
import os
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal as converter
from job_kit import process_group
from zero_kit import Net, prepare, settings

import layerwise_dist as lwd


def engine(case: str, seed: int) -> deepspeed.DeepSpeedEngine:
    """With two groups that differ, a frozen and a tied parameter, and a schedule."""
    stage, *features = case.split("-")
    torch.manual_seed(seed)
    model = Net()
    trained = [param for param in model.parameters() if param.requires_grad]
    groups = [{"params": trained[:2], "weight_decay": 0.5}, {"params": trained[2:], "lr": 0.02}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings(int(stage), set(features)))[0]


def train(held: deepspeed.DeepSpeedEngine, steps: int) -> None:
    for step in range(steps * held.gradient_accumulation_steps()):
        source = torch.Generator().manual_seed(100 * step + dist.get_rank())
        tokens = torch.randint(0, 19, (2, 5), generator=source)
        loss = torch.nn.functional.cross_entropy(held(tokens).float().reshape(-1, 19), tokens.reshape(-1))
        held.backward(loss)
        held.step()


def save(out: str, cases: list[str]) -> None:
    for case in cases:
        held = engine(case, 1)
        ckpt = lwd.attach(held, dir=f"{out}/{case}/ours", every_n_steps=None, save_last=False)
        train(held, 3)
        held.save_checkpoint(f"{out}/{case}/ds", client_state={"epoch": 4})
        ckpt.save("same")
        ckpt.close()
        if dist.get_rank() == 0 and case[0] != "1":
            universal(f"{out}/{case}")


def universal(folder: str) -> None:
    """What DeepSpeed's own converter makes of its checkpoint."""
    os.makedirs(f"{folder}/universal")
    converter.main(
        argparse.Namespace(
            input_folder=f"{folder}/ds/global_step3", output_folder=f"{folder}/universal/global_step3_universal",
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip


def restore(folder: str, case: str) -> None:
    held = engine(case, 2)
    ckpt = lwd.attach(held, dir=folder, every_n_steps=None, save_last=False)
    step = ckpt.restore()
    if dist.get_rank() == 0:
        rates = [group["lr"] for group in held.optimizer.param_groups]
        print(f"RESTORED {step} {held.global_steps} {held.lr_scheduler.last_batch_iteration} {rates}", flush=True)
    ckpt.save("again")
    train(held, 1)  # and it goes on
    ckpt.close()


if __name__ == "__main__":
    prepare()
    with process_group():
        deepspeed.init_distributed("gloo")
        if sys.argv[1] == "save":
            save(sys.argv[2], sys.argv[3:])
        else:
            for folder, case in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
                restore(folder, case)
