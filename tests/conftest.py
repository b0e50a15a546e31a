"""Shared by all tests: async tests run on asyncio."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Asyncio, because the gateway's server and the data path's transport run on it."""
    return "asyncio"
