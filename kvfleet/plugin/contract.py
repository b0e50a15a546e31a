"""The contract between the engine and what it runs: one verb for each of the nine kinds of stage.

What a stage returns *is* its explanation: drops carry reasons, columns carry units, estimates say how they are known.
The engine writes the trace from them, so no component can forget to explain itself.

`filter`, `affinity`, `score` and `select` are synchronous and pure: no I/O, no clock but ``ctx.now_s``, no randomness
but ``ctx.seed``. So a route can be simulated, replayed and tested. The others may wait.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import attrs

from kvfleet.adapters.call import Reply, Usage
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import RouteError
from kvfleet.plugin.context import Affinity, CacheMode, Fact, RouteRequest, RoutingContext
from kvfleet.router.scoring import Column, ModelScore, Ranking, ScoringContext
from kvfleet.trace import names
from kvfleet.trace.spans import AttributeValue, Trace

__all__ = [
    "Admit",
    "Affinity",
    "AffinityStage",
    "Answer",
    "AnswerStage",
    "Attempt",
    "CacheMode",
    "Classifier",
    "Drop",
    "Executor",
    "Fact",
    "Filter",
    "Filtered",
    "Kind",
    "Lease",
    "Marker",
    "Observer",
    "Outcome",
    "Placer",
    "Refusal",
    "Rewrite",
    "RouteRequest",
    "RoutingContext",
    "Scorer",
    "Strategy",
    "Unused",
]

T = TypeVar("T")


class Kind(enum.StrEnum):
    """The kinds of component: nine kinds of stage, and three that stages use."""

    CLASSIFY = "classify"
    ADMIT = "admit"
    FILTER = "filter"
    ANSWER = "answer"
    AFFINITY = "affinity"
    SCORE = "score"
    SELECT = "select"
    EXECUTE = "execute"
    OBSERVE = "observe"
    ADAPTER = "adapter"
    ACTION = "action"
    JUDGE = "judge"

    @property
    def is_stage(self) -> bool:
        """True for what may stand in ``pipeline:``."""
        return self not in (Kind.ADAPTER, Kind.ACTION, Kind.JUDGE)

    @property
    def verb(self) -> str:
        """The method a component of this kind has; empty for an adapter, which has many."""
        return {Kind.ADAPTER: "", Kind.ACTION: "apply", Kind.JUDGE: "grade"}.get(self, self.value)

    @property
    def may_skip(self) -> bool:
        """True if the route goes on, by default, when such a stage fails."""
        return self in (Kind.ANSWER, Kind.AFFINITY, Kind.SCORE, Kind.OBSERVE)


@attrs.frozen
class Drop:
    """One candidate a filter drops, and why.

    Attributes:
        candidate: Who.
        reason: Why, in words.
        rule: By which rule; empty if the filter has none.
        retry_after_s: Seconds after which the same request might not drop it; None if time changes nothing, or nobody
            knows.
    """

    candidate: ModelConfig
    reason: str
    rule: str = ""
    retry_after_s: float | None = None


class Filtered(list[Drop]):
    """The drops of a filter that has more to say: `attributes` are for its span, by name."""

    __slots__ = ("attributes",)

    def __init__(self, drops: Iterable[Drop], attributes: Mapping[str, AttributeValue]) -> None:
        super().__init__(drops)
        self.attributes = attributes


@attrs.frozen(kw_only=True)
class Refusal:
    """An admission refused: why, and after how many seconds to come back (None if unknown).

    `code` is the error's code if it is not the usual ``rate_limit_exceeded``, `status` its HTTP status if not 429.
    """

    reason: str
    retry_after_s: float | None = None
    code: str = ""
    status: int | None = None


@attrs.define
class Answer:
    """What the caller gets: a backend's reply, or a short-circuit answer.

    Attributes:
        reply: The answer in the OpenAI shape, whole or streamed.
        served_by: The replica that answered; None for a short-circuit answer.
        details: What the trace is to say of it, by attribute name; never content. Of a short-circuit answer it stands
            on the stage's span, of an executor's on the route's.
        attempt: The number of the attempt that made it, from 1; 0 for a short-circuit answer.
        goes_on: True of a stream that the executor may have gone on with by further attempts, should it break off: its
            end, and not that of the first attempt, is then the route's.
    """

    reply: Reply
    served_by: ModelConfig | None = None
    details: Mapping[str, AttributeValue] = attrs.field(factory=dict)
    attempt: int = 0
    goes_on: bool = False


@attrs.frozen(kw_only=True)
class Unused:
    """An answer that was made on the way and that the caller did not get: one that did not suffice, or a judge's.

    Attributes:
        model: The replica that made it.
        usage: Its tokens; estimated if it was not read to its end, None if the engine did not say.
        cost_usd: What it cost; None if that is not known.
    """

    model: ModelConfig
    usage: Usage | None = None
    cost_usd: float | None = None


@attrs.frozen(kw_only=True, slots=False)
class Outcome:
    """How a route ended; what observers and leases are told.

    Attributes:
        context: The last context before the answer.
        ranking: The choice; None if it did not come to one.
        served_by: The replica that answered; None for none (or a short-circuit answer).
        usage: Tokens of the answer that was given, if reported.
        unused: Answers that were made on the way and not given.
        error: Why there was no answer, or no whole one.
        cost_usd: What the route cost, answers that were not given included; None if a price is unknown.
        ttfb_s, duration_s: From the start to the first byte, and to the end.
        trace: The finished record.
        traceparent: The route's place in the distributed trace, as W3C has it.
        content: The whole answer as the caller got it, if a component of the pipeline has ``wants_content = True``; for
            a stream its events, one after the other. Empty otherwise, and where any of it was not kept.
    """

    context: RoutingContext
    trace: Trace
    ranking: Ranking | None = None
    served_by: ModelConfig | None = None
    usage: Usage | None = None
    unused: tuple[Unused, ...] = ()
    error: RouteError | None = None
    cost_usd: float | None = None
    ttfb_s: float | None = None
    duration_s: float = 0.0
    traceparent: str = ""
    content: bytes = attrs.field(default=b"", repr=False)

    @property
    def is_success(self) -> bool:
        """True if the caller got a whole answer."""
        return self.error is None

    @property
    def is_continued(self) -> bool:
        """True if another replica went on with the stream: `usage` then speaks of a prompt with what was said in it."""
        return names.CONTINUED in self.trace.route.attributes


@runtime_checkable
class Classifier(Protocol):
    """Finds facts about the request."""

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Facts found; those declared in `gives`, all of them."""


@runtime_checkable
class Lease(Protocol):
    """What an admission reserved, until the route ends.

    A lease may have `attributes`, a mapping that the trace shows on the admission's span.
    """

    def release(self, outcome: Outcome) -> None:
        """Settle: called once, however the route ends. Must not raise or wait."""


@runtime_checkable
class Admit(Protocol):
    """Lets a request in, or refuses it early."""

    async def admit(self, ctx: RoutingContext) -> Lease | Refusal:
        """A lease to be released at the end, or a refusal. In a dry run nothing is reserved."""


@runtime_checkable
class Filter(Protocol):
    """Drops candidates, each with a reason. It can do nothing else."""

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """The drops."""


@runtime_checkable
class AnswerStage(Protocol):
    """May answer without a backend."""

    async def answer(self, ctx: RoutingContext) -> Answer | None:
        """The answer, or None to go on."""


@runtime_checkable
class AffinityStage(Protocol):
    """Expects what each candidate has of the prompt in its KV cache."""

    def affinity(self, ctx: RoutingContext) -> Affinity:
        """One expectation for each candidate."""


@runtime_checkable
class Scorer(Protocol):
    """Gives each candidate a number."""

    def score(self, ctx: RoutingContext) -> Column:
        """One column with a unit; a value, or None for unknown, for each candidate in order.

        A column that was given is not changed any more; the same one may be given again.
        """


@runtime_checkable
class Strategy(Protocol):
    """Ranks the candidates.

    A strategy that looks at certain columns only may name them: ``reads = frozenset({"latency"})``. The others are then
    not computed, unless the pipeline is written out and asks for them. One that looks neither at what caches hold, nor
    at how long prompts would take, may say ``reads_affinity = False``: a replay then does not look who has a prompt.
    """

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Sequence[ModelScore]:
        """The ranking: a permutation of the candidates, or the part of it that may be tried."""


class Rewrite(Protocol):
    """A change to what one backend is sent, and back to what it answers."""

    @property
    def body(self) -> Mapping[str, Any]:
        """The body to send, in the OpenAI shape, instead of the request's own."""

    @property
    def types(self) -> Sequence[str]:
        """What was taken out, for the trace: types, never values."""

    def restore(self, reply: Reply) -> Reply:
        """The answer as the caller shall have it; whatever is kept or cached of it is this one."""


class Attempt(Protocol):
    """Makes one backend call: its live span, its limits, its error mapping, its bookkeeping."""

    async def __call__(
        self,
        candidate: ModelConfig,
        *,
        timeout_s: float | None = None,
        reason: str = "first",
        rewrite: Rewrite | None = None,
    ) -> Answer:
        """Call one replica; for a stream, return once its first event is there.

        Args:
            candidate: One of the ranking's.
            timeout_s: Seconds to the first byte; the model's own limit if None.
            reason: Why this attempt is made, for the trace.
            rewrite: A change to what this backend is sent, such as redaction; None sends the request as it is.

        Raises:
            BackendError: if the attempt failed; nothing has reached the client then.
        """


@runtime_checkable
class Executor(Protocol):
    """Gets the answer from the ranked candidates.

    One that never looks into an answer may say ``reads_answers = False``: then what came over another API than OpenAI's
    chat may be answered in that API's own words.
    """

    async def execute(self, ctx: RoutingContext, ranking: Ranking, attempt: Attempt) -> Answer:
        """The answer of the first attempt that works.

        Raises:
            RouteError: if none did.
        """


@runtime_checkable
class Observer(Protocol):
    """Learns how a route ended. Any stage may also be one."""

    async def observe(self, outcome: Outcome) -> None:
        """Called after the answer has left."""


@runtime_checkable
class Placer(Protocol):
    """A stage that wants to know at once where a request goes, so that the next decision can count on it."""

    def placed(self, ctx: RoutingContext, candidate: ModelConfig) -> None:
        """A call to the candidate begins. On the request's path: quick, without waiting, and it must not raise."""


@runtime_checkable
class Marker(Protocol):
    """An observer that has something to say in the route's own record, which is closed before it observes."""

    def mark(self, outcome: Outcome) -> Mapping[str, AttributeValue]:
        """Attributes for the route's span. Called as the route ends, on its path: quick, and without waiting."""
