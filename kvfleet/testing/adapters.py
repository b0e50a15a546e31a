"""What `check_component` tries on an adapter, without an engine.

Nobody listens at the endpoint it is given: so an adapter that speaks to a network must fail as the contract says, and
one that needs none must answer. What an engine's wire looks like is for tests of the adapter's own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import orjson

from kvfleet.adapters.base import EndpointHealth, EngineLoad, InferenceAdapter
from kvfleet.adapters.call import Call, Limits, Operation, Reply
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError
from kvfleet.testing.trial import Trial

__all__ = ["check_adapter", "make_adapter"]

_NOBODY = "http://127.0.0.1:9"  # the discard port: closed, and who opened it would say nothing
_LIMITS = Limits(connect_s=1.0, first_byte_s=2.0, idle_s=2.0)
_QUESTION = {"model": "sample-model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
_BODIES: Mapping[Operation, Mapping[str, Any]] = {
    Operation.CHAT: _QUESTION,
    Operation.COMPLETION: {"model": "sample-model", "prompt": "Hello", "max_tokens": 4},
    Operation.EMBEDDING: {"model": "sample-model", "input": "Hello"},
    Operation.RERANK: {"model": "sample-model", "query": "Hello", "documents": ["Hello there"]},
}


def make_adapter(cls: type[InferenceAdapter], options: Mapping[str, Any]) -> InferenceAdapter:
    """An adapter for a model whose endpoint nobody serves, made as the router makes it."""
    model = ModelConfig(name="sample-model", endpoint=_NOBODY, timeout_seconds=2.0, idle_timeout_seconds=2.0)
    return cls.from_config(model, **options)


async def check_adapter(trial: Trial) -> list[str]:
    """Every call ends in an OpenAI answer or a BackendError; health never raises; the body stays as it was."""
    if not issubclass(trial.fresh().__class__, InferenceAdapter):
        return ["an adapter extends kvfleet.adapters.base.InferenceAdapter"]
    adapter: InferenceAdapter = trial.fresh()
    breaches: list[str] = []
    try:
        for operation, body in _BODIES.items():
            for stream in (False, True) if "max_tokens" in body else (False,):
                breaches += await _send(adapter, operation, {**body, **({"stream": True} if stream else {})}, stream)
        breaches += await _ask(adapter)
    finally:
        await adapter.aclose()
    return list(dict.fromkeys(breaches))


async def _send(adapter: InferenceAdapter, operation: Operation, body: dict[str, Any], stream: bool) -> list[str]:
    before = copy.deepcopy(body)
    what = f"send() for {operation.value}{', streamed,' if stream else ''}"
    call = Call(operation=operation, body=body, raw=orjson.dumps(body), stream=stream, limits=_LIMITS)
    try:
        reply: Any = await adapter.send(call)
        breaches = await _check_reply(what, operation, reply, stream=stream)
        if isinstance(reply, Reply):
            await reply.close()
            await reply.close()
    except BackendError:
        breaches = []
    except Exception as error:  # noqa: BLE001 - whatever an adapter raises is the breach
        breaches = [f"{what} must end in an answer or a BackendError, not in {type(error).__name__}: {error}"]
    return breaches + ([f"{what} changes the call's body"] if body != before else [])


async def _check_reply(what: str, operation: Operation, reply: Any, *, stream: bool) -> list[str]:
    if not isinstance(reply, Reply):
        return [f"{what} must give a Reply, not {type(reply).__name__}"]
    if stream:
        if reply.events is None:
            return [f"{what} gives no events"]
        raw = b"".join([piece async for piece in reply.events])
        return [] if raw.rstrip().endswith(b"data: [DONE]") else [f"{what} ends without data: [DONE]"]
    try:
        answer = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        return [f"{what} gives a body that is not JSON"]
    key = {Operation.EMBEDDING: "data", Operation.RERANK: "results"}.get(operation, "choices")
    has_key = isinstance(answer, dict) and isinstance(answer.get(key), list) and answer[key]
    return [] if has_key else [f"{what} gives an answer without {key}"]


async def _ask(adapter: InferenceAdapter) -> list[str]:
    breaches = []
    try:
        health: Any = await adapter.health_check()
        if not isinstance(health, EndpointHealth):
            breaches.append(f"health_check() must give an EndpointHealth, not {type(health).__name__}")
        elif health.endpoint != adapter.endpoint:
            breaches.append("health_check() must name the adapter's own endpoint")
    except Exception as error:  # noqa: BLE001 - whatever an adapter raises is the breach
        breaches.append(f"health_check() must never raise; it raises {type(error).__name__}: {error}")
    wanted = {"list_models": tuple, "get_load": EngineLoad, "get_metrics": Mapping, "get_cache_state": Mapping}
    for name, kind in wanted.items():
        try:
            found = await getattr(adapter, name)()
        except BackendError:
            continue
        except Exception as error:  # noqa: BLE001 - whatever an adapter raises is the breach
            breaches.append(f"{name}() may only raise BackendError, not {type(error).__name__}: {error}")
            continue
        if not isinstance(found, kind):
            breaches.append(f"{name}() must give a {kind.__name__}, not {type(found).__name__}")
    return breaches
