# SPDX-License-Identifier: Apache-2.0
"""All private names of `transformers.Trainer` that this package uses. A missing one is named.

Tested with transformers 5.24 and accelerate 1.15.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from layerwise_dist.errors import UnsupportedError

TESTED = "transformers 5.24 with accelerate 1.15"

# Methods that are wrapped on the trainer, and what each must take. The first three are public.
METHODS: dict[str, frozenset[str]] = {
    "train": frozenset(),
    "get_batch_samples": frozenset({"epoch_iterator", "num_batches", "device"}),
    "set_initial_training_values": frozenset({"args", "dataloader"}),
    "_inner_training_loop": frozenset(),
    "_init_training_state": frozenset({"max_steps", "num_update_steps_per_epoch", "num_train_epochs", "trial"}),
    "_prepare_for_training": frozenset({"max_steps", "train_dataloader", "resume_from_checkpoint"}),
    "_run_epoch": frozenset(
        {"epoch", "train_dataloader", "steps_in_epoch", "start_time", "resume_from_checkpoint", "epochs_trained",
         "steps_trained_in_current_epoch"}
    ),
    "_finalize_training": frozenset({"start_time"}),
    "_load_rng_state": frozenset({"checkpoint"}),
}  # fmt: skip

# What the loop keeps on the trainer, outside TrainerState: set by `_inner_training_loop`, or by the constructor.
KEPT = (
    "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step",
    "_initial_num_input_tokens_seen", "current_flos",
)  # fmt: skip

# What else is read of the trainer.
READ = ("_train_batch_size",)

# Of TrainerState: how far the run has come. The rest follows from this run's arguments.
STATE = (
    "epoch", "global_step", "num_input_tokens_seen", "total_flos", "log_history", "best_metric", "best_global_step",
    "best_model_checkpoint",
)  # fmt: skip

# Of the module: `_run_epoch` calls it, to skip what a resumed epoch has had.
SKIPS = "skip_first_batches"


def check(module: Any, trainer: Any) -> None:
    """Raises UnsupportedError, naming what a Trainer of this version has not. `module` is `transformers.trainer`."""
    if missing := list(_missing(module, trainer)):
        raise UnsupportedError(
            f"this transformers ({_version(module)}) lacks what resuming a Trainer exactly needs: "
            f"{', '.join(missing)}. Tested with {TESTED}"
        )


def _missing(module: Any, trainer: Any) -> Iterator[str]:
    for name, wanted in METHODS.items():
        method = getattr(trainer, name, None)
        if not callable(method):
            yield f"Trainer.{name}()"
            continue
        taken = inspect.signature(method).parameters
        if lacking := sorted(wanted - taken.keys()):
            yield f"Trainer.{name}({', '.join(lacking)})"
    loop = getattr(module.Trainer, "_inner_training_loop", None)
    held = {*vars(trainer), *(loop.__code__.co_names if loop is not None else ())}
    yield from (f"Trainer.{name}" for name in (*KEPT, *READ) if name not in held)
    yield from (f"TrainerState.{name}" for name in STATE if not hasattr(trainer.state, name))
    if not callable(getattr(module, SKIPS, None)):
        yield f"transformers.trainer.{SKIPS}"


def _version(module: Any) -> str:
    import importlib.metadata

    return importlib.metadata.version(module.__name__.partition(".")[0])
