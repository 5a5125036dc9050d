# SPDX-License-Identifier: Apache-2.0
"""Two ranks with uneven inputs under `Join`, then with even ones without. What each met is in OUT/<rank>.txt.

joined.py DIR OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from job_kit import process_group
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd


def main() -> None:
    folder, out = sys.argv[1], Path(sys.argv[2])
    with process_group() as rank:
        torch.manual_seed(0)
        model = DistributedDataParallel(torch.nn.Linear(2, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ckpt = lwd.attach(model, optimizer, dir=folder, commit={"timeout_s": 20.0})
        told = "nothing"
        with Join([model], throw_on_early_termination=True):
            pass  # that one is of no consequence
        Join([model])  # as `with` does it; an error within would leave the other ranks in its end
        try:
            for _ in range(3 + rank):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
        except lwd.LayerwiseError as error:
            told = f"{type(error).__name__}: {error}"
        Join([model], enable=False)
        for _ in ckpt.steps(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ckpt.close()
        (out / f"{rank}.txt").write_text(f"{told}\neven: {ckpt.completed} steps\n")
        del ckpt, model, optimizer


if __name__ == "__main__":
    main()
