"""The words of type and range findings."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.config.fields import FieldInfo
from kvfleet.config.yaml import scalar_value

__all__ = ["bounds", "named", "remedy_for", "wanted"]

_WANTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}
_REMEDIES = {
    bool: "write true or false without quotes",
    list: "write it as a list, as in [a, b]",
    dict: "write `key: value` lines below it",
}
_LONGEST = 60
_USER_INFO = re.compile(r"//[^/@\s]*@")


def wanted(kind: Any) -> str:
    """A type in a reader's words.

    >>> wanted(bool), wanted(int), wanted(tuple[str, ...])
    ('true or false', 'a whole number', 'a list')
    """
    outer = typing.get_origin(kind) or kind
    if attrs.has(outer) or (isinstance(outer, type) and issubclass(outer, Mapping)):
        return "a mapping"
    return _WANTED.get(outer) or f"a {getattr(outer, '__name__', str(outer))}"


def named(raw: Any, info: FieldInfo) -> str:
    """A value as a finding may name it: a secret only by its type, a long text only by its beginning."""
    if raw is None:
        return "nothing"
    if isinstance(raw, bool):
        return "a flag" if info.is_secret else str(raw).lower()
    if isinstance(raw, int | float):
        return "a number" if info.is_secret else f"the number {raw}"
    if not isinstance(raw, str):
        return "a list" if isinstance(raw, list | tuple) else wanted(type(raw))
    if info.is_secret:
        return "text"
    text = _USER_INFO.sub("//…@", raw)
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")


def remedy_for(kind: type, raw: Any, default: Any) -> str:
    """What to do about a value that is not of the kind wanted."""
    if kind is str:
        return "put it in quotes" if isinstance(raw, bool | int | float) else "write one text"
    if kind in _REMEDIES:
        return _REMEDIES[kind]
    if isinstance(raw, str) and isinstance(scalar_value(raw), int | float) and not isinstance(scalar_value(raw), bool):
        return "remove the quotes"
    if kind is int and isinstance(raw, float):
        return "write it without a fraction"
    return f"write a number, as in {_plain(default)}" if isinstance(default, int | float) else "write a number"


def bounds(info: FieldInfo, value: float) -> tuple[str, bool]:
    """The bounds in words, with the unit, and whether `value` is within them.

    >>> bounds(FieldInfo(doc="", ge=0, le=1), 2)
    ('from 0 to 1', False)
    """
    fits = (
        (info.ge is None or value >= info.ge)
        and (info.gt is None or value > info.gt)
        and (info.le is None or value <= info.le)
        and (info.lt is None or value < info.lt)
    )
    return ("", True) if fits else (_range(info), False)


def _range(info: FieldInfo) -> str:
    unit = f" {info.unit}" if info.unit else ""
    if info.ge is not None and info.le is not None:
        return f"from {_plain(info.ge)} to {_plain(info.le)}{unit}"
    limits = (("at least", info.ge), ("more than", info.gt), ("at most", info.le), ("less than", info.lt))
    return " and ".join(f"{word} {_plain(limit)}" for word, limit in limits if limit is not None) + unit


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)
