# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/tables/telemetry.md, as layerwise_dist/telemetry has the names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from layerwise_dist.telemetry.boards import LIVE
from layerwise_dist.telemetry.names import CHECKPOINT, COMMON, EVENTS, FIELDS


def table(names: Mapping[str, str]) -> str:
    return "\n".join(["| name | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in names.items())])


def event_table() -> str:
    rows = (
        f"| `{event}` | {text} | {', '.join(f'`{name}`: {said}' for name, said in FIELDS[event].items())} |"
        if event != "checkpoint"
        else f"| `{event}` | {text} | see below |"
        for event, text in EVENTS.items()
    )
    return "\n".join(["| event | when | other members |", "|---|---|---|", *rows])


def tables() -> Iterable[str]:
    return table(COMMON), event_table(), table(CHECKPOINT), table(LIVE)
