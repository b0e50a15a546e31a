"""What a running gateway must survive, in numbers: broken streams, requests given up, reloads and stops under load.

    python benchmarks/trials.py [--only streams,aborts,reloads,stops] [--workers 1,2] [--count 10000] [--reloads 100]
                                [--stops 10] [--json FILE]

`kvfleet run` is a process of its own, or as many as ``--workers`` says; engines and clients live in this one. The
pipeline is the default one with policy, budgets, a queue and the trace store on. Requests come over chat, Messages and
Responses, to engines that speak each and to engines that speak chat alone:

- *streams*: every one breaks at a random byte (``tests/faults/many.py``); what the client got is judged by the API's
  own SDK, and none may pass for complete.
- *aborts*: each is given up in one of nine phases (``tests/gateway/test_aborts.py``).
- *reloads*: the fleet file changes again and again while twelve clients ask on, whole and streamed, on connections
  that they keep and on new ones; every answer must be right.
- *stops*: SIGTERM while twenty-four such clients ask; each must get whole answers until it is refused, or until it has
  been silent for a second on a connection that it keeps, as it may be where this process gets too little CPU.

After the first three all must be at rest again: requests in flight, the queue, what is held of budgets, the engines'
connections and the files that each worker has open. Exit status 1 if anything was not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import httpx
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.faults.catalogue import Case, Fault
from tests.faults.judge import Heard, judged
from tests.faults.many import broken_streams
from tests.faults.sdks import made_of
from tests.faults.site import LAST_CHUNK, SSE_HEAD, Ask, Site, chunk, healthily, site
from tests.faults.tongues import CHAT, MESSAGES, MODEL, RESPONSES, TOKENS, TONGUES, Tongue
from tests.gateway.test_aborts import PHASES, SPOKEN, TRANSLATED, WAYS, Backend, GivenUp, abort
from tests.gateway.test_life import Process, is_refusal, started
from tests.gateway.test_workers import listening

NATIVE = {"options": {"surfaces": [MESSAGES.name, RESPONSES.name]}}
PRICES = {"cost_per_1k_input_tokens": 0.001, "cost_per_1k_output_tokens": 0.002}
PATIENT = 10**9
HELD = ("kvfleet_in_flight_requests", "kvfleet_queue_depth", "kvfleet_queued_prompt_tokens")
REST_S = 60.0
TENANT = {"X-Tenant": "t"}
ANSWERED, REFUSED, SILENT = "answered", "refused", "closed after a second of silence"
SILENCE_S = 1.0
"""A gateway that stops closes connections on which nothing comes for so long (docs/how-to/operate.md)."""


# The gateway ---------------------------------------------------------------------------------------------------------


def model(name: str, endpoint: str, **more: Any) -> dict[str, Any]:
    """A model of a fleet."""
    return {"name": name, "provider": "vllm", "endpoint": endpoint, **PRICES, **more}


def fleet(folder: Path, models: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """The default pipeline with all that may hold something of a request; no breaker opens, whatever fails."""
    return {
        "models": list(models),
        "gateway": {"tenant_header": "X-Tenant"},
        "policy": {"enabled": True, "pii_detection": True},
        "budget": {"enabled": True, "monthly_budget_usd": 1_000_000, "per_request_max_usd": None},
        "tenants": {"t": {"budget": {"enabled": True, "monthly_budget_usd": 500_000, "per_request_max_usd": None}}},
        "health": {"failure_threshold": PATIENT, "outlier_detection": {"enabled": False}},
        "telemetry": {"structured_logs": True, "trace_store": {"path": str(folder / "traces.db")}},
        **more,
    }


@attrs.define
class Gateway:
    """A gateway's processes, and what they hold."""

    process: Process
    workers: Sequence[int]

    @property
    def url(self) -> str:
        """Where it is."""
        return self.process.url

    def files(self) -> int:
        """Files and sockets that the workers have open."""
        return sum(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) for pid in self.workers)

    def rss_mb(self) -> float:
        """Memory of the workers."""
        told = (Path(f"/proc/{pid}/status").read_text(encoding="ascii") for pid in self.workers)
        return sum(int(re.findall(r"VmRSS:\s+(\d+)", one)[0]) for one in told) / 1024

    async def held(self) -> Counter[str]:
        """What is held for requests, by what it is."""
        async with httpx.AsyncClient(base_url=self.url, timeout=30, verify=False) as client:  # noqa: S501 - no TLS
            scraped = (await client.get("/metrics")).text
            tenants = (await client.get("/v1/tenants")).json()["data"]
        found: Counter[str] = Counter()
        for name, value in re.findall(r"^(\w+)(?:\{[^}]*\})? ([\d.e+-]+)$", scraped, re.MULTILINE):
            if name in HELD:
                found[name] += round(float(value))
        found["nanodollars reserved"] = round(1e9 * sum(one["reserved_usd"] for one in tenants))
        return +found


@contextlib.asynccontextmanager
async def gateway(folder: Path, data: Mapping[str, Any], workers: int) -> AsyncIterator[Gateway]:
    """A gateway of a fleet."""
    async with started(folder, dict(data), "--workers", str(workers), "--drain-timeout", "60") as process:
        pids = await listening(process, workers) if workers > 1 else [process.process.pid]
        yield Gateway(process, pids)


@attrs.frozen
class Told:
    """What a trial came to, and what of that was wrong."""

    trial: str
    workers: int
    figures: Mapping[str, Any]
    wrong: Sequence[str] = ()


@contextlib.asynccontextmanager
async def restful(one: Gateway, engines: Callable[[], int], figures: dict[str, Any]) -> AsyncIterator[list[str]]:
    """What happens in the block leaves nothing behind; what it did is added to a list of what was wrong."""
    wrong: list[str] = []
    files, before_mb, began_s = one.files(), one.rss_mb(), time.monotonic()
    yield wrong
    figures["seconds"] = round(time.monotonic() - began_s)
    until_s = time.monotonic() + REST_S
    while (left := await _left(one, files, engines)) and time.monotonic() < until_s:  # noqa: ASYNC110
        await asyncio.sleep(0.5)
    wrong += left
    figures["MB before, after"] = (round(before_mb, 1), round(one.rss_mb(), 1))


async def _left(one: Gateway, files: int, engines: Callable[[], int]) -> list[str]:
    """What is not at rest; files come first, for whoever asks for the rest has a connection open."""
    left = [f"{one.files() - files} files left"] if one.files() > files else []
    left += [f"{engines()} connections to engines left"] if engines() else []
    return left + [f"{count} {what} held" for what, count in (await one.held()).items()]


# The trials ----------------------------------------------------------------------------------------------------------


async def streams(workers: int, options: argparse.Namespace) -> AsyncIterator[Told]:
    """Streams that break."""
    for spoken in ((MESSAGES, RESPONSES), ()):
        kind = "spoken" if spoken else "translated"
        with tempfile.TemporaryDirectory() as name:
            async with site(1, *spoken) as engines:
                data = fleet(Path(name), [model(MODEL, engines.engines[0].url, **(NATIVE if spoken else {}))])
                async with gateway(Path(name), data, workers) as one:
                    for tongue in TONGUES if spoken else TONGUES[1:]:
                        figures, wrong = await _broken(one, engines, tongue, options.count)
                        yield Told(f"streams, {tongue.name} {kind}", workers, figures, wrong)


async def _broken(one: Gateway, engines: Site, tongue: Tongue, count: int) -> tuple[dict[str, Any], list[str]]:
    figures: dict[str, Any] = {}
    await _break(one, engines, tongue, 64)  # who needs files for long opens them

    def connected() -> int:
        for engine in engines.engines:
            engine.hang_up()
        return 0

    connected()
    async with restful(one, connected, figures) as wrong:
        found = await _break(one, engines, tongue, count)
    wrong += [f"{times} {why}" for why, times in found.items() if not why.startswith("pass")]
    return {**found, **figures}, wrong


async def _break(one: Gateway, engines: Site, tongue: Tongue, count: int) -> Counter[str]:
    return await broken_streams(one.url, engines, count=count, tongue=tongue, headers=TENANT)


async def aborts(workers: int, options: argparse.Namespace) -> AsyncIterator[Told]:
    """Requests that are given up."""
    backend = Backend()
    server = await asyncio.start_server(backend.serve, "127.0.0.1", 0)
    backend.url = "http://{}:{}".format(*server.sockets[0].getsockname())
    vectors = model("e", backend.url, capabilities={"model_type": "embedding"})
    models = [model(SPOKEN, backend.url, **NATIVE), model(TRANSLATED, backend.url), vectors]
    with tempfile.TemporaryDirectory() as name:
        data = fleet(Path(name), models, overload={"max_in_flight": 8, "max_queue": 100})
        async with server, gateway(Path(name), data, workers) as one:
            await _give_up(one, backend, -len(PHASES) * len(WAYS), 0)
            await asyncio.sleep(1)
            figures: dict[str, Any] = {}
            async with restful(one, lambda: backend.open, figures) as wrong:
                await _give_up(one, backend, 0, options.count)
            reached = sum(number >= 0 for number in backend.asked)
            figures = {"given up": options.count, "had reached an engine": reached, **figures}
            if reached < options.count / 4:
                wrong.append("too few reached an engine to show anything")
            yield Told("aborts", workers, figures, wrong)


async def _give_up(one: Gateway, backend: Backend, first: int, last: int) -> None:
    """Requests of these numbers, sixteen at a time."""
    left, chance = iter(range(first, last)), random.Random(5)

    async def client() -> None:
        for number in left:
            await abort(one.url, backend, GivenUp.of(number), chance)

    await asyncio.gather(*(client() for _ in range(16)))


async def reloads(workers: int, options: argparse.Namespace) -> AsyncIterator[Told]:
    """Reloads under load."""
    async with _serving_slowly(workers) as (one, engines, data):
        figures: dict[str, Any] = {}
        callers = [Caller(one.url, keeps=number % 2 == 0) for number in range(12)]
        async with restful(one, lambda: 0, figures) as wrong, asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(caller.run())
            said = [await _reload(one, data, engines, number) for number in range(options.reloads)]
            for caller in callers:
                caller.is_over = True
        ends = sum((caller.ends for caller in callers), Counter[str]())
        wrong += [f"{count} {end}" for end, count in ends.items() if end != ANSWERED]
        wrong += [one for one in said if one != "200"]
        yield Told("reloads", workers, {"reloads": dict(Counter(said)), "requests": dict(ends), **figures}, wrong)


async def _reload(one: Gateway, data: Mapping[str, Any], engines: Site, number: int) -> str:
    """Another fleet file: another strategy, and each other time one replica less."""
    strategy = ("expected_latency", "round_robin", "hybrid_score")[number % 3]
    urls = [engine.url for engine in engines.engines][number % 2 :]
    models = [{**entry, "endpoint": urls[0], "replicas": urls[1:]} for entry in data["models"]]
    one.process.path.write_text(yaml.safe_dump({**data, "models": models, "strategy": strategy}))
    async with httpx.AsyncClient(base_url=one.url, timeout=60, verify=False) as client:  # noqa: S501 - no TLS
        return str((await client.post("/-/reload")).status_code)


async def stops(workers: int, options: argparse.Namespace) -> AsyncIterator[Told]:
    """SIGTERM under load."""
    ends, codes, pauses = Counter[str](), Counter[int](), list[float]()
    for number in range(options.stops):
        async with _serving_slowly(workers) as (one, _, _):
            callers = [Caller(one.url, keeps=index % 2 == 0) for index in range(24)]
            async with asyncio.TaskGroup() as group:
                for caller in callers:
                    group.create_task(caller.run())
                while sum(caller.ends.total() for caller in callers) < 100 + 7 * number:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.01)
                one.process.process.send_signal(signal.SIGTERM)
                pauses.append(await _longest_pause_s(2 * SILENCE_S))
            codes[await asyncio.wait_for(one.process.process.wait(), 120)] += 1
            ends += sum((caller.ends for caller in callers), Counter[str]())
    wrong = [f"{count} {end}" for end, count in ends.items() if end not in (ANSWERED, REFUSED, SILENT)]
    wrong += [f"{count} ended with {code}" for code, count in codes.items() if code]
    figures = {"stops": options.stops, "requests": dict(ends), "longest pause of the clients, s": max(pauses)}
    yield Told("stops", workers, figures, wrong)


async def _longest_pause_s(within_s: float) -> float:
    """How long this process stood still at most; clients that do so for a second find connections closed."""
    longest_s, until_s = 0.0, time.monotonic() + within_s
    while (before_s := time.monotonic()) < until_s:
        await asyncio.sleep(0.01)
        longest_s = max(longest_s, time.monotonic() - before_s - 0.01)
    return round(longest_s, 2)


@contextlib.asynccontextmanager
async def _serving_slowly(workers: int) -> AsyncIterator[tuple[Gateway, Site, Mapping[str, Any]]]:
    """A gateway before two engines that are well, and take their time."""
    with tempfile.TemporaryDirectory() as name:
        async with site(2, MESSAGES, RESPONSES) as engines:
            first, *others = (engine.url for engine in engines.engines)
            spoken = model(MODEL, first, replicas=others, **NATIVE)
            translated = model(TRANSLATED, first, replicas=others, model_id=MODEL)
            data = fleet(Path(name), [spoken, translated])
            await engines.befall(slowly)
            engines.is_everybody = True
            async with gateway(Path(name), data, workers) as one:
                yield one, engines, data


async def slowly(ask: Ask) -> None:
    """Answer as one should, within a tenth of a second or two."""
    if not ask.stream:
        await asyncio.sleep(0.1)
        await healthily(ask)
        return
    await ask.say(SSE_HEAD)
    for event in ask.tongue.events_of(TOKENS):
        await ask.say(chunk(event))
        await asyncio.sleep(0.01)
    await ask.say(LAST_CHUNK)


@attrs.define
class Caller:
    """A client that asks one after the other in each API, whole and streamed, and looks at each answer."""

    url: str
    keeps: bool
    ends: Counter[str] = attrs.field(factory=Counter)
    is_over: bool = False
    _said_s: float = 0.0

    async def run(self) -> None:
        """Ask until told to stop, or nobody listens any more."""
        limits = httpx.Limits(max_keepalive_connections=None if self.keeps else 0)
        async with httpx.AsyncClient(base_url=self.url, timeout=60, limits=limits, verify=False) as client:  # noqa: S501
            for name, tongue, stream in itertools.cycle(itertools.product((MODEL, TRANSLATED), TONGUES, (True, False))):
                if self.is_over or self.ends[REFUSED]:
                    return
                self.ends[await self._ask(client, name, tongue, stream=stream)] += 1

    async def _ask(self, client: httpx.AsyncClient, name: str, tongue: Tongue, *, stream: bool) -> str:
        body = {**tongue.ask, "model": name, "stream": stream}
        was_silent = self.keeps and bool(self._said_s) and time.monotonic() - self._said_s > SILENCE_S
        try:
            answer = await client.post(tongue.path, json=body, headers=TENANT)
        except httpx.ConnectError as error:
            return REFUSED if is_refusal(error) else repr(error)
        except httpx.HTTPError as error:
            return SILENT if was_silent else repr(error)
        self._said_s = time.monotonic()
        heard = Heard(answer.status_code, "clean", answer.content)
        is_seen = tongue is not CHAT and heard.status == 200
        made = await made_of(tongue, heard.body, stream=stream) if is_seen else None
        case = Case(Fault("none", healthily, heals=True), stream=stream, engines=2)
        found = judged(case, heard, (), tongue, made)
        return found.why if found.why == ANSWERED else f"{found.verdict}: {found.why}"


TRIALS: Mapping[str, Callable[[int, argparse.Namespace], AsyncIterator[Told]]] = {
    "streams": streams,
    "aborts": aborts,
    "reloads": reloads,
    "stops": stops,
}


async def measure(options: argparse.Namespace) -> AsyncIterator[Told]:
    """What was asked for, with each number of workers."""
    for name in options.only.split(","):
        for workers in options.workers.split(","):
            async for told in TRIALS[name](int(workers), options):
                yield told


async def _main(options: argparse.Namespace) -> int:
    found = []
    async for told in measure(options):
        found.append(told)
        print(f"{told.trial}, workers {told.workers}: {json.dumps(told.figures)}", flush=True)
        for what in told.wrong:
            print(f"  WRONG: {what}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([attrs.asdict(one) for one in found], indent=1), encoding="utf-8")
    return int(any(one.wrong for one in found))


def main() -> None:
    """Do them, and print what they came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TRIALS), help="names of trials, by commas")
    parser.add_argument("--workers", default="1,2", help="numbers of workers, by commas")
    parser.add_argument("--count", type=int, default=10_000, help="streams of each kind, and requests given up")
    parser.add_argument("--reloads", type=int, default=100)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write all figures here")
    sys.exit(asyncio.run(_main(parser.parse_args())))


if __name__ == "__main__":
    main()
