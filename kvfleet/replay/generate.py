"""Generated traces: shared system prompts, sessions of agents, and bursts under one system prompt. All are seeded."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import attrs

from kvfleet.config.convert import structure
from kvfleet.config.fields import number
from kvfleet.config.findings import did_you_mean
from kvfleet.config.origin import Origin
from kvfleet.config.yaml import scalar_value
from kvfleet.errors import ConfigError
from kvfleet.replay.traces import RequestTrace, TracedRequest, chained

__all__ = ["GENERATORS", "AgentSessions", "Bursts", "Generator", "SharedPrefix", "generator_from"]

_BLOCK_TOKENS = 64
_SIGMA = 0.6


class Generator(Protocol):
    """Makes a trace."""

    def generate(self, seed: int) -> RequestTrace:
        """The trace; the same for the same seed."""


@attrs.define
class _Text:
    """A text that is only known by which parts it is made of; equal beginnings have equal blocks."""

    block_tokens: int = _BLOCK_TOKENS
    tokens: int = 0
    blocks: list[int] = attrs.field(factory=list)
    _tail: tuple[int, ...] = ()

    def add(self, part: int, tokens: int) -> None:
        """Go on with a part of so many tokens; parts of different numbers are different texts."""
        end = self.tokens + tokens
        full = end // self.block_tokens - len(self.blocks)
        before = self.blocks[-1] if self.blocks else 0
        if full > 0:
            first = chained(0, (*self._tail, part))[-1]
            self.blocks += chained(before, (first, *itertools.repeat(part, full - 1)))
            self._tail = (part,) if end % self.block_tokens else ()
        else:
            self._tail = (*self._tail, part)
        self.tokens = end

    def copy(self) -> _Text:
        """The same text, to go on with in another way."""
        return attrs.evolve(self, blocks=list(self.blocks), tail=self._tail)

    def answered(self, part: int, tokens: int) -> tuple[int, ...]:
        """Go on with an answer; gives the blocks that it fills."""
        full = len(self.blocks)
        self.add(part, tokens)
        return tuple(self.blocks[full:])


def _length(draw: random.Random, mean: float) -> int:
    """A length with that mean, log-normal as those of prompts and answers are."""
    return max(1, round(mean * math.exp(draw.gauss(0.0, _SIGMA) - _SIGMA * _SIGMA / 2)))


def _systems(draw: random.Random, count: int, tokens: float) -> list[_Text]:
    """So many system prompts."""
    found = []
    for part in range(count):
        text = _Text()
        text.add(-1 - part, _length(draw, tokens))
        found.append(text)
    return found


def _zipf(count: int, exponent: float) -> list[float]:
    """Cumulative shares of the first, second, … of so many, by Zipf's law."""
    weights = [1 / (rank**exponent) for rank in range(1, count + 1)]
    return [share / sum(weights) for share in itertools.accumulate(weights)]


@attrs.frozen(kw_only=True)
class SharedPrefix:
    """Questions under a number of system prompts, of which some are asked much more often than others (Zipf's law)."""

    requests: int = number(5000, ge=1, doc="Requests.")
    rate_per_s: float = number(20.0, gt=0, unit="1/s", doc="Requests a second; the gaps are exponential.")
    prompts: int = number(50, ge=1, doc="System prompts.")
    zipf: float = number(1.0, ge=0, doc="Exponent of their popularity; 0 makes all equal.")
    system_tokens: float = number(4000, gt=0, unit="tokens", doc="Mean length of a system prompt.")
    question_tokens: float = number(300, gt=0, unit="tokens", doc="Mean length of a question.")
    output_tokens: float = number(200, gt=0, unit="tokens", doc="Mean length of an answer.")

    def generate(self, seed: int) -> RequestTrace:
        """The trace."""
        return RequestTrace.of("shared_prefix", _BLOCK_TOKENS, self._requests(random.Random(seed)))  # noqa: S311 - a workload

    def _requests(self, draw: random.Random) -> Iterator[TracedRequest]:
        systems, shares = _systems(draw, self.prompts, self.system_tokens), _zipf(self.prompts, self.zipf)
        at_s = 0.0
        for part in range(1, self.requests + 1):
            text = systems[min(bisect.bisect(shares, draw.random()), self.prompts - 1)].copy()
            text.add(part, _length(draw, self.question_tokens))
            yield _request(at_s, text, part, _length(draw, self.output_tokens))
            at_s += draw.expovariate(self.rate_per_s)


@attrs.frozen(kw_only=True)
class Bursts:
    """One system prompt for everybody, and requests that come in bursts on top of a steady trickle."""

    requests: int = number(5000, ge=1, doc="Requests.")
    rate_per_s: float = number(10.0, gt=0, unit="1/s", doc="Requests a second between the bursts.")
    burst: int = number(100, ge=1, doc="Requests of a burst, all within its first second.")
    every_s: float = number(30.0, gt=0, unit="s", doc="Time from one burst to the next.")
    system_tokens: float = number(8000, gt=0, unit="tokens", doc="Length of the system prompt.")
    question_tokens: float = number(300, gt=0, unit="tokens", doc="Mean length of a question.")
    output_tokens: float = number(200, gt=0, unit="tokens", doc="Mean length of an answer.")

    def generate(self, seed: int) -> RequestTrace:
        """The trace."""
        return RequestTrace.of("bursts", _BLOCK_TOKENS, self._requests(random.Random(seed)))  # noqa: S311 - a workload

    def _requests(self, draw: random.Random) -> Iterator[TracedRequest]:
        system = _systems(draw, 1, self.system_tokens)[0]
        for part, at_s in enumerate(itertools.islice(self._times(draw), self.requests), 1):
            text = system.copy()
            text.add(part, _length(draw, self.question_tokens))
            yield _request(at_s, text, part, _length(draw, self.output_tokens))

    def _times(self, draw: random.Random) -> Iterator[float]:
        for number_ in itertools.count():
            start_s = number_ * self.every_s
            times = [start_s + draw.random() for _ in range(self.burst)]
            at_s = start_s + draw.expovariate(self.rate_per_s)
            while at_s < start_s + self.every_s:
                times.append(at_s)
                at_s += draw.expovariate(self.rate_per_s)
            yield from sorted(times)


@attrs.frozen(kw_only=True)
class AgentSessions:
    """Conversations of agents: each turn holds all before it, and comes a while after the answer to the last.

    Most turns bring the result of a tool, soon; some bring a person's next wish, later.
    """

    sessions: int = number(300, ge=1, doc="Conversations.")
    session_rate_per_s: float = number(1.0, gt=0, unit="1/s", doc="Conversations that begin in a second.")
    turns: float = number(10, ge=1, doc="Mean number of turns (geometric).")
    agents: int = number(5, ge=1, doc="Kinds of agents; each has its own system prompt and tools.")
    system_tokens: float = number(6000, gt=0, unit="tokens", doc="Mean length of a system prompt with its tools.")
    task_tokens: float = number(500, gt=0, unit="tokens", doc="Mean length of what a person writes.")
    tool_tokens: float = number(1200, gt=0, unit="tokens", doc="Mean length of a tool's result.")
    output_tokens: float = number(150, gt=0, unit="tokens", doc="Mean length of an answer.")
    tool_share: float = number(0.8, ge=0, le=1, doc="Share of the turns that bring a tool's result.")
    tool_s: float = number(2.0, ge=0, unit="s", doc="Mean time a tool takes.")
    think_s: float = number(30.0, ge=0, unit="s", doc="Mean time a person takes.")

    def generate(self, seed: int) -> RequestTrace:
        """The trace; the times of later turns hold if answers take no time, and are replaced in a closed loop."""
        draw = random.Random(seed)  # noqa: S311 - a workload
        systems = _systems(draw, self.agents, self.system_tokens)
        found: list[TracedRequest] = []
        at_s = 0.0
        for session in range(self.sessions):
            found += self._session(draw, draw.choice(systems).copy(), session, at_s)
            at_s += draw.expovariate(self.session_rate_per_s)
        return RequestTrace.of("agent_sessions", _BLOCK_TOKENS, found)

    def _session(self, draw: random.Random, text: _Text, session: int, at_s: float) -> Iterator[TracedRequest]:
        think_s: float | None = None
        for turn in range(_turns(draw, self.turns)):
            is_tool = turn > 0 and draw.random() < self.tool_share
            if turn:
                think_s = draw.expovariate(1.0) * (self.tool_s if is_tool else self.think_s)
                at_s += think_s
            part = (session << 24) + 2 * turn + 1
            text.add(part, _length(draw, self.tool_tokens if is_tool else self.task_tokens))
            yield _request(
                at_s,
                text,
                part + 1,
                _length(draw, self.output_tokens),
                session=f"session-{session}",
                think_s=think_s,
            )


def _turns(draw: random.Random, mean: float) -> int:
    """A number of turns, at least one: each is the last with the same chance."""
    if mean <= 1:
        return 1
    return 1 + int(math.log(1.0 - draw.random()) / math.log(1.0 - 1.0 / mean))


def _request(
    at_s: float, text: _Text, part: int, output_tokens: int, *, session: str = "", think_s: float | None = None
) -> TracedRequest:
    """The text as a prompt, and its answer, with which the text goes on."""
    prompt_tokens, blocks = text.tokens, tuple(text.blocks)
    return TracedRequest(
        at_s=at_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        blocks=blocks,
        answer_blocks=text.answered(part, output_tokens),
        session=session,
        think_s=think_s,
    )


GENERATORS: Mapping[str, type[Any]] = {
    "shared_prefix": SharedPrefix,
    "agent_sessions": AgentSessions,
    "bursts": Bursts,
}
"""By the name that stands for a trace on the command line."""


def generator_from(text: str) -> Generator:
    """The generator that a text such as ``agent_sessions:sessions=100,turns=5`` describes.

    >>> generator_from("shared_prefix:requests=10,zipf=1.2").requests
    10

    Raises:
        ConfigError: with every finding.
    """
    name, _, rest = text.partition(":")
    origin = Origin(text)
    if name not in GENERATORS:
        remedy = did_you_mean(name, GENERATORS)
        raise ConfigError([origin.finding((), f"no generator is called {name!r}", remedy, code="generator")])
    raw: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError([origin.finding((), f"{pair!r} is no option", "write name=value", code="generator")])
        raw[key.strip()] = scalar_value(value.strip())
    found, findings = structure(GENERATORS[name], raw, origin=origin)
    if findings:
        raise ConfigError(findings)
    made: Generator = found  # type: ignore[assignment]  # without findings there is one
    return made
