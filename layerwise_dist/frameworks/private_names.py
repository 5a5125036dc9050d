# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch and DeepSpeed that this package uses, in one list. `attach()` checks those of its case.

A place is a module, or a class or function of one: ``torch.nn:Module``. Two names with a bar between them are one thing
that versions name differently. tests/test_private_names.py compares the list with the code. The integrations check what
they need of their hosts themselves (`integrations/host_names.py`, `integrations/trainer_names.py`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import sys
from collections.abc import Iterable, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError

TORCH_TRIED = ("2.9.1", "2.11.0", "2.13.0", "2.14.1")
DEEPSPEED_TRIED = ("0.19.8",)

Names = Mapping[str, tuple[str, ...]]

# By case: what torch must have for it.
TORCH: Mapping[str, Names] = {
    "any model": {
        "torch": ("_C", "_neg_view"),
        "torch:Tensor": ("_cdata", "_version"),
        "torch:UntypedStorage": ("_cdata",),
        "torch._C": ("DisableTorchFunctionSubclass",),
        "torch.nn:Module": ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"),
        "torch.utils._python_dispatch": ("is_traceable_wrapper_subclass", "is_traceable_wrapper_subclass_type"),
    },
    "a torch optimizer": {
        "torch.optim:Optimizer": (
            "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_post_hooks",
            "_optimizer_load_state_dict_pre_hooks", "_patch_step_function",
        ),
    },
    "updates layer by layer": {
        "torch:_C._functions.AccumulateGrad": ("_sequence_nr",),
        "torch.optim.optimizer": ("_default_to_fused_or_foreach",),
    },
    "DistributedDataParallel": {
        "torch.nn.parallel:DistributedDataParallel": (
            "_comm_hooks", "_delay_all_reduce_params", "_get_ddp_logging_data", "_join_config",
        ),
    },
    "gradients of DistributedDataParallel": {"torch.autograd:Variable": ("_execution_engine",)},
    "FSDP1": {
        "torch.distributed.fsdp:FullyShardedDataParallel": ("_fsdp_wrapped_module", "_handle", "_use_orig_params"),
        "torch.distributed.fsdp._flat_param:FlatParamHandle": (
            "_offload_params", "flat_param", "post_reshard", "reshard", "uses_sharded_strategy",
        ),
        "torch.distributed.fsdp._flat_param:FlatParameter": (
            "_contiguities", "_fqns", "_full_param_padded", "_param_extensions", "_param_infos", "_params", "_shapes",
            "_shard_param_infos", "_sharded_size", "_shared_param_infos",
        ),
        "torch.distributed.fsdp._runtime_utils:_share_state_and_init_handle_attrs": (
            "_has_optim_in_backward", "_in_backward_optimizers",
        ),
    },
    "DTensors (FSDP2, tensor parallelism)": {
        "torch.distributed.tensor:DTensor": ("_local_tensor",),
        "torch.distributed.tensor._utils": ("compute_local_shape_and_global_offset",),
        "torch.distributed.fsdp:FSDPModule": ("_get_fsdp_state",),
        "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState": ("_fsdp_param_groups|_fsdp_param_group",),
        "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup": ("fsdp_params",),
        "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam": (
            "_module_info", "_sharded_post_forward_param", "_unsharded_param", "sharded_param",
        ),
    },
    "ZeroRedundancyOptimizer": {
        "torch.distributed.optim.zero_redundancy_optimizer:ZeroRedundancyOptimizer": (
            "_overlap_with_ddp", "_param_to_rank",
        ),
    },
    "a DataLoader": {
        "torch.utils.data:DataLoader": ("_dataset_kind", "_index_sampler", "_iterator"),
        "torch.utils.data.dataloader": ("_DatasetKind",),
        "torch.utils.data.dataloader:_BaseDataLoaderIter": ("_next_index", "_num_yielded", "_sampler_iter"),
        "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter": ("_send_idx",),
    },
    "preemption": {"torch.utils.data._utils.signal_handling": ("_set_worker_signal_handlers",)},
    "load() into a model on the meta device": {"torch.nn:Module": ("_apply",)},
    "torch.distributed.checkpoint": {"torch.distributed.checkpoint._nested_dict": ("flatten_state_dict",)},
}  # fmt: skip

# What of torch is in a model only if the script has imported it; checked then, for any model.
TORCH_IF_IMPORTED: Names = {
    "torch._dynamo.eval_frame:OptimizedModule": ("_orig_mod",),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper:ActivationWrapper": ("_checkpoint_wrapped_module",),
}

# What each object of DeepSpeed must have; the modules of `frameworks.deepspeed` look for these, and for public names.
DEEPSPEED: Names = {
    "engine": ("_config", "_is_gradient_accumulation_boundary", "_take_model_step"),
    "engine, its checkpoint calls": ("_checkpoint_tag_validation",),
    "engine, layerwise bench": ("_commit_decoupled_checkpoint", "_configure_checkpointing"),
    "config": ("_param_dict",),
    "parameter of stages 1 and 2": ("_hp_mapping",),
    "stages 1 and 2": (
        "_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state", "_link_all_hp_params",
    ),
    "stages 1 and 2, in_backward": ("_get_compact_grad_partition_buffer", "_use_compact_grad_partition_buffer"),
    "stage 3": ("_reassign_or_swap_out_partitioned_parameters",),
    "stage 3, in_backward": ("_prepare_sub_group", "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"),
    "stage 3 on NVMe": (
        "_optimizer_states_and_gradient_swap_in", "_optimizer_states_and_gradient_swap_out", "_release_swap_buffers",
        "_swappable_optimizer_subgroup",
    ),
    "in_backward": ("_optimizer_step",),
}  # fmt: skip

# Names that are recognized where they are met, by what they say in the comment; where they are not, nothing is missing.
RECOGNIZED: Names = {
    # Attributes that an optimizer of torch or DeepSpeed has, and that are no state.
    "of optimizers": (
        "_dummy_overflow_buf", "_need_device_dtype_check_for_fused", "_opt_called", "_step_count",
        "_step_supports_amp_scaling", "_warned_capturable_if_run_uncaptured", "_zero_grad_profile_name",
    ),
    # Keys of a state_dict().
    "of schedulers and scalers": (
        "_growth_tracker", "_last_lr", "_milestones", "_schedule_phases", "_schedulers",
    ),
    # What a model of transformers may say of itself; functions of its Trainer, in which `attach()` comes too late.
    "of transformers": (
        "_inner_training_loop", "_is_hf_initialized", "_prepare_for_training", "_tied_weights_keys",
    ),
}  # fmt: skip


def require(case: str) -> None:
    """Raises UnsupportedError, which lists them, where this torch lacks names that `case` needs."""
    if lacking := missing(case):
        raise UnsupportedError(
            f"torch {torch.__version__} has no {', '.join(lacking)}, which {case} needs here. "
            f"{tried('torch', TORCH_TRIED)}"
        )


def missing(case: str) -> list[str]:
    """The names that `case` needs and this torch lacks, each as ``place.name``."""
    found = [text for place, names in TORCH[case].items() for text in _lacking(place, names)]
    if case == "any model":
        for place, names in TORCH_IF_IMPORTED.items():
            if place.partition(":")[0] in sys.modules:
                found += _lacking(place, names)
    return found


def require_of_deepspeed(owner: Any, names: Iterable[str], what: str = "") -> None:
    """Raises UnsupportedError where an object of DeepSpeed, by default called by its class, lacks one of `names`."""
    if lacking := [name for name in names if not hasattr(owner, name)]:
        from deepspeed import __version__

        raise UnsupportedError(
            f"DeepSpeed {__version__}: {what or type(owner).__name__} has no attribute "
            f"{', '.join(map(repr, lacking))}, which layerwise_dist needs. {tried('DeepSpeed', DEEPSPEED_TRIED)}"
        )


def tried(package: str, versions: tuple[str, ...]) -> str:
    return f"Tested with {package} {', '.join(versions)}: install one of these, or a newer layerwise_dist"


@functools.cache
def _lacking(place: str, names: tuple[str, ...]) -> list[str]:
    module, _, inner = place.partition(":")
    shown = place.replace(":", ".")
    try:
        owner = importlib.import_module(module)
        owner = operator.attrgetter(inner)(owner) if inner else owner
    except (ImportError, AttributeError):
        return [shown]
    lacking = [name for name in names if not any(has(owner, each) for each in name.split("|"))]
    return [f"{shown}.{name.replace('|', ' or ')}" for name in lacking]


def has(owner: Any, name: str) -> bool:
    """Whether a module or class has that attribute; of what is set on instances, whether the class's code names it. Of
    a function: whether its code does.
    """
    if isinstance(owner, FunctionType):
        return _is_in(owner, name)
    if hasattr(owner, name):
        return True
    return isinstance(owner, type) and any(
        name in vars(kind).get("__annotations__", ()) or any(_is_in(each, name) for each in vars(kind).values())
        for kind in owner.__mro__
    )


def _is_in(function: Any, name: str) -> bool:
    plain = inspect.unwrap(getattr(function, "__func__", function))
    return isinstance(plain, FunctionType) and _names(plain.__code__, name)


def _names(code: CodeType, name: str) -> bool:
    return (
        name in code.co_names
        or name in code.co_consts
        or any(_names(each, name) for each in code.co_consts if isinstance(each, CodeType))
    )
