"""No stream that breaks is called complete; CI runs some hundreds, `benchmarks/faults.py --streams` as many as wanted."""

from __future__ import annotations

from tests.faults.many import broken_streams
from tests.faults.site import site
from tests.faults.test_wall import Clock, gateway_before

STREAMS = 400


async def test_no_broken_stream_is_called_complete() -> None:
    """Wherever it breaks, and however: an error event, or an honest refusal before the first one."""
    async with site(1) as one, gateway_before(one, Clock(), unit_s=10.0, failures=10**9) as url:
        found = await broken_streams(url, one, count=STREAMS)
    assert sum(found.values()) == STREAMS
    assert not [why for why in found if not why.startswith("pass")], found
    assert found["pass: ended in an error event"] > STREAMS / 2
