# SPDX-License-Identifier: Apache-2.0
"""What Lightning keeps during `fit()` besides model, optimizers and schedulers, as a `state_dict()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector import result as results
from torchmetrics import Metric

from layerwise_dist.errors import UnsupportedError

_MADE = ("_Metadata", "_ResultMetric", "_Sync")
_CONNECTOR = ("_first_loop_iter", "_current_fx", "_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_DESCRIBED = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip


def relied_on_by_state(trainer: Any) -> list[tuple[object, str]]:
    """All that is used here of Lightning and torchmetrics beside what they document."""
    first: list[tuple[object, str]] = [(trainer, "_logger_connector"), *((results, name) for name in _MADE)]
    if not all(hasattr(owner, name) for owner, name in first):
        return first  # by which the rest is asked
    probe = results._ResultMetric(_probe(), True)
    return [
        (trainer.fit_loop.epoch_loop, "_results"), (trainer.fit_loop, "epoch_progress"),
        *((trainer._logger_connector, name) for name in _CONNECTOR), *((probe.meta, name) for name in _DESCRIBED),
        *((probe, name) for name in ("value", "has_reset", "_forward_cache", "_computed", "_update_count")),
        *((probe.meta.sync, name) for name in ("should", "group", "rank_zero_only")), (Metric, "metric_state"),
    ]  # fmt: skip


def _probe() -> Any:
    meta = results._Metadata("training_step", "probe")
    meta.sync = results._Sync()
    return meta


class FitState:
    """Loops' progress, logged metrics, callbacks, and what the module's and the data module's hooks save.

    Attributes:
        best: of the metric that is monitored; None before the first.
        improved: the boundary that comes is to be saved as the best.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.best: float | None = None
        self.improved = False
        self._stop: bool | None = None

    @property
    def mid_epoch(self) -> bool:
        """Do the loops stand within an epoch, its last batch included?"""
        current = self._trainer.fit_loop.epoch_progress.current
        return bool(current.started != current.processed)

    def go_on(self) -> None:
        """The loop is where the restored boundary was."""
        if self._stop is not None:
            self._trainer.should_stop, self._stop = self._stop, None

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        module, data = trainer.lightning_module, trainer.datamodule
        loops = trainer.fit_loop.state_dict()
        loops["state_dict"].pop("combined_loader", None)  # the tap knows better
        hooks: dict[str, Any] = {}
        for callback in trainer.callbacks:
            callback.on_save_checkpoint(trainer, module, hooks)
        module.on_save_checkpoint(hooks)
        return {
            "loops": loops,
            "connector": {name: _copied(getattr(trainer._logger_connector, name)) for name in _CONNECTOR},
            "results": {key: _result(key, each) for key, each in trainer.fit_loop.epoch_loop._results.items()},
            "metrics": {name: _metric(each) for name, each in _metrics(module).items()},
            "callbacks": {each.state_key: saved for each in trainer.callbacks if (saved := each.state_dict())},
            "hooks": hooks,
            "data": {} if data is None else data.state_dict(),
            "stop": trainer.should_stop if self._stop is None else self._stop,
            "best": self.best,
            "improved": self.improved,
        }

    # -- coming back --------------------------------------------------------------------------------------------------

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Within `fit_loop.setup_data()`: what comes next is `fit_loop.reset()`."""
        trainer = self._trainer
        module, data, device = trainer.lightning_module, trainer.datamodule, trainer.strategy.root_device
        fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
        fit.load_state_dict(saved["loops"])
        epoch.restarting = False
        for name in _CONNECTOR:
            setattr(trainer._logger_connector, name, _moved(saved["connector"][name], device))
        known = _metrics(module)
        for name, each in saved["metrics"].items():
            metric = known[name]
            for key, value in each["state"].items():
                setattr(metric, key, _moved(value, metric.device))
            metric._update_count, metric._computed = each["updates"], None
        epoch._results.clear()
        for key, each in saved["results"].items():
            epoch._results[key] = _made(each, trainer, known, device)
        for callback in trainer.callbacks:
            if callback.state_key in saved["callbacks"]:
                callback.load_state_dict(saved["callbacks"][callback.state_key])
            callback.on_load_checkpoint(trainer, module, saved["hooks"])
        module.on_load_checkpoint(saved["hooks"])
        if data is not None:
            data.load_state_dict(saved["data"])
        self.best, self.improved = saved["best"], saved["improved"]
        self._stop = saved["stop"]


def _metrics(module: torch.nn.Module) -> dict[str, Metric]:
    """Those that the module has as attributes: their state is in no `state_dict()` by default."""
    return {name: each for name, each in module.named_modules() if isinstance(each, Metric)}


def _metric(metric: Metric) -> dict[str, Any]:
    return {"state": _copied(metric.metric_state), "updates": metric._update_count}


def _result(key: str, result: Any) -> dict[str, Any]:
    """What `self.log()` has gathered under that key so far."""
    meta = result.meta
    if meta.sync.group is not None:
        raise UnsupportedError(
            f"self.log({meta.name!r}, sync_dist_group=...) in {meta.fx}: what an epoch has gathered over a group of "
            "ranks cannot be restored. Leave the group out, or log a torchmetrics.Metric"
        )
    return {
        **{name: getattr(meta, name) for name in _DESCRIBED},
        "reduce": meta.reduce_fx.__name__,
        "sync": [meta.sync.should, meta.sync.rank_zero_only],
        "is_tensor": result.is_tensor,
        "value": result.value if result.is_tensor else None,
        "size": getattr(result, "cumulated_batch_size", None),
        "cache": result._forward_cache,
        "computed": result._computed,
        "updates": result._update_count,
        "reset": result.has_reset,
    }


def _made(saved: Mapping[str, Any], trainer: Any, metrics: Mapping[str, Metric], device: torch.device) -> Any:
    meta = results._Metadata(**{name: saved[name] for name in _DESCRIBED}, reduce_fx=getattr(torch, saved["reduce"]))
    should, rank_zero_only = saved["sync"]
    meta.sync = results._Sync(_should=should, fn=trainer.strategy.reduce, rank_zero_only=rank_zero_only)
    result: Any = results._ResultMetric(meta, saved["is_tensor"]).to(device)
    result.value = _moved(saved["value"], device) if saved["is_tensor"] else metrics[saved["metric_attribute"]]
    if saved["size"] is not None:
        result.cumulated_batch_size = _moved(saved["size"], device)
    result._forward_cache, result._computed = _moved(saved["cache"], device), _moved(saved["computed"], device)
    result._update_count, result.has_reset = saved["updates"], saved["reset"]
    return result


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, device) for each in value]
    return value
