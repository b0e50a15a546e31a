"""Steps of a simulated engine between which nothing changes but the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from kvfleet.sim.events import Job

__all__ = ["Run"]


@attrs.define(eq=False)
class Run:
    """A run of steps: the first takes `first_s`, each further one `growth_s` more than the one before.

    Attributes:
        start_s: When the first step began.
        first_s: Its length.
        growth_s: What a step is longer than the one before it.
        steps: How many there are.
        filled: Requests whose prefill the only step completes.
        begun, ended: How many steps have begun and are over.
        reading: The request whose prompt is computed in each of several steps; None if they compute answers alone.
        chunk: Tokens of it in each.
    """

    start_s: float
    first_s: float
    growth_s: float
    steps: int
    filled: Sequence[Job]
    begun: int = 0
    ended: int = 0
    reading: Job | None = None
    chunk: int = 0

    def end_s(self, steps: int) -> float:
        """When so many steps are over."""
        return self.start_s + steps * self.first_s + self.growth_s * (steps * (steps - 1) / 2)

    def steps_by(self, now_s: float) -> int:
        """How many steps are over by then."""
        low, high = self.ended, self.steps
        if self.end_s(high) <= now_s:  # as most often: whoever looks at a run looks when it ends
            return high
        high -= 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.end_s(middle) <= now_s:
                low = middle
            else:
                high = middle - 1
        return low
