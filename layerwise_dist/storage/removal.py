# SPDX-License-Identifier: Apache-2.0
"""Removes files from a folder that others may be using too."""

from __future__ import annotations

import os
from collections.abc import Iterable

from layerwise_dist.storage.odd import leave
from layerwise_dist.storage.protocols import Env


def remove(env: Env, folder: str, names: Iterable[str]) -> None:
    """Unlinks these files of `folder`, those that are there; the last one to leave removes the folder. Raises OSError.

    What else is in the folder, another rank's files or some that are not ours, keeps it.
    """
    remove_files(env, folder, names)
    remove_if_empty(env, folder)


def remove_files(env: Env, folder: str, names: Iterable[str]) -> None:
    """The same, without the folder. What is odd is named and stays, and so does all behind a link. Raises OSError."""
    for name in names:
        path = os.path.join(folder, name)
        try:
            env.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            leave(error, path)


def remove_if_empty(env: Env, folder: str) -> None:
    try:
        env.remove_dir(folder)
    except OSError:
        pass  # it is not empty, or gone: if it is ours the next start collects it
