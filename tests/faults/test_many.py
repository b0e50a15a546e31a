"""No stream that breaks is called complete; CI runs some hundreds, `benchmarks/trials.py` as many as wanted."""

from __future__ import annotations

import pytest

from tests.faults.many import broken_streams
from tests.faults.site import site
from tests.faults.test_wall import Clock, gateway_before
from tests.faults.tongues import CHAT, MESSAGES, RESPONSES, Tongue

STREAMS = 400


@pytest.mark.parametrize(
    ("tongue", "spoken"),
    [(CHAT, ()), (MESSAGES, (MESSAGES,)), (MESSAGES, ()), (RESPONSES, (RESPONSES,)), (RESPONSES, ())],
    ids=lambda one: one.name if isinstance(one, Tongue) else "spoken" if one else "translated",
)
async def test_no_broken_stream_is_called_complete(tongue: Tongue, spoken: tuple[Tongue, ...]) -> None:
    """Wherever it breaks, and however, in each API: an error event, or an honest refusal before the first one."""
    count = STREAMS if tongue is CHAT else STREAMS // 4
    names = [one.name for one in spoken]
    async with (
        site(1, *spoken) as one,
        gateway_before(one, Clock(), unit_s=10.0, failures=10**9, tongues=names) as url,
    ):
        found = await broken_streams(url, one, count=count, tongue=tongue)
    assert sum(found.values()) == count
    assert not [why for why in found if not why.startswith("pass")], found
    assert found["pass: ended in an error event"] > count / 2
