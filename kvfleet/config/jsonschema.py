"""The JSON Schema (draft 2020-12) of a fleet file, from the same descriptions that validate it.

Editors use it through a first line ``# yaml-language-server: $schema=fleet.schema.json``. It is as strict as the
converter where JSON Schema can be: what refers to something else in the file is checked by ``kvfleet validate`` alone.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterable
from typing import Any, Protocol

import attrs

from kvfleet.config.fields import FieldInfo
from kvfleet.config.options import Option, options
from kvfleet.config.plain import to_plain
from kvfleet.config.schema import FleetConfig, ModelConfig, PolicyRule, StageConfig
from kvfleet.config.wording import wanted

__all__ = ["DRAFT", "ComponentLike", "schema"]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]

_JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number"}
_STAGES = ("classify", "admit", "filter", "answer", "affinity", "score", "select", "execute", "observe")


class ComponentLike(Protocol):
    """What is read of a component: its kind, name and attrs class."""

    @property
    def kind(self) -> str:
        """Its kind, as in ``filter``."""

    @property
    def name(self) -> str:
        """Its name, as in ``health``."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names that mean the same."""

    @property
    def cls(self) -> type:
        """Its class, whose init fields are its options."""


def schema(components: Iterable[ComponentLike] = (), *, case: type | None = None) -> Schema:
    """The schema of a fleet file.

    Args:
        components: Those whose options are described.
        case: The attrs class of an entry of ``tests:``; such entries are any mappings without it.
    """
    writer = _Writer(tuple(components))
    root = writer.object(FleetConfig)
    if case is not None:
        root["properties"]["tests"]["items"] = writer.entry(case)
    root["properties"]["strategy"] |= writer.words("select")
    root["required"] = ["models"]
    head = {"$schema": DRAFT, "title": "kvfleet fleet file", **root}
    stage = writer.stage()  # it adds definitions of its own
    return {**head, "$defs": {**dict(sorted(writer.definitions.items())), "stage": stage}}


class _Writer:
    """Collects the definitions that the schema refers to."""

    def __init__(self, components: tuple[ComponentLike, ...]) -> None:
        self.definitions: dict[str, Schema] = {}
        self._components = components

    def words(self, kind: str) -> Schema:
        """The names of a kind's components, as suggestions: a plugin may bring others."""
        own = [component for component in self._components if str(component.kind) == kind]
        names = sorted(name for component in own for name in (component.name, *component.aliases))
        return {"anyOf": [{"enum": names}, {"type": "string"}]} if names else {}

    def object(self, cls: type, *, leave_out: frozenset[str] = frozenset()) -> Schema:
        """An attrs class as an object without further keys."""
        known = {name: option for name, option in options(cls).items() if name not in leave_out}
        out: Schema = {"type": "object", "additionalProperties": False}
        if cls.__doc__:
            out["description"] = cls.__doc__.strip().partition("\n")[0]
        out["properties"] = {name: self._option(cls, option) for name, option in known.items()}
        required = [name for name, option in known.items() if option.is_required]
        return out | ({"required": required} if required else {})

    def _option(self, cls: type, option: Option) -> Schema:
        out: Schema = {"description": _described(option.info)} if option.info.doc else {}
        default = to_plain(option.default()) if option.default() is not attrs.NOTHING else None
        if default not in (None, "", {}, []) and not option.info.is_secret:
            out["default"] = default
        if option.info.example is not None:
            out["examples"] = [to_plain(option.info.example)]
        out |= self._type(option.type, option.info)
        if "pattern" in out and option.default() == "":
            out["pattern"] = f"{out['pattern']}|^$"
        special = {(ModelConfig, "provider"): "adapter", (PolicyRule, "action"): "action"}.get((cls, option.name))
        return out | self.words(special) if special else out

    def _type(self, kind: Any, info: FieldInfo) -> Schema:
        outer = typing.get_origin(kind)
        if outer in (types.UnionType, typing.Union):
            return self._union(typing.get_args(kind), info)
        if kind in _JSON_TYPES:
            return {"type": _JSON_TYPES[kind], **_limits(kind, info)}
        if attrs.has(kind):
            return {"$ref": f"#/$defs/{'stage' if kind is StageConfig else self._define(kind)}"}
        if wanted(kind) == "a mapping":
            return {"type": "object", "additionalProperties": self._type((*typing.get_args(kind), Any, Any)[1], info)}
        if outer is not None and outer is not typing.Literal:
            return self._list(kind, info)
        return _words(kind)

    def _union(self, kinds: tuple[Any, ...], info: FieldInfo) -> Schema:
        parts = [{"type": "null"} if kind is type(None) else self._type(kind, info) for kind in kinds]
        return {"anyOf": parts}

    def _list(self, kind: Any, info: FieldInfo) -> Schema:
        items = self._type((*typing.get_args(kind), Any)[0], attrs.evolve(info, ge=None))
        return {"type": "array", "items": items} | ({"minItems": int(info.ge)} if info.ge else {})

    def entry(self, cls: type) -> Schema:
        """A reference to an attrs class, which is described among the definitions."""
        return {"$ref": f"#/$defs/{self._define(cls)}"}

    def _define(self, cls: type) -> str:
        name = cls.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # a class that holds its own kind finds this, and goes no deeper
            self.definitions[name] = self.object(cls)
            if cls is ModelConfig:
                self.definitions[name] |= self._adapter_options()
        return name

    def _adapter_options(self) -> Schema:
        """What may stand under a model's ``options`` depends on its provider."""
        rules = []
        for component in self._of("adapter"):
            # What every adapter has (endpoint, credential, …) is not described there: the model itself says it.
            common = frozenset(name for name, option in options(component.cls).items() if not option.info.doc)
            own = self.object(component.cls, leave_out=common)
            condition = {"properties": {"provider": {"const": component.name}}, "required": ["provider"]}
            rules.append({"if": condition, "then": {"properties": {"options": own}}})
        return {"allOf": rules} if rules else {}

    def _of(self, kind: str) -> list[ComponentLike]:
        return sorted((c for c in self._components if str(c.kind) == kind), key=lambda component: component.name)

    def stage(self) -> Schema:
        """One entry of ``pipeline:``: a name, or a mapping whose ``with`` depends on its ``use``."""
        known = [(f"{kind}.{component.name}", component) for kind in _STAGES for component in self._of(kind)]
        names: Schema = {"type": "string", "pattern": r"^[a-z_]+(\.[a-z][a-z0-9_]*)?$"}
        use: Schema = {"anyOf": [{"enum": [name for name, _ in known]}, names]} if known else names
        entry: Schema = {
            "type": "object",
            "additionalProperties": False,
            "required": ["use"],
            "properties": {
                "use": {"description": "The component, as `kind.name`.", **use},
                "name": {"type": "string", "description": "A name of its own in traces."},
                "on_error": {"enum": ["fail", "skip"], "description": "What happens if the stage fails."},
                "with": {"type": "object", "description": "The component's options."},
            },
        }
        rules = [
            {"if": {"properties": {"use": {"const": name}}}, "then": {"properties": {"with": self.object(c.cls)}}}
            for name, c in known
        ]
        return {
            "description": "One stage of the pipeline.",
            "anyOf": [use, entry | ({"allOf": rules} if rules else {})],
        }


def _described(info: FieldInfo) -> str:
    notes = [info.doc]
    if info.unit:
        notes.append(f"In {info.unit}.")
    if info.is_secret:
        notes.append("Written as a reference: `env:NAME` or `file:/path`.")
    return " ".join(notes)


def _limits(kind: type, info: FieldInfo) -> Schema:
    if kind is str:
        out: Schema = {"enum": list(info.choices)} if info.choices else {}
        if info.pattern:
            out["pattern"] = f"^(?:{info.pattern})$"
        return out
    if kind is bool:
        return {}
    bounds = {
        "minimum": info.ge,
        "exclusiveMinimum": info.gt,
        "maximum": info.le,
        "exclusiveMaximum": info.lt,
    }
    return {name: limit for name, limit in bounds.items() if limit is not None}


def _words(kind: Any) -> Schema:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    if typing.get_origin(kind) is typing.Literal:
        return {"enum": list(typing.get_args(kind))}
    return {}
