"""A client that asks a gateway once, and judges what came of it by what OpenAI's clients would make of it."""

from __future__ import annotations

import asyncio
import enum
import json
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import httpx

from tests.faults.catalogue import Case
from tests.faults.sdks import End, Made
from tests.faults.tongues import CHAT, MESSAGES, TEXT, Tongue

_PASSING = (408, 429)  # what OpenAI's clients take for a failure that passes, beside 5xx
TOLD_ADDRESS = "told an engine's address"
_TLS = ssl.create_default_context()  # not used; httpx would make one for each client, which takes 40 ms


class Verdict(enum.StrEnum):
    """How a gateway did."""

    PASS = "pass"
    SAFE = "safe"
    FAIL = "fail"


@attrs.frozen
class Judgement:
    """A verdict, and why."""

    verdict: Verdict
    why: str

    @property
    def rank(self) -> int:
        """Higher is worse."""
        return list(Verdict).index(self.verdict)


@attrs.define
class Heard:
    """What a client got.

    Attributes:
        status: 0 if there was no answer.
        end: ``clean``, ``dropped`` or ``hang``.
        body: All there was of it.
    """

    status: int = 0
    end: str = "clean"
    body: bytes = b""


async def ask(
    url: str, *, stream: bool, deadline_s: float, tongue: Tongue = CHAT, headers: Mapping[str, str] | None = None
) -> Heard:
    """Ask once, over a connection of its own."""
    heard = Heard()
    body = {**tongue.ask, "stream": stream}
    try:
        async with (
            asyncio.timeout(deadline_s),
            httpx.AsyncClient(timeout=None, verify=_TLS) as client,  # noqa: S113 - the deadline is above
            client.stream("POST", f"{url}{tongue.path}", json=body, headers=headers) as answer,
        ):
            heard.status = answer.status_code
            async for piece in answer.aiter_raw():
                heard.body += piece
    except TimeoutError:
        heard.end = "hang"
    except httpx.HTTPError:
        heard.end = "dropped"
    return heard


def judged(
    case: Case, heard: Heard, ports: Sequence[int], tongue: Tongue = CHAT, made: Made | None = None
) -> Judgement:
    """The verdict on one answer; with what the API's own SDK made of it, by that.

    Pass is a right answer, or the right honest error where no answer was to be had; safe an honest error where one was;
    fail all that misleads a client: a wrong or truncated answer called complete, a hang, a dropped connection, an error
    that blames the caller, an address of an engine.
    """
    said = heard.body.decode(errors="replace")
    found = _judged(case, heard, said, made)
    if heard.status >= 400 and found.verdict is not Verdict.FAIL and not _is_shaped(tongue, said):
        return Judgement(Verdict.FAIL, "refused in another API's words")
    if found.verdict is not Verdict.FAIL and any(f":{port}" in said or f", {port}" in said for port in ports):
        return Judgement(Verdict.FAIL, TOLD_ADDRESS)
    return found


def _judged(case: Case, heard: Heard, said: str, made: Made | None) -> Judgement:
    if heard.end == "hang":
        return Judgement(Verdict.FAIL, "hung")
    if heard.status >= 400:
        return _refused(case, heard)
    if heard.end == "dropped" and not (case.stream and _has_error(said)):
        return Judgement(Verdict.FAIL, "dropped the connection")
    if heard.status != 200:
        return Judgement(Verdict.FAIL, f"answered with status {heard.status}")
    if made is not None:
        return _by_sdk(case, made)
    return _streamed(case, said) if case.stream else _whole(case, said)


def _refused(case: Case, heard: Heard) -> Judgement:
    allowed = case.fault.statuses
    fits = heard.status in allowed if allowed else heard.status in _PASSING or heard.status >= 500
    if not fits:
        return Judgement(Verdict.FAIL, f"blamed the caller with status {heard.status}")
    if heard.end == "dropped":
        return Judgement(Verdict.FAIL, "dropped the connection amid an error")
    return _honest(case, f"said {heard.status}")


def _is_shaped(tongue: Tongue, said: str) -> bool:
    """True if an error is one as the API has them."""
    try:
        told = json.loads(said)
        error = told["error"]
        is_shaped = isinstance(error["message"], str) and isinstance(error["type"], str)
    except (ValueError, LookupError, TypeError):
        return False
    return is_shaped and (tongue is not MESSAGES or told.get("type") == "error")


def _by_sdk(case: Case, made: Made) -> Judgement:
    if made.end is End.UNREADABLE:
        return Judgement(Verdict.FAIL, "passed on an event that no client can read")
    if made.end is End.RAISED and case.stream:
        if not TEXT.startswith(made.text):
            return Judgement(Verdict.FAIL, "passed on a wrong beginning")
        return _honest(case, "ended in an error event")
    if made.end is not End.WHOLE:
        return Judgement(Verdict.FAIL, "called a truncated answer complete")
    return _right(case, made.text)


def _honest(case: Case, why: str) -> Judgement:
    return Judgement(Verdict.SAFE if case.can_recover else Verdict.PASS, why)


def _whole(case: Case, said: str) -> Judgement:
    try:
        content = json.loads(said)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return Judgement(Verdict.FAIL, "called complete what is no answer")
    return _right(case, content)


def _right(case: Case, content: object) -> Judgement:
    if content != TEXT:
        return Judgement(Verdict.FAIL, "called a wrong or truncated answer complete")
    if case.fault.statuses:
        return Judgement(Verdict.FAIL, "answered what was refused")
    return Judgement(Verdict.PASS, "answered")


def _has_error(said: str) -> bool:
    return any("error" in data for data in _chunks(said) if isinstance(data, dict))


def _chunks(said: str) -> list[Any]:
    """Each event's data; None for one that is no JSON."""
    found: list[Any] = []
    for line in said.replace("\r\n", "\n").split("\n"):
        if not line.startswith("data:") or line[5:].strip() == "[DONE]":
            continue
        try:
            found.append(json.loads(line[5:]))
        except ValueError:
            found.append(None)
    return found


def _streamed(case: Case, said: str) -> Judgement:
    content, finish = "", None
    for data in _chunks(said):
        if not isinstance(data, dict):
            return Judgement(Verdict.FAIL, "passed on an event that no client can read")
        if data.get("error"):
            if not TEXT.startswith(content):
                return Judgement(Verdict.FAIL, "passed on a wrong beginning")
            return _honest(case, "ended in an error event")
        for choice in data.get("choices") or ():
            content += choice.get("delta", {}).get("content") or ""
            finish = choice.get("finish_reason") or finish
    if finish is None:
        return Judgement(Verdict.FAIL, "called a truncated answer complete")
    return _right(case, content)
