"""The pool of KV blocks: pinned, released, taken; against a list that does the same slowly."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.sim.blocks import BlockPool


def hold(pool: BlockPool, blocks: list[int]) -> list[int]:
    """Hold a prefix, computing what is not there; gives what was forgotten for it."""
    hits = pool.match(blocks)
    pool.pin(blocks[:hits])
    forgotten = pool.take(len(blocks) - hits)
    pool.share(blocks[hits:])
    return forgotten


class TestBlockPool:
    def test_the_end_of_the_least_recently_used_prefix_goes_first(self) -> None:
        """A pool of four forgets the older of two prompts, from its end."""
        pool = BlockPool(4)
        for blocks in ([1, 2], [3, 4]):
            hold(pool, blocks)
            pool.release(blocks, private=0)
        assert hold(pool, [5]) == [2]
        assert pool.match([1, 2]) == 1

    def test_a_hit_makes_a_prefix_recent(self) -> None:
        """What was pinned again is forgotten after what was not."""
        pool = BlockPool(4)
        for blocks in ([1, 2], [3, 4], [1, 2]):
            hold(pool, blocks)
            pool.release(blocks, private=0)
        assert hold(pool, [5, 6]) == [4, 3]

    def test_a_pinned_block_is_never_taken(self) -> None:
        """What a request holds is not available, and not forgotten however much is taken."""
        pool = BlockPool(4)
        hold(pool, [1, 2])
        assert pool.available == 2
        assert pool.take(2) == []
        assert (pool.match([1, 2]), pool.available) == (2, 0)

    def test_a_shared_block_is_released_with_its_last_holder(self) -> None:
        """Two requests with the same prefix hold one block, and it stays held until both have left."""
        pool = BlockPool(4)
        hold(pool, [1])
        hold(pool, [1])
        pool.release([1], private=0)
        assert pool.held == 1
        pool.release([1], private=0)
        assert (pool.held, pool.match([1])) == (0, 1)

    def test_a_block_computed_twice_is_kept_once(self) -> None:
        """A full block whose hash is there already is the one that is there; the second copy is free again."""
        pool = BlockPool(4)
        hold(pool, [1])
        pool.take(1)
        assert pool.share([1]) == 1
        assert pool.held == 1

    def test_a_released_private_block_is_taken_first(self) -> None:
        """What nobody can share is empty at once, and taken before anything is forgotten."""
        pool = BlockPool(2)
        hold(pool, [1])
        pool.release([1], private=0)
        pool.take(1)
        pool.release([], private=1)
        assert (pool.take(1), pool.take(1)) == ([], [1])

    def test_clearing_forgets_what_nobody_holds(self) -> None:
        """A cleared pool knows nothing."""
        pool = BlockPool(2)
        hold(pool, [1, 2])
        pool.release([1, 2], private=0)
        pool.clear()
        assert (pool.match([1]), pool.cached, pool.available) == (0, 0, 2)

    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 2), st.booleans()), max_size=60))
    def test_blocks_are_conserved(self, steps: list[tuple[int, int, int, bool]]) -> None:
        """Whatever is held and released: what was forgotten is gone, what is held is there, and none is lost."""
        pool = BlockPool(10)
        held: list[tuple[list[int], int]] = []
        known: set[int] = set()
        for family, length, private, is_release in steps:
            if is_release and held:
                pool.release(*held.pop(0))
            else:
                blocks = list(range(family * 100, family * 100 + length))
                if length - pool.match(blocks) + pool.unpinned(blocks[: pool.match(blocks)]) + private > pool.available:
                    continue
                forgotten = hold(pool, blocks) + pool.take(private)
                known = (known | set(blocks)) - set(forgotten)
                held.append((blocks, private))
            pinned = {block for blocks, _ in held for block in blocks}
            assert pinned <= known == {block for block in range(400) if pool.match([block])}
            assert pool.held == len(pinned) + sum(private for _, private in held)
            assert pool.held + pool.available == pool.capacity
            assert pool.held + pool.cached <= pool.capacity


@attrs.define
class PlainPool:
    """The same, block by block: how many hold each, and the released ones in a list, oldest first."""

    capacity: int
    pins: dict[int, int] = attrs.field(factory=dict)
    released: list[int] = attrs.field(factory=list)
    private: int = 0

    def match(self, blocks: Sequence[int]) -> int:
        there = [block in self.pins or block in self.released for block in blocks]
        return [*there, False].index(False)

    def pin(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.pins[block] = self.pins.get(block, 0) + 1
        self.released = [block for block in self.released if block not in self.pins]

    def take(self, count: int) -> list[int]:
        empty = self.capacity - self.held - len(self.released)
        self.private += count
        gone, self.released = self.released[: max(0, count - empty)], self.released[max(0, count - empty) :]
        return gone

    def share(self, blocks: Sequence[int]) -> int:
        known = self.match(blocks)
        self.private -= len(blocks)
        self.pin(blocks)
        return known

    def release(self, blocks: Sequence[int], private: int) -> None:
        self.private -= private
        for block in reversed(blocks):
            self.pins[block] -= 1
            if not self.pins[block]:
                del self.pins[block]
                self.released.append(block)

    @property
    def held(self) -> int:
        return len(self.pins) + self.private


def chain(branches: Sequence[int]) -> list[int]:
    """The chained hashes of a prompt of such parts: as one number in base 4, with a digit for each part."""
    found: list[int] = []
    for part in branches:
        found.append((found[-1] if found else 1) * 4 + part)
    return found


def moves(draw: random.Random, count: int) -> Iterator[tuple[str, Any, int]]:
    """What happens to a pool: somebody asks, somebody's prompt is computed further, somebody leaves."""
    for _ in range(count):
        what = draw.choice(("ask", "grow", "grow", "leave"))
        prompt = chain([draw.choice((0, 0, 0, 1)) for _ in range(draw.randint(1, 9))])
        yield what, prompt if what == "ask" else draw.randrange(6), draw.randint(1, 9 if what == "ask" else 4)


@settings(deadline=None)
@given(st.integers(4, 24), st.integers(0, 1 << 32))
def test_runs_of_blocks_are_the_blocks_one_by_one(capacity: int, seed: int) -> None:
    """Prompts that branch anywhere, are computed by parts, and leave in any order: nothing tells the two apart."""
    pool, plain = BlockPool(capacity), PlainPool(capacity)
    asked: list[tuple[list[int], int, int]] = []  # the prompt, how much of it is shared, and private blocks
    for what, which, size in moves(random.Random(seed), 150):
        if what == "ask":
            hits = pool.match(which, size)
            assert hits == plain.match(which[:size])
            assert pool.unpinned(which, hits) == sum(block not in plain.pins for block in which[:hits])
            missing = len(which) - hits
            if missing + pool.unpinned(which, hits) > pool.available:
                continue
            pool.pin(which, hits)
            plain.pin(which[:hits])
            assert pool.take(missing) == plain.take(missing)
            asked.append((which, hits, missing))
        elif asked:
            blocks, shared, private = asked.pop(which % len(asked))
            if what == "leave":
                pool.release(blocks[:shared], private)
                plain.release(blocks[:shared], private)
            else:
                new = blocks[shared : shared + size]
                assert pool.share(new, blocks[shared - 1] if shared else None) == plain.share(new)
                asked.append((blocks, shared + len(new), private - len(new)))
        assert (pool.held, pool.cached) == (plain.held, len(plain.released))
