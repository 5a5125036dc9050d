# SPDX-License-Identifier: Apache-2.0
"""Many values whose texts are one: what is made once for all of them is what each of them says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwise_dist.errors import DamageError
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.alike_json import Alike
from layerwise_dist.tensors.values import alike

pytestmark = pytest.mark.quick


def state(number: int, **more: Any) -> dict[str, Any]:
    return {
        "step": 3, "boundary": {"rng": torch.full((100,), number), "at": ["l"]},
        "optimizer": {"groups": [{"params": ["a", "b"], "lr": 0.1}], "order": {"a": ["step"]}},
        "wrapper": (1, {2: "x"}), "none": b"", **more,
    }  # fmt: skip


VALUES = [state(1), state(2), state(2), state(3, more={"bytes": b"a"}), state(4), state(5), [1, 2], {1: "a"}, state(6)]


def test_each_value_is_what_its_text_and_its_bytes_say() -> None:
    reader, found = Alike(), []
    for value in VALUES:
        found.append(reader.loads(*typed_json.dumps(value)))
        assert alike(found[-1], value), value
    assert all(alike(one, value) for one, value in zip(found, VALUES, strict=True)), "those before stay as they were"
    assert found[0]["optimizer"] is found[1]["optimizer"] and found[0]["boundary"] is not found[1]["boundary"]
    assert list(found[1]) == list(VALUES[1])


def test_what_is_malformed_is_named_as_it_would_be_alone() -> None:
    text, blob = typed_json.dumps(state(1))
    for wrong in [
        (text, blob[:-1]), (text, blob + b"\0"), (text, b""), (text[:-1], blob),
        (text.replace(b"int64", b"int63"), blob), (text.replace(b'"at":["l"]', b'"at":{"!":"x"}'), blob),
    ]:  # fmt: skip
        reader = Alike()
        assert alike(reader.loads(text, blob), state(1))
        with pytest.raises(DamageError) as alone:
            typed_json.loads(*wrong, where="it")
        with pytest.raises(DamageError) as among:
            reader.loads(*wrong, where="it")
        assert str(among.value) == str(alone.value)
        assert alike(reader.loads(text, blob), state(1)), "and the next one is read"


def test_mutation_bytes_of_another_value_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = typed_json.loads
    monkeypatch.setattr(typed_json, "loads", lambda text, blob, **more: loads(text, blob, **more) if blob else None)
    with pytest.raises((AssertionError, DamageError)):
        test_each_value_is_what_its_text_and_its_bytes_say()
