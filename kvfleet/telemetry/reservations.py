"""What calls mean for a replica: reservations of its time and memory, and all that is known of it."""

from __future__ import annotations

import attrs

from kvfleet.adapters.base import EngineLoad
from kvfleet.telemetry.pace import Prompts, Rates, Ratio

__all__ = ["DEFAULT_S", "NO_WORK", "BusyPeriod", "ReplicaLoad", "Reservation", "Work"]

DEFAULT_S = 0.5
"""A replica's usual time to an answer, if nobody has declared one."""


@attrs.frozen
class Work:
    """What a request means for the engine that gets it.

    Attributes:
        prompt_tokens: Of the prompt.
        cached_tokens: Those of them that are expected in the replica's KV cache.
        answer_tokens: Most tokens of the answer; 0 if nobody said.
        is_stream: True if its first byte will tell when the prompt was computed.
    """

    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    answer_tokens: float = 0.0
    is_stream: bool = True

    @property
    def uncached_tokens(self) -> float:
        """Tokens to compute before the first one of the answer."""
        return max(self.prompt_tokens - self.cached_tokens, 0.0)


NO_WORK = Work()


@attrs.define(eq=False)
class Reservation:
    """One call to a replica, from its start to its end.

    Attributes:
        replica_id: Where.
        work: What.
        started_s: When it began.
        until_s: When it is over even if nobody says so.
        was_idle: True if no prompt was in front of its own.
        ahead_s: How long the queue in front of it was expected to last.
        held: Tokens of KV cache it was taken to need for itself.
        computed_s: Seconds of prompts the replica had computed when its first byte came.
        first_s: When its first byte came; None before that.
        others: Requests that were decoded together with it, when its first byte came.
        is_over: True once it is released.
    """

    replica_id: str
    work: Work
    started_s: float
    until_s: float
    was_idle: bool = True
    ahead_s: float = 0.0
    held: float = 0.0
    computed_s: float = 0.0
    first_s: float | None = None
    others: int = 0
    is_over: bool = False


@attrs.define(eq=False)
class BusyPeriod:
    """A time in which a replica computes prompts without a pause.

    Prompts that are computed together begin to be answered together, and each seems to have taken as long as all, or no
    time at all. How long all of them took is seen without error.

    Attributes:
        since_s: When it began.
        was_idle: False if it is a part of a longer one.
        decoding: Answers that were being written when it began.
        is_clean: False once something was computed in it whose first byte will not be seen.
        prompts: What was computed so far.
    """

    since_s: float
    was_idle: bool
    decoding: int
    is_clean: bool = True
    prompts: Prompts = attrs.field(factory=Prompts)


@attrs.define
class ReplicaLoad:
    """What is known of one replica.

    Attributes:
        model: The name of its model.
        endpoint: Where it runs.
        declared_s: Its configured time to an answer, used until there is a measurement.
        step_tokens: Most prompt tokens that its engine computes in one step.
        started, failed: Our own requests so far.
        open: Our own requests there.
        prefilling: Those of them whose prompt is not computed yet, in the order in which they came.
        queued_tokens: Prompt tokens they have yet to compute.
        held_tokens: KV cache that our requests will take for themselves: what was not cached, and their answers.
        speed, step: How its times compare with its model's: to read a prompt, and to write a token.
        ttfb_s: Usual time to the first byte of a stream; None before the first one.
        whole_s: Usual time to a whole answer; None before the first one.
        duration_s: Usual time to the last byte.
        tokens_per_second: Usual speed of one answer.
        reported: What its engine last said, while that is fresh; and what we had there then.
        capacity_tokens: Size of its KV cache, once its engine has told.
        computed_s: Seconds of prompts it has computed so far.
        busy: Since when it computes prompts; None if it computes none.
        rates: Its pace, as of the `version` of its model's; 0 if it must be made anew.
        shown: How it compares with its model's in them, reading and writing.
    """

    model: str = ""
    endpoint: str = ""
    declared_s: float = DEFAULT_S
    step_tokens: int = 8192
    started: int = 0
    failed: int = 0
    open: dict[int, Reservation] = attrs.field(factory=dict, repr=False)
    prefilling: dict[int, Reservation] = attrs.field(factory=dict, repr=False)
    queued_tokens: float = 0.0
    held_tokens: float = 0.0
    speed: Ratio = attrs.field(factory=Ratio)
    step: Ratio = attrs.field(factory=Ratio)
    measured_s: float = 0.0
    ttfb_s: float | None = None
    whole_s: float | None = None
    duration_s: float | None = None
    uncached_tokens: float | None = None
    tokens_per_second: float | None = None
    reported: EngineLoad | None = None
    reported_in_flight: int = 0
    reported_queue: int = 0
    capacity_tokens: int | None = None
    free_s: float = 0.0
    behind_s: float = 0.0
    last_first_s: float = 0.0
    computed_s: float = 0.0
    busy: BusyPeriod | None = attrs.field(default=None, repr=False)
    rates: Rates = attrs.field(factory=lambda: Rates.declared(DEFAULT_S), repr=False)
    version: int = 0
    shown: tuple[float, float] = (1.0, 1.0)

    @property
    def in_flight(self) -> int:
        """Our own requests there."""
        return len(self.open)

    @property
    def decoding(self) -> int:
        """Our own requests there whose answer has begun."""
        return len(self.open) - len(self.prefilling)

    @property
    def pending(self) -> int:
        """Requests there, ours and others': the engine's own count, moved on by what we did since."""
        own = len(self.open)
        if self.reported is None:
            return own
        counted = (self.reported.running or 0) + (self.reported.waiting or 0)
        return max(own, counted + own - self.reported_in_flight)

    @property
    def waiting(self) -> int:
        """Requests in the engine's queue: its own count, moved on by what we did since; 0 if it had none."""
        if self.reported is None or not self.reported.waiting:
            return 0
        return max(self.reported.waiting + len(self.open) - self.reported_in_flight, 0)

    @property
    def waiting_of_others(self) -> int:
        """Requests in the engine's queue that are not ours."""
        if self.reported is None or not self.reported.waiting:
            return 0
        return max(self.reported.waiting - self.reported_queue, 0)

    @property
    def kv_usage(self) -> float | None:
        """Share of the KV cache in use, 0..1 or more if our requests will need more than there is; None if unknown."""
        said = None if self.reported is None else self.reported.kv_usage
        if self.capacity_tokens is None:
            return said
        return max(said or 0.0, self.held_tokens / self.capacity_tokens)
