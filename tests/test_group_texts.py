# SPDX-License-Identifier: Apache-2.0
"""The text of param groups is what it would be without memory of the last one, whatever changed in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise_dist as lwd
from layerwise_dist.capture import group_texts
from layerwise_dist.capture.group_texts import GroupTexts
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.typed_json_types import Prepared

Groups = list[dict[str, Any]]


def groups() -> Groups:
    return [
        {
            "lr": 0.1 * number, "betas": (0.9, 0.999), "eps": 1e-8, "foreach": None, "amsgrad": False,
            "sides": [1, 2.5, "é"], "params": [f"layers.{number}.weight", "bias"],
        }
        for number in range(5)
    ]  # fmt: skip


def is_same(texts: GroupTexts, live: Groups) -> bool:
    """Whether it is what is written of them anew."""
    return typed_json.dumps({"groups": texts.of(live)}) == typed_json.dumps({"groups": live})


CHANGES: dict[str, Callable[[Groups], object]] = {
    "nothing": lambda live: None,
    "a learning rate": lambda live: live[2].update(lr=0.7),
    "all learning rates": lambda live: [group.update(lr=group["lr"] / 3) for group in live],
    "a zero's sign": lambda live: live[0].update(lr=-0.0),
    "an equal value of another type": lambda live: live[1].update(amsgrad=0),
    "no number": lambda live: live[1].update(lr=float("nan")),
    "an item of a list": lambda live: live[1]["sides"].__setitem__(0, 9),
    "an item more": lambda live: live[1]["sides"].append(None),
    "an equal list": lambda live: live[4].update(params=[*live[4]["params"]]),
    "a list for a tuple": lambda live: live[4].update(betas=[0.9, 0.999]),
    "a group more": lambda live: live.append({"lr": 1.0}),
    "a group less": lambda live: live.pop(),
    "another name": lambda live: live[3].update(momentum=0.5),
    "a name less": lambda live: live[3].pop("eps"),
    "another order": lambda live: live[3].update(lr=live[3].pop("lr")),
    "a tensor": lambda live: live[0].update(lr=torch.tensor(0.5)),
    "a nested list": lambda live: live[0].update(sides=[[1]]),
    "a long vector": lambda live: live[0].update(sides=[*range(100)]),
    "a name that is a tag": lambda live: live[0].update({"!": 1}),
    "a name that is no string": lambda live: live[0].update({7: 1}),  # type: ignore[dict-item]
    "an empty group": lambda live: live.__setitem__(2, {}),
}
UNFIT = ("a tensor", "a nested list", "a long vector", "a name that is a tag", "a name that is no string")


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changed_the_text_is_that_of_what_there_is(what: str) -> None:
    live, texts = groups(), GroupTexts()
    assert is_same(texts, live) and is_same(texts, live)
    CHANGES[what](live)
    if what in UNFIT:
        assert texts.of(live) is None and texts.of(live) is None
    else:
        assert is_same(texts, live) and is_same(texts, live)
    live[:] = groups()
    assert is_same(texts, live)


def test_only_what_changed_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    live, texts, written = groups(), GroupTexts(), []
    prepare = typed_json.prepare

    def noted(value: Any, *, path: str = "state") -> Prepared:
        written.append(value)
        return prepare(value, path=path)

    texts.of(live)
    monkeypatch.setattr(typed_json, "prepare", noted)
    assert isinstance(texts.of(live), Prepared) and not written
    live[3]["lr"], live[1]["sides"][2] = 0.25, "e"
    texts.of(live)
    assert written == [0.25, [1, 2.5, "e"]]


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["constants", "a tensor"])
def test_names_are_written_once_whatever_the_groups_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: Any
) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, foreach=False)
    prepare = typed_json.prepare
    written: list[Any] = []

    def noted(value: Any, *, path: str = "state") -> Prepared:
        written.append(value)
        return prepare(value, path=path)

    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        for step in ckpt.steps(5):
            if step == 3:
                monkeypatch.setattr(typed_json, "prepare", noted)
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not written


def test_mutation_a_list_that_is_taken_for_what_it_was_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_texts, "same_objects", lambda some, others: True)
    live, texts = groups(), GroupTexts()
    assert is_same(texts, live)
    live[1]["sides"][0] = 9
    assert not is_same(texts, live)
