"""The HTTP face of a mock engine: OpenAI's endpoints, vLLM's own, and those that command it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import attrs

from kvfleet.adapters.call import Operation
from kvfleet.adapters.mock_wire import plan
from kvfleet.errors import AuthenticationError, BackendError, BadRequestError, Fault
from kvfleet.gateway.auth import Keys
from kvfleet.gateway.exchange import ClientLeftError, Pairs
from kvfleet.gateway.http_exchange import HTTPExchange
from kvfleet.mock.engine import RANK_HEADER, MockEngine
from kvfleet.mock.faults import FaultKind, FaultRule, parse_fault
from kvfleet.mock.inference import infer, read_body
from kvfleet.mock.metrics import CONTENT_TYPE
from kvfleet.mock.misbehaviour import error_of, instead
from kvfleet.sim.tokens import token_ids

__all__ = ["VERSION", "MockApp"]

VERSION = "0.32.0+kvfleet.mock"
"""What ``/version`` says: the vLLM whose words are spoken."""

Handler = Callable[[HTTPExchange], Awaitable[None]]

_INFERENCE: Mapping[str, Operation] = {
    **{operation.path: operation for operation in Operation},
    "/v2/rerank": Operation.RERANK,
    "/rerank": Operation.RERANK,
}


@attrs.define(eq=False)
class MockApp:
    """Answers exchanges for one engine.

    Args:
        engine: The engine.
        refuse: Called to have connections refused for so many seconds.
        keys: What clients must bring one of, for paths under ``/v1``.
    """

    engine: MockEngine
    refuse: Callable[[float], None]
    keys: Keys = Keys()
    _pages: Mapping[tuple[str, str], Handler] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._pages = {
            ("POST", "/v1/chat/completions/render"): self._render_chat,
            ("POST", "/v1/completions/render"): self._render_completion,
            ("POST", "/tokenize"): self._tokenize,
            ("GET", "/v1/models"): self._models,
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("GET", "/version"): self._version,
            ("GET", "/load"): self._load,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
            ("GET", "/mock"): self._state,
            ("GET", "/mock/faults"): self._faults,
            ("POST", "/mock/faults"): self._add_faults,
            ("DELETE", "/mock/faults"): self._clear_faults,
            ("POST", "/mock/speed"): self._set_speed,
        }

    async def handle(self, exchange: HTTPExchange) -> None:
        """Answer one request; raises nothing but its cancellation."""
        exchange.headers = dict(exchange.fields)
        self.engine.in_flight += 1
        try:
            await self._answer(exchange)
        except ClientLeftError:
            pass
        except asyncio.CancelledError:
            if not exchange.has_left:
                raise
        except (AuthenticationError, BadRequestError) as error:
            await _refuse(exchange, error.status, error.message, param=error.param)
        except BackendError as error:
            await _refuse_backend(exchange, error)
        finally:
            self.engine.in_flight -= 1
            exchange.finish()

    async def _answer(self, exchange: HTTPExchange) -> None:
        operation = _INFERENCE.get(exchange.path) if exchange.method == "POST" else None
        page = self._pages.get((exchange.method.replace("HEAD", "GET"), exchange.path))
        if exchange.path.startswith("/v1/"):
            self.keys.caller(exchange.headers.get(b"authorization"))
        is_command = exchange.path.startswith("/mock")
        rule = None if is_command else self.engine.faults.next(exchange.path)
        if rule is not None and await self._misbehaves(exchange, rule):
            return
        if operation is not None:
            await infer(self.engine.chosen(exchange.headers.get(RANK_HEADER)), operation, exchange, rule)
        elif page is not None:
            await page(exchange)
        else:
            await _refuse(exchange, 404, "Not Found")

    async def _misbehaves(self, exchange: HTTPExchange, rule: FaultRule) -> bool:
        """Do what a fault does in place of an answer; False if there is to be one."""
        if rule.kind is FaultKind.REFUSE:
            self.refuse(rule.wait_s)
            return True
        return await instead(exchange, rule)

    # What vLLM has beside inference ----------------------------------------------------------------------------------

    async def _models(self, exchange: HTTPExchange) -> None:
        adapter = self.engine.adapter
        model = {
            "id": adapter.model_id,
            "object": "model",
            "created": adapter.clock.time_ns() // 1_000_000_000,
            "owned_by": "kvfleet",
            "root": adapter.model_id,
            "parent": None,
            "max_model_len": adapter.spec.room_tokens,
        }
        await exchange.json(200, {"object": "list", "data": [model]})

    async def _health(self, exchange: HTTPExchange) -> None:
        await exchange.whole(200, b"", [])

    async def _version(self, exchange: HTTPExchange) -> None:
        await exchange.json(200, {"version": VERSION})

    async def _load(self, exchange: HTTPExchange) -> None:
        await exchange.json(200, {"server_load": self.engine.in_flight - 1})

    async def _metrics(self, exchange: HTTPExchange) -> None:
        await exchange.whole(200, self.engine.page(), [(b"content-type", CONTENT_TYPE)])

    async def _reset_prefix_cache(self, exchange: HTTPExchange) -> None:
        if self.engine.clear_cache():
            await exchange.whole(200, b"", [])
        else:
            await _refuse(exchange, 409, "the cache is in use: requests are running")

    async def _tokenize(self, exchange: HTTPExchange) -> None:
        body = await read_body(exchange)
        operation = Operation.CHAT if "messages" in body else Operation.COMPLETION
        (prompt, *_) = _prompts(operation, body)
        if operation is Operation.CHAT and body.get("add_generation_prompt") is False:
            prompt = prompt.removesuffix(b"<|assistant|>\n")
        tokens = token_ids(prompt)
        room = self.engine.adapter.spec.room_tokens
        answer = {"count": len(tokens), "max_model_len": room, "tokens": tokens, "token_strs": None}
        await exchange.json(200, answer)

    async def _render_chat(self, exchange: HTTPExchange) -> None:
        (prompt,) = _prompts(Operation.CHAT, await read_body(exchange))
        await exchange.json(200, self._rendered(prompt))

    async def _render_completion(self, exchange: HTTPExchange) -> None:
        prompts = _prompts(Operation.COMPLETION, await read_body(exchange))
        await exchange.json(200, [self._rendered(prompt) for prompt in prompts])

    def _rendered(self, prompt: bytes) -> dict[str, Any]:
        return {"model": self.engine.adapter.model_id, "token_ids": token_ids(prompt), "features": None}

    # What commands it ------------------------------------------------------------------------------------------------

    async def _state(self, exchange: HTTPExchange) -> None:
        await exchange.json(200, self.engine.state())

    async def _faults(self, exchange: HTTPExchange) -> None:
        await exchange.json(200, {"faults": self.engine.faults.state()})

    async def _add_faults(self, exchange: HTTPExchange) -> None:
        rule = parse_fault(await read_body(exchange))
        if rule.kind is FaultKind.REFUSE and not rule.skip:
            await self._faults(exchange)
            self.refuse(rule.wait_s)
            return
        self.engine.faults.add(rule)
        await self._faults(exchange)

    async def _clear_faults(self, exchange: HTTPExchange) -> None:
        self.engine.faults.clear()
        await self._faults(exchange)

    async def _set_speed(self, exchange: HTTPExchange) -> None:
        speed = (await read_body(exchange)).get("speed")
        if not isinstance(speed, int | float) or isinstance(speed, bool) or not 0 < speed < math.inf:
            raise BadRequestError("speed must be a number above 0", param="speed")
        self.engine.set_speed(speed)
        await self._state(exchange)


def _prompts(operation: Operation, body: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The prompts of a call, as the engine reads them."""
    return plan(operation, {**body, "cache_salt": None}, "", 1).prompts


async def _refuse(
    exchange: HTTPExchange, status: int, message: str, *, param: str | None = None, headers: Pairs | None = None
) -> None:
    """An error as vLLM's, unless the answer has begun: then it is cut."""
    if not exchange.status:
        error = error_of(status, message, param)
        await exchange.json(status, error, headers)


async def _refuse_backend(exchange: HTTPExchange, error: BackendError) -> None:
    headers: Pairs = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % math.ceil(error.retry_after_s)))
    said = error.body or {}
    message = str(said.get("message") or error.message)
    if error.kind is Fault.CONTEXT_LENGTH:
        message = message.replace("this model's context is", "This model's maximum context length is", 1)
    await _refuse(exchange, error.status or 500, message, param=said.get("param"), headers=headers)
