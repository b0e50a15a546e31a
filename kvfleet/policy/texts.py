"""Every text of a request's body, wherever it stands: what is looked through for personal data, and redacted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["is_text", "strings_of", "texts_beside"]

_NAMES = frozenset({"model", "role", "type", "object", "format", "encoding_format"})
_PLAIN = frozenset({"role", "content"})
_EMBEDDED = re.compile(r"data:[\w.+/-]*(?:;[\w.=+-]+)*;base64,[A-Za-z0-9+/=_-]*", re.ASCII)
_BASE64 = re.compile(r"[A-Za-z0-9+/=_-]{32,}", re.ASCII)
_HEAD = 200  # characters by which an embedded file is told from a text
_SHORTEST = 4
_BETWEEN = "\n\x1e\n"
"""Between two texts that are looked through as one: no pattern reaches over it."""


def is_text(key: str, value: str) -> bool:
    """True unless it names something (a role, a type), or is an embedded file.

    >>> is_text("content", "data: see below"), is_text("url", "data:image/png;base64,iVBORw0K"), is_text("role", "user")
    (True, False, False)
    """
    if key in _NAMES or len(value) < _SHORTEST:
        return False
    if key == "data" and _BASE64.fullmatch(value[:_HEAD]):
        return False
    return not (value.startswith("data:") and _EMBEDDED.fullmatch(value[:_HEAD]))


def strings_of(value: Any, key: str = "") -> Iterator[str]:
    """Every text in a JSON value, in order; of keys those that are no plain names."""
    if isinstance(value, str):
        if is_text(key, value):
            yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not name.isidentifier():
                yield name
            if isinstance(item, str | Mapping | list | tuple):
                yield from strings_of(item, name)
    elif isinstance(value, Sequence) and value and not isinstance(value[0], int | float):  # no vectors, no token ids
        for item in value:
            yield from strings_of(item, key)


def texts_beside(known: Sequence[str], *bodies: Mapping[str, Any]) -> str:
    """What texts there are in bodies beside the known ones, as one; empty if there are none.

    Args:
        known: Texts of them that are looked at anyway; the very objects, not equal ones.
        bodies: A request's body, and the same in its client's own words.
    """
    seen = frozenset(map(id, known))
    rest = ({name: _unknown(item, seen) for name, item in body.items()} for body in bodies)
    return _BETWEEN.join([text for body in rest for text in strings_of(body) if id(text) not in seen])


def _unknown(value: Any, seen: frozenset[int]) -> Any:
    """A list without the messages of which everything is known, which are nearly all: a third of the time."""
    if type(value) is not list:
        return value
    return [
        item
        for item in value
        if type(item) is not dict or not (item.keys() <= _PLAIN and id(item.get("content")) in seen)
    ]
