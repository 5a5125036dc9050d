# SPDX-License-Identifier: Apache-2.0
"""Param groups as text: by the hundred under DeepSpeed, and nearly all that is in them is what it was last time."""

from __future__ import annotations

from itertools import islice
from typing import Any

from layerwise_dist.frameworks.contents import Contents
from layerwise_dist.frameworks.framework import same_objects
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.typed_json_types import TAG, Prepared

# What never changes while it is the same object.
_CONSTANT = (type(None), bool, int, float, str)


class GroupTexts:
    """The text of a list of dicts, in which only what is another object than last time is written anew: a learning
    rate, as a rule.
    """

    def __init__(self) -> None:
        self._held: Contents | None = None
        self._lists: dict[int, list[Any]] = {}  # by their places in it: what is in them, which may change
        self._names: list[str] = []
        self._texts: list[str] = []  # of each value
        self._whole: Prepared | None = None  # made of these

    def of(self, groups: list[dict[str, Any]]) -> Prepared | None:
        """What stands for these in `typed_json.dumps`; None where they hold other things than constants, and lists and
        tuples of such.
        """
        held = self._held
        others = held.others(groups) if held is not None else None
        if held is None or others is None:
            fit = self._anew(groups)
        else:
            for place, value in others:
                held.values[place] = value
            fit = all(self._write(place, value) for place, value in others) and all(
                same_objects(held.values[place], items) or self._write(place, held.values[place])
                for place, items in [*self._lists.items()]
            )
        if not fit:
            self._held = None
            return None
        return self._text(groups)

    def _anew(self, groups: list[dict[str, Any]]) -> bool:
        """Whether all of it can be written here."""
        held = self._held = Contents(groups)
        plain = all(type(name) is str and name.isascii() and name != TAG for name in held.names)
        if not plain or not all(map(_constant, held.values)):
            return False
        self._names = [typed_json.prepare(name).text for name in held.names]
        self._lists, self._texts, self._whole = {}, [""] * len(held.values), None
        return all(self._write(place, value) for place, value in enumerate(held.values))

    def _write(self, place: int, value: Any) -> bool:
        """Whether it can be written here."""
        items = self._lists.pop(place, None)
        if type(value) is list:
            self._lists[place] = [*value]
            if items is not None and same_objects(items, value):
                return True
        if not _constant(value):
            return False
        self._whole = None
        try:
            self._texts[place] = typed_json.prepare(value).text
        except ValueError:
            return False  # long enough for the blob
        return True

    def _text(self, groups: list[dict[str, Any]]) -> Prepared:
        if self._whole is None:
            entries = map("{}:{}".format, self._names, self._texts)
            of_each = ("{" + ",".join(islice(entries, len(group))) + "}" for group in groups)
            self._whole = Prepared("[" + ",".join(of_each) + "]")
        return self._whole


def _constant(value: Any) -> bool:
    """Or a list or tuple of what never changes."""
    return type(value) in _CONSTANT or (type(value) in (list, tuple) and all(type(item) in _CONSTANT for item in value))
