"""What a pipeline is told of a traced prompt, of which there are sizes and hashes but no text."""

from __future__ import annotations

from kvfleet.builtin.facts import PromptFacts
from kvfleet.cache.blocks import PromptBlocks
from kvfleet.replay.traces import RequestTrace, spread

__all__ = ["traced_prompts"]


def traced_prompts(trace: RequestTrace, *, names_sessions: bool) -> list[PromptFacts]:
    """The facts of each prompt of a trace, in its order.

    They are what a live prompt's are: its whole blocks, a mark at its end, and in a session a mark where the answer
    before it begins.
    """
    found = []
    last: dict[str, int] = {}
    for number, request in enumerate(trace.requests):
        end, marks = spread(-1 - number), []
        before = last.get(request.session) if request.session else None
        if before is not None:
            answered = trace.requests[before]
            known = answered.prompt_tokens + answered.output_tokens
            if known <= request.prompt_tokens:
                marks.append((spread(-1 - before), float(known)))
        if request.session:
            last[request.session] = number
        blocks = PromptBlocks(request.blocks, trace.block_tokens, request.prompt_tokens, marks=marks, ends=(end,))
        found.append(PromptFacts.of_blocks(blocks, request.session if names_sessions else ""))
    return found
