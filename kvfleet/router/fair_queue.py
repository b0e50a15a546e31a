"""A bounded queue that is fair to tenants: the more important first, and among equals whoever has had the least.

Within a priority each tenant has a counter of the work it was given, divided by its weight, and the one with the
smallest goes next. A tenant that had nothing to ask for comes back with the counter of the others, so that it can
neither save up nor catch up (the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024). A tenant's own requests go in the order in which they came, unless the replicas that the first one may go to
have no room: then the next one for others goes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Generic, TypeVar

import attrs

__all__ = ["FairQueue", "Waiting"]

T = TypeVar("T")

_MOST_REMEMBERED = 4096


@attrs.define(eq=False)
class Waiting(Generic[T]):
    """One that waits.

    Attributes:
        item: What the owner of the queue knows it by.
        tenant: Whose it is.
        priority: The greater the more important.
        work: What it will take, in any unit, as long as all have the same.
        pool: Those with the same pool have room at the same time.
        number: In the order of arrival.
    """

    item: T
    tenant: str
    priority: int
    work: float
    pool: Hashable
    number: int = 0


@attrs.define(eq=False)
class _Line(Generic[T]):
    """A tenant's requests of one priority: those of each pool in the order in which they came."""

    weight: float
    had: float = 0.0
    size: int = 0
    pools: dict[Hashable, deque[Waiting[T]]] = attrs.field(factory=dict)

    def add(self, one: Waiting[T]) -> None:
        self.pools.setdefault(one.pool, deque()).append(one)
        self.size += 1

    def remove(self, one: Waiting[T]) -> bool:
        line = self.pools.get(one.pool)
        if line is None or one not in line:
            return False
        line.remove(one)
        self.size -= 1
        if not line:
            del self.pools[one.pool]
        return True

    def first(self, has_room: Callable[[Waiting[T]], bool]) -> Waiting[T] | None:
        """The oldest that has room."""
        heads = sorted((line[0] for line in self.pools.values()), key=lambda one: one.number)
        return next((one for one in heads if has_room(one)), None)

    def last(self) -> Waiting[T]:
        """The youngest."""
        return max((line[-1] for line in self.pools.values()), key=lambda one: one.number)


@attrs.define(eq=False)
class _Level(Generic[T]):
    """All of one priority."""

    lines: dict[str, _Line[T]] = attrs.field(factory=dict)
    had: dict[str, float] = attrs.field(factory=dict)


@attrs.define
class FairQueue(Generic[T]):
    """Holds those that wait, and says who is next.

    Attributes:
        size: How many wait.

    Args:
        most: Most that may wait.
        weights: By tenant: how many times as much as others it is to get; 1 for one that is not named.
    """

    most: int = 256
    weights: Mapping[str, float] = attrs.field(factory=dict)
    _levels: dict[int, _Level[T]] = attrs.field(init=False, factory=dict, repr=False)
    size: int = attrs.field(init=False, default=0)
    _count: int = attrs.field(init=False, default=0)
    _pools: Counter[Hashable] = attrs.field(init=False, factory=Counter, repr=False)

    def __len__(self) -> int:
        return self.size

    def holds(self, pool: Hashable) -> bool:
        """True if one of that pool waits."""
        return pool in self._pools

    def depths(self) -> Mapping[int, int]:
        """How many wait, by priority."""
        return {priority: sum(line.size for line in level.lines.values()) for priority, level in self._levels.items()}

    def ahead(self, tenant: str, priority: int) -> float:
        """About how many would go before one more of a tenant's: by its priority and its tenant's share."""
        found = 0.0
        for other, level in self._levels.items():
            if other > priority:
                found += sum(line.size for line in level.lines.values())
        level = self._levels.get(priority, _Level())
        own = level.lines.get(tenant)
        turns = ((own.size if own else 0) + 1) / self._weight(tenant)
        for name, line in level.lines.items():
            found += line.size if name == tenant else min(line.size, turns * line.weight)
        return found

    def room_for(self, tenant: str, priority: int) -> Waiting[T] | bool:
        """If one more may wait: True, or whom to send away for it; False if not.

        In a full queue the least important go first; among equals the youngest of the tenant that has the most waiting
        for its weight. So a tenant that fills the queue only takes places from itself.
        """
        if self.size < self.most:
            return True
        if not self.size:
            return False
        least = min(self._levels)
        level = self._levels[least]
        if least > priority:
            return False
        longest = max(level.lines, key=lambda name: level.lines[name].size / level.lines[name].weight)
        line = level.lines[longest]
        own = level.lines.get(tenant)
        mine = ((own.size if own else 0) + 1) / self._weight(tenant)
        if least == priority and (longest == tenant or line.size / line.weight <= mine):
            return False
        return line.last()

    def add(self, item: T, tenant: str, priority: int, work: float, pool: Hashable = None) -> Waiting[T]:
        """Let one wait; ask `room_for` before."""
        self._count += 1
        one = Waiting(item, tenant, priority, work, pool, self._count)
        level = self._levels.setdefault(priority, _Level())
        line = level.lines.get(tenant)
        if line is None:
            least = min((other.had for other in level.lines.values()), default=0.0)
            line = level.lines[tenant] = _Line(self._weight(tenant), max(level.had.pop(tenant, 0.0), least))
        line.add(one)
        self.size += 1
        self._pools[pool] += 1
        return one

    def remove(self, one: Waiting[T]) -> bool:
        """One does not wait any more; False if it did not."""
        level = self._levels.get(one.priority)
        line = level.lines.get(one.tenant) if level is not None else None
        if level is None or line is None or not line.remove(one):
            return False
        self.size -= 1
        self._pools[one.pool] -= 1
        if not self._pools[one.pool]:
            del self._pools[one.pool]
        if not line.size:
            self._retire(level, one.tenant, line)
        if not level.lines:
            del self._levels[one.priority]  # nobody waits, so nobody has had less than it asked for
        return True

    def next(self, has_room: Callable[[Waiting[T]], bool] = lambda _: True) -> Waiting[T] | None:
        """Take the next one out for which there is room; its work is booked to its tenant."""
        for priority in sorted(self._levels, reverse=True):
            level = self._levels[priority]
            for tenant in sorted(level.lines, key=lambda name: level.lines[name].had):
                line = level.lines[tenant]
                one = line.first(has_room)
                if one is not None:
                    line.had += one.work / line.weight
                    self.remove(one)
                    return one
        return None

    def correct(self, one: Waiting[T], work: float) -> None:
        """What one took was so much more, or less, than was said.

        What is given back never puts a tenant before one that has had less: those that began to wait meanwhile began
        with the counters as they were, and must not be passed over for that.
        """
        level = self._levels.get(one.priority)
        if level is None:
            return
        line = level.lines.get(one.tenant)
        if line is not None:
            least = min([other.had for other in level.lines.values() if other is not line], default=0.0)
            line.had = max(line.had + work / line.weight, min(least, line.had))
        elif one.tenant in level.had:
            level.had[one.tenant] = max(level.had[one.tenant] + work / self._weight(one.tenant), 0.0)

    def __iter__(self) -> Iterator[Waiting[T]]:
        """All that wait, in no order."""
        for level in self._levels.values():
            for line in level.lines.values():
                for pool in line.pools.values():
                    yield from pool

    def _weight(self, tenant: str) -> float:
        return self.weights.get(tenant, 1.0)

    def _retire(self, level: _Level[T], tenant: str, line: _Line[T]) -> None:
        """A tenant has nobody waiting: what it had is remembered while others have had less."""
        del level.lines[tenant]
        level.had[tenant] = line.had
        if len(level.had) > _MOST_REMEMBERED:
            least = min((other.had for other in level.lines.values()), default=0.0)
            level.had = {name: had for name, had in level.had.items() if had > least}
