"""Settings from elsewhere than the file: environment variables, and overrides of the calling program.

``KVFLEET__SECTION__KEY=value`` sets one value. What the text means is decided by the option's type, never by its looks:
``KVFLEET__FLEET_NAME=8`` is the text "8". List items go by their number (``KVFLEET__MODELS__0__ENDPOINT``), lists and
whole sections are written as JSON or in YAML's flow style (``["a", "b"]``).
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.config.findings import Finding, Path
from kvfleet.config.options import options
from kvfleet.config.schema import FleetConfig, StageConfig
from kvfleet.config.yaml import parse_yaml, scalar_value

__all__ = ["PREFIX", "Layers"]

PREFIX = "KVFLEET__"
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@attrs.define
class Layers:
    """A configuration's plain data while one layer after the other is laid over it.

    Attributes:
        data: The data so far; changed in place.
        positions: Where values stand in the file; what is overridden is taken out.
        others: Where values come from that are not in the file.
        findings: What is wrong with the layers themselves.
    """

    data: dict[str, Any]
    positions: dict[Path, tuple[int, int]] = attrs.field(factory=dict)
    others: dict[Path, str] = attrs.field(factory=dict)
    findings: list[Finding] = attrs.field(factory=list)

    def add_environment(self, environ: Mapping[str, str]) -> None:
        """Lay the ``KVFLEET__`` variables over the data; whole sections before the values within them."""
        names = [name for name in environ if name.startswith(PREFIX)]
        for name in sorted(names, key=_order):
            self._set(name, environ[name])

    def add_overrides(self, overrides: Mapping[str, Any], source: str = "<overrides>") -> None:
        """Merge a mapping: sections deeply, everything else as a whole."""
        self._merge(self.data, overrides, (), source)

    def _merge(self, target: dict[str, Any], over: Mapping[str, Any], path: Path, source: str) -> None:
        for key, value in over.items():
            place = (*path, key)
            if isinstance(value, Mapping):
                held = target.get(key)
                if not isinstance(held, dict):
                    held = target[key] = {}
                    self._mark(place, source)
                self._merge(held, value, place, source)
            else:
                target[key] = value
                self._mark(place, source)

    def _mark(self, path: Path, source: str) -> None:
        """Note who set a value; the positions of what it replaced no longer hold."""
        depth = len(path)
        for table in (self.positions, self.others):
            for stale in [place for place in table if place[:depth] == path]:
                del table[stale]
        self.others[path] = source

    def _complain(self, name: str, path: Path, message: str, remedy: str) -> None:
        self.findings.append(Finding(message, remedy, path, f"<environment> {name}", code="environment"))

    def _set(self, name: str, text: str) -> None:
        steps = name.removeprefix(PREFIX).lower().split("__")
        if not all(steps):
            self._complain(name, (), "names no setting", "write it as in KVFLEET__GATEWAY__PORT")
            return
        place: Any = self.data
        kind: Any = FleetConfig
        path: Path = ()
        for index, step in enumerate(steps):
            found = self._find(name, place, kind, step, path)
            if found is None:
                return
            key, kind = found
            path = (*path, key)
            if index == len(steps) - 1:
                self._write(name, place, key, _typed(text, kind), path)
                return
            is_new = key not in place if isinstance(place, dict) else key == len(place)
            place = _enter(place, key, kind, steps[index + 1])
            if is_new:
                self.others[path] = f"<environment> {name}"
            if place is None:
                self._complain(name, path, "holds one value, and nothing below it", "shorten the variable's name")
                return

    def _find(self, name: str, place: Any, kind: Any, step: str, path: Path) -> tuple[str | int, Any] | None:
        """The key or index that a step of a variable's name means, and the type of what is there."""
        kind = _without_none(kind)
        if isinstance(place, list):
            inner = (*typing.get_args(kind), Any)[0]
            if step.isdecimal() and int(step) <= len(place):
                return int(step), inner
            remedy = f"use 0 to {len(place)}; {len(place)} adds one"
            self._complain(name, path, f"{step!r} is not the number of one of its {len(place)} items", remedy)
            return None
        if attrs.has(kind):
            known = options(kind) if kind is not StageConfig else {}
            return step, known[step].type if step in known else Any
        inner = (*typing.get_args(kind), Any, Any)[1]
        written = {_folded(key): key for key in place if isinstance(key, str)}
        return written.get(_folded(step), step), inner

    def _write(self, name: str, place: Any, key: str | int, value: Any, path: Path) -> None:
        source = f"<environment> {name}"
        if isinstance(value, Mapping) and isinstance(place, dict) and isinstance(key, str):
            self._merge(place, {key: value}, path[:-1], source)
            return
        if isinstance(place, list) and key == len(place):
            place.append(value)
        else:
            place[key] = value
        self._mark(path, source)


def _order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Shorter names first, and numbers by their value."""
    steps = name.split("__")
    return len(steps), [(int(step), "") if step.isdecimal() else (-1, step) for step in steps]


def _folded(key: str) -> str:
    """A mapping's key as a variable's name can hold it."""
    return re.sub(r"[^a-z0-9]", "_", key.lower())


def _enter(place: Any, key: str | int, kind: Any, next_step: str) -> Any:
    """The collection at `key`, made if it is not there; None if a plain value stands there."""
    kind = _without_none(kind)
    held = place[key] if isinstance(place, list) and isinstance(key, int) and key < len(place) else None
    if isinstance(place, dict):
        held = place.get(key)
    if kind is StageConfig and isinstance(held, str):
        held = {"use": held}
    elif held is None:
        is_list = typing.get_origin(kind) is tuple or (kind is Any and next_step.isdecimal())
        held = [] if is_list else {}
    if not isinstance(held, dict | list) or (typing.get_origin(kind) or kind) in (str, int, float, bool):
        return None
    if isinstance(place, list) and key == len(place):
        place.append(held)
    else:
        place[key] = held
    return held


def _without_none(kind: Any) -> Any:
    """The one type of an optional one; unions of several are left to the converter."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kinds = [one for one in typing.get_args(kind) if one is not type(None)]
        return kinds[0] if len(kinds) == 1 else Any
    return kind


def _typed(text: str, kind: Any) -> Any:
    """A variable's text as a value of the option's type; unchanged if it is none, which the converter then reports."""
    if kind is not str and text.strip().lower() in ("", "null") and _without_none(kind) is not kind:
        return None
    kind = _without_none(kind)
    if kind is str:
        return text
    if kind is bool:
        return _FLAGS.get(text.strip().lower(), text)
    if kind in (int, float):
        number = scalar_value(text.strip()) if text.strip() else text
        return number if isinstance(number, int | float) and not isinstance(number, bool) else text
    parsed = parse_yaml(text)
    return text if not parsed.is_yaml or parsed.findings else parsed.data
