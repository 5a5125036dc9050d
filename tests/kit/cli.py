# SPDX-License-Identifier: Apache-2.0
"""The command line, called within this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from layerwise_dist.cli.app import app


def call(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def call_json(*args: object) -> tuple[int, dict[str, Any]]:
    code, output = call(*args, "--json")
    return code, json.loads(output)
