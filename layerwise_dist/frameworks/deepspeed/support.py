# SPDX-License-Identifier: Apache-2.0
"""Which DeepSpeed engines are supported: finds the optimizer with the masters, and refuses the rest by name."""

from __future__ import annotations

from typing import Any

import torch

from layerwise_dist import unattached
from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.deepspeed.flattening import (
    Bf16,
    FusedMasters,
    UnfusedMasters,
    Units,
    Untrained,
    UntrainedZero3,
    Unwrapped,
    Zero3,
    Zero12,
)
from layerwise_dist.frameworks.deepspeed.nvme import Zero3OnNvme
from layerwise_dist.frameworks.elsewhere import tells
from layerwise_dist.frameworks.private_names import DEEPSPEED, require_of_deepspeed

WORKS = (
    "what works: ZeRO stages 0 to 3 in fp32 and bf16, fp16 with loss scaling, CPU offload, NVMe offload with stage 3, "
    "with optimizers of torch.optim or DeepSpeed's Adam, AdamW, Adagrad and Lion"
)
_ENGINE = (
    "module", "optimizer", "was_step_applied", "global_steps", "global_samples", "skipped_steps",
    "micro_steps", "gradient_accumulation_steps", "lr_scheduler", "managed_gradient_accumulation", "dp_world_size",
    "random_ltd_enabled", "curriculum_learning_enabled", *DEEPSPEED["engine"],
)  # fmt: skip
# Of DeepSpeed's own inner optimizers, those that keep all state in `state` and do nothing but update it in `step()`.
_INNER = {"FusedAdam", "DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion", "FusedLion"}


def is_engine(model: object) -> bool:
    """Whether `model` is what `deepspeed.initialize()` returns first. DeepSpeed is not imported for the answer."""
    return any(
        base.__name__ == "DeepSpeedEngine" and base.__module__.startswith("deepspeed.") for base in type(model).__mro__
    )


def config_block(engine: Any) -> Any:
    """The ``layerwise_checkpoint`` block of ds_config, None without one. Raises UnsupportedError."""
    _check_attributes(engine)
    unattached.attached(engine)
    return engine._config._param_dict.get("layerwise_checkpoint")


def accumulating(engine: Any) -> bool:
    """Whether a DeepSpeed engine is within an accumulation window: between two micro-batches of one update.

    False where only the caller knows: unmanaged accumulation, and after `set_gradient_accumulation_boundary()`.
    """
    if not engine.managed_gradient_accumulation() or engine._is_gradient_accumulation_boundary is not None:
        return False
    return engine.micro_steps % engine.gradient_accumulation_steps() != 0


def find_units(engine: Any, rank: int, world_size: int) -> Units:
    """Raises UnsupportedError for a mode that cannot be captured exactly, naming it and what works."""
    _check_attributes(engine)
    unattached.attached(engine)
    for what, refused in _refusals(engine, world_size):
        if refused:
            raise UnsupportedError(f"DeepSpeed with {what} is not supported by this version; {WORKS}")
    units = _units(engine.optimizer, rank)
    _check_inner(units.base)
    scheduler = engine.lr_scheduler
    if scheduler is not None and not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        raise UnsupportedError(f"the LR scheduler {type(scheduler).__name__} has no state_dict() and load_state_dict()")
    return units


def _check_attributes(engine: Any) -> None:
    require_of_deepspeed(engine, _ENGINE, "the engine")
    require_of_deepspeed(engine._config, DEEPSPEED["config"], "the engine's _config")


def _units(wrapper: Any, rank: int) -> Units:
    name = type(wrapper).__name__
    if name == "DeepSpeedZeRoOffload":
        return UntrainedZero3(wrapper)
    if wrapper is None or "DummyOptim" in (name, type(getattr(wrapper, "optimizer", None)).__name__):
        return Untrained(wrapper)
    if not type(wrapper).__module__.startswith("deepspeed.runtime"):
        if isinstance(wrapper, torch.optim.Optimizer):
            return Unwrapped(wrapper)
    elif name == "DeepSpeedZeroOptimizer":
        return Zero12(wrapper)
    elif name == "DeepSpeedZeroOptimizer_Stage3":
        return (Zero3OnNvme if getattr(wrapper, "swap_optimizer", False) else Zero3)(wrapper, rank)
    elif name == "BF16_Optimizer":
        return Bf16(wrapper)
    elif name == "FP16_Optimizer":
        return FusedMasters(wrapper)
    elif name == "FP16_UnfusedOptimizer":
        return UnfusedMasters(wrapper)
    raise UnsupportedError(f"DeepSpeed's optimizer {name} is not supported by this version; {WORKS}")


def _check_inner(base: object) -> None:
    name = type(base).__name__
    if not isinstance(base, torch.optim.Optimizer):
        raise UnsupportedError(
            f"DeepSpeed around {name}, which is not a torch.optim.Optimizer, is not supported; {WORKS}"
        )
    if isinstance(base, torch.optim.LBFGS) or (type(base).__module__.startswith("deepspeed.") and name not in _INNER):
        raise UnsupportedError(f"DeepSpeed around the optimizer {name} is not supported by this version; {WORKS}")
    if tells(base):
        raise UnsupportedError(
            f"DeepSpeed around the optimizer {name}, which has a state_dict() of its own, is not supported: it "
            f"cannot be called while ZeRO has its own tensors in the groups; {WORKS}"
        )


def _refusals(engine: Any, world_size: int) -> list[tuple[str, bool]]:
    """Modes by name, and whether this engine is in one."""
    wrapper, zero = engine.optimizer, engine._config.zero_config
    device = getattr(zero.offload_param, "device", None)
    ratio = getattr(zero.offload_optimizer, "ratio", 1.0) if zero.offload_optimizer is not None else 1.0
    compiled = getattr(getattr(engine._config, "compile_config", None), "deepcompile", False)
    return [
        ("pipeline parallelism", any(base.__name__ == "PipelineEngine" for base in type(engine).__mro__)),
        ("mixture-of-experts layers", bool(getattr(engine, "has_moe_layers", False))),
        (
            "model, tensor or sequence parallelism (a data-parallel group that is not all ranks)",
            engine.dp_world_size != world_size,
        ),
        (
            "parameters that it does not reduce over all ranks (`allreduce = False`, as of experts)",
            not all(getattr(param, "allreduce", True) for param in engine.module.parameters()),
        ),
        ("ZenFlow", bool(getattr(engine, "zenflow", False))),
        ("SuperOffload", type(wrapper).__name__ == "SuperOffloadOptimizer_Stage3"),
        ("DeepCompile", bool(compiled)),
        (
            "frozen parameters under NVMe offload of parameters",
            getattr(device, "value", device) == "nvme"
            and not all(param.requires_grad for param in engine.module.parameters()),
        ),
        ("partial (twin-flow) optimizer offload, a ratio below 1", ratio < 1.0),
        ("zero_hpz_partition_size above 1", getattr(zero, "zero_hpz_partition_size", 1) > 1),
        ("quantized weights (zero_quantized_weights)", bool(getattr(zero, "zero_quantized_weights", False))),
        (
            "torch_autocast in fp16 (its GradScaler)",
            getattr(wrapper, "torch_autocast_gradscaler", None) is not None
            or getattr(engine, "torch_autocast_z0_gradscaler", None) is not None,
        ),
        ("random layer token dropping (random_ltd)", engine.random_ltd_enabled()),
        ("curriculum learning with a data sampler (data_efficiency)", engine.curriculum_learning_enabled()),
    ]
