"""A fleet file to try commands on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

FLEET = """\
fleet_name: demo
strategy: cost_first
models:
  - {name: cheap, provider: mock, replicas: ["mock://cheap-1", "mock://cheap-2"], cost_per_1k_input_tokens: 0.001}
  - {name: dear, provider: mock, cost_per_1k_input_tokens: 0.01, allowed_data_classes: [public, internal, confidential, restricted]}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a fleet file."""

    def make(text: str = FLEET, name: str = "fleet.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


@pytest.fixture
def fleet(write: Callable[..., Path]) -> Path:
    """A valid file: two models, three mock engines."""
    return write()
