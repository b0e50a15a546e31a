"""The least time to a first token that any router could give a request: what is left to win by routing better.

It is the time of the fleet's fastest engine, idle, that holds everything anybody has asked before. No router can be
below it, and where engines are scarce or caches small none can reach it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from kvfleet.replay.traces import RequestTrace, leading
from kvfleet.sim.spec import EngineSpec

__all__ = ["alone_s", "least_ttft_s"]


def least_ttft_s(trace: RequestTrace, engines: Collection[EngineSpec], *, waits: bool) -> list[float]:
    """Seconds to the first token of each request, in the trace's order.

    Args:
        trace: What is asked.
        engines: The fleet's.
        waits: True if turns wait for the answer before them: then nobody knows which of two sessions is first, and all
            that another one ever asks counts as there.
    """
    kinds = set(engines)
    return [
        min(alone_s(spec, one.prompt_tokens, known) for spec in kinds)
        for one, known in zip(trace.requests, _known_tokens(trace, waits=waits), strict=True)
    ]


def alone_s(spec: EngineSpec, prompt_tokens: int, cached_tokens: int) -> float:
    """How long an idle engine takes for a prompt of which it has the first tokens.

    >>> round(alone_s(EngineSpec(token_budget=256, step_s=0.04, prefill_s_per_token=0.001), 300, 100), 3)
    0.24
    """
    seconds, done = 0.0, cached_tokens
    while done < prompt_tokens:
        chunk = min(prompt_tokens - done, spec.token_budget)
        done += chunk
        seconds += spec.step_time_s(chunk, chunk * (done - (chunk + 1) / 2), 0, 0)
    return seconds


def _known_tokens(trace: RequestTrace, *, waits: bool) -> Iterator[int]:
    """Of each prompt: the tokens that anybody could have cached when it comes. An engine computes the last one anew."""
    known = _of_several_sessions(trace) if waits else set()
    for one in trace.requests:
        most = (one.prompt_tokens - 1) // trace.block_tokens
        yield trace.block_tokens * min(leading(one.blocks, known), most)
        known.update(one.blocks, one.answer_blocks)


def _of_several_sessions(trace: RequestTrace) -> set[int]:
    """Blocks that more than one session has.

    Of a prompt's blocks the first ones are those of several already, then come those that another session had first,
    then those that only this one had so far, then new ones.
    """
    owners: dict[int, str | int] = {}
    several: set[int] = set()
    for number, one in enumerate(trace.requests):
        owner, blocks = one.session or number, (*one.blocks, *one.answer_blocks)
        known = leading(blocks, owners)
        start = min(leading(blocks, several), known)
        firsts = [owners[block] for block in blocks[start:known]]
        several.update(blocks[start : start + firsts.index(owner) if owner in firsts else known])
        owners.update(dict.fromkeys(blocks[known:], owner))
    return several
