"""Rate Limit Awareness."""

from __future__ import annotations

import re

from kvfleet.errors import Fault
from kvfleet.telemetry.rate_limits import RateLimitTracker
from kvfleet.testing.fakes import FakeReply
from tests.page.living import live
from tests.page.loopback import Served, serving
from tests.page.printed import fleet, run

EXAMPLE = """
from kvfleet.telemetry.rate_limits import RateLimitTracker

tracker = RateLimitTracker(default_rpm=60, throttle_threshold=0.85)

# Record each request
tracker.record_request("http://api:8000", model_id="llama-3-8b", tokens_used=500)

# Parse rate limit headers from provider responses
tracker.record_rate_limit_headers("http://api:8000", "llama-3-8b", headers={
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-remaining-requests": "12",
})

# Handle 429 responses with cooldown
tracker.record_429("http://api:8000", "llama-3-8b", retry_after=30)

# Check before routing
if tracker.should_throttle("http://api:8000", "llama-3-8b"):
    print("Endpoint throttled — route to alternative")

# Use as scoring signal
capacity = tracker.get_capacity_score("http://api:8000", "llama-3-8b")  # 0.0–1.0
print(f"Available capacity: {capacity:.0%}")
"""  # noqa: RUF001 - as printed

FLEET = """\
models:
  - {name: best, endpoint: "http://best", quality_score: 0.9}
  - {name: other, endpoint: "http://other"}
strategy: quality_first
"""


async def test_the_example() -> None:
    """After a refusal the endpoint is left alone, and has no capacity."""
    ran = await run(EXAMPLE)
    assert ran.lines == ["Endpoint throttled — route to alternative", "Available capacity: 0%"]
    assert isinstance(ran["tracker"], RateLimitTracker)


async def test_without_the_refusal_there_is_capacity_left() -> None:
    """The example's headers: 12 of 60 are a fifth, and not yet at the threshold."""
    ran = await run(re.sub(r"(?m)^tracker\.record_429.*$", "", EXAMPLE))
    assert ran.lines == ["Available capacity: 20%"]


async def test_a_live_gateway_routes_away_from_who_refuses() -> None:
    """The first refusal is answered by the other model; then nobody asks the first one, and the trace says why."""
    refusal = FakeReply(fail=Fault.RATE_LIMITED)
    async with live(fleet(FLEET), scripts={"best": refusal}) as gateway:
        assert await gateway.served() == "other"
        assert [attempt.fault for attempt in gateway.last.attempts] == ["rate_limited", ""]
        assert await gateway.served() == "other"
        assert gateway.asked_of("best") == 1
        assert [(drop.model, drop.stage) for drop in gateway.last.drops] == [("best", "filter.rate_limits")]


async def test_a_live_gateway_reads_the_headers_of_answers() -> None:
    """Three of sixty left: the next request goes elsewhere before a refusal comes."""
    near = {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "57s",
    }
    async with serving(Served("Best.", headers=near)) as (engine,):
        config = fleet(FLEET.replace("http://best", engine.url))
        async with live(config, scripts={"best": None}) as gateway:
            assert await gateway.served() == "best"
            assert await gateway.served() == "other"
            (drop,) = gateway.last.drops
            assert drop.model == "best"
