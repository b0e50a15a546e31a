"""Health Monitoring & Circuit Breakers."""

from __future__ import annotations

from kvfleet.clock import FrozenClock
from kvfleet.errors import Fault
from kvfleet.telemetry.health import HealthManager
from kvfleet.testing.fakes import FakeReply
from tests.page.living import live
from tests.page.printed import fleet, run

EXAMPLE = """
from kvfleet.telemetry.health import HealthManager
from kvfleet.adapters.base import EndpointHealth

health_mgr = HealthManager(
    failure_threshold=3,        # Open circuit after 3 failures
    recovery_timeout_seconds=60, # Try again after 60s
)

# Automatic circuit breaking
health_mgr.update_health(EndpointHealth(endpoint="http://gpu-1:8000", healthy=False))
health_mgr.update_health(EndpointHealth(endpoint="http://gpu-1:8000", healthy=False))
health_mgr.update_health(EndpointHealth(endpoint="http://gpu-1:8000", healthy=False))
# → Circuit breaker OPEN — endpoint removed from routing

# Warm model detection
if health_mgr.is_warm("http://gpu-1:8000"):
    print("GPU is warm — prioritize for low latency")
"""

FLEET = """\
models:
  - {name: llama, endpoint: "http://gpu-1:8000", replicas: ["http://gpu-2:8000"], provider: vllm}
strategy: round_robin
"""


async def test_three_failures_open_the_circuit() -> None:
    """The endpoint is not routed to any more; nothing is warm there."""
    ran = await run(EXAMPLE)
    manager = ran["health_mgr"]
    assert isinstance(manager, HealthManager)
    assert not manager.is_available("http://gpu-1:8000")
    assert manager.breaker_state("http://gpu-1:8000") == "open"
    assert ran.printed == ""


async def test_a_working_gpu_is_warm() -> None:
    """The example's last lines, for an endpoint that has requests."""
    warm = EXAMPLE.replace("healthy=False", "healthy=True, active_requests=2")
    assert (await run(warm)).printed == "GPU is warm — prioritize for low latency\n"


async def test_a_live_replica_that_fails_is_left_alone_until_its_time_is_up() -> None:
    """Three failed calls take it out, with a reason in the trace; after a minute one request tries it again."""
    clock = FrozenClock()
    script = [*[FakeReply(fail=Fault.SERVER_ERROR)] * 3, FakeReply(text="Back again.")]
    async with live(fleet(FLEET), scripts={"http://gpu-1:8000": script}, clock=clock) as gateway:
        while len(gateway.engines["llama"][0].calls) < 3:
            assert await gateway.served() == "llama"
        for _ in range(4):
            await gateway.ask()
            assert gateway.last.served_endpoint == "http://gpu-2:8000"
            assert [drop.candidate for drop in gateway.last.drops] == ["llama@http://gpu-1:8000"]
            assert gateway.last.drops[0].stage == "filter.health"
        clock.advance(61)
        served = set()
        for _ in range(4):
            await gateway.ask()
            served.add(gateway.last.served_endpoint)
        assert "http://gpu-1:8000" in served
