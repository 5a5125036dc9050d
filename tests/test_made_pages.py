# SPDX-License-Identifier: Apache-2.0
"""Pages and pictures that commands make are what these commands would make now."""

from __future__ import annotations

from pathlib import Path

import configuration_page
import pytest
import step_picture

pytestmark = pytest.mark.quick

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_of_the_configuration_is_what_the_model_says() -> None:
    assert (DOCS / "configuration.md").read_text() == configuration_page.page()


def test_mutation_a_key_with_another_default_or_text_is_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    before = configuration_page.page()
    schema = configuration_page.LayerwiseConfig.model_json_schema()
    schema["properties"]["keep_last"]["default"] = 3
    monkeypatch.setattr(configuration_page.LayerwiseConfig, "model_json_schema", lambda: schema)
    assert configuration_page.page() != before


def test_the_picture_of_a_step_is_what_its_command_draws() -> None:
    assert (DOCS / "step.svg").read_text() == step_picture.picture()
