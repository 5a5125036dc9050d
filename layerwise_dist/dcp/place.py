# SPDX-License-Identifier: Apache-2.0
"""What a DCP storage says about its place, shared by writer and reader."""

from __future__ import annotations

import os

from layerwise_dist.errors import ConfigError
from layerwise_dist.interop.one_commit import root_of


class InDirectory:
    """Mixed into DCP's `StorageWriter` and `StorageReader`, which ask for these."""

    _root: str

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The directory."""
        return self._root

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path of a file system."""
        try:
            root_of(checkpoint_id)
        except (ConfigError, TypeError):
            return False
        return True
