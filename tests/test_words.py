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


def test_insides_tell_another_storage_address_first_element_shape_stride_dtype_and_sign() -> None:
    tensor, flipped = torch.zeros(64), torch.zeros(6, dtype=torch.complex64)
    tensors = [torch.ones(2, 3), tensor, flipped]
    changes: list[Callable[[], object]] = [
        lambda: tensor.untyped_storage().resize_(1 << 16),
        lambda: setattr(tensor, "data", torch.zeros(64)),
        lambda: tensor.set_(tensor.untyped_storage(), 3, (8,)),
        lambda: tensor.set_(tensor.untyped_storage(), 3, (2, 2, 2)),
        lambda: tensor.transpose_(0, 2),
        lambda: setattr(tensor, "data", tensor.data.view(torch.int32)),
        lambda: setattr(flipped, "data", flipped.data.conj()),
        lambda: setattr(flipped, "data", flipped.data.resolve_conj()),
        lambda: tensors.__setitem__(0, torch.ones(2, 3)),
    ]
    for change in changes:
        known, geometry = words.Insides(tensors), Geometry(tensors)
        tensor.add_(1)
        held = [tensor.detach(), tensor.untyped_storage(), flipped.real]
        assert known.are_of(tensors) and geometry.is_of(tensors)
        change()
        assert not known.are_of(tensors), "or nobody would ask torch"
        assert not geometry.is_of(tensors)
        del held
    assert not words.Insides(tensors).are_of(tensors[:2]) and not words.Insides(tensors[:2]).are_of(tensors)


def test_what_torch_keeps_outside_of_a_tensor_is_asked_of_torch() -> None:
    """From six dimensions on: another stride there changes nothing in the tensor itself."""
    tensor = torch.zeros(3, 3, 3, 3, 3, 3)[:2, :2, :2, :2, :2, :2]
    known = Geometry([tensor])
    assert not words.Insides([tensor]).are_of([tensor]) and known.is_of([tensor])
    tensor.as_strided_(tensor.shape, (81, 243, 27, 9, 3, 1))
    assert not known.is_of([tensor])
    fewer = torch.zeros(2, 2, 2, 2, 2)
    known = Geometry([fewer])
    fewer.unsqueeze_(0)
    assert not known.is_of([fewer])


def test_other_storages_over_the_same_memory_are_the_same_geometry() -> None:
    memory = bytearray(256)
    first, second = (torch.frombuffer(memory, dtype=torch.uint8) for _ in range(2))
    known, insides = Geometry([first]), words.Insides([first])
    assert not insides.are_of([second]) and known.is_of([second])
    assert not known.is_of([second[1:]]) and known.is_of([second])


@pytest.mark.parametrize("name", ["counter", "storage", "references"])
def test_a_word_that_does_not_follow_is_found_out_and_torch_is_asked(
    anew: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    original = _native.TensorWords

    def shifted(kind: type, **offsets: int) -> _native.TensorWords:
        beside = offsets["references"] + 8
        elsewhere = {"counter": offsets["storage"], "storage": offsets["counter"], "references": beside}
        return original(kind, **{**offsets, name: elsewhere[name]})

    monkeypatch.setattr(_native, "TensorWords", shifted)
    assert words._find() is None
    tensors = [torch.zeros(2), torch.ones(3)]
    tensors[0].add_(1)
    assert words.versions(tensors) == array.array("Q", [1, 0])
    known = Geometry(tensors)
    assert not words.Insides(tensors).are_of(tensors)
    assert known.is_of(tensors) and not known.is_of([*reversed(tensors)])


def test_insides_that_lack_the_dispatch_keys_are_found_out(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a torch that has more words before them: the next length is tried."""
    monkeypatch.setattr(words, "_INSIDE", (168,))
    assert words._find() is None
    monkeypatch.setattr(words, "_INSIDE", (168, 176))
    assert words._find() is not None


def test_where_no_word_has_the_version_torch_is_asked(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_half", lambda address: 0)
    assert words._find() is None


def test_what_is_no_tensor_is_not_read() -> None:
    known = words._find()
    assert known is not None
    for other in (None, object(), "", 7, torch.Tensor):
        assert known.versions([torch.zeros(1), other]) is None and known.insides([other]) is None
    with pytest.raises(TypeError):
        known.versions((torch.zeros(1),))  # type: ignore[arg-type]
    for inside in (8, 264):
        with pytest.raises(ValueError, match="256 bytes at most"):
            _native.TensorWords(torch.Tensor, impl=0, counter=0, version=0, storage=0, address=0, references=8,
                                inside=inside)  # fmt: skip
    with pytest.raises(ValueError, match="class of tensors"):
        _native.TensorWords(7, impl=0, counter=0, version=0, storage=0, address=0, references=8, inside=176)  # type: ignore[arg-type]
