"""How requests end that get no whole answer: errors, broken streams, departures, bodies that are refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from kvfleet.adapters.call import Reply
from kvfleet.clock import FrozenClock
from kvfleet.config.models import ModelCapabilities
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.errors import AdmissionError, AttemptsExhaustedError, BackendError, Fault, NoCandidatesError
from kvfleet.gateway.app import Gateway
from kvfleet.gateway.auth import Keys
from kvfleet.plugin.contract import RouteRequest
from kvfleet.runtime import Router
from tests.gateway.asgi import Client, call
from tests.gateway.fleet import (
    CHAT,
    ENDPOINTS,
    TRACE_ID,
    FakeRouter,
    events,
    fleet,
    gateway,
    trace_of,
)


class TestErrors:
    async def test_excluded_models_are_named(self) -> None:
        """An error says which stage excluded whom, and under which trace; no address gets out."""

        async def nobody(request: RouteRequest) -> Reply:
            router = FakeRouter(fleet())
            reason = f"{ENDPOINTS[0]} is not private"
            excluded = {"llama": {"by": "filter.policy", "rule": "pii", "reason": reason}}
            raise NoCandidatesError(
                f"no model may serve this request: {reason}",
                status=403,
                code="policy_excluded_all",
                trace=trace_of(router.models[0]),
                details={"excluded": excluded},
            )

        answer = await call(await gateway(FakeRouter(fleet(), nobody)), "POST", "/v1/chat/completions", CHAT)
        assert answer.status == 403
        assert answer.json == {
            "error": {
                "message": "no model may serve this request: llama#1 is not private",
                "type": "permission_error",
                "param": None,
                "code": "policy_excluded_all",
                "kvfleet": {
                    "request_id": "req-new",
                    "excluded": {"llama": {"by": "filter.policy", "rule": "pii", "reason": "llama#1 is not private"}},
                    "trace": TRACE_ID,
                },
            }
        }
        assert answer.header("x-kvfleet-trace") == TRACE_ID
        assert answer.header("x-should-retry") == "false"

    async def test_a_refusal_says_when_to_come_back(self) -> None:
        """Retry-After is in whole seconds, rounded up; the milliseconds stand beside it."""

        async def full(request: RouteRequest) -> Reply:
            raise AdmissionError("too many requests in flight", retry_after_s=1.2)

        answer = await call(await gateway(FakeRouter(fleet(), full)), "POST", "/v1/chat/completions", CHAT)
        assert answer.status == 429
        assert (answer.header("retry-after"), answer.header("retry-after-ms")) == ("2", "1200")
        assert answer.header("x-should-retry") is None
        assert answer.json["error"]["type"] == "rate_limit_error"

    async def test_an_open_breaker_says_when_it_may_be_tried(self) -> None:
        """A real router behind it: 503 with the rest of the breaker's time, and OpenAI's clients may try again."""
        model = ModelConfig(name="m", provider="mock")
        router = Router(FleetConfig(models=(model,)), polls=False, clock=FrozenClock())
        app = Gateway(router, keys=Keys())
        await app.start()
        for _ in range(3):
            router.services.health.record_failure(router.models[0].endpoint, Fault.CONNECT)
        answer = await call(app, "POST", "/v1/chat/completions", CHAT)
        await app.stop()
        assert (answer.status, answer.json["error"]["code"]) == (503, "no_candidates")
        assert (answer.header("retry-after"), answer.header("x-should-retry")) == ("60", None)

    @pytest.mark.parametrize(
        ("more", "code"),
        [
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "no_capable_model"),
            ({"max_tokens": 5000}, "context_length_exceeded"),
        ],
    )
    async def test_what_no_model_can_do_is_the_callers_mistake(self, more: dict[str, object], code: str) -> None:
        """A real router behind it: 400, which no client tries again, and what is lacking stands in the message."""
        model = ModelConfig(name="m", provider="mock", capabilities=ModelCapabilities(max_context_window=4096))
        app = Gateway(Router(FleetConfig(models=(model,)), polls=False), keys=Keys())
        await app.start()
        answer = await call(app, "POST", "/v1/chat/completions", {**CHAT, **more})
        await app.stop()
        error = answer.json["error"]
        assert (answer.status, error["type"], error["code"]) == (400, "invalid_request_error", code)
        assert answer.header("x-should-retry") == "false"
        assert list(error["kvfleet"]["excluded"]) == ["m"]

    async def test_the_backends_verdict_on_a_request_comes_back_as_it_is(self) -> None:
        """A backend's 400 keeps its message, type, parameter and code, and gains our facts beside them."""

        async def refused(request: RouteRequest) -> Reply:
            said = {"message": "max_tokens is too large", "type": "BadRequestError", "param": "max_tokens", "code": 400}
            details = {"backend_error": {"error": said}, "attempts": [{"model": "llama", "fault": "bad_request"}]}
            raise AttemptsExhaustedError("llama did not answer", status=400, code="invalid_request", details=details)

        answer = await call(await gateway(FakeRouter(fleet(), refused)), "POST", "/v1/chat/completions", CHAT)
        assert answer.status == 400
        assert answer.json["error"] == {
            "message": "max_tokens is too large",
            "type": "BadRequestError",
            "param": "max_tokens",
            "code": "invalid_request",
            "kvfleet": {"request_id": "req-new", "attempts": [{"model": "llama", "fault": "bad_request"}]},
        }

    @pytest.mark.parametrize("status", [429, 502])
    async def test_what_a_backend_says_of_itself_is_not_shown(self, status: int) -> None:
        """Texts about the operator's account, or the backend's inside, stay here."""

        async def refused(request: RouteRequest) -> Reply:
            said = {"error": {"message": "org-secret-canary is over its limit"}}
            raise AttemptsExhaustedError("llama did not answer", status=status, details={"backend_error": said})

        answer = await call(await gateway(FakeRouter(fleet(), refused)), "POST", "/v1/chat/completions", CHAT)
        assert answer.status == status
        assert b"canary" not in answer.body

    async def test_a_defect_of_ours_says_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        """An unexpected exception is a 500 with the identifier; its text reaches neither the client nor the log."""

        async def broken(request: RouteRequest) -> Reply:
            raise KeyError("prompt-canary")

        with caplog.at_level(logging.INFO):
            answer = await call(await gateway(FakeRouter(fleet(), broken)), "POST", "/v1/chat/completions", CHAT)
        assert answer.status == 500
        assert answer.json["error"]["code"] == "internal_error"
        assert "request_id=req-new error=KeyError at=test_outcomes.py:" in caplog.text
        assert "canary" not in caplog.text + answer.body.decode()

    async def test_a_stream_that_dies_ends_in_an_error_event(self) -> None:
        """A client sees what came, then an error, and never a clean end."""

        async def dying(request: RouteRequest) -> Reply:
            death = BackendError(Fault.DISCONNECTED, f"{ENDPOINTS[1]} closed the connection", received=True)
            return Reply(events=events(b'data: {"a":1}\n\n', death))

        client = Client(await gateway(FakeRouter(fleet(), dying)))
        answer = await client.call("POST", "/v1/chat/completions", {**CHAT, "stream": True})
        assert answer.status == 200
        assert answer.is_complete
        assert answer.pieces == [
            b'data: {"a":1}\n\n',
            (
                b'data: {"error":{"message":"the answer broke off: llama#2 closed the connection","type":"server_error",'
                b'"param":null,"code":"stream_interrupted","kvfleet":{"request_id":"req-new","fault":"disconnected"}}}\n\n'
            ),
        ]

    async def test_a_stream_that_just_ends_is_not_whole(self) -> None:
        """A stream without its [DONE] ends in an error event, whatever the adapter thought of it."""

        async def short(request: RouteRequest) -> Reply:
            return Reply(events=events(b'data: {"a":1}\n\n'))

        answer = await call(
            await gateway(FakeRouter(fleet(), short)), "POST", "/v1/chat/completions", {**CHAT, "stream": True}
        )
        assert b'"code":"stream_interrupted"' in answer.pieces[-1]

    async def test_a_stream_that_dies_before_its_first_byte_is_an_http_error(self) -> None:
        """As long as nothing was sent, the status can tell the truth."""

        async def stillborn(request: RouteRequest) -> Reply:
            return Reply(events=events(BackendError(Fault.DISCONNECTED, "gone")))

        answer = await call(
            await gateway(FakeRouter(fleet(), stillborn)), "POST", "/v1/chat/completions", {**CHAT, "stream": True}
        )
        assert (answer.status, answer.json["error"]["code"]) == (502, "stream_interrupted")

    async def test_what_follows_the_end_of_a_stream_changes_nothing(self) -> None:
        """After [DONE] the client has everything; a backend that then fails is the gateway's own affair."""

        async def late(request: RouteRequest) -> Reply:
            return Reply(events=events(b"data: [DONE]\n\n", BackendError(Fault.DISCONNECTED, "late")))

        answer = await call(
            await gateway(FakeRouter(fleet(), late)), "POST", "/v1/chat/completions", {**CHAT, "stream": True}
        )
        assert answer.pieces == [b"data: [DONE]\n\n"]
        assert answer.is_complete


class TestDeparture:
    async def test_leaving_before_the_answer_cancels_the_route(self) -> None:
        """A client that leaves while the backend thinks cancels the call at once."""
        began, cancelled = asyncio.Event(), asyncio.Event()

        async def slow(request: RouteRequest) -> Reply:
            began.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
            raise AssertionError

        app = await gateway(FakeRouter(fleet(), slow))
        client = Client(app)
        task = asyncio.create_task(client.call("POST", "/v1/chat/completions", CHAT))
        await began.wait()
        client.leave.set()
        await asyncio.wait_for(cancelled.wait(), 1)
        assert (await task).status == 0
        assert (app.meters.left, app.meters.in_flight) == (1, 0)

    async def test_leaving_amid_a_stream_closes_the_reply(self) -> None:
        """A client that leaves while tokens come closes the backend's call, which stops the engine."""
        closed = asyncio.Event()

        async def endless(request: RouteRequest) -> Reply:
            async def forever() -> AsyncIterator[bytes]:
                yield b'data: {"a":1}\n\n'
                await asyncio.Event().wait()

            async def close() -> None:
                closed.set()

            return Reply(events=forever(), close=close)

        client = Client(await gateway(FakeRouter(fleet(), endless)))
        task = asyncio.create_task(client.call("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
        await client.until(pieces=1)
        client.leave.set()
        await asyncio.wait_for(closed.wait(), 1)
        assert not (await task).is_complete

    async def test_leaving_after_the_end_is_no_departure(self) -> None:
        """A client that closes right after [DONE] had its answer; the route is not cancelled."""
        closed = asyncio.Event()

        async def whole(request: RouteRequest) -> Reply:
            async def close() -> None:
                closed.set()

            return Reply(events=events(b'data: {"a":1}\n\n', b"data: [DONE]\n\n"), close=close)

        app = await gateway(FakeRouter(fleet(), whole))
        await call(app, "POST", "/v1/chat/completions", {**CHAT, "stream": True})
        assert app.meters.left == 0
        assert not closed.is_set()

    async def test_leaving_amid_the_body_asks_nobody(self) -> None:
        """Half a request reaches no backend."""
        router = FakeRouter(fleet())
        app = await gateway(router)
        client = Client(app)
        client.leave.set()
        answer = await client.call("POST", "/v1/chat/completions", CHAT)
        assert (answer.status, router.requests, app.meters.left) == (0, [], 1)

    async def test_a_stopping_server_ends_a_stream_honestly(self) -> None:
        """A stream cut by the gateway's own end says so, and the backend's call is closed."""
        closed = asyncio.Event()

        async def endless(request: RouteRequest) -> Reply:
            async def forever() -> AsyncIterator[bytes]:
                yield b'data: {"a":1}\n\n'
                await asyncio.Event().wait()

            async def close() -> None:
                closed.set()

            return Reply(events=forever(), close=close)

        client = Client(await gateway(FakeRouter(fleet(), endless)))
        task = asyncio.create_task(client.call("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
        await client.until(pieces=1)
        task.cancel()
        answer = await task
        assert closed.is_set()
        assert answer.is_complete
        assert b'"code":"shutting_down"' in answer.pieces[-1]

    async def test_a_stopping_server_refuses_what_has_not_begun(self) -> None:
        """A request cut before its answer gets a 503 and a time to come back."""
        began = asyncio.Event()

        async def slow(request: RouteRequest) -> Reply:
            began.set()
            await asyncio.Event().wait()
            raise AssertionError

        client = Client(await gateway(FakeRouter(fleet(), slow)))
        task = asyncio.create_task(client.call("POST", "/v1/chat/completions", CHAT))
        await began.wait()
        task.cancel()
        answer = await task
        assert (answer.status, answer.header("retry-after")) == (503, "1")


class TestBodies:
    async def test_a_body_announced_as_too_large_is_not_read(self) -> None:
        """Content-Length decides before a byte is taken; the connection closes, since the rest is not read."""
        client = Client(await gateway(FakeRouter(fleet(max_body_bytes=100))))
        answer = await client.call("POST", "/v1/chat/completions", b"x", headers={"Content-Length": "101"})
        assert (answer.status, answer.json["error"]["code"]) == (413, "body_too_large")
        assert answer.header("connection") == "close"

    async def test_a_body_that_grows_too_large_is_stopped(self) -> None:
        """A body that was not announced is read up to the limit only."""
        client = Client(await gateway(FakeRouter(fleet(max_body_bytes=100))))
        answer = await client.call("POST", "/v1/chat/completions", pieces=[b"x" * 60] * 10)
        assert answer.status == 413
        assert len(client._pieces) == 8

    async def test_a_body_in_pieces_is_put_together(self) -> None:
        """Pieces arrive as one body."""
        router = FakeRouter(fleet())
        pieces = [b'{"messages":[{"role":"us', b'er","content":"Hel', b'lo"}]}']
        await Client(await gateway(router)).call("POST", "/v1/chat/completions", pieces=pieces)
        assert router.requests[0].raw == b"".join(pieces)

    async def test_compressed_bodies_are_refused(self) -> None:
        """A content-encoding is a 415, so that no bomb is unpacked."""
        answer = await call(
            await gateway(FakeRouter(fleet())),
            "POST",
            "/v1/chat/completions",
            CHAT,
            headers={"Content-Encoding": "gzip"},
        )
        assert (answer.status, answer.json["error"]["code"]) == (415, "unsupported_content_encoding")
