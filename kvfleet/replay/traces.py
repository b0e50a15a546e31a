"""What is replayed: requests with their times, sizes and prefix blocks, and never their texts."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Container, Iterable, Sequence

import attrs
import xxhash

from kvfleet.errors import TraceError

__all__ = ["RequestTrace", "TracedRequest", "chained", "leading", "spread", "with_prefixes"]

_MASK = (1 << 64) - 1
_LONGEST_S = 366 * 86_400
_hash = xxhash.xxh3_64_intdigest
_PACK = struct.Struct("<QQ").pack


@attrs.frozen(kw_only=True)
class TracedRequest:
    """One request of a trace.

    Attributes:
        at_s: When it came, in seconds after the trace's beginning.
        prompt_tokens, output_tokens: How long its prompt and its answer are.
        blocks: A 64-bit hash for each whole block of the prompt; equal hashes stand for equal prompts up to there.
            Empty if the trace does not know them: such a prompt shares nothing.
        answer_blocks: The same for the blocks after these that hold its answer; empty if not known.
        session: The conversation it belongs to; empty for none.
        think_s: Seconds from the end of the session's answer before to this request; None if it does not wait for one.
        tenant, model: Who asked, and for which model.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = attrs.field(default=(), repr=False)
    answer_blocks: tuple[int, ...] = attrs.field(default=(), repr=False)
    session: str = ""
    think_s: float | None = None
    tenant: str = ""
    model: str = "auto"


@attrs.frozen(kw_only=True)
class RequestTrace:
    """Requests in the order of their times.

    Attributes:
        name: For people.
        block_tokens: Tokens of one block.
        requests: The requests.
        passed_over: How many its source has beside these that nobody answered, or that had no prompt.
    """

    name: str
    block_tokens: int
    requests: tuple[TracedRequest, ...] = attrs.field(repr=False)
    passed_over: int = 0

    def __attrs_post_init__(self) -> None:
        """Check that the blocks fit the prompts.

        Raises:
            TraceError: naming the first request whose blocks do not; or if it would take years.
        """
        size = self.block_tokens
        if self.requests and self.duration_s - self.requests[0].at_s > _LONGEST_S:
            days = (self.duration_s - self.requests[0].at_s) / 86_400
            raise TraceError(
                f"the trace {self.name} lasts {days:,.7g} days; give all its times from one beginning and in one unit"
            )
        for number, one in enumerate(self.requests):
            if one.prompt_tokens < 1 or (one.blocks and len(one.blocks) != one.prompt_tokens // size):
                what = f"{len(one.blocks)} blocks of {size} tokens for a prompt of {one.prompt_tokens}"
                raise TraceError(
                    f"request {number} of the trace {self.name} has {what}; give every whole block, or none"
                )

    @classmethod
    def of(cls, name: str, block_tokens: int, requests: Iterable[TracedRequest]) -> RequestTrace:
        """A trace of these requests, in order, its first at 0."""
        found = sorted(requests, key=lambda one: one.at_s)
        start_s = found[0].at_s if found else 0.0
        if start_s:
            found = [attrs.evolve(one, at_s=one.at_s - start_s) for one in found]
        return cls(name=name, block_tokens=block_tokens, requests=tuple(found))

    @property
    def duration_s(self) -> float:
        """From the first request to the last."""
        return self.requests[-1].at_s if self.requests else 0.0

    @property
    def has_sessions(self) -> bool:
        """True if some request waits for the answer to the one before it."""
        return any(one.think_s is not None for one in self.requests)

    @property
    def shared_share(self) -> float:
        """Share of the prompts' tokens that stood in an earlier prompt or answer: what an endless cache would hold."""
        seen: set[int] = set()
        held = total = 0
        for one in self.requests:
            total += one.prompt_tokens
            known = leading(one.blocks, seen)
            held += min(known * self.block_tokens, one.prompt_tokens)
            seen.update(one.blocks, one.answer_blocks)
        return held / total if total else 0.0


def spread(number: int) -> int:
    """A trace's own small number for a block as a 64-bit hash, as indices and hash rings expect one."""
    return _hash(_PACK(number & _MASK, 0))


def leading(blocks: Sequence[int], known: Container[int]) -> int:
    """How many of a prompt's first blocks are among those that are known, which with a block has all before it.

    >>> leading((1, 2, 3), {1, 2, 8})
    2
    """
    return bisect.bisect_left(blocks, True, key=lambda block: block not in known)


def chained(before: int, parts: Sequence[int]) -> tuple[int, ...]:
    """The hashes of blocks, each standing for all that comes before it too.

    >>> chained(0, (1, 2))[0] == chained(0, (1, 3))[0], chained(0, (1, 2))[1] == chained(0, (1, 3))[1]
    (True, False)
    """
    found = []
    for part in parts:
        before = _hash(_PACK(before, part & _MASK))
        found.append(before)
    return tuple(found)


def with_prefixes(requests: Sequence[TracedRequest]) -> Sequence[TracedRequest]:
    """The requests with hashes that stand for all that comes before, as they are if theirs do so.

    Some traces number blocks by what each holds alone. What engines share are whole beginnings.
    """
    before: dict[int, int] = {}
    for one in requests:
        lasts = (0, *one.blocks[:-1]) if one.blocks else ()
        if tuple(map(before.setdefault, one.blocks, lasts)) != lasts:
            return [attrs.evolve(each, blocks=chained(0, each.blocks)) for each in requests]
    return requests
