"""Faults on demand: what a mock engine does wrong, to which requests, and for how long."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.clock import Clock
from kvfleet.config.convert import structure
from kvfleet.config.fields import choice, flag, number, text
from kvfleet.errors import BadRequestError

__all__ = ["MOST_RULES", "FaultBook", "FaultKind", "FaultRule", "parse_fault"]

MOST_RULES = 64


class FaultKind(enum.StrEnum):
    """What goes wrong."""

    STATUS = "status"  # an HTTP error, with an error object
    REFUSE = "refuse"  # connections are refused, and those that are open are closed
    RESET = "reset"  # the connection is reset before a byte of the answer
    HANG_UP = "hang_up"  # the same, but closed
    NOT_HTTP = "not_http"  # what comes is no HTTP
    SLOW_HEADERS = "slow_headers"  # silence before the answer's head
    SLOW_FIRST_TOKEN = "slow_first_token"  # noqa: S105 - silence between a stream's head and its first event
    SLOW_TOKENS = "slow_tokens"  # silence before every event of a stream
    STALL = "stall"  # silence amid a stream
    CUT = "cut"  # the connection ends amid the answer
    END_EARLY = "end_early"  # a stream ends properly, but without its end
    TRUNCATED_JSON = "truncated_json"  # the JSON stops amid a value, the HTTP does not
    MALFORMED_SSE = "malformed_sse"  # lines between a stream's events that are none
    WRONG_TYPE = "wrong_type"  # a page for people, with status 200
    ERROR_BODY = "error_body"  # an error object, with status 200, or amid a stream
    EMPTY_BODY = "empty_body"  # status 200 and nothing


@attrs.frozen(kw_only=True)
class FaultRule:
    """One fault, and whom it befalls."""

    kind: FaultKind = choice(doc="What goes wrong.")
    status: int = number(500, ge=100, le=599, doc="The HTTP status, for `status`; also what `error_body` speaks of.")
    wait_s: float = number(30.0, ge=0, unit="s", doc="How long the slow ones are silent, and connections refused.")
    after_tokens: int = number(
        1, ge=0, unit="tokens", doc="Tokens of a stream that come through before what happens amid it."
    )
    retry_after_s: float | None = number(None, ge=0, unit="s", doc="What `Retry-After` says; absent if not set.")
    resets: bool = flag(doc="A cut connection is reset, so that even what was sent may be lost.")
    path: str = text("/v1/", doc="Only requests whose path begins so.")
    every: int = number(1, ge=1, unit="requests", doc="Only every so many-th of them.")
    skip: int = number(0, ge=0, unit="requests", doc="So many of them are spared first.")
    times: int | None = number(None, ge=1, unit="requests", doc="So many have the fault, then none.")
    for_s: float | None = number(None, gt=0, unit="s", doc="How long the rule holds; until it is cleared if not set.")


def parse_fault(raw: Mapping[str, Any] | str) -> FaultRule:
    """Read a rule: a mapping, or words as on a command line.

    A bare number is a status. What is wrong is said all at once.

    Raises:
        BadRequestError: if it is none.

    >>> parse_fault("429,retry_after_s=2,every=3").status
    429
    >>> parse_fault({"kind": "cut", "after_tokens": 5}).after_tokens
    5
    """
    data = _words(raw) if isinstance(raw, str) else raw
    rule, findings = structure(FaultRule, data)
    if rule is None:
        raise BadRequestError("; ".join(map(str, findings)), code="invalid_fault")
    return rule


def _words(said: str) -> dict[str, Any]:
    kind, *rest = said.split(",")
    data: dict[str, Any] = {"kind": "status", "status": int(kind)} if kind.isdecimal() else {"kind": kind.strip()}
    for word in rest:
        name, _, value = word.partition("=")
        data[name.strip()] = _value(value.strip()) if value else True
    return data


def _value(said: str) -> Any:
    for read in (int, float):
        try:
            return read(said)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(said, said)


@attrs.define
class _Entry:
    rule: FaultRule
    since_s: float
    seen: int = 0
    done: int = 0


@attrs.define
class FaultBook:
    """The rules in force, oldest first; the first that a request falls under decides.

    Args:
        clock: What time it is.
    """

    clock: Clock
    _entries: list[_Entry] = attrs.field(init=False, factory=list)

    def add(self, rule: FaultRule) -> None:
        """Have a rule from now on.

        Raises:
            BadRequestError: if there are too many.
        """
        self._forget()
        if len(self._entries) >= MOST_RULES:
            raise BadRequestError(f"there are {MOST_RULES} faults already; DELETE /mock/faults clears them")
        self._entries.append(_Entry(rule, self.clock.now_s()))

    def clear(self) -> None:
        """Have none."""
        self._entries.clear()

    def next(self, path: str) -> FaultRule | None:
        """The fault of the next request to a path, if it has one."""
        if not self._entries:
            return None
        self._forget()
        for entry in self._entries:
            rule = entry.rule
            if not path.startswith(rule.path):
                continue
            entry.seen += 1
            is_due = entry.seen > rule.skip and (entry.seen - rule.skip) % rule.every == 0
            if is_due and (rule.times is None or entry.done < rule.times):
                entry.done += 1
                return rule
        return None

    def state(self) -> list[dict[str, Any]]:
        """The rules, and how many requests each has seen and spoilt."""
        self._forget()
        return [{**attrs.asdict(entry.rule), "seen": entry.seen, "done": entry.done} for entry in self._entries]

    def _forget(self) -> None:
        now_s = self.clock.now_s()
        self._entries = [e for e in self._entries if e.rule.for_s is None or now_s - e.since_s < e.rule.for_s]
