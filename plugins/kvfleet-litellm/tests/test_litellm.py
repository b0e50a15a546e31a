"""The adapter against LiteLLM's own mock answers, and against a service on loopback."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import struct
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs
import httpx
import orjson
import pytest
from kvfleet_litellm import LiteLLMAdapter, kvfleet_components
from kvfleet_litellm.answers import chat_answer
from kvfleet_litellm.faults import error_of
from kvfleet_litellm.library import litellm
from kvfleet_litellm.requests import chat_arguments, embedding_arguments

from kvfleet.adapters.call import Call, Limits, Operation, Reply, Tally, Usage
from kvfleet.adapters.refusals import refuse
from kvfleet.config.loader import load_config
from kvfleet.errors import BackendError, Fault
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.telemetry.cost_sync import CostSyncManager
from kvfleet.testing.conformance import check_component

USER = {"role": "user", "content": "Hi"}
LIMITS = Limits(connect_s=5, first_byte_s=20, idle_s=20)
USAGE = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 8}}
TOOL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
HEAD = {"id": "chatcmpl-1", "created": 1, "model": "m"}


@pytest.fixture
def anyio_backend() -> str:
    """The only one kvfleet runs on."""
    return "asyncio"


pytestmark = pytest.mark.anyio


def call(operation: Operation = Operation.CHAT, *, stream: bool = False, **body: Any) -> Call:
    """A call; a greeting if nothing else is asked."""
    asked = {"model": "m", **({"messages": [USER]} if operation is Operation.CHAT else {}), **body}
    return Call(operation=operation, body=asked, stream=stream, limits=LIMITS)


def mocked(model: str = "openai/gpt-4o-mini", answer: Any = "Hello there") -> LiteLLMAdapter:
    """An adapter that LiteLLM answers itself."""
    return LiteLLMAdapter(model_id=model, api_key="key-1", params={"mock_response": answer})


async def events(reply: Reply) -> list[Any]:
    """The data of a stream's events; ``[DONE]`` as that text."""
    assert reply.events is not None
    raw = b"".join([piece async for piece in reply.events])
    said = [line.removeprefix(b"data: ") for line in raw.split(b"\n\n") if line]
    return [line.decode() if line == b"[DONE]" else orjson.loads(line) for line in said]


# --- as a component


def test_it_keeps_its_contract() -> None:
    """Options documented, round trips, errors in the one taxonomy, closing twice, the body left as it was."""
    check_component(*kvfleet_components())


def test_kvfleet_finds_it_and_one_line_makes_a_candidate() -> None:
    """Without an endpoint; the credential is never shown."""
    assert discover().get(Kind.ADAPTER, "litellm").cls is LiteLLMAdapter
    data = {"models": [{"name": "c", "provider": "litellm", "model_id": "bedrock/x", "api_key": "env:KEY"}]}
    config = load_config(None, data, environ={"KEY": "SECRET"})
    router = Router(config)
    (adapter,) = router.adapters.values()
    assert isinstance(adapter, LiteLLMAdapter)
    assert (adapter.model_id, adapter.api_key) == ("bedrock/x", "SECRET")
    assert "SECRET" not in repr(adapter)
    assert not router.models[0].is_self_hosted


async def test_a_route_ends_at_the_provider() -> None:
    """Through the real engine, with its trace."""
    options = {"params": {"mock_response": "Yes"}}
    data = {"models": [{"name": "c", "provider": "litellm", "model_id": "openai/x", "options": options}]}
    async with Router(load_config(None, data, environ={})) as router:
        answer, explanation = await router.route(prompt="Hello")
    assert (answer.content, explanation.served_by) == ("Yes", "c")
    assert answer.usage is not None


async def test_the_package_is_kept_quiet() -> None:
    """No callback, no message in a log, no price list or tokenizer fetched, nothing printed."""
    package = await litellm()
    assert not any((package.callbacks, package.success_callback, package.failure_callback, package.input_callback))
    assert package.suppress_debug_info
    assert package.disable_hf_tokenizer_download
    assert not importlib.import_module("logging").getLogger("LiteLLM").isEnabledFor(50)


def test_its_price_list_can_be_taken_over() -> None:
    """Thousands of names, batch and long-context prices among them; what it does not know stays unknown."""
    costs = CostSyncManager()
    assert costs.sync_from_litellm() > 1000
    priced = costs.get_cost("gemini/gemini-2.5-pro")
    assert priced is not None
    assert priced.source.startswith("LiteLLM ")
    assert priced.input_cost_per_1k and priced.output_cost_per_1k and priced.batch_input_cost_per_1k  # noqa: PT018 - all
    assert priced.long_context_from_tokens == 200_000
    assert costs.get_cost("nobody/nothing-1") is None


async def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither by a call that succeeds nor by one that fails; LiteLLM's own errors hold prompts."""
    await mocked().send(call())
    for answer in ("litellm.RateLimitError", "litellm.InternalServerError"):
        with pytest.raises(BackendError):
            await mocked(answer=answer).send(call())
    with pytest.raises(BackendError):
        await LiteLLMAdapter(model_id="nonsense").send(call())
    assert capfd.readouterr() == ("", "")


# --- answers


async def test_a_whole_answer() -> None:
    """OpenAI's shape, and what was counted."""
    reply = await mocked().send(call())
    found = orjson.loads(reply.body)
    assert found["choices"][0]["message"]["content"] == "Hello there"
    assert found["object"] == "chat.completion"
    assert reply.tally.usage == Usage.from_openai(found["usage"])
    assert (reply.tally.finish_reason, reply.tally.is_complete) == ("stop", True)


@pytest.mark.parametrize("is_asked", [True, False])
async def test_a_stream(is_asked: bool) -> None:
    """Pieces, the finish reason once, the usage apart and only if it was asked for; known to kvfleet in any case."""
    options = {"stream_options": {"include_usage": True}} if is_asked else {}
    reply = await mocked().send(call(stream=True, **options))
    found = await events(reply)
    assert found[-1] == "[DONE]"
    choices = [event["choices"][0] for event in found[:-1] if event["choices"]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello there"
    assert [choice["finish_reason"] for choice in choices if choice.get("finish_reason")] == ["stop"]
    assert [bool(event["choices"]) for event in found[:-1]].count(False) == int(is_asked)
    assert reply.tally.usage is not None
    assert reply.tally.is_complete


async def test_embeddings_are_packed_if_that_is_asked() -> None:
    """As OpenAI's own clients ask by default, whatever the provider can."""
    adapter = mocked("openai/text-embedding-3-small", [0.5, -1.0])
    plain = orjson.loads((await adapter.send(call(Operation.EMBEDDING, input="a"))).body)
    reply = await adapter.send(call(Operation.EMBEDDING, input="a", encoding_format="base64"))
    packed = orjson.loads(reply.body)["data"][0]["embedding"]
    assert plain["data"][0]["embedding"] == [0.5, -1.0]
    assert struct.unpack("<2f", base64.b64decode(packed)) == (0.5, -1.0)
    assert reply.tally.usage is not None


@pytest.mark.parametrize("operation", [Operation.COMPLETION, Operation.RERANK])
async def test_other_operations_are_refused(operation: Operation) -> None:
    """And say so."""
    with pytest.raises(BackendError, match=operation.value):
        await mocked().send(call(operation, prompt="a"))


def test_an_answer_with_tool_calls_has_a_content() -> None:
    """Null, as OpenAI has it, where LiteLLM leaves it out."""

    class Answer:
        def model_dump(self, **_: Any) -> dict[str, Any]:
            return {"choices": [{"message": {"tool_calls": [TOOL]}, "finish_reason": "tool_calls"}], "usage": USAGE}

    tally = Tally()
    found = orjson.loads(chat_answer(Answer(), tally))
    assert found["choices"][0]["message"] == {"content": None, "tool_calls": [TOOL]}
    assert (tally.usage, tally.finish_reason) == (Usage(10, 2, 12, 8), "tool_calls")


# --- requests


def test_only_what_is_about_the_answer_is_an_argument() -> None:
    """Fields nobody knows go into the body of the call; kvfleet's own stay behind."""
    body = {"messages": [USER], "model": "m", "stream": True, "top_k": 3, "temperature": 0, "new": [1], "seed": None}
    found = chat_arguments(body, (), may_fetch=False)
    assert found == {"messages": [USER], "top_k": 3, "temperature": 0, "extra_body": {"new": [1]}}
    assert chat_arguments(body, ("new",), may_fetch=False)["new"] == [1]
    assert embedding_arguments({"input": "a", "encoding_format": "base64", "model": "m"}, ()) == {"input": "a"}


@pytest.mark.parametrize(
    "key",
    [
        *(
            "api_base",
            "base_url",
            "api_key",
            "API_KEY",
            "api_version",
            "aws_region_name",
            "aws_bedrock_runtime_endpoint",
        ),
        *("azure_ad_token", "vertex_credentials", "custom_llm_provider", "extra_body", "extra_headers", "headers"),
        *("callbacks", "fallbacks", "litellm_call_id", "mock_response", "organization", "some_url", "x_token"),
    ],
)
async def test_a_client_directs_nothing(key: str) -> None:
    """Neither where the request goes, nor with whose key."""
    with pytest.raises(BackendError) as caught:
        await mocked().send(call(**{key: "http://elsewhere"}))
    assert caught.value.kind is Fault.BAD_REQUEST


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "image_url", "image_url": "https://example.com/a.png"},
        {"type": "file", "file": {"file_id": "gs://bucket/a.pdf"}},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
    ],
)
async def test_nothing_is_fetched_for_a_client(part: Mapping[str, Any]) -> None:
    """Unless the operator allows it; what is inside the request is fine, and so are addresses in a text."""
    body = {"messages": [{"role": "user", "content": [part]}]}
    with pytest.raises(BackendError, match="data: URLs"):
        chat_arguments(body, (), may_fetch=False)
    assert chat_arguments(body, (), may_fetch=True) == body
    inside = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    text = {"type": "text", "text": "http://169.254.169.254/"}
    fine = {"messages": [{"role": "user", "content": [inside, text]}]}
    assert chat_arguments(fine, (), may_fetch=False) == fine


def test_tools_on_servers_are_refused() -> None:
    """A client must not have the gateway call them."""
    with pytest.raises(BackendError, match="tools on servers"):
        chat_arguments({"messages": [], "tools": [{"type": "mcp", "server_url": "http://x"}]}, (), may_fetch=False)


# --- errors


async def test_every_exception_of_litellms_has_its_fault() -> None:
    """By LiteLLM's own classes, raised as LiteLLM raises them."""
    errors = (await litellm()).exceptions
    said: dict[str, Any] = {"message": "m http://10.0.0.1:80/x", "model": "m", "llm_provider": "p"}
    response = httpx.Response(400, request=httpx.Request("POST", "http://x"), headers={"Retry-After": "7"})
    made = {
        Fault.CONTEXT_LENGTH: errors.ContextWindowExceededError(**said),
        Fault.CONTENT_POLICY: errors.ContentPolicyViolationError(**said),
        Fault.UNAUTHORIZED: errors.AuthenticationError(**said),
        Fault.NOT_FOUND: errors.NotFoundError(**said),
        Fault.RATE_LIMITED: errors.RateLimitError(**said, response=response),
        Fault.TIMEOUT: errors.Timeout(**said),
        Fault.CONNECT: errors.APIConnectionError(**said),
        Fault.OVERLOADED: errors.ServiceUnavailableError(**said),
        Fault.BAD_REQUEST: errors.UnsupportedParamsError(**said),
        Fault.SERVER_ERROR: errors.InternalServerError(**said),
        Fault.PROTOCOL: ValueError("what a provider's code says"),
    }
    for fault, error in made.items():
        found = error_of(error, received=False)
        assert found.kind is fault
        assert "10.0.0.1" not in f"{found.message}{found.body}"
        assert (found.body is not None) == fault.is_callers
    assert error_of(made[Fault.RATE_LIMITED], received=True).retry_after_s == 7
    denied = errors.PermissionDeniedError(**said, response=httpx.Response(403, request=response.request))
    assert error_of(denied, received=False).kind is Fault.UNAUTHORIZED
    assert error_of(ImportError("boto3"), received=False).kind is Fault.NOT_FOUND


async def test_a_model_of_no_provider_is_the_operators_mistake() -> None:
    """No caller can mend it, and another model may answer."""
    with pytest.raises(BackendError) as caught:
        await LiteLLMAdapter(model_id="nonsense", api_key="k").send(call())
    assert caught.value.kind is Fault.NOT_FOUND
    assert caught.value.body is None


async def test_a_provider_that_is_away() -> None:
    """Nothing was sent, so the next candidate may be asked; LiteLLM itself calls this a server's error."""
    adapter = LiteLLMAdapter(model_id="openai/m", endpoint="http://127.0.0.1:9/v1", api_key="k")
    with pytest.raises(BackendError) as caught:
        await adapter.send(call())
    assert caught.value.kind is Fault.CONNECT


# --- a service on loopback


@attrs.define
class Service:
    """An OpenAI-compatible service: what it was asked, and what it answers."""

    url: str = ""
    asked: list[tuple[dict[str, Any], dict[str, str]]] = attrs.field(factory=list)
    answer: bytes = b""
    status: int = 200
    waits: threading.Event = attrs.field(factory=threading.Event)


@pytest.fixture
def service() -> Iterator[Service]:
    """It answers every request with the same bytes, and then closes the connection."""
    made = Service()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            made.asked.append((orjson.loads(body), {key.lower(): value for key, value in self.headers.items()}))
            is_stream = made.answer.startswith(b"data:")
            self.send_response(made.status)
            self.send_header("content-type", "text/event-stream" if is_stream else "application/json")
            self.send_header("retry-after", "7")
            self.send_header("x-ratelimit-remaining-requests", "4")
            self.end_headers()
            self.wfile.write(made.answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


@contextlib.asynccontextmanager
async def calling(service: Service, **options: Any) -> AsyncIterator[LiteLLMAdapter]:
    """An adapter for the service."""
    adapter = LiteLLMAdapter(model_id="openai/m", endpoint=service.url, api_key="key-1", **options)
    yield adapter
    await adapter.aclose()


def sse(*deltas: dict[str, Any], usage: Any = USAGE, reason: str | None = "stop") -> bytes:
    """A stream of OpenAI's; without a reason it breaks off."""
    head = {**HEAD, "object": "chat.completion.chunk"}
    said: list[Any] = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    if reason:
        said.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        said.append({**head, "choices": [], "usage": usage})
    return b"".join(b"data: " + orjson.dumps(one) + b"\n\n" for one in said) + (b"data: [DONE]\n\n" if reason else b"")


async def test_a_call_carries_what_the_file_says(service: Service) -> None:
    """Endpoint, key and headers of the fleet file; unknown fields; the provider's rate limits come back."""
    message = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    service.answer = orjson.dumps({**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE})
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    async with calling(service, headers={"x-team": "ml"}, params={"extra_body": {"ours": 1}}) as adapter:
        reply = await adapter.send(call(tools=tools, guided_choice=["a"]))
    ((body, headers),) = service.asked
    assert (body["model"], body["tools"], body["guided_choice"], body["ours"]) == ("m", tools, ["a"], 1)
    assert (headers["authorization"], headers["x-team"]) == ("Bearer key-1", "ml")
    found = orjson.loads(reply.body)["choices"][0]
    assert (found["message"]["tool_calls"], found["finish_reason"]) == ([TOOL], "tool_calls")
    assert reply.tally.usage == Usage(10, 2, 12, 8)
    assert reply.headers["x-ratelimit-remaining-requests"] == "4"


async def test_a_stream_with_tools_and_cached_tokens(service: Service) -> None:
    """Delta by delta."""
    service.answer = sse({"role": "assistant", "content": "Hel"}, {"tool_calls": [{"index": 0, **TOOL}]})
    async with calling(service) as adapter:
        reply = await adapter.send(call(stream=True))
        found = await events(reply)
    deltas = [event["choices"][0]["delta"] for event in found[:-1]]
    assert deltas[0]["content"] == "Hel"
    assert deltas[1]["tool_calls"][0]["function"] == TOOL["function"]
    assert reply.tally.usage is not None
    assert reply.tally.usage.cached_tokens == 8


async def test_a_stream_that_breaks_off_is_no_answer(service: Service) -> None:
    """LiteLLM gives it a clean end; kvfleet does not hand that on."""
    service.answer = sse({"role": "assistant", "content": "Hel"}, reason=None)
    async with calling(service) as adapter:
        reply = await adapter.send(call(stream=True))
        with pytest.raises(BackendError) as caught:
            await events(reply)
    assert (caught.value.kind, caught.value.received) == (Fault.DISCONNECTED, True)


async def test_a_refusal_is_made_once(service: Service) -> None:
    """LiteLLM and the packages under it repeat nothing; how long to wait is kept."""
    service.status, service.answer = 429, b'{"error":{"message":"slow down","type":"rate_limit"}}'
    async with calling(service) as adapter:
        with pytest.raises(BackendError) as caught:
            await adapter.send(call(stream=True))
    assert (caught.value.kind, caught.value.retry_after_s) == (Fault.RATE_LIMITED, 7)
    assert len(service.asked) == 1


async def test_silence_has_its_limit() -> None:
    """A provider that accepts and says nothing."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the caller has gone
        writer.close()
        gone.set()

    gone = asyncio.Event()
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    adapter = LiteLLMAdapter(model_id="openai/m", endpoint=f"http://127.0.0.1:{port}/v1", api_key="k")
    asked = attrs.evolve(call(), limits=Limits(first_byte_s=0.3))
    with pytest.raises(BackendError) as caught:
        await adapter.send(asked)
    await gone.wait()
    server.close()
    assert caught.value.kind is Fault.TIMEOUT


def test_the_taxonomy_is_kvfleets() -> None:
    """What the adapter refuses itself reads as every adapter's refusals do."""
    assert refuse("x", "y").body is not None
