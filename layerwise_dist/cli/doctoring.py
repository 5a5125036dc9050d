# SPDX-License-Identifier: Apache-2.0
"""`layerwise doctor`: is a directory fit, and what to change."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from layerwise_dist.cli.catalogue import WrongUsage
from layerwise_dist.cli.console import Answer, row, table
from layerwise_dist.config import load_config
from layerwise_dist.doctor import Finding, Questions, Report, examine
from layerwise_dist.units import parse_count, parse_number

BYTES_A_PARAMETER = 12  # float32, and AdamW's two moments
_LEAST = 1 << 20
QUICK: dict[str, Any] = {"nbytes": 4 << 20, "flushes": 10, "rounds": 1}
_STYLE = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def doctor(
    directory: str, *, config: str | None, state_bytes: str | None, params: str | None, nbytes: str | None, quick: bool
) -> Answer:
    """Bad when a finding is. Raises WrongUsage, or ConfigError for a bad configuration file."""
    settings = load_config(config, dir=directory)
    state = _state(state_bytes, params)
    sizes: dict[str, Any] = dict(QUICK) if quick else {}
    if nbytes is not None:
        sizes["nbytes"] = -(-_number("--bytes", nbytes, _LEAST) // 4096) * 4096
    with watched() as progress:
        try:
            report = examine(directory, Questions(settings, state, **sizes), progress)
        except NotADirectoryError as error:
            raise WrongUsage(f"{error.filename}: not a directory") from None
    data = {
        "dir": report.directory, "looked_at": report.looked_at, "good": report.good,
        "findings": [finding.data for finding in report.findings],
    }  # fmt: skip
    return Answer(data, _parts(report), good=report.good)


def _state(state_bytes: str | None, params: str | None) -> int | None:
    if state_bytes is not None and params is not None:
        raise WrongUsage("give --state-bytes or --params, not both")
    if state_bytes is not None:
        return _number("--state-bytes", state_bytes, 1)
    return None if params is None else BYTES_A_PARAMETER * _number("--params", params, 1, parse_count)


def _number(option: str, text: str, least: int, parse: Callable[[str], int] = parse_number) -> int:
    try:
        value = parse(text)
    except ValueError as error:
        raise WrongUsage(f"{option}: {error}") from None
    if value < least:
        raise WrongUsage(f"{option}: {text} is too little; at least {least}")
    return value


def _parts(report: Report) -> list[Any]:
    shown = table("", "finding", "what was found", folded=("what was found",))
    for finding in report.findings:
        row(shown, finding.verdict, finding.name, finding.text, style=_STYLE[finding.verdict])
    advised = [finding for finding in report.findings if finding.advice]
    parts: list[RenderableType] = [f"Looked at {report.looked_at}", shown]
    if advised:
        parts += ["What to do or know:", *(_advice(finding) for finding in advised)]
    bad = sum(finding.verdict == "bad" for finding in report.findings)
    warned = sum(finding.verdict == "warn" for finding in report.findings)
    parts.append(f"{bad} bad, {warned} to improve, {len(report.findings) - bad - warned} ok")
    return parts


def _advice(finding: Finding) -> Text:
    return Text(textwrap.indent(f"{finding.name}: {finding.advice}", "  "), style=_STYLE[finding.verdict])


@contextmanager
def watched() -> Iterator[Callable[[str], None]]:
    """What is going on, on standard error while a person watches."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("looking") as status:
        yield status.update
