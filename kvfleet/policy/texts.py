"""Every text of a request's body, wherever it stands: what is looked through for personal data, and redacted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvfleet.policy.embedded import has_files, read

__all__ = ["is_text", "may_have_files", "strings_of", "texts_beside"]

_NAMES = frozenset({"role", "type", "object", "format", "encoding_format"})
_PLAIN = frozenset({"role", "content"})
_SHORTEST = 4
_LONGEST_NAME = 14  # the shortest bank account's number has a letter more
_BETWEEN = "\n\x1e\n"
"""Between two texts that are looked through as one: no pattern reaches over it."""


def is_text(key: str, value: str) -> bool:
    """True unless it names something (a role, a type), or is too short for anything.

    >>> is_text("content", "see below"), is_text("role", "user"), is_text("role", "ada@example.com")
    (True, False, True)
    """
    length = len(value)
    return length >= _SHORTEST and (key not in _NAMES or length > _LONGEST_NAME or not value.isidentifier())


def may_have_files(raw: bytes) -> bool:
    """True if a body as it was sent looks as if files were in it: then it takes longer to look through."""
    return b"data:" in raw or b'data"' in raw


def strings_of(value: Any, key: str = "") -> Iterator[str]:
    """Every text in a JSON value, in order, those in embedded files too; of keys those that are no plain names."""
    if isinstance(value, str):
        if is_text(key, value):
            yield from read(key, value) if has_files(value, key) else (value,)
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
    rest = ({name: _unknown(item, seen) for name, item in body.items() if name != "model"} for body in bodies)
    return _BETWEEN.join([text for body in rest for text in strings_of(body) if id(text) not in seen])


def _unknown(value: Any, seen: frozenset[int]) -> Any:
    """A list without the messages of which everything is known, which are nearly all: a third of the time."""
    if type(value) is not list:
        return value
    return [item for item in value if type(item) is not dict or not (item.keys() <= _PLAIN and _is_known(item, seen))]


def _is_known(message: Mapping[str, Any], seen: frozenset[int]) -> bool:
    """True if its text is looked at anyway, and has none within it."""
    content: Any = message.get("content")
    return id(content) in seen and not has_files(content)
