# SPDX-License-Identifier: Apache-2.0
"""The private names of a host package that an integration relies on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from layerwise_dist.errors import UnsupportedError


def require(package: str, version: str, tested: Sequence[str], names: Iterable[tuple[object, str]]) -> None:
    """Raises UnsupportedError, which lists them, if any of these objects lacks the attribute beside it."""
    missing = [f"{_called(owner)}.{name}" for owner, name in names if not hasattr(owner, name)]
    if missing:
        raise UnsupportedError(
            f"{package} {version} has no {', '.join(missing)}, by which its loop is followed. Tested with {package} "
            f"{', '.join(tested)}: install one of these"
        )


def _called(owner: object) -> str:
    return owner.__name__ if isinstance(owner, type) else getattr(owner, "__name__", type(owner).__name__)
