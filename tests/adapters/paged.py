"""An engine's control endpoints, answered from recorded samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import httpx

from kvfleet.adapters.connections import Connections
from kvfleet.adapters.http import HTTPAdapter
from kvfleet.clock import FrozenClock

SAMPLES = Path(__file__).with_name("samples")
A = TypeVar("A", bound=HTTPAdapter)


def sample(name: str) -> bytes:
    """One recorded answer."""
    return (SAMPLES / name).read_bytes()


def paged(
    kind: type[A],
    pages: Mapping[str, bytes | int],
    clock: FrozenClock | None = None,
    endpoint: str = "http://gpu-1:8000/v1",
) -> tuple[A, list[str]]:
    """An adapter whose engine answers each path with bytes or a status (404 where nothing is said), and the paths asked."""
    asked: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        asked.append(path)
        page = pages.get(path, 404)
        return httpx.Response(page, content=b"{}") if isinstance(page, int) else httpx.Response(200, content=page)

    connections = Connections(transport=httpx.MockTransport(handler), clock=clock or FrozenClock())
    return kind(endpoint=endpoint, model_id="m", connections=connections), asked
