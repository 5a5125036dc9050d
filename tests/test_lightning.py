# SPDX-License-Identifier: Apache-2.0
"""Lightning's Trainer with one callback: killed anywhere, `fit()` goes on as if it had not been."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.drawing import drawn
from kit.runners import Warm, told
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise_dist as lwd
from layerwise_dist.errors import BoundaryError, ConfigError, LayerwiseError, UnsupportedError

pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402

from layerwise_dist.integrations.lightning import LayerwiseCheckpoint, _Following  # noqa: E402
from layerwise_dist.integrations.lightning_state import FitState  # noqa: E402
from layerwise_dist.loop.placed import PlacedTap  # noqa: E402

BATCHES = {1: 12, 2: 6}  # an epoch's, by the number of ranks
WINDOW, EPOCHS = 3, 3


@pytest.fixture(scope="module")
def fast(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    modules = ["lightning.pytorch"] if importlib.util.find_spec("lightning") else []
    server = Warm(tmp_path_factory.mktemp("warm"), *modules, out_of=warm)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def lines(folder: Path, ranks: int) -> list[dict[Any, Any]]:
    """What each rank told, the last of what it told twice."""
    kept: list[dict[Any, Any]] = []
    for rank in range(ranks):
        found: dict[Any, Any] = {}
        for line in told(folder, rank):
            if "loss" in line:
                found["loss", line["total"]] = line
            elif "log" in line:
                found[("log", line["step"], *line["log"])] = line
            elif "epoch_end" in line:
                found["epoch_end", line["epoch_end"]] = line
            elif "end" in line:
                found["end"] = line
        kept.append(found)
    return kept


def once(fast: Warm, ranks: int, folder: Path, *args: Any, killed: bool = False) -> None:
    done = fast.run("lit.py", ranks if ranks > 1 else 0, folder / "ckpt", folder, *args, check=not killed)
    assert done.returncode != 0 or not killed, done.output[-6000:]


CASES: dict[str, list[Any]] = {
    "automatic": ["--kind", "auto"],
    "manual": ["--kind", "manual", "--accumulate", 5],  # windows go over epochs' ends
    "several optimizers": ["--kind", "several"],
    "no length": ["--kind", "auto", "--endless"],
    "every fourth": ["--kind", "auto", "--every", 4],
}
AT_TWO = {
    **{name: CASES[name] for name in ("automatic", "manual", "several optimizers")},
    "fsdp1": ["--fsdp1"],
    "fsdp2": ["--fsdp2"],
}


@pytest.mark.jobs
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_within_a_window_and_an_epoch_it_goes_on_bit_for_bit(
    fast: Warm, tmp_path: Path, ranks: int, long: bool
) -> None:
    """Parameters, optimizers, schedulers, what is logged (an epoch's means too), callbacks and counts."""
    seed = drawn(range(1 << 32), __name__)
    dice = random.Random(seed)
    known = CASES if ranks == 1 else AT_TWO
    for name in known if long else [dice.choice([*known])]:
        options = known[name]
        plain = tmp_path / f"plain {name}"
        plain.mkdir()
        once(fast, ranks, plain, "--plain", *options)
        expected = lines(plain, ranks)
        for trial in range(6 if long else 1):
            out = tmp_path / f"trial {name} {trial}"
            out.mkdir()
            where = f"seed {seed}, {name}, trial {trial}"
            at = dice.randrange(WINDOW + 3, EPOCHS * BATCHES[ranks] - 1)
            once(fast, ranks, out, *options, "--die-at", at, "--die-rank", dice.randrange(ranks), killed=True)
            once(fast, ranks, out, *options)
            starts = [[line["start"] for line in told(out, rank) if "start" in line] for rank in range(ranks)]
            assert starts[0][0] == 0 and (starts[0][1] > 0 or "--every" in options), where
            assert all(each == starts[0] for each in starts), where
            assert lines(out, ranks) == expected, where


@pytest.mark.jobs
def test_the_page_of_loops_runs_as_it_stands(fast: Warm, tmp_path: Path) -> None:
    fast.run("loops.py", 0, tmp_path, "Lightning")
    assert json.loads((tmp_path / "0.json").read_text()) == [3 * 16, 3 * 16, 5 * 16]


# -- in this process --------------------------------------------------------------------------------------------------


class Small(LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3), nn.Linear(5, 1))
        self.losses: list[float] = []
        self.crash_at = -1

    def on_train_start(self) -> None:
        torch.rand(3)  # a resume draws it as well, where the run that was never interrupted had other numbers

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.losses.append(loss.item())
        if len(self.losses) == self.crash_at:
            raise Crash
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Crash(Exception):
    pass


def fit(
    module: LightningModule, *callbacks: Any, loader: Any = None, after: int = 7, epochs: int = 2, **options: Any
) -> Trainer:
    torch.manual_seed(after)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[*callbacks], logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=bool(callbacks), **{"accumulate_grad_batches": 2, **options},
    )  # fmt: skip
    data = torch.arange(42, dtype=torch.float32).reshape(14, 3) / 10
    train = DataLoader(TensorDataset(data), batch_size=2, shuffle=True)
    trainer.fit(module, train if loader is None else loader, DataLoader(TensorDataset(data[:4]), batch_size=2))
    return trainer


def resumed(root: Path, module: type[Small] = Small) -> tuple[list[Any], list[Any]]:
    """What a crash within the second epoch leads to, and what should come of it: losses and the epoch's mean."""
    whole, before, after = module(), module(), module(1)
    end = fit(whole)
    before.crash_at = 12
    callback = LayerwiseCheckpoint(root)
    with pytest.raises(Crash):
        fit(before, callback)
    again = fit(after, LayerwiseCheckpoint(root), after=8)
    return (
        [again.global_step, *after.losses, float(again.callback_metrics["loss_epoch"])],
        [end.global_step, *whole.losses[-len(after.losses) :], float(end.callback_metrics["loss_epoch"])],
    )


def test_a_crash_within_an_epoch_goes_on_where_it_was(tmp_path: Path) -> None:
    after, expected = resumed(tmp_path)
    assert 2 < len(after) < 10 and after == expected


@pytest.mark.parametrize("broken", ["random numbers", "gathered metrics", "counters"])
def test_mutation_a_resume_that_is_not_exact_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "random numbers":
        monkeypatch.setattr(PlacedTap, "go_on", lambda tap: None)
    elif broken == "gathered metrics":
        plain = FitState.state_dict
        monkeypatch.setattr(FitState, "state_dict", lambda fit: {**plain(fit), "results": {}})
    else:
        monkeypatch.setattr(_Following, "_epoch_resets", lambda self, plain: plain())
        monkeypatch.setattr(_Following, "_epoch_begins", lambda self, plain, fetcher: plain(fetcher))
    after, expected = resumed(tmp_path)
    assert after != expected


def test_the_best_step_is_under_its_tag_and_fit_may_go_on(tmp_path: Path) -> None:
    callback = LayerwiseCheckpoint(tmp_path, monitor="val", mode="max")
    trainer = fit(Small(), callback, epochs=1)
    assert callback.engine is not None and callback.engine.completed == 4
    assert callback.best_score == pytest.approx(float(trainer.callback_metrics["val"]))
    tags = [(each.tag, each.step) for each in callback.engine.metadata.inventory().lineage()]
    assert ("best", 4) in tags, tags
    module, callback = Small(1), LayerwiseCheckpoint(tmp_path, monitor="val", mode="max")
    fit(module, callback)
    assert len(module.losses) == 7 and callback.engine is not None and callback.engine.completed == 8
    with pytest.raises(ConfigError, match="monitor = 'other' is not among the metrics.*'val'"):
        fit(Small(), LayerwiseCheckpoint(tmp_path / "other", monitor="other"))
    with pytest.raises(ConfigError, match="must be 'min' or 'max'"):
        LayerwiseCheckpoint(tmp_path, mode="least")  # type: ignore[arg-type]


class Adding(Callback):
    def __init__(self, root: Path) -> None:
        self._root = root

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.callbacks.append(LayerwiseCheckpoint(self._root))


class Attaching(Callback):
    def __init__(self, root: Path) -> None:
        self._root = root

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        lwd.attach(trainer.strategy.model, trainer.optimizers[0], dir=str(self._root))


class Reading(Small):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, *_ = next(dataloader_iter)
        return self.net(batch[0]).sum()


class Saving(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        engine = next(each.engine for each in trainer.callbacks if isinstance(each, LayerwiseCheckpoint))
        engine.save("now")


def refused(match: str, *callbacks: Any, kind: type[LayerwiseError] = UnsupportedError, **options: Any) -> None:
    with pytest.raises(kind, match=match):
        fit(options.pop("module", None) or Small(), *callbacks, **options)


def test_what_cannot_be_followed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def callback(name: str) -> LayerwiseCheckpoint:
        return LayerwiseCheckpoint(tmp_path / name)

    refused("put among the callbacks when fit.. had begun: too late", Adding(tmp_path / "late"), kind=BoundaryError)
    refused(r"attach\(\) within Trainer.fit\(\)", Attaching(tmp_path / "by hand"), kind=BoundaryError)
    refused("two LayerwiseCheckpoints", callback("1"), callback("2"), kind=ConfigError)
    refused("reload_dataloaders_every_n_epochs", callback("3"), reload_dataloaders_every_n_epochs=1)
    refused("draws from the loader itself", callback("4"), module=Reading())
    data = DataLoader(TensorDataset(torch.ones(4, 3)))
    refused("training loaders DataLoader, DataLoader", callback("5"), loader=[data, data])
    refused("within an iteration of Lightning's loop", callback("6"), Saving(), kind=BoundaryError)
    monkeypatch.setattr("layerwise_dist.integrations.lightning._STRATEGIES", ())
    refused("Lightning's SingleDeviceStrategy can't be followed", callback("7"))
    monkeypatch.undo()
    monkeypatch.setattr(
        "layerwise_dist.integrations.lightning.relied_on_by_state", lambda trainer: [(trainer.fit_loop, "_gone")]
    )
    refused(r"has no _FitLoop\._gone, by which its loop is followed. Tested with lightning 2\.6\.6", callback("8"))


def test_an_engine_that_is_turned_off_leaves_the_loop_as_it_is(tmp_path: Path) -> None:
    whole, off = Small(), Small()
    fit(whole)
    fit(off, LayerwiseCheckpoint(tmp_path, enabled=False))
    assert off.losses == whole.losses and not list(tmp_path.iterdir())
