# SPDX-License-Identifier: Apache-2.0
"""Typed JSON of drawn values: all that is supported comes back, and whatever else is read is damage or a value."""

from __future__ import annotations

import contextlib
import json

import hypothesis.strategies as st
from hypothesis import given, settings
from kit.drawn_values import LIGHT, ints, values
from kit.typed_values import HOSTILE, form, round_trip

from layerwise_dist.errors import DamageError
from layerwise_dist.storage.typed_json import loads


@LIGHT
@given(values)
def test_every_supported_value_comes_back_with_its_type_and_bits(value):
    assert form(round_trip(value)) == form(value)


@settings(LIGHT, max_examples=150)
@given(st.recursive(
    st.sampled_from(HOSTILE) | ints.filter(lambda n: abs(n) < 10**4000) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["!", "v", "of", "max", "type", "index", "dtype", "shape", "offset", "bytes", "a"]),
        inner | st.sampled_from(["tuple", "set", "dict", "array", "tensor", "vector", "deque", "slice", "np",
        "device"]), max_size=5),
    max_leaves=20), st.binary(max_size=80))  # fmt: skip
def test_any_json_is_damage_or_a_value(tree, blob):
    with contextlib.suppress(DamageError):
        loads(json.dumps(tree).encode(), blob)
