"""Twice what the fleet can do: what is served in time, with the queue of `overload:` and without it.

    python benchmarks/overload.py [--seconds 60] [--json]

Gateway, client and two simulated engines (`provider: mock`, eight requests in a batch, 1.6 s for an answer) share one
process; the engines are slow, so that it is they who are at their limit and not the machine. First a closed loop of as
many clients as they have places finds the most they serve. Then requests come at twice that rate, by a Poisson process
with a fixed seed, whatever becomes of the earlier ones; each has a deadline of ten seconds. Three tenants send them:
`loud` 70 %, `quiet` 25 %, `vip` 5 % with a higher priority.

Then as many clients as the engines can serve in twenty seconds come at once, with the queue, and each that is refused
comes back when `Retry-After` says: how often each had to, and how much longer it took than the engines need.

How long a refusal took is told twice: as the client has it, which shares its event loop with all the others, and as the
gateway has it, from the request's beginning to its end in the trace. That it waits for nothing is shown by
`tests/gateway/test_overload.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import httpx

from kvfleet.config.overload import OverloadConfig, TenantShare
from kvfleet.config.schema import (
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    TelemetryConfig,
    TenantConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace import names
from kvfleet.trace.spans import Trace

BATCH, ANSWER_TOKENS, DEADLINE_MS = 8, 30, 10_000
ENGINES = ("mock://a", "mock://b")
CROWD_S = 20.0
"""Seconds for which a crowd keeps the engines busy."""
DEMAND = {"loud": 0.70, "quiet": 0.25, "vip": 0.05}
_IN_THE_QUEUE = ("no place became free", "others come first")
QUEUE = OverloadConfig(
    max_in_flight_per_replica=BATCH,
    max_queue=64,
    max_wait_ms=3000,
    tenants={"vip": TenantShare(priority=1)},
)


@attrs.frozen
class Asked:
    """One request: whose, when it was sent, how long it took, and how it ended (0 for an error of the connection)."""

    tenant: str
    at_s: float
    took_s: float
    status: int


@attrs.frozen
class Returned:
    """A client that came back for as long as it was refused: how often it was, and for how long it was told to wait."""

    refusals: int
    told_s: int
    took_s: float


@attrs.define
class Refusals:
    """Seconds that routes took which were refused at once, by their traces; others were refused in the queue."""

    took_s: list[float] = attrs.field(factory=list)
    waited: int = 0

    def write(self, trace: Trace) -> None:
        """Take one."""
        route = trace.route
        if route.attributes.get(names.OUTCOME) != "refused":
            return
        if any(words in route.message for words in _IN_THE_QUEUE):
            self.waited += 1
        else:
            self.took_s.append((route.end_ns - route.start_ns) / 1e9)


def fleet(overload: OverloadConfig) -> FleetConfig:
    """Two engines behind a gateway."""
    options = {"max_batch": BATCH, "decode_ms_per_token": 40.0, "answer_tokens": ANSWER_TOKENS, "max_queue": 100_000}
    model = ModelConfig(name="m", endpoint=ENGINES[0], replicas=ENGINES[1:], provider="mock", options=options)
    return FleetConfig(
        models=(model,),
        overload=overload,
        gateway=GatewayConfig(tenant_header="X-Tenant"),
        tenants={name: TenantConfig() for name in DEMAND},
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )


async def ask(client: httpx.AsyncClient, tenant: str, number: int) -> Asked:
    """Send one request and wait for what comes of it."""
    began_s = time.monotonic()
    body = {"model": "auto", "messages": [{"role": "user", "content": f"Question {number}: " + "word " * 40}]}
    headers = {"X-Tenant": tenant, "X-KVFleet-Timeout": str(DEADLINE_MS)}
    try:
        status = (await client.post("/v1/chat/completions", json=body, headers=headers)).status_code
    except httpx.HTTPError:
        status = 0
    return Asked(tenant, began_s, time.monotonic() - began_s, status)


async def most_per_s(client: httpx.AsyncClient, seconds: float) -> float:
    """What a closed loop of as many clients as there are places gets served."""
    until_s = time.monotonic() + seconds

    async def one(number: int) -> int:
        served = 0
        while time.monotonic() < until_s:
            served += (await ask(client, "loud", number)).status == 200
        return served

    return sum(await asyncio.gather(*(one(i) for i in range(BATCH * len(ENGINES))))) / seconds


async def offer(client: httpx.AsyncClient, rate_per_s: float, seconds: float, seed: int) -> list[Asked]:
    """Send requests at a rate, whatever becomes of them."""
    chance = random.Random(seed)
    tenants, weights = list(DEMAND), list(DEMAND.values())
    tasks, at_s = [], time.monotonic()
    end_s = at_s + seconds
    while at_s < end_s:
        await asyncio.sleep(max(at_s - time.monotonic(), 0))
        tenant = chance.choices(tenants, weights)[0]
        tasks.append(asyncio.create_task(ask(client, tenant, len(tasks))))
        at_s += chance.expovariate(rate_per_s)
    return [await task for task in tasks]


async def come_back(client: httpx.AsyncClient, number: int) -> Returned:
    """Ask, and again when one is told to, until one is served."""
    began_s, told = time.monotonic(), list[int]()
    body = {"model": "auto", "messages": [{"role": "user", "content": f"Question {number}: " + "word " * 40}]}
    while True:
        answer = await client.post("/v1/chat/completions", json=body, headers={"X-Tenant": "loud"})
        if answer.status_code == 200:
            return Returned(len(told), told[0] if told else 0, time.monotonic() - began_s)
        told.append(int(answer.headers["retry-after"]))
        await asyncio.sleep(told[-1])


async def crowd(client: httpx.AsyncClient, most: float) -> dict[str, Any]:
    """All at once, and then those that are refused as they are told."""
    count, began_s = round(CROWD_S * most), time.monotonic()
    found = await asyncio.gather(*(come_back(client, i) for i in range(count)))
    took_s = time.monotonic() - began_s
    return {
        "clients": count,
        "by_refusals": dict(sorted(Counter(one.refusals for one in found).items())),
        "told_at_most_s": max(one.told_s for one in found),
        "seconds": took_s,
        "of_what_the_engines_need": took_s / CROWD_S,
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies; NaN without any."""
    found = sorted(values)
    return found[min(int(share * len(found)), len(found) - 1)] if found else float("nan")


def figures(found: Sequence[Asked], most: float, seconds: float, refusals: Refusals) -> dict[str, Any]:
    """What the run came to."""
    served = [one for one in found if one.status == 200 and one.took_s <= DEADLINE_MS / 1000]
    refused = [one for one in found if one.status in (429, 503)]
    by_tenant, wanted = Counter(one.tenant for one in served), Counter(one.tenant for one in found)
    return {
        "most_per_s": most,
        "offered_per_s": len(found) / seconds,
        "served_per_s": len(served) / seconds,
        "of_the_most": len(served) / seconds / most,
        "median_s": percentile([one.took_s for one in served], 0.5),
        "p99_s": percentile([one.took_s for one in served], 0.99),
        "refused_p99_ms": 1000 * percentile([one.took_s for one in refused], 0.99),
        "refused_median_ms": 1000 * percentile([one.took_s for one in refused], 0.5),
        "decided_median_ms": 1000 * percentile(refusals.took_s, 0.5),
        "decided_p99_ms": 1000 * percentile(refusals.took_s, 0.99),
        "decided_longest_ms": 1000 * max(refusals.took_s, default=float("nan")),
        "refused_at_once": len(refusals.took_s),
        "refused_in_the_queue": refusals.waited,
        "statuses": dict(Counter(one.status for one in found)),
        "served_of_wanted": {tenant: by_tenant[tenant] / wanted[tenant] for tenant in DEMAND},
    }


async def measure(overload: OverloadConfig, seconds: float, seed: int) -> Mapping[str, Any]:
    """One gateway: the most it can serve, and what it serves of twice that."""
    config, refusals = fleet(overload), Refusals()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with (
        running(config, router=Router(config, polls=False, sinks=[refusals])) as serving,
        httpx.AsyncClient(base_url=serving.url, limits=limits, timeout=60) as client,
    ):
        gc.collect()  # as `kvfleet run` does; else most of what a refusal takes is looking for cycles of this client's
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)
        await most_per_s(client, 5)  # learn the pace
        most = await most_per_s(client, max(seconds / 4, 5))
        found = figures(await offer(client, 2 * most, seconds, seed), most, seconds, refusals)
        return {**found, "crowd": await crowd(client, most)} if overload.max_in_flight_per_replica else found


def main() -> None:
    """Measure both, and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args()
    found = {
        name: asyncio.run(measure(overload, options.seconds, options.seed))
        for name, overload in (("without", OverloadConfig()), ("with", QUEUE))
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for name, one in found.items():
        shares = ", ".join(f"{tenant} {share:.0%}" for tenant, share in one["served_of_wanted"].items())
        print(
            f"{name:8} most {one['most_per_s']:.1f}/s  offered {one['offered_per_s']:.1f}/s  "
            f"served in time {one['served_per_s']:.1f}/s ({one['of_the_most']:.0%})  "
            f"median {one['median_s']:.2f} s  p99 {one['p99_s']:.2f} s  "
            f"refused at once {one['refused_at_once']}, in the gateway median "
            f"{one['decided_median_ms']:.2f} ms, p99 {one['decided_p99_ms']:.2f} ms, "
            f"at most {one['decided_longest_ms']:.2f} ms; in the queue {one['refused_in_the_queue']}"
        )
        print(f"{'':8} of what each asked for: {shares}   {one['statuses']}")
    one = found["with"]["crowd"]
    print(
        f"{one['clients']} at once that come back as told: refusals of each {one['by_refusals']}, told to wait for "
        f"{one['told_at_most_s']} s at most; all served in {one['seconds']:.1f} s, "
        f"{one['of_what_the_engines_need']:.2f} times what the engines need"
    )


if __name__ == "__main__":
    main()
