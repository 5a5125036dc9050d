# SPDX-License-Identifier: Apache-2.0
"""`layerwise cp`: copies one checkpoint, with all that it needs, into a new directory."""

from __future__ import annotations

import os

from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.console import Answer, size
from layerwise_dist.cli.progress import bytes_bar
from layerwise_dist.commit.copying import CheckpointCopy


def copy(catalogue: Catalogue, out: str, step: int | None, tag: str | None) -> Answer:
    """Raises WrongUsage, LayerwiseError or OSError; nothing of the copy is left then."""
    with (
        catalogue.held(step, tag) as manifest,
        CheckpointCopy(catalogue.manager, manifest, os.path.expanduser(out)) as copied,
    ):
        with bytes_bar("copying", copied.nbytes) as advance:
            copied.write(advance)
        with bytes_bar("verifying", copied.nbytes) as advance:
            copied.verify(advance)
        copied.publish()
    data = {
        "dir": catalogue.root, "out": copied.target, "step": manifest.step, "seq": manifest.seq, "tag": manifest.tag,
        "folder": manifest.attempt_id.folder, "bytes": copied.nbytes, "good": True,
        "files": [{"rank": file.rank, "file": file.name, "bytes": file.nbytes} for file in copied.files],
    }  # fmt: skip
    count = len(copied.files)
    said = f"step {manifest.step} is in {copied.target}: {count} file{'s' if count > 1 else ''}, {size(copied.nbytes)}"
    return Answer(data, [f"{said}, read back and compared"])
