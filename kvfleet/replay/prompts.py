"""What a pipeline is told of a traced prompt, of which there are sizes and hashes but no text."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from kvfleet.builtin.facts import PromptFacts
from kvfleet.cache.fingerprints import Mark, PromptFingerprint, PromptFingerprinter
from kvfleet.replay.traces import TracedRequest, spread

__all__ = ["TracedPrompt"]


@attrs.define(repr=False)
class TracedPrompt(PromptFacts):
    """The facts of a prompt that is known by its blocks; each block's end is a mark."""

    blocks: Sequence[int] = attrs.field(default=(), kw_only=True)
    block_tokens: int = attrs.field(default=512, kw_only=True)
    salt: int = attrs.field(default=0, kw_only=True)

    @classmethod
    def of_traced(cls, request: TracedRequest, block_tokens: int, number: int, *, names_session: bool) -> TracedPrompt:
        """The facts of one request; `number` tells apart what it shares with nobody."""
        return cls(
            request.prompt_tokens,
            request.session if names_session else "",
            blocks=request.blocks,
            block_tokens=block_tokens,
            salt=number,
        )

    def _make_fingerprint(self, fingerprinter: PromptFingerprinter) -> PromptFingerprint:
        size, tokens = self.block_tokens, self.token_estimate
        marks: list[Mark] = [(block, (i + 1) * size, False) for i, block in enumerate(self.blocks)]
        if not marks or marks[-1][1] < tokens:
            marks.append((spread(-1 - self.salt), tokens, False))
        first = next((value for value, end, _ in marks if end >= fingerprinter.prefix_tokens), marks[-1][0])
        return PromptFingerprint(
            full_hash=f"{marks[-1][0]:016x}",
            system_hash="0" * 16,
            prefix_hash=f"{first:016x}",
            conversation_hash=f"{first:016x}",
            token_estimate=tokens,
            marks=tuple(marks),
        )
