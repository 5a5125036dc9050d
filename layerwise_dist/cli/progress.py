# SPDX-License-Identifier: Apache-2.0
"""A command's progress bar, shown only in a terminal and gone when the answer is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TransferSpeedColumn,
)

Advance = Callable[[int], None]


@contextmanager
def bytes_bar(what: str, total: int) -> Iterator[Advance]:
    """Told of bytes that are done, of `total`."""
    with _bar(what, total, DownloadColumn(), TransferSpeedColumn()) as advance:
        yield advance


@contextmanager
def count_bar(what: str, total: int) -> Iterator[Advance]:
    """Told of things that are done, of `total`."""
    with _bar(what, total, MofNCompleteColumn()) as advance:
        yield advance


@contextmanager
def _bar(what: str, total: int, *more: ProgressColumn) -> Iterator[Advance]:
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), *more)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, advance=done)
