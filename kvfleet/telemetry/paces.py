"""How fast each replica is: what its model's replicas teach together, and how it compares with them.

A replica that was not measured is taken to be like its model's others, and a model without any measurement to be as
much faster or slower than declared as the fleet is. So measured and declared times can be compared, and nobody is
shunned for a careless declaration.
"""

from __future__ import annotations

from collections.abc import Container

import attrs

from kvfleet.telemetry.pace import Pace, Rates, Ratio
from kvfleet.telemetry.reservations import BusyPeriod, ReplicaLoad, Reservation, Work

__all__ = ["MOMENT_S", "Paces", "mixed"]

MOMENT_S = 0.02
"""How long rates are used before what was learned meanwhile is looked at: answers come by the thousand a second."""
_WEIGHT_OF_NEW = 0.2
_LEAST_OWN = 0.5
"""Share of a time in which prompts were computed that is theirs, however slow steps of answers beside them seem.

At a start under more load than engines can do, steps seem five times as slow as they are, because prompts hold them up.
Taken off in full, that leaves nothing for the prompts: they then seem to be free, queues too, and nothing mends it.
"""
_USUAL_ANSWER = 256.0
_WELL_KNOWN = 64
"""Answers of a replica from which on one in a moment is learned from."""
_SAME = 0.05
"""Share by which a replica must differ from what it was taken to be to be taken for another."""
_STEP = 0.1
"""Share by which the fleet's pace must change before all declared times are read anew."""


@attrs.define
class Paces:
    """The learned paces of a fleet's models, and what they make of each replica.

    What is kept of one replica stands in its `ReplicaLoad`: its ratios to the others, and the rates made from them.

    Attributes:
        lessons: Rises whenever rates that were given out before are old.
    """

    lessons: int = 0
    _models: dict[str, Pace] = attrs.field(init=False, factory=dict, repr=False)
    _stretch_seen: float | None = attrs.field(init=False, default=None, repr=False)
    _stretch: float = attrs.field(init=False, default=1.0, repr=False)
    _stretched: int = attrs.field(init=False, default=-1, repr=False)
    _has_streams: bool = attrs.field(init=False, default=False, repr=False)

    def keep(self, names: Container[str]) -> None:
        """Forget all models but these."""
        self._models = {name: pace for name, pace in self._models.items() if name in names}

    def rates(self, known: ReplicaLoad) -> Rates:
        """A replica's own pace, made anew where its model's has changed, or how it compares with it."""
        pace = self._models.get(known.model)
        version = self._stretched if pace is None else pace.version
        if known.version != version:
            known.version, known.shown = version, self._compared(known)
            known.rates = self._shape(known).scaled(*known.shown)
        return known.rates

    def speed(self, known: ReplicaLoad) -> float:
        """How many times as long as its model's replicas on average a replica takes."""
        pace = self._models.get(known.model)
        return 1.0 if pace is None else pace.relative(known.speed)

    def usual_answer(self, known: ReplicaLoad) -> float:
        """Tokens of a usual answer of a replica's model."""
        pace = self._models.get(known.model)
        return pace.answer_tokens if pace is not None and pace.answers else _USUAL_ANSWER

    def answer_of(self, known: ReplicaLoad, work: Work) -> float:
        """Tokens of a usual answer, of those that may be as long as this one."""
        usual = self.usual_answer(known)
        return min(usual, work.answer_tokens) if work.answer_tokens else usual

    # Learning

    def note_idle(self, known: ReplicaLoad, seconds: float) -> None:
        """Note how a time without a queue compares with its declaration."""
        if not known.model:
            return
        self._stretch_seen = mixed(self._stretch_seen, seconds / known.declared_s)
        if abs(self._stretch_seen - self._stretch) > _STEP * self._stretch:
            self._stretch = self._stretch_seen
            self._stretched -= 1
            self.lessons += 1

    def learn_prompts(self, known: ReplicaLoad, busy: BusyPeriod, now_s: float, took_s: float) -> None:
        """A replica has computed some prompts, and nothing else in that time but answers."""
        if not busy.is_clean or not _teaches(known.speed, now_s):
            return
        pace, prompts, rates = self._pace(known), busy.prompts, self.rates(known)
        self._has_streams = True
        under_way_s = rates.under_way_s(busy.decoding) if busy.was_idle else 0.0
        seconds = max(took_s - under_way_s - rates.step_each_s * prompts.beside, _LEAST_OWN * took_s)
        pace.learn_first_bytes(seconds / pace.relative(known.speed), prompts, was_idle=busy.was_idle)
        if pace.is_known:
            pace.compare(known.speed, seconds, pace.expected_first_bytes_s(prompts, was_idle=busy.was_idle))
        self._note_learned(known)

    def learn_whole(
        self, known: ReplicaLoad, one: Reservation, duration_s: float, answer_tokens: int | None, now_s: float
    ) -> None:
        """An answer came in one piece, so long after its call."""
        if not self._has_streams:
            self.note_idle(known, duration_s)
        if not _teaches(known.speed, now_s):
            return
        alone_s = max(duration_s - one.ahead_s, 0.0)
        tokens, pace = (one.work.prompt_tokens, one.work.cached_tokens, float(answer_tokens or 0)), self._pace(known)
        pace.learn_whole(alone_s / pace.relative(known.speed), *tokens)
        if pace.is_known and not pace.streams:
            pace.compare(known.speed, alone_s, pace.expected_whole_s(*tokens))
        self._note_learned(known)

    def learn_answer(self, known: ReplicaLoad, one: Reservation, tokens: int, now_s: float) -> None:
        """An answer of so many tokens has ended."""
        pace = self._pace(known)
        pace.learn_answer(tokens)
        if one.first_s is None or tokens < 2 or not _teaches(known.step, now_s):
            return
        # Prompts that were computed meanwhile held it up; that is not the pace of decoding.
        held_up_s = known.computed_s - one.computed_s
        step_s = max(now_s - one.first_s - held_up_s, 0.0) / (tokens - 1)
        together = (one.others + known.decoding) / 2
        pace.learn_steps(step_s / known.step.value, together)
        known.step.learn(step_s, pace.rates.step_s + pace.rates.step_each_s * together)
        self._note_learned(known)

    def forget(self, known: ReplicaLoad) -> None:
        """Take a replica to be like its model's others again."""
        self._pace(known).forget(known.speed)
        known.speed, known.step = Ratio(), Ratio()
        known.version, known.shown = 0, (1.0, 1.0)

    # How

    def _pace(self, known: ReplicaLoad) -> Pace:
        """What learns from its answers."""
        pace = self._models.get(known.model)
        if pace is None:
            pace = self._models[known.model] = Pace(self._shape(known))
        return pace

    def _shape(self, known: ReplicaLoad) -> Rates:
        """Its model's pace, or what was declared, as far as declarations were right so far."""
        model = self._models.get(known.model)
        if model is not None:
            return model.rates
        return Rates.declared(known.declared_s * self._stretch)

    def _compared(self, known: ReplicaLoad) -> tuple[float, float]:
        """How many times as long as its model's replicas on average it takes to read and to write.

        Who is like the others stays so until he is off by a twentieth: less is noise, and equals take turns.
        """
        speed, step = known.shown
        return _unless_off(speed, self.speed(known)), _unless_off(step, known.step.value)

    def _note_learned(self, known: ReplicaLoad) -> None:
        """Something was learned from one of its answers: what was made from that before is old, if it is another."""
        if known.version != self._pace(known).version or known.shown != self._compared(known):
            known.version = 0
            self.lessons += 1


def mixed(old: float | None, new: float) -> float:
    """The exponentially weighted mean, which the first value starts."""
    return new if old is None else old + _WEIGHT_OF_NEW * (new - old)


def _unless_off(shown: float, value: float) -> float:
    same = _SAME if shown == 1 else _SAME / 4
    return shown if abs(value - shown) <= same * shown else value


def _teaches(ratio: Ratio, now_s: float) -> bool:
    """False for what comes by the thousand a second from a replica that is well known: one in a moment is enough."""
    if ratio.seen > _WELL_KNOWN and 0 <= now_s - ratio.learned_s < MOMENT_S:
        return False
    ratio.learned_s = now_s
    return True
