"""Requests that are given up, in every phase, in every API and in numbers: nothing stays behind.

`KVFLEET_ABORTS` sets how many; 10,000 take some minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import attrs

from kvfleet.builtin.budget import ledger_path
from kvfleet.config.overload import OverloadConfig
from kvfleet.config.schema import (
    BudgetConfig,
    FleetConfig,
    GatewayConfig,
    ModelCapabilities,
    ModelConfig,
    TelemetryConfig,
    TenantConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.server import Serving, running
from kvfleet.policy.budget import Spending, month_of
from kvfleet.policy.ledger import read_month
from kvfleet.runtime import Router
from tests.faults.site import whole
from tests.faults.tongues import CHAT, MESSAGES, RESPONSES, TONGUES, Tongue
from tests.gateway.upstream import SSE_HEAD, chunk

ABORTS = int(os.environ.get("KVFLEET_ABORTS", "400"))
AT_ONCE = 16
PLACES = 8
FIRST = "first-word"
BEGINNINGS = {tongue.path: b"".join(map(chunk, tongue.events_of([FIRST])[: tongue.opening + 1])) for tongue in TONGUES}
PHASES = (
    "amid the head",
    "amid the body",
    "at once",
    "queued",
    "headers",
    "first token",
    "stream",
    "whole",
    "embedding",
)
SPOKEN, TRANSLATED = "m", "t"
WAYS = ((SPOKEN, CHAT), (SPOKEN, MESSAGES), (SPOKEN, RESPONSES), (TRANSLATED, MESSAGES), (TRANSLATED, RESPONSES))
"""What is asked and in which API: of an engine that speaks it, or of one whose chats are translated."""
REACHES_THE_BACKEND = ("headers", "first token", "stream", "whole", "embedding")


@attrs.frozen
class GivenUp:
    """A request that is given up in a phase: its number, what is asked, and in which API."""

    number: int
    phase: str
    model: str
    tongue: Tongue

    @classmethod
    def of(cls, number: int) -> GivenUp:
        """That of a number; each phase comes with each way to ask."""
        return cls(number, PHASES[number % len(PHASES)], *WAYS[number % len(WAYS)])

    @property
    def head_and_data(self) -> tuple[bytes, bytes]:
        """As it is sent; it says which phase it is given up in."""
        prompt = f"{self.phase} #{self.number}"
        talk = {"input": prompt} if self.tongue is RESPONSES else {"messages": [{"role": "user", "content": prompt}]}
        body = {**self.tongue.ask, "model": self.model, **talk}
        if self.phase in ("headers", "first token", "stream", "queued", "at once"):
            body["stream"] = True
        path = self.tongue.path
        if self.phase == "embedding":
            path, body = "/v1/embeddings", {"input": prompt}
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Tenant: t\r\nContent-Length: {len(data)}\r\n\r\n"
        return head.encode(), data


@attrs.define
class Backend:
    """Answers as far as the prompt says, and waits to be left.

    Attributes:
        open: Connections.
        asked: The requests that came, by their numbers.
    """

    url: str = ""
    open: int = 0
    asked: set[int] = attrs.field(factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET "):  # a gateway that looks whether it is well
                    writer.write(whole(b"{}", more="connection: close\r\n"))
                    break
                length = next(
                    int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
                )
                body = await reader.readexactly(length)
                self.asked.add(int(body.partition(b" #")[2].partition(b'"')[0]))
                if b"first token" in body:
                    writer.write(SSE_HEAD)
                elif b'"stream"' in body and b"headers" not in body:
                    writer.write(SSE_HEAD + BEGINNINGS[head.split(b" ", 2)[1].decode()])
                await writer.drain()
        self.open -= 1
        writer.close()


@contextlib.asynccontextmanager
async def world(ledger: Path) -> AsyncIterator[tuple[Serving, Backend]]:
    """A gateway with a queue and budgets, before one backend that never finishes."""
    backend = Backend()
    server = await asyncio.start_server(backend.serve, "127.0.0.1", 0)
    backend.url = "http://{}:{}".format(*server.sockets[0].getsockname())
    prices = {"cost_per_1k_input_tokens": 0.001, "cost_per_1k_output_tokens": 0.001}
    spoken = ModelConfig(
        name=SPOKEN,
        endpoint=backend.url,
        provider="vllm",
        options={"surfaces": [MESSAGES.name, RESPONSES.name]},
        **prices,
    )  # type: ignore[arg-type]
    translated = ModelConfig(name=TRANSLATED, endpoint=backend.url, provider="vllm", **prices)  # type: ignore[arg-type]
    vectors = ModelConfig(
        name="e",
        endpoint=backend.url,
        provider="vllm",
        capabilities=ModelCapabilities(model_type="embedding"),
        **prices,
    )  # type: ignore[arg-type]
    config = FleetConfig(
        models=(spoken, translated, vectors),
        overload=OverloadConfig(max_in_flight=PLACES, max_queue=100),
        gateway=GatewayConfig(tenant_header="X-Tenant"),
        budget=BudgetConfig(enabled=True, monthly_budget_usd=1000.0),
        tenants={"t": TenantConfig(budget=BudgetConfig(enabled=True, monthly_budget_usd=500.0))},
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    router = Router(config, polls=False, state_dir=ledger)
    async with server, running(config, router=router) as serving:
        yield serving, backend


async def abort(url: str, backend: Backend, one: GivenUp, chance: random.Random) -> None:
    """One request that is given up in a phase, once it is there."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    phase, (head, data) = one.phase, one.head_and_data
    writer.write({"amid the head": head[:40], "amid the body": head + data[:10]}.get(phase, head + data))
    if phase in REACHES_THE_BACKEND:
        async with asyncio.timeout(30):
            while one.number not in backend.asked:  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(0.002)
    if phase == "stream":
        await reader.readuntil(FIRST.encode())
    elif phase != "at once":
        await asyncio.sleep(chance.random() * 0.02)
    writer.transport.abort()


def fds() -> int:
    """How many files and sockets this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def reservations(serving: Serving) -> Counter[str]:
    """Everything that is held for requests in flight, by what it is."""
    router = serving.router
    state = router.state()["stages"]
    held: Counter[str] = Counter()
    for model in router.models:
        known = router.services.load.of(model.id)
        assert known is not None
        held["load"] += len(known.open)
        held["prompts"] += len(known.prefilling)
        held["tokens"] += round(known.held_tokens + known.queued_tokens)
    held["places"] = state["admit.queue"]["in_flight"]
    held["waiting"] = state["admit.queue"]["waiting"]
    held["dollars"] = round(sum(account["reserved_usd"] for account in state["admit.budget"]["accounts"]) * 1e9)
    held["requests"] = serving.gateway.meters.in_flight
    return +held


async def settled(serving: Serving, backend: Backend) -> None:
    """Wait until everybody has noticed."""
    async with asyncio.timeout(20):
        while reservations(serving) or backend.open:  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.01)


async def test_requests_that_are_given_up_leave_nothing_behind(tmp_path: Path) -> None:
    """In each phase and API: no socket, no task, no place, no load and no money stays, here or in the ledger."""
    chance = random.Random(5)
    async with world(tmp_path) as (serving, backend):
        once = range(-len(PHASES) * len(WAYS), 0)
        await asyncio.gather(*(abort(serving.url, backend, GivenUp.of(i), chance) for i in once))
        await settled(serving, backend)
        await asyncio.sleep(0.1)
        gc.collect()
        files, tasks = fds(), len(asyncio.all_tasks())
        left = list(range(ABORTS))

        async def keep_aborting() -> None:
            while left:
                await abort(serving.url, backend, GivenUp.of(left.pop()), chance)

        await asyncio.gather(*(keep_aborting() for _ in range(AT_ONCE)))
        await settled(serving, backend)
        await asyncio.sleep(0.1)
        gc.collect()
        assert (fds() <= files, len(asyncio.all_tasks())) == (True, tasks)
        assert reservations(serving) == Counter()
        assert len(backend.asked) >= ABORTS * len(REACHES_THE_BACKEND) // len(PHASES)
        assert len(serving.router.services.load.snapshot()) == 3
        assert not serving.doors.in_flight
    spent = read_month(ledger_path(tmp_path, "default"), month_of(serving.router.clock.time_ns()))
    assert set(spent) <= {"fleet", "tenant/t"}
    fleet = spent.get("fleet", Spending())
    assert fleet.nano_usd == 1000 * (
        fleet.prompt_tokens + fleet.completion_tokens
    )  # a message's first event tells of some
