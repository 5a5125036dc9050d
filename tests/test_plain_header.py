# SPDX-License-Identifier: Apache-2.0
"""Headers that our writer wrote are read by a shorter way. It takes nothing that the check of all others would not, and
nothing for something else.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from layerwise_dist.errors import DamageError, UnsupportedError
from layerwise_dist.storage import header, plain_header, plain_places, shard_layout, strict_json
from layerwise_dist.storage.header import ShardIndex, parse_header
from layerwise_dist.storage.shard_layout import ALIGN, ShardLayout, Source, round_up, state_extent
from layerwise_dist.tensors.slices import ITEM_BYTES, Slice

pytestmark = pytest.mark.quick

CASES = 700
WORLD, RANK = 4, 1
LAYERS: dict[str, list[tuple[str, list[Source]]]] = {
    "nothing": [],
    "whole": [("a", [Source(Slice.whole("param", "w", "F32", (3, 5)))])],
    "cut": [
        ("a", [
            Source(Slice("param", "w", "F32", (8, 3), offsets=(2, 0), lengths=(2, 3), among="0-3")),
            Source(Slice("exp_avg", "w", "BF16", (8, 3), offsets=(0, 1), lengths=(8, 1), among="1,3")),
            Source(Slice("param", "v", "F64", (9,), start=4, length=5, among="0-3")),
            Source(Slice("param", "none", "F64", (9,), start=9, length=0, among="0-3")),
        ]),
        ("b", [
            Source(Slice.whole("step", "w", "F32", ()), wrapped=True),
            Source(Slice.whole("buffer", "empty", "I64", (0, 7))),
            Source(Slice.whole("buffer", "also empty", "I64", (0,))),
            Source(Slice("param", "large", "F16", (4, 9000), offsets=(1, 0), lengths=(1, 9000), among="0-3"), 64),
        ]),
    ],
    "odd names": [("ä\n\"", [
        Source(Slice.whole("param", name, "U8", (1,), "0-3"))
        for name in ("ä", "名", "\U0001f600", "\x00\x1f\x7f\u2028", 'a"b\\c/d', "__metadata__", "x" * 3000)
    ])],
    "many": [("a", [
        Source(Slice("param", f"w.{number}", "F32", (WORLD, 16), offsets=(RANK, 0), lengths=(1, 16), among="0-3"))
        for number in range(40)
    ])],
}  # fmt: skip


@functools.cache
def written(name: str, *, hashed: bool = True) -> tuple[bytes, int]:
    """The JSON of a header, and what the file has beside the header."""
    layout = ShardLayout(LAYERS[name], 512, 4096)
    found = layout.header(
        attempt="0000000100000002", step=7, rank=RANK, world_size=WORLD, state=(100, 50), state_hash="0" * 16,
        hashes="0123456789abcdef" * len(layout.blocks) if hashed else None,
    )  # fmt: skip
    return found[8:].rstrip(b" "), layout.data_bytes + len(state_extent(bytes(100), bytes(50)))


WRITTEN = [(name, hashed) for name in LAYERS for hashed in (True, False)]


def region(text: bytes) -> bytes:
    size = round_up(8 + len(text), ALIGN)
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def shorter(data: bytes, size: int, recent: plain_header.Recent | None = None) -> ShardIndex | None:
    return header._plain_index("it", size, data, None, recent or plain_header.Recent())


def defined(data: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> ShardIndex | DamageError:
    with monkeypatch.context() as patched:
        patched.setattr(header, "_plain_index", lambda *_: None)
        try:
            return parse_header("it", size, data)
        except DamageError as error:
            return error


def contents(index: ShardIndex) -> Any:
    entries = index.entries
    assert len(entries) == len(list(entries)) and all(name in entries for name in entries) and "x" not in entries
    return {
        **{name: getattr(index, name) for name in ShardIndex.__slots__ if name not in ("entries", "blocks", "hashes")},
        "entries": list(entries.items()), "blocks": list(index.blocks), "hashes": list(index.hashes),
    }  # fmt: skip


def compare(
    text: bytes, beside: int, monkeypatch: pytest.MonkeyPatch, recent: plain_header.Recent | None = None
) -> bool:
    """Whether a header is taken by the shorter way. Fails where the check of all others takes it for something else."""
    data = region(text)
    size = len(data) + beside
    found, right = shorter(data, size, recent), defined(data, size, monkeypatch)
    if found is not None:
        assert isinstance(right, ShardIndex), (text, right)
        assert contents(found) == contents(right), text
    return found is not None


@pytest.mark.parametrize(("name", "hashed"), WRITTEN)
def test_all_that_our_writer_writes_is_read_by_the_shorter_way(
    name: str, hashed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, beside = written(name, hashed=hashed)
    data = region(text)
    assert compare(text, beside, monkeypatch) and isinstance(defined(data, len(data) + beside, monkeypatch), ShardIndex)
    spaced = json.dumps(json.loads(text), ensure_ascii=False).encode()
    assert not compare(spaced, beside, monkeypatch), "what only another writer would write is left to the definition"


def test_what_ends_where_no_file_can_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, beside = json.loads(written("nothing")[0]), (1 << 63) - 1
    tree = {"__metadata__": tree["__metadata__"]}
    for name, kind, begin, end in (
        ("param/w", "U8", 0, beside), ("state/json", "U8", beside, beside), ("state/bytes", "U8", beside, beside)
    ):  # fmt: skip
        tree[name] = {"dtype": kind, "shape": [end - begin], "data_offsets": [begin, end]}
    data = region(_compact(tree).encode())
    assert shorter(data, ALIGN) is None
    assert "no file is that long" in str(defined(data, ALIGN, monkeypatch))


# -- what nobody wrote -----------------------------------------------------------------------------------------------

STRANGE = [
    0, 1, -1, 2, 3, 4, 7, 16, 36, 64, 4096, 1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, 1.0, 1e300, 0.5,
    True, False, None, "", "0", "0-3", "1", "2,3", "0-9", "1,,", "F32", "U8", "F4", "x", "state/json", ".pad/0",
    "\ud800", "a/", "/a", [], [1], [0, 1], [1, 2, 3], [[1]], {}, {"shape": [1]},
]  # fmt: skip


def first(tree: Any, begin: str) -> Any:
    """The first tensor whose name begins so."""
    return next(item for name, item in tree.items() if name.startswith(begin))


def without_wrapped(tree: Any) -> None:
    metadata = tree["__metadata__"]
    assert '"wrapped":true' in metadata["slices"]
    metadata["slices"] = metadata["slices"].replace('"wrapped":true', '"wrapped":false')


def of_too_many_blocks(tree: Any) -> None:
    """512 blocks, whose hashes would be twice as long as the header."""
    metadata = tree["__metadata__"]
    tree.clear()
    metadata |= {"slices": "{}", "layers": _compact([["a", 0, 1 << 21]]), "hashes": ""}
    tree["__metadata__"] = metadata
    size = 1 << 21
    for name, begin, end in (("param/w", 0, size), ("state/json", size, size), ("state/bytes", size, size)):
        tree[name] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


AGAINST_THE_FORMAT: dict[str, tuple[Callable[[Any], object], str]] = {
    "slices that are an array": (lambda tree: tree["__metadata__"].update(slices="[]"), "slices is not an object"),
    "layers that are an object": (lambda tree: tree["__metadata__"].update(layers="{}"), "layers is not an array of"),
    "a state of signed bytes": (lambda tree: tree["state/json"].update(dtype="I8"), "state/json is of dtype I8"),
    "a gap of signed bytes": (lambda tree: first(tree, ".pad/").update(dtype="I8"), "is of dtype I8, expected U8"),
    "a part that says that it is not wrapped": (without_wrapped, "shape, offsets, start, among or wrapped is not"),
    "more blocks than it has room for": (of_too_many_blocks, "512 blocks; the hashes of all would not fit into"),
    "metadata that is an array": (lambda tree: tree.update(__metadata__=[]), "its header has no __metadata__ object"),
}


@pytest.mark.parametrize("what", AGAINST_THE_FORMAT)
def test_what_is_against_the_format_is_damage_by_name(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, says = AGAINST_THE_FORMAT[what]
    text, beside = written("cut")
    tree = json.loads(text)
    change(tree)
    data = region(_compact(tree).encode())
    size = len(data) + ((1 << 21) if change is of_too_many_blocks else beside)
    assert shorter(data, size) is None
    with pytest.raises(DamageError, match="^shard it: ") as raised:
        parse_header("it", size, data)
    assert says in str(raised.value)


def test_a_region_that_is_cut_or_of_another_shard_is_damage_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    text, beside = written("cut")
    data = region(text)
    size = len(data) + beside
    for cut in (b"", data[:4], data[:-1]):
        with pytest.raises(DamageError, match=f"its header region is {len(cut)} bytes, expected a multiple of 4096"):
            parse_header("it", size, cut)
    with pytest.raises(DamageError, match="its length field does not match its header region"):
        parse_header("it", size, bytes(8) + data[8:])
    for of in (("0000000100000003", RANK, WORLD), ("0000000100000002", 0, WORLD), ("0000000100000002", RANK, 8)):
        with pytest.raises(DamageError, match="it is of attempt 0000000100000002, rank 1 of 4; the manifest is of"):
            parse_header("it", size, data, of)
    monkeypatch.setattr(strict_json, "WEIGHT_CAP", 1 << 8)
    assert shorter(data, size) is None
    with pytest.raises(DamageError, match="its header is not JSON: its values would take about"):
        parse_header("it", size, data)


def test_a_shard_whose_header_no_reader_takes_is_refused_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = LAYERS["many"]
    with (
        monkeypatch.context() as patched,
        pytest.raises(UnsupportedError, match="tensors; the format allows 4096: spread"),
    ):
        patched.setattr(shard_layout, "HEADER_CAP", 4096)
        ShardLayout(layers, 512, 4096)
    with monkeypatch.context() as patched, pytest.raises(UnsupportedError, match="a reader would need about 0 MB of"):
        patched.setattr(strict_json, "WEIGHT_CAP", shard_layout._OTHER_WEIGHT + 100)
        ShardLayout(layers, 512, 4096)
    layout = ShardLayout(layers, 512, 4096)
    with pytest.raises(UnsupportedError, match=r"the shard's header needs \d+ bytes and has room for \d+"):
        layout.header(
            attempt="0000000100000002", step=7, rank=RANK, world_size=WORLD, state=(1, 1), state_hash="0" * 16,
            hashes="0" * layout.header_bytes,
        )  # fmt: skip


def test_a_block_that_there_is_not_is_an_index_error() -> None:
    text, beside = written("cut")
    data = region(text)
    blocks = parse_header("it", len(data) + beside, data).blocks
    for number in (-1, len(blocks)):
        with pytest.raises(IndexError):
            blocks[number]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each container of a tree, with the key or the index of each of its values."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _change(tree: Any, draw: random.Random) -> None:
    places = list(_places(tree))
    holder, key = draw.choice(places)
    value = holder[key]
    kind = draw.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and type(value) is int:
        holder[key] = value + draw.choice((-4096, -64, -1, 1, 4, 64, 4096, 1 << 63))
    elif kind == 2 and isinstance(holder, dict):
        items = list(holder.items())
        at = draw.randrange(len(items))
        items[at] = (draw.choice([*(name for name in STRANGE if type(name) is str), key + "x"]), items[at][1])
        draw.shuffle(items) if draw.random() < 0.3 else None
        holder.clear()
        holder.update(items)
    elif kind == 3:
        other, name = draw.choice(places)
        holder[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name])
    elif kind == 4 and isinstance(value, list):
        value.insert(draw.randrange(len(value) + 1), copy.deepcopy(draw.choice(STRANGE)))
    else:
        holder[key] = copy.deepcopy(draw.choice(STRANGE))


def _changed_value(text: bytes, draw: random.Random) -> bytes:
    """A changed member somewhere, in a text that is otherwise as our writer writes it."""
    tree = json.loads(text)
    metadata = tree["__metadata__"]
    tables = {name: json.loads(metadata[name]) for name in ("slices", "layers")}
    drawn = draw.random()
    if drawn < 0.45 and tables["slices"]:
        _change(tables["slices"], draw)
    elif drawn < 0.5 and tables["layers"]:
        _change(tables["layers"], draw)
    elif drawn < 0.6:
        _change(metadata, draw)
    else:
        beside = {name: value for name, value in tree.items() if name != "__metadata__"}
        _change(beside, draw)
        tree = {"__metadata__": metadata, **beside}
    for name, value in tables.items():
        if name in metadata and draw.random() < 0.95:
            metadata[name] = _compact(value)
    return _compact(tree).encode("utf-8", "surrogatepass")


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _changed_text(text: bytes, draw: random.Random) -> bytes:
    """Changed bytes, or a part of the text once more, or not at all."""
    at = draw.randrange(len(text))
    kind = draw.randrange(4)
    if kind == 0:
        return text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :]
    if kind == 1:
        return text[:at] + draw.choice((b" ", b"\\", b'"', b",", b"}", b"-", b"0", b"\xff", b"\\u0061")) + text[at:]
    end = min(len(text), at + draw.randrange(1, 60))
    return text[:at] + text[end:] if kind == 2 else text[:end] + text[at:end] + text[end:]


def sweep(monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes, random.Random], bytes], seed: int) -> list[int]:
    """How many changed headers the shorter way took, and how many it did not."""
    seen = [0, 0]
    draw, recent = random.Random(seed), plain_header.Recent()
    for _ in range(CASES):
        name, hashed = draw.choice(WRITTEN[2:])
        text, beside = written(name, hashed=hashed)
        beside += draw.choice((0, 0, 0, -4096, 4096))
        seen[not compare(change(text, draw), beside, monkeypatch, recent)] += 1
    return seen


@pytest.mark.parametrize(("change", "least"), [(_changed_value, 10), (_changed_text, 1)])
def test_nothing_is_taken_that_the_check_of_all_headers_would_not_take_for_the_same(
    change: Callable[[bytes, random.Random], bytes], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, left = sweep(monkeypatch, change, seed=1)
    assert taken >= least and left > 300


NUMBERS = [
    b"0", b"1", b"2", b"3", b"4", b"7", b"8", b"11", b"9000", b"00", b"01", b"", b"-1", b"1.0", b"1e0", b" 1", b"1,1",
    b"9" * 17, b"9" * 18, b"9" * 19, b"%d" % ((1 << 63) - 1), b"%d" % (1 << 63), b"\xd9\xa1",
]  # fmt: skip


def _other_numbers(text: bytes, draw: random.Random) -> bytes:
    """Other digits in what says where parts lie, or the same ones elsewhere."""
    begin, end = text.index(b'"slices":"'), text.index(b'"layers":"')
    table = text[begin:end]
    for _ in range(draw.randint(1, 3)):
        one, other = draw.choice([each.span() for each in re.finditer(rb"[0-9]+", table)])
        digits, at = table[one:other], draw.randrange(len(table))
        if draw.random() < 0.8:
            table = table[:one] + draw.choice(NUMBERS) + table[other:]
        else:
            left = table[:one] + table[other:]
            table = left[:at] + digits + left[at:]
    return text[:begin] + table + text[end:]


def sweep_numbers(monkeypatch: pytest.MonkeyPatch, seed: int) -> list[int]:
    """As `sweep`, of headers that come after one that was written."""
    seen = [0, 0]
    draw, recent = random.Random(seed), plain_header.Recent()
    headers = [written(name) for name in ("cut", "many")]
    for _ in range(CASES // 4):
        text, beside = draw.choice(headers)
        assert shorter(region(text), len(region(text)) + beside, recent) is not None
        seen[not compare(_other_numbers(text, draw), beside, monkeypatch, recent)] += 1
    return seen


def test_a_header_that_differs_from_the_last_in_numbers_is_read_as_it_would_be_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, left = sweep_numbers(monkeypatch, seed=1)
    assert taken > 5 and left > 100
    read = []
    exactly = plain_places.exactly
    monkeypatch.setattr(plain_places, "exactly", lambda of, data: read.append(data) or exactly(of, data))
    recent = plain_header.Recent()
    for rank in range(WORLD):
        text, beside = written("many")
        text = text.replace(b'"rank":"1"', b'"rank":"%d"' % rank).replace(b"[1,0]", b"[%d,0]" % rank)
        assert compare(text, beside, monkeypatch, recent)
    assert len(read) == 1, "and from there on as an array"


def test_digits_elsewhere_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    text, beside = written("cut")
    for part, instead in [(b"[2,0]", b"2[,0]"), (b"[2,0]", b"[2,]0"), (b'\\"start\\":4', b'\\"start\\"4:')]:
        recent = plain_header.Recent()
        assert part in text and compare(text, beside, monkeypatch, recent)
        assert not compare(text.replace(part, instead, 1), beside, monkeypatch, recent), instead


def test_what_could_be_taken_for_two_things_is_left_to_the_check_of_all_headers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, beside = written("cut")
    tensor = json.dumps(json.loads(text)["param/w"], separators=(",", ":")).encode()
    for part, instead in [
        (b'"param/w":' + tensor, b'"param/w":' + tensor + b',"param/w":' + tensor),
        (b'"param/w":' + tensor, b'"param/w":{},"param/w":' + tensor),
        (b'{"__metadata__":', b'{"__metadata__":{},"__metadata__":'),
        (b'"dtype":"F32"', b'"dtype":"BF16","dtype":"F32"'),
        (b'"rank":"1"', b'"rank":"0","rank":"1"'),
        (b'"param/w"', b'"\\u0070aram/w"'),
        (b'\\"start\\":4', b'\\"start\\":0,\\"start\\":4'),
        (b'\\"start\\":4', b'\\"start\\":4.0'),
        (b'\\"start\\":4', b'\\"start\\":4e0'),
    ]:
        assert part in text
        assert not compare(text.replace(part, instead, 1), beside, monkeypatch), instead


def test_a_dtype_that_is_not_known_is_refused_where_a_tensor_has_no_elements_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, beside = written("cut")
    wrong = text.replace(b'"buffer/empty":{"dtype":"I64"', b'"buffer/empty":{"dtype":"I63"')
    assert wrong != text and "I63" not in ITEM_BYTES
    assert not compare(wrong, beside, monkeypatch)


class _Same(bytes):
    def __ne__(self, other: object) -> bool:
        return False


class _Unmindful(plain_header.Recent):
    text = property(lambda self: _Same(), lambda self, value: None)  # type: ignore[assignment]


class _Lax(dict[str, int]):
    def get(self, name: str, default: Any = None) -> int:
        return super().get(name, 4)


APART = plain_places.Pattern._apart
MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "all headers have the tensors of the last": lambda patch: patch.setattr(plain_header, "Recent", _Unmindful),
    "no text is compared": lambda patch: (
        [patch.setattr(each, "exactly", lambda of, data: of.decode(data)) for each in (plain_header, plain_places)]
    ),
    "no part is checked": lambda patch: patch.setattr(plain_places, "check_within", lambda *_: None),
    "no rank is looked for": lambda patch: patch.setattr(plain_places, "ranks_of", lambda *_: range(WORLD)),
    "what is beside numbers is not compared": lambda patch: patch.setattr(
        plain_places.Pattern, "_apart", lambda self, *of: (b"", *APART(self, *of)[1:])
    ),
    "where numbers stand is not compared": lambda patch: patch.setattr(
        plain_places.Pattern, "_apart", lambda self, *of: (APART(self, *of)[0], 0, *APART(self, *of)[2:])
    ),
    "a number is written in any way": lambda patch: patch.setattr(plain_places, "in_one_way", lambda *_: True),
    "a number is of any length": lambda patch: [
        patch.setattr(plain_places, "_DIGITS", 30),
        patch.setattr(plain_places, "_POWERS", 10 ** np.arange(30)),
    ],
    "every dtype is known": lambda patch: patch.setattr(plain_header, "ITEM_BYTES", _Lax(ITEM_BYTES)),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_a_shorter_way_that_checks_less_is_found(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises(AssertionError):
        test_what_could_be_taken_for_two_things_is_left_to_the_check_of_all_headers(monkeypatch)
        test_a_dtype_that_is_not_known_is_refused_where_a_tensor_has_no_elements_too(monkeypatch)
        test_digits_elsewhere_are_no_numbers(monkeypatch)
        for seed in range(3):
            sweep_numbers(monkeypatch, seed)
            sweep(monkeypatch, _changed_value, seed)
