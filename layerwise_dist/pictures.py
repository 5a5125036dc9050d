# SPDX-License-Identifier: Apache-2.0
"""Saves figures to files; shows nothing on a screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerwise_dist.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg", ".pdf")


def new_figure(path: Path, inches: tuple[float, float]) -> Figure:
    """For a file of that name. Raises ConfigError for a suffix that is none of .png .svg .pdf, UnsupportedError without
    matplotlib.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{path.name}: a graph is drawn as one of {', '.join(_SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "drawing needs matplotlib: pip install 'layerwise_dist[viz]', or pip install matplotlib"
        ) from error
    return Figure(figsize=inches)
