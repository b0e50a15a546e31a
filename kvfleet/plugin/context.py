"""What stages see: the request, the facts that were found in it, and what is known of the candidates."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import attrs

from kvfleet.adapters.call import LARGE_BYTES, Native, Operation
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import ContractError
from kvfleet.router.scoring import Column
from kvfleet.trace.names import FACT_PREFIX
from kvfleet.trace.spans import AttributeValue

__all__ = ["Affinity", "CacheMode", "Fact", "RouteRequest", "RoutingContext"]

T = TypeVar("T")


def _as_attribute(value: Any) -> AttributeValue:
    if isinstance(value, str | bool | int | float):
        return value
    return str(value)


def _no_details(_: Any) -> Mapping[str, AttributeValue]:
    return {}


@attrs.frozen(eq=False)
class Fact(Generic[T]):
    """A typed name for what a classifier finds, as in ``PII: Fact[PIIDetectionResult]``.

    Attributes:
        name: lower_snake_case; the trace shows it as ``kvfleet.fact.<name>``.
        describe: What the trace may show of a value; never the text it was found in.
        details: What else it may show, by name; the trace has it as ``kvfleet.fact.<name>.<detail>``.
        attribute: Its name in the trace.
    """

    name: str
    describe: Callable[[T], AttributeValue] = attrs.field(default=_as_attribute, repr=False)
    details: Callable[[T], Mapping[str, AttributeValue]] = attrs.field(default=_no_details, repr=False)
    attribute: str = attrs.field(init=False, repr=False)

    @attribute.default
    def _make_attribute(self) -> str:
        return FACT_PREFIX + self.name


@attrs.frozen(kw_only=True, slots=False)  # made once for each request: a dictionary is quicker to fill, and to copy
class RouteRequest:
    """One request, as it enters the pipeline.

    Attributes:
        operation: What is asked.
        body: The OpenAI body, parsed; never changed in place.
        raw: The same, as the client sent it; empty if it came from Python, or in the words of another API.
        body_bytes: How long the client's own words are, in bytes, where `raw` is not they.
        model: The model asked for; ``auto`` leaves the choice open.
        models: The only models allowed; None for all.
        allowlist: The same as the caller wrote it, before the name of the model asked for narrowed it; filled in as
            the request is resolved. What calls further models obeys it.
        strategy: The strategy asked for; empty for the pipeline's own.
        is_override: True if that strategy came from the request itself, not from an alias.
        request_id: The caller's, or one of ours.
        key: The name of the gateway's key it came with; empty if it came with none.
        tenant, data_class, region, tags, session: Who asks, and what of; `data_class` is empty if nobody said.
        headers: Headers to pass on to the backend.
        condition_headers: Request headers that policy conditions may read, lower-case.
        traceparent, tracestate: W3C context of the caller, if any.
        timeout_s: The request's own deadline, in seconds from its start; None for none.
        timeout_by: What set it: a header, a field, an option.
        first_byte_s: How long the client waits for a byte, if that is another limit: for the first one from the
            request's start, and for each further one. None if nobody said.
        first_byte_by: What set that.
        seed: Seed for this decision; None draws one.
        native: A chat's own words, if it came over another API than OpenAI's chat; `body` says the same.
    """

    operation: Operation = Operation.CHAT
    body: Mapping[str, Any]
    raw: bytes = b""
    body_bytes: int = 0
    model: str = "auto"
    models: frozenset[str] | None = None
    allowlist: frozenset[str] | None = None
    strategy: str = ""
    is_override: bool = False
    stream: bool = False
    request_id: str = ""
    key: str = ""
    tenant: str = ""
    data_class: str = ""
    region: str = ""
    tags: Mapping[str, str] = attrs.field(factory=dict)
    session: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    condition_headers: Mapping[str, str] = attrs.field(factory=dict)
    traceparent: str = ""
    tracestate: str = ""
    timeout_s: float | None = None
    timeout_by: str = ""
    first_byte_s: float | None = None
    first_byte_by: str = ""
    seed: int | None = None
    native: Native | None = None

    @property
    def is_large(self) -> bool:
        """True if what is done with its whole body is to be done in turns of their own, or in a thread."""
        return (len(self.raw) or self.body_bytes) > LARGE_BYTES

    @property
    def patience_s(self) -> float | None:
        """Seconds from the start in which a first byte must be there; None if nobody said."""
        whole_s, first_s = self.timeout_s, self.first_byte_s
        if whole_s is None or first_s is None:
            return first_s if whole_s is None else whole_s
        return min(whole_s, first_s)

    def changed(self, **changes: Any) -> RouteRequest:
        """The same with other values of some fields; `attrs.evolve` takes ten times as long."""
        made = object.__new__(RouteRequest)
        made.__dict__.update(self.__dict__, **changes)
        return made


class CacheMode(enum.StrEnum):
    """How an expectation of cached tokens is known."""

    EXACT = "exact"  # the engine said so (KV events)
    DEGRADED = "degraded"  # the engine said so, but some of it was lost
    APPROXIMATE = "approximate"  # learned from where we routed
    OBSERVED = "observed"  # learned from what the engine reported back
    NONE = "none"


@attrs.frozen
class Affinity:
    """Expected cached prompt tokens for each candidate, in their order, and how each is known.

    `returns` says what computing the prompt once more is worth to later requests: for a number of its first tokens, how
    often each further replica that holds them will be asked for them. Left out, nobody else will want any of it.

    `reasons` say why a candidate's cache is known no better: one for each, empty for those of which there is nothing to
    say; or none at all.
    """

    tokens: Sequence[float]
    modes: Sequence[CacheMode]
    returns: Mapping[float, float] = attrs.field(factory=dict)
    reasons: Sequence[str] = ()


@attrs.frozen(kw_only=True, slots=False)
class RoutingContext:
    """What the stages see. It never changes; the engine makes the next one.

    Attributes:
        request: The request.
        candidates: The replicas still in the race.
        data_class, tenant, region: The request's, with the configuration's defaults filled in.
        facts: What the classifiers found.
        affinity: By replica id: expected cached tokens; empty before the affinity stages.
        returns: How often a further replica that holds so many of the prompt's first tokens will be asked for them.
        columns: The scorers' columns by name, each aligned with `candidates`.
        now_s: The monotonic clock at the start of the route, in seconds.
        seed: For every random choice of this decision.
        dry_run: True while simulating: no component then moves state of its own.
    """

    request: RouteRequest
    candidates: tuple[ModelConfig, ...]
    data_class: str = "internal"
    tenant: str = ""
    region: str = ""
    facts: Mapping[Fact[Any], Any] = attrs.field(factory=dict)
    affinity: Mapping[str, float] = attrs.field(factory=dict)
    returns: Mapping[float, float] = attrs.field(factory=dict)
    columns: Mapping[str, Column] = attrs.field(factory=dict)
    now_s: float = 0.0
    seed: int = 0
    dry_run: bool = False

    def fact(self, fact: Fact[T]) -> T:
        """What was found.

        Raises:
            ContractError: if no stage gave it; the build checks declared needs, so the component did not declare it.
        """
        try:
            value: T = self.facts[fact]
        except KeyError:
            raise ContractError(
                f"no stage before this one gives the fact {fact.name!r}; declare it in `needs`"
            ) from None
        return value

    def fact_or_none(self, fact: Fact[T]) -> T | None:
        """What was found, or None if no stage looked."""
        return self.facts.get(fact)
