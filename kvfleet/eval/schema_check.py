"""Whether an answer is JSON of the schema that was asked for; needs the extra ``kvfleet[judges]``.

Schema and answer both come from outside, so the check is bounded: no reference leaves the schema, no regular expression
of the caller's is run, and it gives up after so many steps.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orjson

from kvfleet.errors import ComponentError

__all__ = ["SchemaCheck", "wanted_schema"]

_MOST_STEPS = 5_000
_MOST_BYTES = 256 * 1024
_EXPRESSIONS = ("pattern", "patternProperties", "format")


class _TooMuchError(Exception):
    """The check took too many steps."""


def wanted_schema(body: Mapping[str, Any]) -> Mapping[str, Any] | bool | None:
    """What a request wants: a JSON schema, True for any JSON, None for anything.

    >>> wanted_schema({"response_format": {"type": "json_object"}})
    True
    """
    wanted = body.get("response_format")
    if not isinstance(wanted, Mapping):
        return None
    if wanted.get("type") == "json_object":
        return True
    if wanted.get("type") != "json_schema":
        return None
    holder = wanted.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, Mapping) else None
    return schema if isinstance(schema, Mapping) else True


class SchemaCheck:
    """Checks texts against JSON schemas (draft 2020-12).

    Raises:
        ComponentError: if the library is not installed.
    """

    def __init__(self) -> None:
        try:
            jsonschema: Any = importlib.import_module("jsonschema")
            referencing: Any = importlib.import_module("referencing")
        except ImportError as error:
            raise ComponentError("checking JSON schemas needs a library: pip install 'kvfleet[judges]'") from error
        base = jsonschema.Draft202012Validator
        self._local = threading.local()
        kept = {name: check for name, check in base.VALIDATORS.items() if name not in _EXPRESSIONS}
        dropped = dict.fromkeys(_EXPRESSIONS, _nothing)
        counted = {name: self._counted(check) for name, check in kept.items()} | dropped
        self._validator = jsonschema.validators.extend(base, counted)
        self._registry = referencing.Registry()  # an empty one retrieves nothing

    def _counted(self, check: Callable[..., Iterator[Any] | None]) -> Callable[..., Iterator[Any]]:
        """A keyword's check that counts as a step."""

        def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
            self._local.steps += 1
            if self._local.steps > _MOST_STEPS:
                raise _TooMuchError
            yield from check(validator, value, instance, schema) or ()

        return counted

    def fits(self, text: str, schema: Mapping[str, Any] | bool) -> bool | None:
        """True if the text is such JSON, False if it is not; None if that cannot be told, for the schema's sake."""
        if len(text) > _MOST_BYTES:
            return None
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            return False
        if isinstance(schema, bool):
            return schema
        self._local.steps = 0
        try:
            return bool(self._validator(schema, registry=self._registry).is_valid(value))
        except Exception:  # noqa: BLE001 - a schema from outside may be of any shape, and break the library anywhere
            return None


def _nothing(*_: Any) -> Iterator[Any]:
    return iter(())
