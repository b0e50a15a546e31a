"""What a decision costs: the default pipeline, trace included, for 3, 64 and 512 replicas.

Run ``python benchmarks/decision.py``. Figures are CPU microseconds per decision (median of rounds), measured in one
process; compare ratios between lines of one run, since machines differ and are busy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

from kvfleet.adapters.call import Operation
from kvfleet.config.schema import FleetConfig, ModelCapabilities, ModelConfig, PolicyConfig, PolicyRule
from kvfleet.pipeline.engine import Decision
from kvfleet.plugin.contract import RouteRequest
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.trace.spans import Span, Trace

SIZES = (3, 8, 64, 512)
ROUNDS = 7
PROMPT_BYTES = 2048


def fleet(replicas: int, *, policy: bool) -> FleetConfig:
    """A fleet of chat models, a fifth of them in a cloud, with or without a policy."""
    models = tuple(
        ModelConfig(
            name=f"model-{i}",
            endpoint=f"mock://engine-{i}",
            provider="mock",
            quality_score=0.5 + (i % 5) / 10,
            cost_per_1k_input_tokens=0.001 * (i % 7),
            cost_per_1k_output_tokens=0.002 * (i % 7),
            latency_p50_ms=100 + 10 * (i % 11),
            private=i % 5 != 0,
            capabilities=ModelCapabilities(max_context_window=32_768),
        )
        for i in range(replicas)
    )
    rules = (PolicyRule(name="confidential-stays", condition="data_class == confidential", action="require_private"),)
    return FleetConfig(models=models, policy=PolicyConfig(enabled=policy, rules=rules if policy else ()))


def request() -> RouteRequest:
    """A chat request of about 2 KB with a system prompt."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant. " * 20},
        {"role": "user", "content": "x" * (PROMPT_BYTES - 600)},
    ]
    body: dict[str, Any] = {"model": "auto", "messages": messages}
    return RouteRequest(
        operation=Operation.CHAT,
        body=body,
        raw=json.dumps(body).encode(),
        request_id="bench",
        data_class="confidential",
    )


async def measure(router: Router, rounds: int) -> float:
    """CPU microseconds for one decision, trace included."""
    asked = request()

    async def decide() -> None:
        ctx, select = router.prepare(asked)
        trace = Trace("0" * 32, [Span("kvfleet.route", router.clock.time_ns())])
        await Decision(router.pipeline, ctx, trace, router.clock).run(select)

    times = []
    count = max(50, 4000 // max(1, len(router.models)))
    for round_ in range(rounds + 1):
        started = time.process_time()
        for _ in range(count):
            await decide()
        if round_:  # the first round warms caches
            times.append((time.process_time() - started) / count * 1e6)
    return statistics.median(times)


async def run(rounds: int) -> list[dict[str, float]]:
    """One row for each size."""
    table = discover()
    rows = []
    for size in SIZES:
        row: dict[str, float] = {"replicas": size}
        for name, policy in (("default_us", False), ("with_policy_us", True)):
            async with Router(fleet(size, policy=policy), table=table, polls=False, seed=1) as router:
                row[name] = round(await measure(router, rounds), 1)
                row["stages"] = len(router.pipeline.all_stages)
        rows.append(row)
    return rows


def main() -> None:
    """Print the table, or JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = asyncio.run(run(options.rounds))
    if options.json:
        print(json.dumps(rows))
        return
    print("| replicas | stages | default pipeline, µs | with policy, µs | µs per replica |")
    print("|---|---|---|---|---|")
    for row in rows:
        per = row["with_policy_us"] / row["replicas"]
        print(f"| {row['replicas']} | {row['stages']} | {row['default_us']} | {row['with_policy_us']} | {per:.1f} |")


if __name__ == "__main__":
    main()
