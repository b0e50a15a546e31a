"""Objects to plain YAML data: defaults left out, secrets as the references they were written as, or not at all."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import attrs
import cattrs

from kvfleet.config.options import Option, options
from kvfleet.config.schema import StageConfig
from kvfleet.config.secrets import Secret, is_reference

__all__ = ["to_plain"]

# Keys of free-form options whose values are credentials, whether or not their component declares them as such.
_CREDENTIAL = re.compile(r"(?:api[_-]?key|token|secret|password|passwd|credential|authorization)s?$", re.IGNORECASE)
_DROPPED: Any = object()


def to_plain(obj: Any) -> Any:
    """An attrs object as plain data that reads back as an equal one, except that plain secrets are gone.

    Values equal to their default are left out; credentials are written as their reference, or left out if they have
    none.
    """
    return _CONVERTER.unstructure(obj)


def _object(obj: Any) -> dict[str, Any]:
    out = {}
    cls: type = type(obj)
    for name, option in options(cls).items():
        value = getattr(obj, option.attribute.name)
        if value == option.default():
            continue
        plain = _value(option, value)
        if plain == {} and option.default() is not None:  # all that was said was a secret
            plain = _DROPPED
        if plain is not _DROPPED:
            out[name] = plain
    if out and "enabled" in options(cls) and not obj.enabled:
        return {"enabled": False, **out}  # what is off on purpose is not taken for forgotten when it is read again
    return out


def _value(option: Option, value: Any) -> Any:
    if option.info.is_secret:
        return _references(value)
    if option.attribute.repr is False:
        return _without_credentials(value)
    return to_plain(value)


def _references(value: Any) -> Any:
    """Only the references of a secret, or of a mapping of them."""
    if isinstance(value, Mapping):
        kept = {key: _references(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not _DROPPED} or _DROPPED
    if isinstance(value, Secret):
        return value.reference or _DROPPED
    return value if isinstance(value, str) and is_reference(value) else _DROPPED


def _without_credentials(value: Any) -> Any:
    """Free-form options; what stands under a key that sounds like a credential is kept only as a reference."""
    if isinstance(value, Mapping):
        kept = {
            key: _references(item) if _CREDENTIAL.search(str(key)) and _is_textual(item) else _without_credentials(item)
            for key, item in value.items()
        }
        return {key: item for key, item in kept.items() if item is not _DROPPED}
    if isinstance(value, list | tuple):
        return [_without_credentials(item) for item in value]
    return to_plain(value)


def _is_textual(value: Any) -> bool:
    return isinstance(value, str | Mapping)


def _stage(stage: StageConfig) -> Any:
    full = {"use": stage.use, "name": stage.name, "on_error": stage.on_error}
    written = {key: value for key, value in full.items() if value}
    if stage.options:
        written["with"] = _without_credentials(stage.options)
    return stage.use if list(written) == ["use"] else written


def _text(value: str) -> str:
    """Plain text also of a StrEnum or a path; a secret shows its reference at most."""
    if isinstance(value, Secret):
        return value.reference
    return str(value.value) if isinstance(value, enum.Enum) else str(value)


def _mapping(value: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: to_plain(item) for key, item in value.items()}


def _list(value: Sequence[Any]) -> list[Any]:
    return [to_plain(item) for item in value]


def _set(value: AbstractSet[Any]) -> list[Any]:
    return sorted(to_plain(item) for item in value)


def _make_converter() -> cattrs.Converter:
    """The last hook that fits wins, so the most special ones come last."""
    converter = cattrs.Converter()
    converter.register_unstructure_hook_func(lambda cls: issubclass(cls, Mapping), _mapping)
    converter.register_unstructure_hook_func(lambda cls: issubclass(cls, list | tuple), _list)
    converter.register_unstructure_hook_func(lambda cls: issubclass(cls, AbstractSet), _set)
    converter.register_unstructure_hook_func(lambda cls: issubclass(cls, str), _text)
    converter.register_unstructure_hook_func(attrs.has, _object)
    converter.register_unstructure_hook(StageConfig, _stage)
    return converter


_CONVERTER = _make_converter()
