# SPDX-License-Identifier: Apache-2.0
"""torch.compile: a compiled model trains the same bits with the engine and by layers as without, and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kit.runners import Warm


@pytest.mark.parametrize(("wrapper", "ranks"), [("plain", 1), ("ddp", 2), ("fsdp2", 2)])
def test_compiled_models_train_and_resume_bit_for_bit(
    warm: Warm, tmp_path: Path, long: bool, wrapper: str, ranks: int
) -> None:
    # Without --long it is traced as ever, and run by torch's own kernels: compiling takes minutes here.
    if wrapper == "ddp" and not long:
        pytest.skip("--long")
    which = wrapper if long or wrapper == "plain" else f"{wrapper}:blocks"
    warm.run("compiled.py", ranks, "inductor" if long else "aot_eager", tmp_path, which, timeout=900 if long else 120)
    for rank in range(ranks):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(results) >= 2 and results == {case: [] for case in results}
