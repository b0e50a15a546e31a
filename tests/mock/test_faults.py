"""Faults on demand: which requests they befall, and what each looks like on the wire."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from kvfleet.clock import FrozenClock
from kvfleet.errors import BadRequestError
from kvfleet.mock.faults import MOST_RULES, FaultBook, FaultKind, FaultRule, parse_fault
from kvfleet.mock.server import MockServer
from tests.mock.serving import HELLO, Answer, ask, served

STREAM = {**HELLO, "stream": True}


def book(*rules: FaultRule) -> tuple[FaultBook, FrozenClock]:
    """A book with rules, on a clock of the test's."""
    clock = FrozenClock()
    made = FaultBook(clock)
    for rule in rules:
        made.add(rule)
    return made, clock


def hits(made: FaultBook, count: int, path: str = "/v1/x") -> list[bool]:
    """Which of so many requests have a fault."""
    return [made.next(path) is not None for _ in range(count)]


class TestBook:
    def test_every_third_after_the_first_two(self) -> None:
        """`skip` spares the first ones, `every` most of the rest, `times` all but a few."""
        made, _ = book(FaultRule(kind=FaultKind.CUT, every=3, skip=2, times=2))
        assert hits(made, 12) == [False] * 4 + [True] + [False] * 2 + [True] + [False] * 4

    def test_a_rule_holds_for_its_time(self) -> None:
        """After `for_s` it is as if it had never been."""
        made, clock = book(FaultRule(kind=FaultKind.CUT, for_s=5))
        clock.advance(4.9)
        assert hits(made, 1) == [True]
        clock.advance(0.1)
        assert hits(made, 1) == [False]
        assert made.state() == []

    def test_a_rule_is_for_its_paths(self) -> None:
        """Health stays sound unless the rule names it."""
        made, _ = book(FaultRule(kind=FaultKind.CUT), FaultRule(kind=FaultKind.STATUS, path="/health"))
        assert hits(made, 1, "/metrics") == [False]
        found = made.next("/health")
        assert found is not None
        assert found.kind is FaultKind.STATUS

    def test_the_oldest_rule_that_is_due_decides(self) -> None:
        """One that is not due leaves the request to the next."""
        made, _ = book(FaultRule(kind=FaultKind.CUT, every=2), FaultRule(kind=FaultKind.STALL))
        found = [made.next("/v1/x") for _ in range(2)]
        assert [rule.kind for rule in found if rule] == [FaultKind.STALL, FaultKind.CUT]

    def test_there_are_not_too_many(self) -> None:
        """The book is bounded, and says how to empty it."""
        made, _ = book(*[FaultRule(kind=FaultKind.CUT) for _ in range(MOST_RULES)])
        with pytest.raises(BadRequestError, match="DELETE /mock/faults"):
            made.add(FaultRule(kind=FaultKind.CUT))
        made.clear()
        assert hits(made, 1) == [False]


class TestParsing:
    @pytest.mark.parametrize(
        ("said", "rule"),
        [
            ("429", FaultRule(kind=FaultKind.STATUS, status=429)),
            ("503,retry_after_s=1.5", FaultRule(kind=FaultKind.STATUS, status=503, retry_after_s=1.5)),
            ("cut,after_tokens=3,resets", FaultRule(kind=FaultKind.CUT, after_tokens=3, resets=True)),
            ({"kind": "stall", "wait_s": 2}, FaultRule(kind=FaultKind.STALL, wait_s=2.0)),
        ],
    )
    def test_a_rule_is_read(self, said: Any, rule: FaultRule) -> None:
        """As words or as JSON."""
        assert parse_fault(said) == rule

    def test_everything_wrong_is_said_at_once(self) -> None:
        """The kinds there are, the ranges, and the unknown name."""
        with pytest.raises(BadRequestError) as caught:
            parse_fault("boo,every=0,color=red")
        assert all(word in str(caught.value) for word in ("'boo'", "at least 1", "color"))


async def spoilt(fault: str, body: Any = HELLO, **options: Any) -> Answer:
    """What a request gets under a fault."""
    async with served(**options) as server:
        server.engine.faults.add(parse_fault(fault))
        return await ask(server, body=body)


class TestOnTheWire:
    @pytest.mark.parametrize("status", [400, 429, 500, 503])
    async def test_a_status(self, status: int) -> None:
        """With an error object, and Retry-After if wanted."""
        answer = await spoilt(f"{status},retry_after_s=7")
        assert (answer.status, answer.json["error"]["code"], answer.headers["retry-after"]) == (status, status, "7")

    async def test_a_reset_before_the_answer(self) -> None:
        """The client sees a reset, not an end."""
        with pytest.raises(ConnectionResetError):
            await spoilt("reset")

    async def test_a_connection_closed_before_the_answer(self) -> None:
        """The client sees the end of nothing."""
        with pytest.raises(EOFError) as caught:
            await spoilt("hang_up")
        assert caught.value.args == (b"",)

    async def test_something_that_is_no_http(self) -> None:
        """Bytes come, but no status."""
        with pytest.raises(EOFError) as caught:
            await spoilt("not_http")
        assert b"SSH" in caught.value.args[0]

    async def test_refused_connections(self) -> None:
        """For its time nobody gets in, connections that are open are closed, and afterwards all is well."""
        async with served() as server:
            await ask(server, "/mock/faults", {"kind": "refuse", "wait_s": 0.3})
            statuses: list[int] = []
            while not statuses or statuses[-1] != 200 or 0 not in statuses:
                statuses.append(await self._knock(server))
            assert statuses[-1] == 200

    async def _knock(self, server: MockServer) -> int:
        """The status of the engine's health, 0 if the connection was refused."""
        await asyncio.sleep(0.01)
        try:
            return (await ask(server, "/health")).status
        except ConnectionRefusedError:
            return 0
        except (OSError, EOFError):  # it was open when the door closed
            return -1

    @pytest.mark.parametrize("fault", ["slow_headers,wait_s=0.2", "slow_first_token,wait_s=0.2", "stall,wait_s=0.2"])
    async def test_silence_and_then_an_answer(self, fault: str) -> None:
        """The answer is whole, but late."""
        began = asyncio.get_running_loop().time()
        answer = await spoilt(fault, STREAM)
        assert asyncio.get_running_loop().time() - began >= 0.2
        assert (answer.is_whole, answer.events[-1]) == (True, "[DONE]")

    async def test_slow_tokens(self) -> None:
        """Every event of the stream is late."""
        began = asyncio.get_running_loop().time()
        answer = await spoilt("slow_tokens,wait_s=0.02", STREAM)
        assert asyncio.get_running_loop().time() - began >= 0.02 * len(answer.events)
        assert answer.events[-1] == "[DONE]"

    async def test_a_stream_cut_after_two_tokens(self) -> None:
        """Role and two tokens come, then the connection ends without the stream's end."""
        answer = await spoilt("cut,after_tokens=2", STREAM)
        assert (answer.status, answer.is_whole, len(answer.events)) == (200, False, 3)

    async def test_a_whole_answer_cut(self) -> None:
        """Half of the body comes."""
        answer = await spoilt("cut")
        assert not answer.is_whole
        with pytest.raises(json.JSONDecodeError):
            _ = answer.json

    async def test_a_stream_that_ends_early_but_properly(self) -> None:
        """The HTTP is whole, the stream has no reason and no [DONE]."""
        answer = await spoilt("end_early,after_tokens=2", STREAM)
        assert (answer.is_whole, len(answer.events)) == (True, 3)
        assert "[DONE]" not in answer.events

    @pytest.mark.parametrize("body", [HELLO, STREAM])
    async def test_truncated_json(self, body: Any) -> None:
        """The HTTP is whole, the JSON is not."""
        answer = await spoilt("truncated_json", body)
        assert answer.is_whole
        with pytest.raises(json.JSONDecodeError):
            _ = answer.events if body is STREAM else answer.json

    async def test_lines_that_are_no_events(self) -> None:
        """Junk comes between two events, and the rest of the stream after it."""
        answer = await spoilt("malformed_sse", STREAM)
        assert b"data: {not JSON at all\n" in answer.body
        assert answer.body.endswith(b"data: [DONE]\n\n")

    async def test_a_page_for_people(self) -> None:
        """Status 200 and HTML."""
        answer = await spoilt("wrong_type")
        assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")

    async def test_an_error_under_status_200(self) -> None:
        """In place of a whole answer, and amid a stream."""
        answer, stream = await spoilt("error_body,status=503"), await spoilt("error_body,status=503", STREAM)
        assert (answer.status, answer.json["error"]["code"]) == (200, 503)
        assert [event.get("error", {}).get("code") for event in stream.events[:-1]] == [None, None, 503]

    async def test_nothing_at_all(self) -> None:
        """Status 200 and an empty body."""
        answer = await spoilt("empty_body")
        assert (answer.status, answer.body) == (200, b"")

    async def test_only_some_requests(self) -> None:
        """The others are served, and the state counts both."""
        async with served() as server:
            added = await ask(server, "/mock/faults", {"kind": "status", "status": 500, "every": 2})
            statuses = [(await ask(server, body=HELLO)).status for _ in range(4)]
            state = (await ask(server, "/mock/faults")).json
            cleared = await ask(server, "/mock/faults", method="DELETE")
            after = await ask(server, body=HELLO)
        assert added.json["faults"][0]["seen"] == 0
        assert statuses == [200, 500, 200, 500]
        assert [(rule["kind"], rule["seen"], rule["done"]) for rule in state["faults"]] == [("status", 4, 2)]
        assert (cleared.json, after.status) == ({"faults": []}, 200)

    async def test_a_fault_leaves_nothing_in_the_engine(self) -> None:
        """After a cut the engine's place and blocks are free."""
        async with served() as server:
            server.engine.faults.add(parse_fault("cut,after_tokens=2"))
            await ask(server, body=STREAM)
            load = server.engine.adapter.live.load()
        assert (load.running, load.kv_usage) == (0, 0.0)
