"""Translated engines that show their load on a Prometheus page, which may be on a port of its own."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar

import attrs
import httpx

from kvfleet.adapters import faults
from kvfleet.adapters.base import EndpointHealth, EngineLoad
from kvfleet.adapters.connections import Route
from kvfleet.adapters.control import answer_within
from kvfleet.adapters.exposition import Reader, Samples, totals
from kvfleet.adapters.translated import TranslatedAdapter
from kvfleet.errors import BackendError, Fault

__all__ = ["GaugedAdapter"]

PAGE_TTL_S = 0.5
PAGE_TIMEOUT_S = 5.0


@attrs.define(kw_only=True)
class GaugedAdapter(TranslatedAdapter):
    """What such engines have in common: one page, read at most twice a second for all models of an endpoint."""

    reader: ClassVar[Reader]
    prefix: ClassVar[str]

    @abc.abstractmethod
    def load_of(self, samples: Samples) -> EngineLoad:
        """The engine's load, from the lines that `reader` found."""

    def page_url(self) -> str:
        """Where the page is, if it is not ``/metrics`` of the endpoint itself; there no credential is sent."""
        return ""

    async def get_load(self) -> EngineLoad:
        """The engine's load and cache; see `InferenceAdapter.get_load`."""
        page = await self._page()
        return EngineLoad() if page is None else self.load_of(self.reader.read(page))

    async def get_metrics(self) -> Mapping[str, float]:
        """The engine's own figures by their own names, summed over their labels; empty if it shows none."""
        page = await self._page()
        return {} if page is None else totals(page, self.prefix)

    async def with_load(self, found: EndpointHealth) -> EndpointHealth:
        """The finding of a health check, and a healthy engine's load beside it."""
        if not found.healthy:
            return found
        try:
            load = await self.get_load()
        except BackendError:
            return found  # it is up; that its load cannot be read is not its health
        return attrs.evolve(found, queue_depth=load.waiting, active_requests=load.running, kv_usage=load.kv_usage)

    async def _page(self) -> bytes | None:
        """The page; None if the engine does not serve it."""
        key = ("metrics", self.root, self.page_url())
        return await self.shared_connections().shared(key, PAGE_TTL_S, self._fetch_page)

    async def _fetch_page(self) -> bytes | None:
        response = await (self._elsewhere(self.page_url()) if self.page_url() else self.control("GET", "/metrics"))
        if response.is_success:
            return response.content
        refusal = self.error_of(response.status_code, response.headers, response.content)
        if refusal.kind is Fault.NOT_FOUND:
            return None
        raise refusal

    async def _elsewhere(self, address: str) -> httpx.Response:
        url = httpx.URL(address)
        client = self.shared_connections().client_for(Route(f"{url.scheme}://{url.netloc.decode('ascii')}"))
        try:
            request = client.build_request("GET", url, timeout=PAGE_TIMEOUT_S)
        except httpx.InvalidURL as error:
            raise faults.from_exception(error) from error
        return await answer_within(client, request)
