"""How long a request may take: by its headers, its body, the client's own patience, and the configuration.

The smallest counts, and its name is kept, so that an error can say which limit it was.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.errors import BadRequestError
from kvfleet.gateway.headers import Headers

__all__ = ["DeadlineReader", "TimeLimits"]

_MILLISECONDS = re.compile(rb"[0-9]{1,8}")
_SECONDS = re.compile(rb"[0-9]{1,7}(?:\.[0-9]{1,9})?")
_REQUEST_TIMEOUT = b"x-request-timeout"
# What OpenAI's and Anthropic's clients tell of themselves: how long Python's waits between two bytes, how long
# JavaScript's waits for the answer's head. Neither limits a whole stream.
_PATIENCE = (b"x-stainless-read-timeout", b"x-stainless-timeout")
_LONGEST_S = 1e7
_MOST_MARGIN_S = 0.25


@attrs.frozen
class TimeLimits:
    """What holds for one request; see `kvfleet.plugin.contract.RouteRequest`."""

    timeout_s: float | None = None
    timeout_by: str = ""
    first_byte_s: float | None = None
    first_byte_by: str = ""


_NONE = TimeLimits()


@attrs.frozen
class DeadlineReader:
    """Reads time limits.

    Args:
        header: The header with a deadline in milliseconds, in lower case; empty if it is switched off.
        configured_s: The configuration's own limit; None for none.
    """

    header: bytes
    configured_s: float | None = None

    def read(self, headers: Headers, body: Mapping[str, Any], *, is_stream: bool) -> TimeLimits:
        """The limits of one request.

        Raises:
            BadRequestError: for a header or field that is no time.
        """
        patience = _patience_in(headers)
        if (
            self.configured_s is None
            and self.header not in headers
            and _REQUEST_TIMEOUT not in headers
            and body.get("timeout") is None
        ):
            return _NONE if patience is None else _of_patience(patience, is_stream)
        found = self._whole(headers, body)
        if patience is not None and not is_stream:
            found.append(patience)
            patience = None
        timeout_s, timeout_by = min(found, default=(None, ""))
        first_byte_s, first_byte_by = patience or (None, "")
        return TimeLimits(timeout_s, timeout_by, first_byte_s, first_byte_by)

    def _whole(self, headers: Headers, body: Mapping[str, Any]) -> list[tuple[float, str]]:
        found: list[tuple[float, str]] = []
        if self.header and (value := headers.get(self.header)) is not None:
            found.append((_milliseconds(value, self.header.decode()) / 1000, self.header.decode()))
        if self.header != _REQUEST_TIMEOUT and (value := headers.get(_REQUEST_TIMEOUT)) is not None:
            found.append((_seconds(value), _REQUEST_TIMEOUT.decode()))
        if (said := body.get("timeout")) is not None:
            found.append((_field(said), "timeout"))
        if self.configured_s is not None:
            found.append((self.configured_s, "gateway.request_timeout_seconds"))
        return found


def _patience_in(headers: Headers) -> tuple[float, str] | None:
    """How long the client waits, less what an answer needs to reach it; None if it does not say."""
    for name in _PATIENCE:
        value = headers.get(name)
        if value is not None and (found := _patience(value, name)) is not None:
            return found
    return None


@functools.lru_cache(maxsize=1024)
def _patience(value: bytes, name: bytes) -> tuple[float, str] | None:
    if not _SECONDS.fullmatch(value) or not (seconds := float(value)):
        return None
    return seconds - min(_MOST_MARGIN_S, seconds / 20), name.decode()


@functools.lru_cache(maxsize=1024)
def _of_patience(patience: tuple[float, str], is_stream: bool) -> TimeLimits:
    """The limits where nobody else says anything: a whole answer's first byte is nearly its last."""
    return TimeLimits(None, "", *patience) if is_stream else TimeLimits(*patience)


def _milliseconds(value: bytes, name: str) -> int:
    if not _MILLISECONDS.fullmatch(value) or not int(value):
        raise BadRequestError(
            f"the header {name} must be a whole number of milliseconds from 1 to 99999999", param=name
        )
    return int(value)


def _seconds(value: bytes) -> float:
    name = _REQUEST_TIMEOUT.decode()
    if not _SECONDS.fullmatch(value) or not float(value):
        raise BadRequestError(f"the header {name} must be a number of seconds above 0", param=name)
    return float(value)


def _field(said: Any) -> float:
    if isinstance(said, bool) or not isinstance(said, int | float) or not 0 < said <= _LONGEST_S:
        raise BadRequestError("timeout must be a number of seconds above 0", param="timeout")
    return float(said)
