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

    def of(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]] | Prepared:
        """What stands for these in `typed_json.dumps`: they themselves where they hold other things than constants, and
        lists and tuples of such.
        """
        others = self._held.others(groups) if self._held is not None else None
        if others is None or self._held is None:
            return self._anew(groups)
        for place, value in others:
            if not self._write(place, value):
                return self._give_up(groups)
            self._held.values[place] = value
        for place, items in [*self._lists.items()]:
            value = self._held.values[place]
            if not same_objects(value, items) and not self._write(place, value):
                return self._give_up(groups)
        return self._text(groups)

    def _anew(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]] | Prepared:
        held = self._held = Contents(groups)
        self._lists, self._names, self._texts, self._whole = {}, [], [], None
        for place, (name, value) in enumerate(zip(held.names, held.values, strict=True)):
            if type(name) is not str or name == TAG or not name.isascii():
                return self._give_up(groups)
            self._names.append(typed_json.prepare(name).text)
            self._texts.append("")
            if not self._write(place, value):
                return self._give_up(groups)
        return self._text(groups)

    def _write(self, place: int, value: Any) -> bool:
        """Whether it can be written here."""
        items = self._lists.pop(place, None)
        if type(value) is list:
            self._lists[place] = [*value]
            if items is not None and same_objects(items, value):
                return True
        if type(value) not in _CONSTANT and not (
            type(value) in (list, tuple) and all(type(item) in _CONSTANT for item in value)
        ):
            return False
        self._whole = None
        try:
            self._texts[place] = typed_json.prepare(value).text
        except ValueError:
            return False  # long enough for the blob
        return True

    def _give_up(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self._held = None
        return groups

    def _text(self, groups: list[dict[str, Any]]) -> Prepared:
        if self._whole is None:
            entries = map("{}:{}".format, self._names, self._texts)
            of_each = ("{" + ",".join(islice(entries, len(group))) + "}" for group in groups)
            self._whole = Prepared("[" + ",".join(of_each) + "]")
        return self._whole
