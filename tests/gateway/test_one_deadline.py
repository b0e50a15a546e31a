"""One request's time is spent once: in the queue, in an attempt that fails, and in the one after that."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import attrs
import httpx
import pytest

from kvfleet.config.overload import OverloadConfig
from kvfleet.config.schema import FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace import names
from kvfleet.trace.spans import Span, Trace
from tests.faults.site import Ask, LeaveError, refusal, site
from tests.faults.tongues import CHAT

TIME_MS = 2000
CLOCKS_S = 0.005  # spans are timed by another clock than deadlines


@attrs.define
class Story:
    """Two engines, and what they do with the first, the second and the third request of all.

    Attributes:
        asked: How many there have been.
        release: Lets the first one be answered.
        fail: Lets the second one fail.
        left: Set when the third one, which is never answered whole, has been left.
        traces: Of all requests.
    """

    asked: int = 0
    release: asyncio.Event = attrs.field(factory=asyncio.Event)
    fail: asyncio.Event = attrs.field(factory=asyncio.Event)
    left: asyncio.Event = attrs.field(factory=asyncio.Event)
    traces: list[Trace] = attrs.field(factory=list)

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)

    async def behave(self, ask: Ask) -> None:
        self.asked += 1
        if self.asked == 1:
            await self.release.wait()
            await ask.answer()
        elif self.asked == 2:
            await self.fail.wait()
            await ask.say(refusal("500 Internal Server Error"))
        else:
            if ask.stream:
                await ask.begin()
            try:
                await ask.silence()
            except LeaveError:
                self.left.set()
                raise

    async def tell(self, router: Router, client: httpx.AsyncClient, *, stream: bool) -> httpx.Response:
        """A request that waits for the first one's place, fails once, and then waits for its time to be up."""
        body = {**CHAT.ask, "stream": stream}
        first = asyncio.create_task(client.post(CHAT.path, json=CHAT.ask))
        await until(lambda: self.asked == 1)
        own = asyncio.create_task(client.post(CHAT.path, json=body, headers={"X-KVFleet-Timeout": str(TIME_MS)}))
        await until(lambda: router.state()["stages"]["admit.queue"]["waiting"] == 1)
        self.release.set()
        assert (await first).status_code == 200
        await until(lambda: self.asked == 2)
        self.fail.set()
        answer = await own
        await self.left.wait()
        return answer


async def until(holds: Any) -> None:
    """Let the loop run until something holds."""
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.001)


def took_s(span: Span) -> float:
    """How long a span was."""
    return (span.end_ns - span.start_ns) / 1e9


@pytest.mark.parametrize("stream", [False, True])
async def test_queue_attempts_and_stream_share_one_deadline(stream: bool) -> None:
    """What the queue and the failed attempt took is not there for the last one, and the trace says who took what."""
    story = Story()
    async with site(2) as one:
        await one.befall(story.behave)
        one.is_everybody = True
        first, second = (engine.url for engine in one.engines)
        config = FleetConfig(
            models=(ModelConfig(name="mock", provider="vllm", endpoint=first, replicas=(second,)),),
            overload=OverloadConfig(max_in_flight=1, refuse_late=False),
            telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
        )
        router = Router(config, polls=False, sinks=[story])
        async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            client.timeout = httpx.Timeout(60)
            answer = await story.tell(router, client, stream=stream)
    if stream:
        error = json.loads(answer.text.rstrip().rpartition("data: ")[2])["error"]
        assert (answer.status_code, error["kvfleet"]["fault"]) == (200, "deadline")
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    trace = story.traces[1]
    route, (failed, last) = trace.route, [span for span in trace.spans if names.ATTEMPT in span.attributes]
    waited = next(span for span in trace.stages if names.QUEUE_WAIT_S in span.attributes)
    waited_s = float(waited.attributes[names.QUEUE_WAIT_S])
    left = [float(span.attributes[names.DEADLINE_LEFT_S]) for span in (failed, last, route)]
    assert route.attributes[names.DEADLINE_S] == TIME_MS / 1000
    assert waited_s > 0
    assert left[0] <= TIME_MS / 1000 - waited_s
    assert left[1] <= left[0] - took_s(failed) + CLOCKS_S
    assert left[2] <= left[1] - took_s(last) + CLOCKS_S
    assert left[2] <= CLOCKS_S
    assert waited_s + took_s(failed) + took_s(last) <= took_s(route) + CLOCKS_S
    assert [span.attributes.get(names.ERROR_TYPE) for span in (failed, last)] == ["server_error", "deadline"]
