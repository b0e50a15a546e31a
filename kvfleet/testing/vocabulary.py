"""The vocabulary of `tests:` in a pipeline file: what is asked, what is given, what is expected.

Every field describes itself, as in a fleet file, so a misspelt key is a finding with its line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.adapters.call import Operation
from kvfleet.config.fields import choice, flag, listing, mapping, number, section, text
from kvfleet.config.schema import AUTO_MODEL, DATA_CLASSES
from kvfleet.errors import Fault

__all__ = [
    "OUTCOMES",
    "BackendGiven",
    "Case",
    "CaseRequest",
    "DropExpected",
    "Expected",
    "Given",
    "LoadGiven",
    "Range",
    "RateLimitGiven",
    "Share",
    "Turn",
]

OUTCOMES = ("answered", "cached", "refused", "no_candidates", "failed", "cancelled")
"""How a route may end."""

_FAULTS = tuple(fault.value for fault in Fault if fault not in (Fault.CANCELLED, Fault.DEADLINE, Fault.CIRCUIT_OPEN))
_REPLICA = "by model, or by replica as in `model@endpoint`"


@attrs.frozen(kw_only=True)
class CaseRequest:
    """One request, as a client would send it. Give one of `prompt`, `messages` and `body`."""

    prompt: str = text("", doc="A single user message.", example="Hello")
    messages: tuple[Mapping[str, Any], ...] = listing((), doc="A conversation, as OpenAI has it.")
    body: Mapping[str, Any] = mapping(doc="A whole request body, as OpenAI has it.")
    operation: str = choice("chat", of=tuple(o.value for o in Operation), doc="Which endpoint is called.")
    model: str = text(AUTO_MODEL, doc="The model or alias asked for; `auto` leaves the choice open.")
    models: tuple[str, ...] = listing((), doc="The only models allowed; all if empty.")
    strategy: str = text("", doc="The strategy this request asks for.")
    tenant: str = text("", doc="Who asks.")
    key: str = text("", doc="The name of the gateway's key it comes with.")
    data_class: str = choice("", of=DATA_CLASSES, doc="The request's data class; the policy's default if absent.")
    region: str = text("", doc="The request's source region.")
    session: str = text("", doc="The conversation's key.")
    tags: Mapping[str, str] = mapping(doc="The request's tags.", example={"domain": "coding"})
    headers: Mapping[str, str] = mapping(doc="Request headers, as policy conditions read them.")
    stream: bool = flag(doc="Ask for a stream, and read it to its end.")
    timeout_ms: float | None = number(None, gt=0, unit="ms", doc="The request's own deadline.")


@attrs.frozen(kw_only=True)
class BackendGiven:
    """What one backend does when it is called."""

    reply: str = text("", doc="What it says.")
    fail: str = choice("", of=_FAULTS, doc="The fault it has instead of an answer, by the name traces show.")
    status: int | None = number(None, ge=400, le=599, doc="HTTP status of the fault, if not the usual one.")
    fail_times: int | None = number(None, ge=1, unit="calls", doc="Calls that fail before it works; all if absent.")
    fail_after: int = number(0, ge=0, doc="Pieces of a stream that get through before the fault.")
    latency_ms: float = number(0, ge=0, unit="ms", doc="Time to its answer; beyond the limit in force it is a timeout.")
    cached_tokens: int | None = number(None, ge=0, unit="tokens", doc="Prompt tokens it reports as cached.")
    token_probability: float | None = number(
        None,
        gt=0,
        le=1,
        doc="How sure it is of each token; told where `logprobs` are asked for. It never tells if absent.",
    )
    retry_after_s: float | None = number(None, ge=0, unit="s", doc="Seconds that the fault asks to wait.")
    headers: Mapping[str, str] = mapping(
        doc="Headers of its answer or fault, as of a rate limit.", example={"x-ratelimit-remaining-requests": "0"}
    )


@attrs.frozen(kw_only=True)
class LoadGiven:
    """What one engine says of its load before the request."""

    running: int = number(0, ge=0, unit="requests", doc="Requests in its batch.")
    waiting: int = number(0, ge=0, unit="requests", doc="Requests in its queue.")
    kv_usage: float | None = number(None, ge=0, le=1, doc="Share of its KV cache in use.")


@attrs.frozen(kw_only=True)
class RateLimitGiven:
    """What one backend has said of its rate limits before the request."""

    requests_left: int | None = number(None, ge=0, unit="requests", doc="Requests left.")
    requests_limit: int | None = number(None, gt=0, unit="requests", doc="Out of how many.")
    tokens_left: int | None = number(None, ge=0, unit="tokens", doc="Tokens left.")
    tokens_limit: int | None = number(None, gt=0, unit="tokens", doc="Out of how many.")
    resets_in_s: float = number(60, ge=0, unit="s", doc="When there are all of them again.")
    retry_after_s: float | None = number(
        None, ge=0, unit="s", doc="It has refused (429), and asked to wait so long; 0 if it did not say how long."
    )


@attrs.frozen(kw_only=True)
class Given:
    """The state of the world before the request."""

    backends: Mapping[str, BackendGiven] = mapping(doc=f"What backends do, {_REPLICA}.")
    health: Mapping[str, str] = mapping(doc=f"`up` or `down`, {_REPLICA}.", example={"small": "down"})
    load: Mapping[str, LoadGiven] = mapping(doc=f"What engines say of their load, {_REPLICA}.")
    rate_limits: Mapping[str, RateLimitGiven] = mapping(
        doc=f"What backends have said of their rate limits, {_REPLICA}."
    )
    select: str = text("", doc="Who is ranked first, whatever the strategy says: a model or a replica.")


@attrs.frozen(kw_only=True)
class DropExpected:
    """By whom a candidate is dropped."""

    by: str = text("", doc="The stage, as in `filter.policy`; any if absent.")
    rule: str = text("", doc="The rule; any if absent.")


@attrs.frozen(kw_only=True)
class Range:
    """A range of numbers, ends included."""

    min: float | None = number(None, doc="The least.")
    max: float | None = number(None, doc="The most.")


@attrs.frozen(kw_only=True)
class Share:
    """A share of the repetitions."""

    between: tuple[float, ...] = listing(doc="The least and the greatest share, each 0 to 1.", ge=2, example=[0.4, 0.6])


@attrs.frozen(kw_only=True)
class Expected:
    """What must hold of the decision and its outcome. What is left out is not looked at."""

    selected: str = text("", doc="Who is ranked first: a model or a replica.")
    served_by: str = text("", doc="Who answers: a model or a replica.")
    answered_by: str = text("", doc="The stage that answers instead of a backend, as in `answer.exact_cache`.")
    attempts: tuple[str, ...] | None = listing(None, doc="Every backend call, in order: models or replicas.")  # type: ignore[arg-type]
    shadowed: tuple[str, ...] | None = listing(None, doc="Whom the request is mirrored to: models or replicas.")  # type: ignore[arg-type]
    ranking: tuple[str, ...] = listing((), doc="The beginning of the ranking: models or replicas.")
    dropped: Mapping[str, DropExpected] = mapping(doc=f"Who is dropped, {_REPLICA}.")
    kept: tuple[str, ...] = listing((), doc="Who is not dropped: models (any replica of each) or replicas.")
    outcome: str = choice("", of=OUTCOMES, doc="How the route ends.")
    error: str = text("", doc="The code of its error, as in `no_candidates`.")
    status: int | None = number(None, ge=100, le=599, doc="The HTTP status the caller gets.")
    scores: Mapping[str, Range] = mapping(doc=f"Totals of the ranking, {_REPLICA}.")
    cached: Mapping[str, Range] = mapping(doc=f"Prompt tokens expected in the KV cache, {_REPLICA}.")
    facts: Mapping[str, Any] = mapping(doc="Facts, as the trace shows them.", example={"pii": ["email"]})
    share: Mapping[str, Share] = mapping(doc=f"Who answers how often, over all repetitions, {_REPLICA}.")


@attrs.frozen(kw_only=True)
class Turn:
    """One of several requests of a case, which see what came before."""

    after_s: float = number(0, ge=0, unit="s", doc="Time that passes before it.")
    request: CaseRequest = section(CaseRequest, doc="What is asked.")
    given: Given = section(Given, doc="What changes before it.")
    expect: Expected = section(Expected, doc="What must hold.")


@attrs.frozen(kw_only=True)
class Case:
    """One test of a pipeline: a request, or several in `turns`; what is `given` above them holds from the start."""

    name: str = text(doc="What must hold, in a sentence.")
    seed: int = number(0, ge=0, doc="Seed of every random choice.")
    repeat: int = number(1, ge=1, le=100_000, doc="How often the request is sent; every answer must be as expected.")
    request: CaseRequest = section(CaseRequest, doc="What is asked.")
    given: Given = section(Given, doc="The state of the world before.")
    expect: Expected = section(Expected, doc="What must hold.")
    turns: tuple[Turn, ...] = listing((), doc="Several requests, one after the other; then without `request` above.")
