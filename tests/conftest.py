"""Shared by all tests: async tests run on asyncio, and nothing is kept in the home of whoever runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")
"""Examples are the same in each run, so that a change fails for what it changed, and a busy machine is no failure.

`pytest --hypothesis-profile=search` looks for others.
"""


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Asyncio, because the gateway's server and the data path's transport run on it."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where gateways and commands keep their state while tests run: an empty folder, not the user's own."""
    before = os.environ.get("XDG_STATE_HOME")
    place = tmp_path_factory.mktemp("state")
    os.environ["XDG_STATE_HOME"] = str(place)
    yield place
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before
