# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer with checkpoints attached, stopped and started again.

    hf.py sweep OUT CASE EVENT:STEP...   stopped by an exception at each of these, and resumed, in one process
    hf.py run OUT CASE EVENT:STEP|-      once; SIGKILL to one rank there, after what was sealed before is committed
    hf.py reference OUT CASE -           once, without checkpoints
    hf.py refused OUT CASE -             what is refused, and in what words

    hf.py best OUT CASE -                with best_metric
    hf.py page OUT CASE -                the block of docs/loops.md
    hf.py mutated OUT CASE -             resumed without one thing that a resume needs

`max:STEP` is a run that ends by itself at that step, and is then told to go on. Writes what became of it into
OUT/<rank>.json.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from job_kit import contents, differences
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import layerwise_dist as lwd
from layerwise_dist.integrations import trainer_progress
from layerwise_dist.integrations import transformers as lwd_hf
from layerwise_dist.loop.placed import PlacedTap

TIMED = ("runtime", "per_second", "preparation_time")
RANK = int(os.environ.get("RANK", "0"))

CASES: dict[str, dict[str, Any]] = {
    # A last window of one batch in each epoch; logged in the middle of anything; evaluated within epochs.
    "gpt2": {
        "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 3, "max_grad_norm": 0.5,
        "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no",
        "metric_for_best_model": "loss", "greater_is_better": False,
    },
    "llama": {
        "gradient_accumulation_steps": 3, "bf16": True, "logging_steps": 1, "eval_strategy": "epoch",
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "eval_on_start": True,
        "include_num_input_tokens_seen": "all",
    },
    "lora": {
        "gradient_accumulation_steps": 1, "logging_steps": 2, "save_strategy": "no", "max_steps": 17,
        "lr_scheduler_type": "constant",
    },
    "workers": {
        "gradient_accumulation_steps": 2, "dataloader_num_workers": 1, "logging_steps": 5, "save_strategy": "no",
        "train_sampling_strategy": "group_by_length",
    },
    "own loader": {"gradient_accumulation_steps": 2, "logging_steps": 5, "save_strategy": "no"},
    # Of two ranks. The Trainer turns it on for several accelerators only: see `as_on_accelerators`.
    "fsdp2": {
        "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "logging_steps": 3, "save_strategy": "no", "fsdp": True,
        "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
}  # fmt: skip


class Tokens(Dataset):
    """Draws random numbers for each sample, where it is loaded."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = [torch.randint(0, 30, (5 + number % 4,), generator=generator) for number in range(count)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index].clone()
        ids[random.randrange(len(ids))] = int(torch.randint(0, 30, ()))
        ids[-1] = np.random.randint(30)
        return {"input_ids": ids}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Masks by random numbers, as those for masked language models do."""
    ids = torch.nn.utils.rnn.pad_sequence([each["input_ids"] for each in samples], batch_first=True)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    return {"input_ids": ids, "labels": labels}


def model_of(case: str) -> torch.nn.Module:
    if case in ("llama", "fsdp2"):
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, attention_dropout=0.1,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    if case == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True))
    return model


class OwnLoader(Trainer):
    """A loader that Accelerate does not prepare, with a generator of its own."""

    def get_train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(5)
        return DataLoader(self.train_dataset, 2, shuffle=True, generator=order, collate_fn=self.data_collator)


def as_on_accelerators(args: TrainingArguments) -> None:
    """What only several accelerators turn on, on CPUs and gloo: all that follows is Accelerate's own."""
    args.distributed_state.distributed_type = DistributedType.MULTI_GPU


class Stopped(Exception):
    pass


class Stop(TrainerCallback):
    """At one event of one step, and beside it what a callback of a script may keep: here, how many steps it saw."""

    def __init__(self, at: str, kill: bool) -> None:
        self.event, _, step = at.partition(":")
        self.step, self.kill, self.seen, self.checkpoints = int(step or -1), kill, 0, None

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.seen = saved["seen"]

    def happened(self, event: str, step: int) -> None:
        if event == self.event and step >= self.step >= 0:
            if not self.kill:
                raise Stopped(event)
            ckpt = self.checkpoints.ckpt
            if ckpt.completed:  # on all ranks: one in the next collective does not judge what it has saved
                ckpt.wait(ckpt.completed)
            if RANK == step % int(os.environ.get("WORLD_SIZE", "1")):
                os.kill(os.getpid(), signal.SIGKILL)


def _telling(event: str) -> Any:
    def on_event(self: Stop, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen += event == "step_end"
        self.happened(event, state.global_step)

    return on_event


EVENTS = (
    "step_begin", "substep_end", "optimizer_step", "step_end", "log", "evaluate", "epoch_end", "epoch_begin",
)  # fmt: skip
for _event in EVENTS:
    setattr(Stop, f"on_{_event}", _telling(_event))


def trainer_of(out: str, case: str, stop: Stop, **more: Any) -> Trainer:
    torch.manual_seed(7)
    options = {
        "per_device_train_batch_size": 2, "num_train_epochs": 3, "learning_rate": 0.01, "seed": 11, **CASES[case],
        **more,
    }  # fmt: skip
    args = TrainingArguments(output_dir=f"{out}/hf", use_cpu=True, report_to="none", disable_tqdm=True, **options)
    if args.fsdp:
        as_on_accelerators(args)
    callbacks = [EarlyStoppingCallback(50)] if args.metric_for_best_model and args.eval_strategy != "no" else []
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return (OwnLoader if case == "own loader" else Trainer)(
        model=model_of(case), args=args, data_collator=collate, train_dataset=Tokens(14 * world - 1, 1),
        eval_dataset=Tokens(6, 2), callbacks=[*callbacks, stop],
    )  # fmt: skip


def outcome(trainer: Trainer, stop: Stop) -> dict[str, Any]:
    """All that must be equal, to the bit."""
    held = contents(trainer.model, trainer.optimizer.optimizer)
    held = {name: value for name, value in held.items() if not name.startswith("grad?/")}
    history = [
        {key: value for key, value in entry.items() if not any(word in key for word in TIMED)}
        for entry in trainer.state.log_history
    ]
    state = trainer.state
    held["told"] = repr((history, state.global_step, state.epoch, state.total_flos, state.best_metric, stop.seen,
                         state.num_input_tokens_seen, trainer.lr_scheduler.state_dict()["last_epoch"],
                         [each.early_stopping_patience_counter for each in trainer.callback_handler.callbacks
                          if isinstance(each, EarlyStoppingCallback)]))  # fmt: skip
    return held


def train(out: str, case: str, at: str, *, attached: bool = True, kill: bool = False, **more: Any) -> tuple[Any, ...]:
    stop = Stop(at, kill)
    trainer = trainer_of(out, case, stop, **more)
    if attached:
        stop.checkpoints = lwd_hf.attach(trainer, dir=f"{out}/ckpt", keep_last=2)
    try:
        result = trainer.train()
    except Stopped:
        return None, 0, trainer
    held = outcome(trainer, stop)
    held["told"] += repr(result.training_loss)
    return held, stop.checkpoints.resumed_from if attached else 0, trainer


def digest(held: dict[str, Any]) -> dict[str, str]:
    return {
        name: hashlib.sha256(
            value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if isinstance(value, torch.Tensor) else repr(value).encode()
        ).hexdigest()[:12] if name != "told" else value
        for name, value in held.items()
    }  # fmt: skip


@contextmanager
def deterministic() -> Iterator[None]:
    torch.set_num_threads(1)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def sweep(out: str, case: str, stops: list[str], reference: dict[str, Any] | None = None) -> dict[str, Any]:
    """`reference` is what a training without checkpoints ends with; it is trained if there is none."""
    if reference is None:
        reference, _, _ = train(out, case, "never", attached=False)
    assert reference is not None
    found: dict[str, Any] = {"steps": {}, "problems": []}
    for at in stops:
        shutil.rmtree(f"{out}/hf", ignore_errors=True)
        if RANK == 0:
            shutil.rmtree(f"{out}/ckpt", ignore_errors=True)
        if dist.is_initialized():
            dist.barrier()
        ends = {"max_steps": int(at.partition(":")[2])} if at.startswith("max:") else {}
        held, _, _ = train(out, case, at, **ends)
        if held is not None and not ends:
            found["problems"].append(f"{at}: never happened")
            continue
        torch.manual_seed(random.randrange(1 << 30))  # a new process would not have these numbers either
        held, step, _ = train(out, case, "never")
        found["steps"][at] = step
        if ends:  # it was logged that the first run ended
            held["told"] = reference["told"]
        if wrong := differences(reference, held):
            found["problems"].append(f"{at}, from step {step}: {wrong[:5]}: {reference['told']} {held['told']}")
    return found


def refused(out: str, case: str) -> dict[str, str]:
    found: dict[str, str] = {}

    def note(what: str, action: Callable[[], Any]) -> None:
        try:
            action()
            found[what] = "nothing was raised"
        except Exception as error:
            found[what] = f"{type(error).__name__}: {error}"

    class Late(TrainerCallback):
        def __init__(self, attach: Callable[..., Any]) -> None:
            self.attach = attach

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
                           **_: Any) -> None:  # fmt: skip
            self.attach(model, optimizer)

    def late(integration: bool) -> None:
        trainer = trainer_of(out, case, Stop("", False))
        folder = f"{out}/late"
        if integration:
            trainer.add_callback(Late(lambda *_: lwd_hf.attach(trainer, dir=folder)))
        else:
            trainer.add_callback(Late(lambda model, optimizer: lwd.attach(model, optimizer, dir=folder)))
        trainer.train()

    def attached(**more: Any) -> Trainer:
        trainer = trainer_of(out, case, Stop("", False), **more)
        lwd_hf.attach(trainer, dir=f"{out}/ckpt")
        return trainer

    def twice() -> None:
        lwd_hf.attach(attached(), dir=f"{out}/ckpt")

    def nameless() -> None:
        trainer = trainer_of(out, case, Stop("", False))
        trainer._run_epoch = None  # as a version without it
        lwd_hf.attach(trainer, dir=f"{out}/ckpt")

    def regrouped() -> None:
        train(f"{out}/regrouped", case, "step_begin:2")
        train(f"{out}/regrouped", case, "never", per_device_train_batch_size=1)

    note("a callback, by lwd.attach", lambda: late(False))
    note("a callback, by the integration", lambda: late(True))
    note("twice", twice)
    note("ignore_data_skip", lambda: attached(ignore_data_skip=True))
    note("auto_find_batch_size", lambda: attached(auto_find_batch_size=True))
    trainer = trainer_of(out, case, Stop("", False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        note("alone", lambda: lwd_hf.attach(trainer, dir=f"{out}/ckpt"))
    note("resume_from_checkpoint", lambda: attached().train(resume_from_checkpoint=out))
    note("a name that is missing", nameless)
    note("no Trainer", lambda: lwd_hf.attach("trainer"))
    note("a bad key", lambda: lwd_hf.attach(trainer_of(out, case, Stop("", False)), every_steps=3))
    note("another batch size", regrouped)
    return found


def without_ahead(patch: Any) -> None:
    restore = PlacedTap.restore
    patch(PlacedTap, "restore", lambda self, snapshot: restore(self, {**snapshot, "ahead": None}))


def without_kept(patch: Any) -> None:
    patch(trainer_progress.Progress, "put_kept", lambda self: None)


def without_rng(patch: Any) -> None:
    patch(PlacedTap, "go_on", lambda self: None)


def with_its_skipping(patch: Any) -> None:
    patch(lwd_hf, "_skipping_nothing", nullcontext)


def mutated(out: str, case: str) -> dict[str, list[str]]:
    """What is wrong without one thing that a resume needs, by its name."""
    found = {}
    reference, _, _ = train(out, case, "never", attached=False)
    for mutation in (without_ahead, without_kept, without_rng, with_its_skipping):
        with pytest.MonkeyPatch.context() as patch:
            mutation(patch.setattr)
            try:
                found[mutation.__name__] = sweep(out, case, ["substep_end:5"], reference)["problems"]
            except AssertionError as error:
                found[mutation.__name__] = [f"AssertionError: {error}"]
    return found


def on_the_page(out: str, case: str) -> dict[str, Any]:
    """docs/loops.md, as it stands: once, and once more with more steps. Then docs/integrations/transformers.md."""
    from loops import blocks, snippets

    os.chdir(out)
    steps = []
    for total in (3, 5):
        args = TrainingArguments("hf", use_cpu=True, max_steps=total, report_to="none", save_strategy="no")
        data = [{"input_ids": ids, "labels": ids} for ids in torch.arange(40).remainder(30).view(8, 5)]
        held = {"Trainer": Trainer, "model": model_of(case), "args": args, "data": data}
        exec(blocks()["Hugging Face's Trainer"], held)
        steps.append([held["trainer"]._layerwise_checkpoints.resumed_from, held["trainer"].state.global_step])
    os.mkdir("page")
    os.chdir("page")
    snippets.run("docs/integrations/transformers.md 1", held)
    steps.append([held["checkpoints"].resumed_from, held["trainer"].state.global_step])
    return {"steps": steps}


def best(out: str, case: str) -> dict[str, Any]:
    """Run through, and stopped twice: the weights that `train()` leaves, and what the directory holds."""
    found: dict[str, Any] = {}
    for name, stops in {"whole": [], "cut": ["epoch_end:8", "step_begin:9"]}.items():
        for at in (*stops, "never"):
            stop = Stop(at, False)
            trainer = trainer_of(f"{out}/{name}", case, stop)
            options = {"dir": f"{out}/{name}/ckpt", "every_n_steps": 5, "best_metric": "loss"}
            stop.checkpoints = lwd_hf.attach(trainer, **options)
            with suppress(Stopped):
                trainer.train()
        losses = {each["step"]: each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each}
        with lwd.open_checkpoint(f"{out}/{name}/ckpt", tag="best") as saved:
            same = [torch.equal(saved[f"param/{fqn}"][...], param) for fqn, param in trainer.model.named_parameters()]
            step = saved.step
        with lwd.open_checkpoint(f"{out}/{name}/ckpt") as newest:
            last = newest.step
        weights = torch.cat([param.detach().reshape(-1) for param in trainer.model.parameters()])
        found[name] = {
            "best": step, "expected": min(losses, key=losses.get), "same": all(same) and len(same) > 10, "last": last,
            "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
        }  # fmt: skip
    return found


def main(mode: str, out: str, case: str, *stops: str) -> None:
    with deterministic():
        if mode == "sweep":
            found = sweep(out, case, list(stops))
        elif mode == "refused":
            found = refused(out, case)
        elif mode == "best":
            found = best(out, case)
        elif mode == "page":
            found = on_the_page(out, case)
        elif mode == "mutated":
            found = mutated(out, case)
        elif mode == "reference":
            found = digest(train(out, case, "never", attached=False)[0])
        else:
            held, step, _ = train(out, case, stops[0], kill=True)
            found = {"from": step, **digest(held)}
        with open(f"{out}/{RANK}.json", "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
