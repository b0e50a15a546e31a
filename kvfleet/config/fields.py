"""Fields that describe themselves: one description serves validation, error texts, JSON Schema and reference docs.

A component's attrs class is its configuration. Each option is made by one of the functions here, which put a
`FieldInfo` (what it means, its unit, its range) into the field's metadata::

    @attrs.frozen
    class LeastBusy:
        queue_weight: float = number(1.0, ge=0, doc="What one queued request costs, in score points.")

Plain `attrs.field(init=False)` fields are state, not options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

__all__ = [
    "FieldInfo",
    "choice",
    "flag",
    "info_of",
    "listing",
    "mapping",
    "number",
    "options_of",
    "secret",
    "section",
    "text",
]

_KEY = "kvfleet"
_REQUIRED: Any = attrs.NOTHING


@attrs.frozen(kw_only=True)
class FieldInfo:
    """What is known of one option beside its name and type.

    Attributes:
        doc: One sentence: what it is.
        unit: The unit of a number, as in ``ms``, ``tokens``, ``usd``; empty for a bare number.
        ge, gt, le, lt: Bounds of a number (for a list or mapping, of its length: only ``ge``).
        choices: The words a text (or each item of a list) may be; empty for any.
        pattern: A regular expression a text (or each item of a list) must match in full, and `pattern_doc` the words
            for it.
        is_secret: True if values may be references (``env:NAME``, ``file:/path``) and must never be shown.
        example: A value for docs and schemas, where the default says too little.
        refers_to: ``model`` if values name a model of the fleet: checked against the fleet when it is known.
    """

    doc: str
    unit: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str = ""
    pattern_doc: str = ""
    is_secret: bool = False
    example: Any = None
    refers_to: str = ""


def _field(default: Any, info: FieldInfo, *, factory: Callable[[], Any] | None = None, is_shown: bool = True) -> Any:
    metadata = {_KEY: info}
    is_shown = is_shown and not info.is_secret
    if factory is not None:
        return attrs.field(factory=factory, metadata=metadata, repr=is_shown)
    return attrs.field(default=default, metadata=metadata, repr=is_shown)


def number(
    default: Any = _REQUIRED,
    *,
    doc: str,
    unit: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A number option (annotate it ``int`` or ``float``, or either with ``| None``)."""
    return _field(default, FieldInfo(doc=doc, unit=unit, ge=ge, gt=gt, le=le, lt=lt))


def text(
    default: Any = _REQUIRED,
    *,
    doc: str,
    pattern: str = "",
    pattern_doc: str = "",
    example: Any = None,
    refers_to: str = "",
) -> Any:
    """A text option (annotate it ``str``)."""
    return _field(
        default, FieldInfo(doc=doc, pattern=pattern, pattern_doc=pattern_doc, example=example, refers_to=refers_to)
    )


def choice(default: Any = _REQUIRED, *, of: tuple[str, ...] = (), doc: str) -> Any:
    """A text option that is one of some words (annotate it ``str``, or a ``StrEnum`` and leave `of` out)."""
    return _field(default, FieldInfo(doc=doc, choices=of))


def flag(default: bool | None = False, *, doc: str) -> Any:
    """A yes-or-no option (annotate it ``bool``, or ``bool | None`` where absence means something)."""
    return _field(default, FieldInfo(doc=doc))


def secret(default: str = "", *, doc: str) -> Any:
    """A text that is a credential: written as ``env:NAME`` or ``file:/path``, resolved at load, never shown."""
    return _field(default, FieldInfo(doc=doc, is_secret=True))


def listing(
    default: tuple[Any, ...] = (),
    *,
    doc: str,
    ge: int | None = None,
    of: tuple[str, ...] = (),
    pattern: str = "",
    pattern_doc: str = "",
    refers_to: str = "",
    example: Any = None,
) -> Any:
    """A list option (annotate it ``tuple[T, ...]``).

    `ge` is the fewest items allowed; `of`, `pattern` and `refers_to` speak of each item.
    """
    info = FieldInfo(
        doc=doc, ge=ge, choices=of, pattern=pattern, pattern_doc=pattern_doc, refers_to=refers_to, example=example
    )
    return _field(default, info)


def mapping(
    *, doc: str, refers_to: str = "", example: Any = None, is_secret: bool = False, is_shown: bool = True
) -> Any:
    """A mapping option (annotate it ``Mapping[str, T]``), empty by default.

    `refers_to` speaks of its keys, `is_secret` of its values. `is_shown` is False for a mapping of anything, which may
    hold a credential that nobody declared as one: it stays out of the repr.
    """
    info = FieldInfo(doc=doc, refers_to=refers_to, example=example, is_secret=is_secret)
    return _field(None, info, factory=dict, is_shown=is_shown)


def section(factory: Callable[[], Any] | None, *, doc: str) -> Any:
    """A nested attrs class (annotate it so); a factory of None makes it optional, absent by default."""
    if factory is None:
        return _field(None, FieldInfo(doc=doc))
    return _field(None, FieldInfo(doc=doc), factory=factory)


def info_of(attribute: attrs.Attribute[Any]) -> FieldInfo | None:
    """The description of an attrs field, or None if it is not an option of ours."""
    found = attribute.metadata.get(_KEY)
    return found if isinstance(found, FieldInfo) else None


def options_of(cls: type) -> Mapping[str, attrs.Attribute[Any]]:
    """The options of an attrs class: its init fields, by the name used in YAML."""
    return {a.alias or a.name: a for a in attrs.fields(cls) if a.init}
