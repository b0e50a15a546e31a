"""The routes: who may call them, what they answer, and what no answer says."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.adapters.call import Operation
from kvfleet.gateway.app import Gateway
from kvfleet.gateway.table import Access
from kvfleet.plugin.contract import RouteRequest
from kvfleet.trace.spans import SpanKind
from tests.gateway.asgi import Answer, Client, call
from tests.gateway.fleet import (
    CHAT,
    MESSAGES,
    TRACE_ID,
    Dispatched,
    FakeRouter,
    fleet,
    gateway,
)

INFERENCE = {
    "/v1/chat/completions": (Operation.CHAT, CHAT),
    "/v1/completions": (Operation.COMPLETION, {"prompt": "Once"}),
    "/v1/embeddings": (Operation.EMBEDDING, {"input": ["a", "b"]}),
    "/v1/rerank": (Operation.RERANK, {"query": "a", "documents": ["b"]}),
    "/v2/rerank": (Operation.RERANK, {"query": "a", "documents": ["b"]}),
    "/rerank": (Operation.RERANK, {"query": "a", "documents": ["b"]}),
}


def header_names(answer: Answer) -> set[str]:
    """The names of an answer's headers."""
    return {name for name, _ in answer.headers}


class TestInference:
    @pytest.mark.parametrize("path", INFERENCE)
    async def test_each_path_routes_its_own_operation(self, path: str) -> None:
        """A POST to each path reaches the router as its operation, and the backend's bytes come back."""
        operation, body = INFERENCE[path]
        router = FakeRouter(fleet())
        answer = await call(await gateway(router), "POST", path, body)
        assert (answer.status, answer.body) == (200, b'{"id":"chatcmpl-1","object":"chat.completion"}')
        assert router.requests[0].operation is operation
        assert router.requests[0].body == body

    async def test_a_whole_answer_says_who_gave_it(self) -> None:
        """Headers name model, replica, strategy, trace and times, and nothing of where the replica is."""
        answer = await call(await gateway(FakeRouter(fleet())), "POST", "/v1/chat/completions", CHAT)
        assert dict(answer.headers) == {
            "content-type": "application/json",
            "content-length": "46",
            "x-request-id": "req-new",
            "x-kvfleet-model": "llama",
            "x-kvfleet-replica": "llama#2",
            "x-kvfleet-strategy": "hybrid_score",
            "x-kvfleet-trace": TRACE_ID,
            "server-timing": "route;dur=2.000, backend;dur=30.000",
        }

    async def test_a_stream_is_relayed_piece_by_piece(self) -> None:
        """Each piece leaves as it came, under headers that keep proxies from collecting them."""
        client = Client(await gateway(FakeRouter(fleet())))
        answer = await client.call("POST", "/v1/chat/completions", {**CHAT, "stream": True})
        assert answer.pieces == [b'data: {"a":1}\n\n', b'data: {"b":2}\n\n', b"data: [DONE]\n\n"]
        assert answer.is_complete
        assert answer.header("content-type") == "text/event-stream; charset=utf-8"
        assert answer.header("cache-control") == "no-cache"
        assert answer.header("x-accel-buffering") == "no"
        assert answer.header("x-kvfleet-replica") == "llama#2"

    async def test_the_callers_request_id_comes_back(self) -> None:
        """A harmless identifier is kept, on errors too."""
        app = await gateway(FakeRouter(fleet()))
        good = await call(app, "POST", "/v1/chat/completions", CHAT, headers={"X-Request-ID": "my-trace-001"})
        bad = await call(app, "POST", "/v1/chat/completions", {}, headers={"X-Request-ID": "my-trace-001"})
        assert good.header("x-request-id") == bad.header("x-request-id") == "my-trace-001"
        assert bad.json["error"]["kvfleet"]["request_id"] == "my-trace-001"

    @pytest.mark.parametrize("sent", ["x" * 129, "a b", "a\u00ffb", '"'])
    async def test_a_strange_request_id_is_replaced(self, sent: str) -> None:
        """What is long, or could mean something in a log or a header, gives way to an identifier of ours."""
        app = await gateway(FakeRouter(fleet()))
        answer = await call(app, "POST", "/v1/chat/completions", CHAT, headers={"X-Request-ID": sent})
        assert answer.header("x-request-id") == "req-new"

    async def test_a_short_circuit_answer_names_no_replica(self) -> None:
        """An answer that no backend gave has no model header."""

        class Cached(FakeRouter):
            async def dispatch(self, request: RouteRequest, *, kind: SpanKind) -> Dispatched:
                dispatched = await super().dispatch(request, kind=kind)
                dispatched.answer.served_by = None
                del dispatched.trace.spans[1:]
                return dispatched

        answer = await call(await gateway(Cached(fleet())), "POST", "/v1/chat/completions", CHAT)
        assert answer.status == 200
        assert not {"x-kvfleet-model", "x-kvfleet-replica"} & header_names(answer)


class TestTable:
    async def test_every_route_has_an_auth_policy(self) -> None:
        """Without the key, every route but the probes and the empty page refuses; there is no third kind."""
        app = await gateway(FakeRouter(fleet()), key="s3cret")
        for route in app.routes:
            answer = await call(app, route.method, route.path, CHAT)
            expected = 200 if route.path in ("/livez", "/readyz", "/dashboard") else 401
            assert (route.access is Access.OPEN) == (expected == 200)
            assert answer.status == expected, route.path

    @pytest.mark.parametrize(
        "path",
        ["/", "/v1", "//v1/chat/completions", "/v1/../v1/models", "/v1/chat/completions/", "/V1/models", "/livez/"],
    )
    async def test_other_spellings_of_a_path_need_the_key_too(self, path: str) -> None:
        """What is not in the table is 401 without the key and 404 with it."""
        app = await gateway(FakeRouter(fleet()), key="s3cret")
        assert (await call(app, "POST", path, CHAT)).status == 401
        assert (await call(app, "POST", path, CHAT, headers={"Authorization": "Bearer s3cret"})).status == 404

    async def test_a_wrong_method_names_the_right_one(self) -> None:
        """405 as an OpenAI error, with Allow."""
        answer = await call(await gateway(FakeRouter(fleet())), "GET", "/v1/chat/completions")
        assert (answer.status, answer.header("allow")) == (405, "POST")
        assert answer.json["error"]["message"] == "/v1/chat/completions takes POST"

    async def test_an_unknown_path_is_told_apart_by_its_usual_slip(self) -> None:
        """A base URL without /v1 gets a hint."""
        answer = await call(await gateway(FakeRouter(fleet())), "POST", "/chat/completions", CHAT)
        assert answer.json["error"]["message"] == "there is no /chat/completions; did you mean /v1/chat/completions?"

    async def test_head_is_answered_like_get(self) -> None:
        """Load balancers that ask with HEAD are served."""
        assert (await call(await gateway(FakeRouter(fleet())), "HEAD", "/livez")).status == 200


class TestModels:
    async def test_the_list_has_auto_aliases_and_models(self) -> None:
        """Everything one may ask for, and what each can do, but not where it is."""
        answer = await call(await gateway(FakeRouter(fleet())), "GET", "/v1/models")
        found = answer.json
        assert found["object"] == "list"
        assert [model["id"] for model in found["data"]] == ["auto", "llama"]
        llama = found["data"][1]
        assert {key: llama[key] for key in ("object", "owned_by")} == {"object": "model", "owned_by": "kvfleet"}
        assert llama["kvfleet"]["replicas"] == 2
        assert b"internal" not in answer.body

    async def test_one_model(self) -> None:
        """A model by its name, also one with slashes; an unknown one is 404."""
        app = await gateway(FakeRouter(fleet()))
        assert (await call(app, "GET", "/v1/models/llama")).json["id"] == "llama"
        unknown = await call(app, "GET", "/v1/models/meta/none")
        assert (unknown.status, unknown.json["error"]["code"]) == (404, "model_not_found")


class TestExplain:
    @pytest.mark.parametrize(
        ("body", "operation"),
        [
            ({"messages": MESSAGES}, "chat"),
            ({"prompt": "a"}, "completion"),
            ({"input": "a"}, "embedding"),
            ({"query": "a", "documents": ["b"]}, "rerank"),
        ],
    )
    async def test_a_dry_run_decides_like_the_operation_its_fields_belong_to(self, body: Any, operation: str) -> None:
        """The same headers and bodies, no backend; replicas by their opaque names."""
        router = FakeRouter(fleet())
        answer = await call(
            await gateway(router), "POST", "/v1/route/explain", body, headers={"X-KVFleet-Strategy": "cost_first"}
        )
        assert answer.json == {"selected_model": "llama", "replica": "llama#2", "operation": operation}
        assert router.requests[0].strategy == "cost_first"


class TestHealth:
    async def test_a_sound_fleet_is_ok(self) -> None:
        """200, and every replica by its opaque name."""
        answer = await call(await gateway(FakeRouter(fleet())), "GET", "/health")
        assert answer.status == 200
        assert answer.json["status"] == "ok"
        assert set(answer.json["endpoints"]) == {"llama#1", "llama#2"}

    async def test_a_lost_replica_degrades_but_does_not_take_the_gateway_out(self) -> None:
        """200 while anybody can answer, so that load balancers keep the gateway; no address in the reasons."""
        app = await gateway(FakeRouter(fleet(), healthy=(False, True)))
        answer = await call(app, "GET", "/health")
        assert (answer.status, answer.json["status"]) == (200, "degraded")
        assert answer.json["models"] == {"llama": {"replicas": 2, "usable": 1}}
        assert answer.json["endpoints"]["llama#1"]["reason"] == "no answer from llama#1"
        assert (await call(app, "GET", "/readyz")).status == 200

    async def test_a_lost_fleet_is_unavailable(self) -> None:
        """503 from /health and /readyz, 200 from /livez: restarting would not help."""
        app = await gateway(FakeRouter(fleet(), healthy=(False, False)))
        statuses = [(await call(app, "GET", path)).status for path in ("/health", "/readyz", "/livez")]
        assert statuses == [503, 503, 200]

    async def test_a_stopping_gateway_is_not_ready_but_answers(self) -> None:
        """While it drains, readiness is 503 and requests are served, each closing its connection."""
        app = await gateway(FakeRouter(fleet()))
        app.drain()
        ready = await call(app, "GET", "/readyz")
        assert (ready.status, ready.json) == (503, {"status": "stopping"})
        answer = await call(app, "POST", "/v1/chat/completions", CHAT)
        assert (answer.status, answer.header("connection")) == (200, "close")


class TestMetrics:
    async def test_the_gateway_counts_its_answers(self) -> None:
        """Answers by path template and status stand beside the routes' metrics; unknown paths share one label."""
        app = await gateway(FakeRouter(fleet()))
        await call(app, "POST", "/v1/chat/completions", CHAT)
        await call(app, "GET", "/v1/models/llama")
        await call(app, "GET", "/wp-login.php")
        text = (await call(app, "GET", "/metrics")).body.decode()
        assert 'kvfleet_gateway_responses_total{route="/v1/chat/completions",status="200"} 1.0' in text
        assert 'kvfleet_gateway_responses_total{route="/v1/models/{id}",status="200"} 1.0' in text
        assert 'kvfleet_gateway_responses_total{route="other",status="404"} 1.0' in text
        assert "kvfleet_gateway_in_flight_requests 1.0" in text
        assert "kvfleet_route_requests_total" in text


class TestLife:
    async def test_the_server_opens_and_closes_the_router(self) -> None:
        """ASGI's lifespan protocol opens the router before the first request and closes it after the last."""
        router = FakeRouter(fleet())
        app = Gateway(router)
        said = []
        inbox = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

        async def receive() -> dict[str, str]:
            return inbox.pop(0)

        async def send(message: dict[str, str]) -> None:
            said.append((message["type"], router.opened, router.closed))

        await app({"type": "lifespan"}, receive, send)
        assert said == [("lifespan.startup.complete", 1, 0), ("lifespan.shutdown.complete", 1, 1)]
