"""Plain data to attrs classes and back, strictly: every finding at once, each with its path and position.

The walk over mappings, lists and scalars is our own, because cattrs coerces where a configuration must not (the text
``"false"`` becomes True, a text becomes a tuple of letters) and reports nested exceptions without positions. cattrs
does what it is good at: it turns objects back into plain data, and reads the types that YAML has no words for
(`pathlib.Path`, new types, typed dictionaries), which plugin authors may use for their options.
"""

from __future__ import annotations

import collections.abc
import enum
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import attrs
import cattrs

from kvfleet.config.fields import FieldInfo
from kvfleet.config.findings import Finding, Path, did_you_mean
from kvfleet.config.options import Option, options
from kvfleet.config.origin import NOWHERE, Origin
from kvfleet.config.plain import to_plain
from kvfleet.config.schema import GatewayConfig, StageConfig
from kvfleet.config.secrets import Problem, Secret, SecretReader
from kvfleet.config.wording import bounds, named, remedy_for, wanted
from kvfleet.errors import ConfigError

__all__ = ["read", "structure", "unstructure"]

T = TypeVar("T")
_BAD: Any = object()
_NO_INFO = FieldInfo(doc="")
_STAGE = re.compile(r"[a-z_]+(?:\.[a-z][a-z0-9_]*)?")
_STAGE_KEYS = ("use", "name", "on_error", "with")

_RETIRED: Mapping[type, Mapping[str, tuple[str, str]]] = {
    GatewayConfig: {"enabled": ("means nothing", "remove it; `kvfleet serve` is what starts the gateway")},
}
"""Keys of earlier versions: a finding of their own, because they are no typing mistakes."""

unstructure = to_plain


def structure(
    cls: type[T], raw: Any, *, path: Path = (), origin: Origin = NOWHERE, models: Collection[str] | None = None
) -> tuple[T | None, list[Finding]]:
    """Make an instance of an attrs class from plain data.

    Args:
        cls: The class; its init fields are its options.
        raw: A mapping of its options, or an instance already.
        path: Where `raw` stands in the file.
        origin: The file; also what resolves secrets.
        models: The fleet's models; if given, options that refer to a model are checked against them.

    Returns:
        The instance and no findings, or None and every finding.

    Raises:
        ComponentError: if the class itself is at fault: an option has a type that cannot be resolved.
    """
    value, findings = read(cls, raw, path=path, origin=origin, models=models)
    return (None if findings else value), findings


def read(
    cls: type[T], raw: Any, *, path: Path = (), origin: Origin = NOWHERE, models: Collection[str] | None = None
) -> tuple[T | None, list[Finding]]:
    """As `structure`, but give the instance also if all that is wrong can be passed over in order to look further.

    That is: unknown keys, unknown models, and secrets that are not set.
    """
    reader = _Reader(origin, None if models is None else frozenset(models))
    value = reader.value(raw, cls, _NO_INFO, path)
    return (None if value is _BAD else value), reader.findings


class _Reader:
    """One walk over one piece of data."""

    def __init__(self, origin: Origin, models: Collection[str] | None) -> None:
        self.findings: list[Finding] = []
        self._origin = origin
        self._models = models
        self._secrets = origin.secrets or SecretReader()

    def complain(self, path: Path, message: str, remedy: str = "", *, code: str) -> Any:
        """Note a finding; gives the mark of a value that cannot be used."""
        self.findings.append(self._origin.finding(path, message, remedy, code=code))
        return _BAD

    def wrong(self, raw: Any, want: str, info: FieldInfo, path: Path, remedy: str) -> Any:
        if raw is None:
            return self.complain(path, "has no value", "write one, or remove the key", code="type")
        return self.complain(path, f"must be {want}, not {named(raw, info)}", remedy, code="type")

    def value(self, raw: Any, kind: Any, info: FieldInfo, path: Path, default: Any = attrs.NOTHING) -> Any:
        """Read one value of the type `kind`; `_BAD` if it cannot be used."""
        if kind in _SCALARS:
            return self._scalar(raw, kind, info, path, default)
        if kind is Any:
            return raw
        outer = typing.get_origin(kind)
        if outer in (types.UnionType, typing.Union):
            return self._union(raw, typing.get_args(kind), info, path, default)
        return self._compound(raw, kind, outer, info, path)

    def _compound(self, raw: Any, kind: Any, outer: Any, info: FieldInfo, path: Path) -> Any:
        if outer in _LISTS:
            return self._list(raw, kind, outer, info, path)
        if outer in _MAPPINGS or kind in _MAPPINGS:
            return self._mapping(raw, (*typing.get_args(kind), str, Any)[:2], info, path)
        if kind is StageConfig:
            return self._stage(raw, path)
        if attrs.has(kind):
            return self._class(raw, kind, path)
        return self._other(raw, kind, info, path)

    # Scalars

    def _scalar(self, raw: Any, kind: type, info: FieldInfo, path: Path, default: Any) -> Any:
        if kind is str:
            return raw if raw == default == "" else self._text(raw, info, path)
        if kind is bool:
            return raw if isinstance(raw, bool) else self._not(raw, kind, info, path, default)
        is_number = isinstance(raw, int | float if kind is float else int) and not isinstance(raw, bool)
        if not is_number:
            return self._not(raw, kind, info, path, default)
        if isinstance(raw, float) and not math.isfinite(raw):
            return self.complain(path, f"must be a finite number, not {raw}", "write a number", code="range")
        limits, fits = bounds(info, raw)
        if not fits:
            return self.complain(path, f"must be {limits}, not {raw}", code="range")
        return float(raw) if kind is float else raw

    def _not(self, raw: Any, kind: type, info: FieldInfo, path: Path, default: Any) -> Any:
        return self.wrong(raw, wanted(kind), info, path, remedy_for(kind, raw, default))

    def _text(self, raw: Any, info: FieldInfo, path: Path) -> Any:
        if not isinstance(raw, str):
            return self._not(raw, str, info, path, attrs.NOTHING)
        if info.is_secret:
            return self._secret(raw, path)
        if info.choices and raw not in info.choices:
            remedy = did_you_mean(raw, info.choices)
            return self.complain(path, f"{named(raw, info)} is not allowed here", remedy, code="choice")
        if info.pattern and not re.fullmatch(info.pattern, raw):
            remedy = f"write it as in {info.example}" if isinstance(info.example, str) else "correct it"
            return self.complain(
                path, f"must be {info.pattern_doc or info.pattern}, not {named(raw, info)}", remedy, code="pattern"
            )
        self._check_reference(raw, info, path)
        return raw

    def _check_reference(self, name: str, info: FieldInfo, path: Path) -> None:
        if info.refers_to == "model" and self._models is not None and name and name not in self._models:
            self.complain(path, f"no model is called {name!r}", did_you_mean(name, self._models), code="unknown-model")

    def _secret(self, raw: str, path: Path) -> str:
        if isinstance(raw, Secret) or not raw:
            return raw
        found = self._secrets.read(raw)
        if isinstance(found, Problem):
            self.complain(path, found.message, found.remedy, code="secret")
            return Secret("", raw)
        return found

    # Collections

    def _list(self, raw: Any, kind: Any, outer: type, info: FieldInfo, path: Path) -> Any:
        if not isinstance(raw, list | tuple | set | frozenset):
            return self.wrong(raw, "a list", info, path, remedy_for(list, raw, attrs.NOTHING))
        limits, fits = bounds(info, len(raw))
        if not fits:
            return self.complain(path, f"must have {_plural(limits, 'item')}, not {len(raw)}", code="range")
        args = typing.get_args(kind)
        if outer is tuple and args[-1:] != (...,):
            return self._fixed(raw, args, info, path)
        values = [self.value(item, args[0], _items(info), (*path, index)) for index, item in enumerate(raw)]
        return _BAD if any(value is _BAD for value in values) else _LISTS[outer](values)

    def _fixed(self, raw: Any, args: tuple[Any, ...], info: FieldInfo, path: Path) -> Any:
        if len(raw) != len(args):
            return self.complain(path, f"must have {len(args)} items, not {len(raw)}", code="range")
        pairs = enumerate(zip(raw, args, strict=True))
        values = [self.value(item, kind, _items(info), (*path, index)) for index, (item, kind) in pairs]
        return _BAD if any(value is _BAD for value in values) else tuple(values)

    def _mapping(self, raw: Any, args: tuple[Any, ...], info: FieldInfo, path: Path) -> Any:
        if not isinstance(raw, Mapping):
            return self.wrong(raw, "a mapping", info, path, remedy_for(dict, raw, attrs.NOTHING))
        limits, fits = bounds(info, len(raw))
        if not fits:
            return self.complain(path, f"must have {_plural(limits, 'key')}, not {len(raw)}", code="range")
        made = {}
        values = attrs.evolve(_items(info), refers_to="") if info.refers_to else _items(info)
        for key, item in raw.items():
            if not isinstance(key, str):
                self.complain(path, f"has the key {key!r}, which is not text", "put it in quotes", code="type")
                made[str(key)] = _BAD
                continue
            self._check_reference(key, info, (*path, key))
            made[key] = self.value(item, args[1], values, (*path, key))
        return _BAD if any(value is _BAD for value in made.values()) else made

    def _union(self, raw: Any, args: tuple[Any, ...], info: FieldInfo, path: Path, default: Any) -> Any:
        if raw is None and type(None) in args:
            return None
        kinds = [kind for kind in args if kind is not type(None)]
        if len(kinds) == 1:
            return self.value(raw, kinds[0], info, path, default)
        nearest: list[Finding] = []
        for kind in kinds:
            attempt = _Reader(self._origin, self._models)
            value = attempt.value(raw, kind, info, path, default)
            if value is not _BAD:
                self.findings += attempt.findings
                return value
            if any(finding.code != "type" or finding.path != path for finding in attempt.findings):
                nearest = attempt.findings  # right in kind, wrong in itself: the finding that helps
        self.findings += nearest
        want = " or ".join(wanted(kind) for kind in kinds)
        return _BAD if nearest else self.wrong(raw, want, info, path, "change it")

    # Classes

    def _class(self, raw: Any, cls: type, path: Path) -> Any:
        if isinstance(raw, cls):
            return raw
        if not isinstance(raw, Mapping):
            return self.wrong(raw, "a mapping", _NO_INFO, path, remedy_for(dict, raw, attrs.NOTHING))
        known = options(cls)
        given: dict[str, Any] = {}
        for key, value in raw.items():
            option = known.get(key)
            if option is None:
                self._unknown(cls, key, known, path)
            else:
                given[key] = self.value(value, option.type, option.info, (*path, key), option.attribute.default)
        missing = [option for option in known.values() if option.is_required and option.name not in given]
        for option in missing:
            self.complain((*path, option.name), "is missing", f"add `{option.name}:`", code="missing")
        if missing or any(value is _BAD for value in given.values()):
            return _BAD
        return self._make(cls, given, known, path)

    def _unknown(self, cls: type, key: Any, known: Mapping[str, Option], path: Path) -> None:
        place = (*path, key if isinstance(key, str) else str(key))
        if retired := _RETIRED.get(cls, {}).get(key):
            self.complain(place, *retired, code="not-available")
        else:
            self.complain(place, "unknown key", did_you_mean(str(key), known), code="unknown-key")

    def _make(self, cls: type, given: dict[str, Any], known: Mapping[str, Option], path: Path) -> Any:
        try:
            return cls(**given)
        except ConfigError as error:  # a component's own validator, with findings relative to its options
            for finding in error.findings:
                self.complain((*path, *finding.path), finding.message, finding.remedy, code=finding.code)
        except Exception as error:  # noqa: BLE001 - a plugin's border: whatever its validators raise is a finding
            holds_secret = any(option.info.is_secret for option in known.values())
            what = type(error).__name__ if holds_secret else str(error) or type(error).__name__
            self.complain(path, f"is refused: {what}", "see `kvfleet components`", code="invalid")
        return _BAD

    def _stage(self, raw: Any, path: Path) -> Any:
        """One entry of ``pipeline:``, either form."""
        if isinstance(raw, StageConfig):
            return raw
        entry = {"use": raw} if isinstance(raw, str) else raw
        if not isinstance(entry, Mapping):
            return self.wrong(raw, "`kind.name`, or a mapping with `use`", _NO_INFO, path, "as in `- filter.health`")
        for key in entry:
            if key not in _STAGE_KEYS:
                self.complain((*path, str(key)), "unknown key", did_you_mean(str(key), _STAGE_KEYS), code="unknown-key")
        if "use" not in entry:
            return self.complain((*path, "use"), "is missing", "add `use:`", code="missing")
        place = path if isinstance(raw, str) else (*path, "use")
        use = self._text(entry["use"], _USE, place)
        name = self._text(entry.get("name", ""), _NO_INFO, (*path, "name"))
        on_error = self._text(entry.get("on_error", "fail"), _ON_ERROR, (*path, "on_error"))
        given = self._mapping(entry.get("with", {}), (str, Any), _NO_INFO, (*path, "with"))
        if any(part is _BAD for part in (use, name, on_error, given)):
            return _BAD
        return StageConfig(
            use=use, name=name, on_error=on_error if "on_error" in entry else "", options=given, path=path
        )

    # Types that YAML has no words for

    def _other(self, raw: Any, kind: Any, info: FieldInfo, path: Path) -> Any:
        words = _words_of(kind)
        if words is not None:
            return self._word(raw, words, info, path)
        try:
            return _CONVERTER.structure(raw, kind)
        except Exception:  # noqa: BLE001 - cattrs raises what the type's own constructor raises
            return self.wrong(raw, wanted(kind), info, path, "write it as text")

    def _word(self, raw: Any, words: Mapping[Any, Any], info: FieldInfo, path: Path) -> Any:
        """One of an enumeration's or a literal's values."""
        if isinstance(raw, bool) or not isinstance(raw, str | int | float) or raw not in words:
            known = [str(word) for word in words]
            what = "has no value" if raw is None else f"{named(raw, info)} is not allowed here"
            return self.complain(path, what, did_you_mean(str(raw), known), code="choice")
        return words[raw]


_SCALARS = frozenset({str, bool, int, float})
_LISTS: dict[Any, Any] = {
    tuple: tuple,
    list: list,
    set: set,
    frozenset: frozenset,
    collections.abc.Sequence: tuple,
    collections.abc.Collection: tuple,
    collections.abc.Iterable: tuple,
}
_MAPPINGS = frozenset({dict, collections.abc.Mapping, collections.abc.MutableMapping})
_CONVERTER = cattrs.Converter()
_USE = FieldInfo(doc="", pattern=_STAGE.pattern, pattern_doc="a stage's `kind.name`", example="filter.health")
_ON_ERROR = FieldInfo(doc="", choices=("fail", "skip"))


def _plural(limits: str, noun: str) -> str:
    return f"{limits} {noun}" if limits.endswith(" 1") else f"{limits} {noun}s"


def _items(info: FieldInfo) -> FieldInfo:
    """The description of a collection's items: bounds speak of the collection's length."""
    return info if info.ge is None else attrs.evolve(info, ge=None)


def _words_of(kind: Any) -> Mapping[Any, Any] | None:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {member.value: member for member in kind}
    if typing.get_origin(kind) is typing.Literal:
        return {word: word for word in typing.get_args(kind)}
    return None
