"""Long work in steps."""

from __future__ import annotations

import asyncio

import pytest

from kvfleet.turns import Steps, at_once, in_turns


def counted(seen: list[int], most: int = 5) -> Steps[int]:
    """Work of some steps, each of which takes longer than a turn may."""
    for step in range(most):
        begun_s = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() - begun_s < 0.003:
            pass
        seen.append(step)
        yield
    return most


async def test_both_ways_give_the_same() -> None:
    """What the work gives at its end, every step having been taken."""
    one: list[int] = []
    other: list[int] = []
    assert at_once(counted(one)) == await in_turns(counted(other)) == 5
    assert one == other == [0, 1, 2, 3, 4]


async def test_others_have_their_turn_between_steps() -> None:
    """Whoever is ready runs before the work has ended."""
    seen: list[int] = []
    asyncio.get_running_loop().call_soon(seen.append, -1)
    await in_turns(counted(seen))
    assert seen.index(-1) == 1


async def test_what_goes_wrong_is_told() -> None:
    """An error of a step is the work's."""

    def broken() -> Steps[None]:
        yield
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        await in_turns(broken())
