"""What an attrs class offers as options: names, types, descriptions; resolved once for each class."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.config.fields import FieldInfo, info_of, options_of
from kvfleet.config.origin import NOWHERE
from kvfleet.errors import ComponentError

__all__ = ["Option", "option_types", "options"]

_UNDESCRIBED = FieldInfo(doc="")


@attrs.frozen
class Option:
    """One option of a class.

    Attributes:
        name: As YAML has it.
        attribute: The attrs field behind it.
        type: Its resolved annotation.
        info: Its description.
    """

    name: str
    attribute: attrs.Attribute[Any]
    type: Any
    info: FieldInfo

    @property
    def is_required(self) -> bool:
        """True if it has no default."""
        return self.attribute.default is attrs.NOTHING

    def default(self) -> Any:
        """Its default; `attrs.NOTHING` if it has none, or one that depends on the instance."""
        default = self.attribute.default
        if not isinstance(default, attrs.Factory):  # type: ignore[arg-type]  # a class at run time
            return default
        factory: Any = default
        return attrs.NOTHING if factory.takes_self else factory.factory()


@functools.cache
def options(cls: type) -> Mapping[str, Option]:
    """The options of an attrs class, by name.

    Raises:
        ComponentError: if an option's type cannot be resolved.
    """
    hints = option_types(cls)
    found = {}
    for name, attribute in options_of(cls).items():
        if attribute.default is NOWHERE:  # where a configuration came from is no option of it
            continue
        info = info_of(attribute) or _UNDESCRIBED
        found[name] = Option(name, attribute, hints[attribute.name], info)
    return types.MappingProxyType(found)


def option_types(cls: type) -> dict[str, Any]:
    """The resolved annotations of an attrs class's init fields, by attribute name.

    Other fields are left alone: their annotations may name what is imported for type checkers only.

    Raises:
        ComponentError: if one cannot be resolved.
    """
    homes = {name: base for base in reversed(cls.__mro__) for name in inspect.get_annotations(base)}
    return {a.name: _resolve(cls, homes.get(a.name, cls), a) for a in attrs.fields(cls) if a.init}


def _resolve(cls: type, home: type, attribute: attrs.Attribute[Any]) -> Any:
    """One annotation, read where it was written; typing's names serve classes made by `attrs.make_class`."""
    annotation = attribute.type
    if annotation is None:
        return Any
    module = sys.modules.get(home.__module__)
    names = {**vars(collections.abc), **vars(typing), **vars(module or types.ModuleType("none"))}
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, globalns=names, localns=dict(vars(home)))["it"]
    except (NameError, TypeError, SyntaxError) as error:
        what = f"the type {annotation!r} of the option {attribute.name!r} of {cls.__qualname__} cannot be resolved"
        raise ComponentError(f"{what}: {error}; import what it names at run time, not under TYPE_CHECKING") from error
