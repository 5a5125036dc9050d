# SPDX-License-Identifier: Apache-2.0
"""Trains a small GPT with Hugging Face's Trainer on real data: scikit-learn's handwritten digits, pixel by pixel.

    python examples/digits_hf.py --dir checkpoints/digits-hf

Interrupt it at any moment, with Ctrl-C or with kill -9, and start it again: `train()` resumes within the epoch, at the
newest committed step, and logs what a run without interruption would. Started once more when it is done, it trains
nothing. Under torchrun the Trainer makes it one DDP replica a rank:

    torchrun --standalone --nproc-per-node 2 examples/digits_hf.py --dir checkpoints/digits-hf-ddp
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from layerwise_dist.integrations.transformers import attach


class Digits(Dataset[dict[str, Tensor]]):
    """An image is 64 tokens, 0 to 16 by its brightness; the last token, 17 to 26, says which digit it is."""

    def __init__(self, train: bool) -> None:
        data = load_digits()
        tokens = torch.tensor(data.images, dtype=torch.long).flatten(1)
        tokens = torch.cat([tokens, torch.tensor(data.target)[:, None] + 17], dim=1)
        self.tokens = tokens[:-300] if train else tokens[-300:]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="checkpoints/digits-hf")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--every-n-steps", type=int, default=5)
    given = parser.parse_args()
    args = TrainingArguments(
        output_dir=f"{given.dir}-hf", num_train_epochs=given.epochs, per_device_train_batch_size=16,
        gradient_accumulation_steps=2, learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=10,
        logging_steps=5, eval_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        use_cpu=not torch.cuda.is_available(),  # else torchrun's processes would not find each other without a GPU
    )  # fmt: skip
    set_seed(args.seed)  # the Trainer's constructor does it too, but the weights are drawn before that
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=27, n_positions=65, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    trainer = Trainer(model=model, args=args, train_dataset=Digits(True), eval_dataset=Digits(False))
    checkpoints = attach(trainer, dir=given.dir, every_n_steps=given.every_n_steps)
    trainer.train()
    if trainer.is_world_process_zero():
        print(f"resumed from step {checkpoints.resumed_from}")
        for entry in trainer.state.log_history:
            print(*(f"{key} {entry[key]:.6g}" for key in ("step", "loss", "eval_loss") if key in entry))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
