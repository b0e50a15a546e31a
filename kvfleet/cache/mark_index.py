"""Which replica holds which beginning of a prompt, learned from where requests were answered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import attrs

from kvfleet.cache.fingerprints import Mark

__all__ = ["MarkIndex"]

_MOST_HOLDERS = 16
_ENDS = 4


@attrs.define
class MarkIndex:
    """For each mark (see `kvfleet.cache.fingerprints`) the replicas that answered a prompt beginning so.

    Bounded: beyond `max_entries` marks, or `ttl_s` after it was last seen, a mark is forgotten, the oldest first; of
    one mark's holders the 16 latest are kept. A prompt leaves at most eight marks, so a conversation of any length
    costs the same.

    Args:
        ttl_s: How long a mark is believed, in seconds.
        max_entries: Most marks; each takes about 400 bytes.
    """

    ttl_s: float = 3600.0
    max_entries: int = 50_000
    _holders: OrderedDict[int, dict[str, float]] = attrs.field(init=False, factory=OrderedDict, repr=False)

    def __len__(self) -> int:
        return len(self._holders)

    def record(self, marks: Sequence[Mark], holder: str, now_s: float) -> None:
        """A prompt with these marks was answered by `holder`."""
        chosen = marks if len(marks) <= 2 * _ENDS else (*marks[:_ENDS], *marks[-_ENDS:])
        for value, _, _ in chosen:
            self._add(value, holder, now_s)
        self._trim(now_s)

    def lookup(self, marks: Sequence[Mark], now_s: float) -> dict[str, int]:
        """By holder: about how many tokens of the prompt it holds.

        An answer that follows the deepest mark a holder has counts as held too: that holder wrote it.
        """
        found: dict[str, int] = {}
        oldest_s = now_s - self.ttl_s
        for at in range(len(marks) - 1, -1, -1):
            holders = self._holders.get(marks[at][0])
            if not holders:
                continue
            tokens = -1
            for holder, seen_s in holders.items():
                if holder not in found and seen_s >= oldest_s:
                    if tokens < 0:
                        tokens = _with_answer(marks, at)
                    found[holder] = tokens
        return found

    def state(self) -> Mapping[str, int]:
        """How many marks there are, and how many there may be."""
        return {"entries": len(self._holders), "max_entries": self.max_entries}

    def _add(self, value: int, holder: str, now_s: float) -> None:
        holders = self._holders.get(value)
        if holders is None:
            holders = self._holders[value] = {}
        else:
            self._holders.move_to_end(value)
        holders.pop(holder, None)  # put last, so that the first is the one seen longest ago
        if len(holders) >= _MOST_HOLDERS:
            del holders[next(iter(holders))]
        holders[holder] = now_s

    def _trim(self, now_s: float) -> None:
        """Let go of what is too much or too old; marks stand in the order they were last seen."""
        oldest_s = now_s - self.ttl_s
        while self._holders:
            holders = next(iter(self._holders.values()))
            is_old = not holders or max(holders.values()) < oldest_s
            if not is_old and len(self._holders) <= self.max_entries:
                return
            self._holders.popitem(last=False)


def _with_answer(marks: Sequence[Mark], at: int) -> int:
    """Tokens of the beginning at a mark, with the answer that follows it."""
    while at + 1 < len(marks) and marks[at + 1][2]:
        at += 1
    return marks[at][1]
