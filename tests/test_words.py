# SPDX-License-Identifier: Apache-2.0
"""Version counters and places of tensors that the native core reads are what torch says, or torch is asked."""

from __future__ import annotations

import array
import operator
from collections.abc import Callable, Iterator

import pytest
import torch

from layerwise_dist import _native
from layerwise_dist.tensors import words
from layerwise_dist.tensors.geometry import Geometry

VERSION = operator.attrgetter("_version")


@pytest.fixture
def anew() -> Iterator[None]:
    words._words.cache_clear()
    yield
    words._words.cache_clear()


def test_of_this_torch_the_words_are_known() -> None:
    assert words._find() is not None
    with torch.inference_mode():
        assert words._find() is not None


def test_versions_are_torch_s_own_whatever_raises_or_replaces_them() -> None:
    tensors = [
        torch.zeros(5),
        torch.nn.Parameter(torch.zeros(5)),
        torch.zeros(()),
        torch.zeros(3, 3)[1:],
        torch.zeros(0),
    ]
    swapped = torch.ones(5)
    changes: list[Callable[[], object]] = [
        lambda: tensors[0].add_(1), lambda: tensors[0][2:].mul_(3), lambda: torch._foreach_add_(tensors[2:4], 1.0),
        lambda: setattr(tensors[1], "data", torch.ones(7)), lambda: tensors[0].set_(torch.zeros(9)),
        lambda: torch.utils.swap_tensors(tensors[0], swapped), lambda: tensors[1].detach().add_(1),
        lambda: tensors[3].resize_(1, 3), lambda: tensors[4].requires_grad_(),
    ]  # fmt: skip
    with torch.no_grad():
        for change in changes:
            change()
            assert words.versions(tensors) == array.array("Q", map(VERSION, tensors))


def test_what_has_no_version_is_refused_as_torch_does() -> None:
    with torch.inference_mode():
        bare = torch.zeros(3)
    with pytest.raises(RuntimeError, match="version counter"):
        words.versions([torch.zeros(2), bare])


def test_places_tell_another_storage_another_address_and_another_first_element() -> None:
    tensor = torch.zeros(64)
    seen = [words.places([tensor])]
    tensor.untyped_storage().resize_(1 << 16)
    seen.append(words.places([tensor]))
    tensor.data = torch.zeros(64)
    seen.append(words.places([tensor]))
    tensor.set_(tensor.untyped_storage(), 3, (8,))
    seen.append(words.places([tensor]))
    assert None not in seen and len({*seen}) == 4
    tensor.add_(1)
    assert words.places([tensor]) == seen[-1]


def test_other_storages_over_the_same_memory_are_the_same_geometry() -> None:
    memory = bytearray(256)
    first, second = (torch.frombuffer(memory, dtype=torch.uint8) for _ in range(2))
    known = Geometry([first])
    assert words.places([first]) != words.places([second]) and known.is_of([second])
    assert not known.is_of([second[1:]])


@pytest.mark.parametrize("name", ["counter", "storage", "offset"])
def test_a_word_that_does_not_follow_is_found_out_and_torch_is_asked(
    anew: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    original = _native.TensorWords

    def shifted(kind: type, **offsets: int) -> _native.TensorWords:
        elsewhere = {"counter": offsets["storage"], "storage": offsets["counter"], "offset": offsets["offset"] + 8}
        return original(kind, **{**offsets, name: elsewhere[name]})

    monkeypatch.setattr(_native, "TensorWords", shifted)
    assert words._find() is None
    tensors = [torch.zeros(2), torch.ones(3)]
    tensors[0].add_(1)
    assert words.versions(tensors) == array.array("Q", [1, 0])
    assert words.places(tensors) is None
    known = Geometry(tensors)
    assert known.is_of(tensors) and not known.is_of([*reversed(tensors)])


def test_where_no_word_has_the_version_torch_is_asked(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_half", lambda address: 0)
    assert words._find() is None


def test_what_is_no_tensor_is_not_read() -> None:
    known = words._find()
    assert known is not None
    for other in (None, object(), "", 7, torch.Tensor):
        assert known.versions([torch.zeros(1), other]) is None and known.places([other]) is None
    with pytest.raises(TypeError):
        known.versions((torch.zeros(1),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class of tensors"):
        _native.TensorWords(7, impl=0, counter=0, version=0, storage=0, address=0, offset=0)  # type: ignore[arg-type]
