"""Discovery: from entry points to a table of components, with what is broken isolated and named.

`discover` reads the entry points of the group ``kvfleet``, kvfleet's own among them, and gives a `ComponentTable`: a
plain value that is passed down to whoever needs it. There is no global registry.

A plugin that cannot be imported, implements an unknown hook, or brings something that is not a component is set aside
whole; the rest works. Only who *uses* a component of a broken plugin is stopped, by the error of `ComponentTable.get`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import pluggy

from kvfleet.config.findings import Finding, did_you_mean
from kvfleet.config.schema import FleetConfig
from kvfleet.errors import ComponentError, PluginError
from kvfleet.plugin import spec
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Kind, Outcome

if TYPE_CHECKING:
    import click

__all__ = ["BUILTIN_DISTRIBUTION", "DISABLE_VARIABLE", "ComponentTable", "EntryPoint", "PluginInfo", "discover"]

log = logging.getLogger(__name__)

BUILTIN_DISTRIBUTION = "kvfleet"
DISABLE_VARIABLE = "KVFLEET_DISABLE_PLUGINS"
"""Environment variable: plugins to leave out, by entry-point or distribution name, separated by commas."""

_USUAL = {Kind.SELECT: "hybrid_score", Kind.EXECUTE: "fallback"}
"""What ``use: select`` and ``use: execute`` mean without a name."""


class EntryPoint(Protocol):
    """What is used of `importlib.metadata.EntryPoint`."""

    @property
    def name(self) -> str:
        """The entry point's name."""

    @property
    def value(self) -> str:
        """What it points to, as ``module`` or ``module:object``."""

    @property
    def dist(self) -> Any:
        """The distribution, with ``name`` and ``version``; None if it is not known."""

    def load(self) -> Any:
        """Import what it points to."""


@attrs.frozen(kw_only=True)
class PluginInfo:
    """One plugin, as ``kvfleet plugins`` shows it.

    Attributes:
        name: The entry point's name.
        distribution, version: Who brought it.
        module: What the entry point points to.
        components: What it brings; empty if it is broken or disabled.
        hooks: Names of the hooks it implements.
        cause: What is wrong with it; empty if nothing is.
        traceback: The cause in full, for ``kvfleet plugins -v``.
        is_disabled: True if it was left out on request.
    """

    name: str
    distribution: str
    version: str = ""
    module: str = ""
    components: tuple[Component, ...] = ()
    hooks: tuple[str, ...] = ()
    cause: str = ""
    traceback: str = attrs.field(default="", repr=False)
    is_disabled: bool = False

    @property
    def is_broken(self) -> bool:
        """True if it cannot be used."""
        return bool(self.cause)

    @property
    def status(self) -> str:
        """``ok``, ``disabled`` or ``broken``."""
        return "broken" if self.is_broken else "disabled" if self.is_disabled else "ok"

    @property
    def label(self) -> str:
        """Entry point and distribution in words: ``slo (kvfleet-slo 0.1.0)``."""
        return (
            f"{self.name} ({self.distribution} {self.version})"
            if self.version
            else f"{self.name} ({self.distribution})"
        )


Caller = Callable[..., Any]


@attrs.frozen
class _Hooks:
    """For each hook, the plugins that implement it, each with a caller of its own, so that one's failure is its own."""

    commands: tuple[tuple[PluginInfo, Caller], ...] = ()
    secret: tuple[tuple[PluginInfo, Caller], ...] = ()
    lint: tuple[tuple[PluginInfo, Caller], ...] = ()
    route_finished: tuple[tuple[PluginInfo, Caller], ...] = ()


@attrs.frozen
class ComponentTable:
    """Every component there is, by kind and name, and the hooks of the plugins that brought them.

    Attributes:
        plugins: Every plugin found, by distribution and name, broken and disabled ones included.
    """

    plugins: tuple[PluginInfo, ...] = ()
    _by_key: Mapping[tuple[Kind, str], tuple[Component, ...]] = attrs.field(factory=dict, repr=False)
    _aliases: Mapping[tuple[Kind, str], str] = attrs.field(init=False, repr=False)
    _hooks: _Hooks = attrs.field(factory=_Hooks, repr=False)

    @_aliases.default
    def _make_aliases(self) -> dict[tuple[Kind, str], str]:
        """The one table of other names; a component's own name goes before another's alias."""
        usable = [found[0] for found in self._by_key.values() if len(found) == 1]
        return {(c.kind, a): c.name for c in usable for a in c.aliases if (c.kind, a) not in self._by_key}

    def get(self, kind: Kind, name: str) -> Component:
        """The component of that kind and name, or alias.

        Raises:
            ComponentError: if there is none, or two distributions bring one; says what to do.
        """
        found = self._by_key.get((kind, self._aliases.get((kind, name), name)), ())
        if len(found) == 1:
            return found[0]
        if found:
            raise ComponentError(_conflict(found))
        raise ComponentError(self._unknown(kind, name))

    def of_kind(self, kind: Kind) -> tuple[Component, ...]:
        """The usable components of a kind, by name."""
        return tuple(c[0] for (k, _), c in sorted(self._by_key.items()) if k is kind and len(c) == 1)

    def names(self, kind: Kind) -> tuple[str, ...]:
        """The names `get` knows for a kind."""
        return tuple(component.name for component in self.of_kind(kind))

    @property
    def components(self) -> tuple[Component, ...]:
        """Every usable component, by the order of the kinds and by name."""
        return tuple(component for kind in Kind for component in self.of_kind(kind))

    @property
    def conflicts(self) -> tuple[tuple[Component, ...], ...]:
        """Components that several distributions bring under one name; nobody can use these."""
        return tuple(found for _, found in sorted(self._by_key.items()) if len(found) > 1)

    def find_stage(self, use: str) -> Component:
        """The component that a ``use:`` names, as in ``filter.health``; ``select`` and ``execute`` may stand alone.

        Raises:
            ComponentError: if there is none; says what to do.
        """
        kind_name, dot, name = use.partition(".")
        stages = [kind.value for kind in Kind if kind.is_stage]
        if kind_name not in stages:
            raise ComponentError(
                f"{use!r} is no stage: {kind_name!r} is no kind of stage; {did_you_mean(kind_name, stages)}"
            )
        kind = Kind(kind_name)
        if not dot and kind in _USUAL:
            return self.get(kind, _USUAL[kind])
        if not name:
            remedy = f"write {kind}.NAME; {did_you_mean('', (f'{kind}.{n}' for n in self.names(kind)))}"
            raise ComponentError(f"{use!r} names no component; {remedy}")
        return self.get(kind, name)

    def secret(self, reference: str) -> str | None:
        """What the first plugin that knows the reference says, or None.

        Raises:
            PluginError: if a plugin fails; its message is not repeated, for it may hold what was being read.
        """
        for info, call in self._hooks.secret:
            try:
                value: str | None = call(reference=reference)
            except Exception as error:  # a plugin's border
                raise PluginError(
                    f"plugin {info.label} failed on a secret reference ({type(error).__name__})"
                ) from error
            if value is not None:
                return value
        return None

    def lint(self, config: FleetConfig) -> list[Finding]:
        """The plugins' own findings; a plugin that fails is a finding too."""
        found: list[Finding] = []
        for info, call in self._hooks.lint:
            try:
                found.extend(finding for given in call(config=config) for finding in given)
            except Exception as error:  # noqa: BLE001 - a plugin's border: named, and the rest goes on
                found.append(
                    Finding(
                        f"plugin {info.label} failed while it checked the file: {_cause(error)}",
                        f"tell its author, or set {DISABLE_VARIABLE}={info.name}",
                        file=config.origin.file,
                        code="plugin",
                    )
                )
        return found

    def route_finished(self, outcome: Outcome) -> None:
        """Tell the plugins; one that fails is logged."""
        for info, call in self._hooks.route_finished:
            try:
                call(outcome=outcome)
            except Exception as error:  # noqa: BLE001 - a plugin's border: the answer has left
                log.warning(
                    "plugin failed plugin=%s hook=kvfleet_route_finished error=%s", info.name, type(error).__name__
                )

    def add_commands(self, cli: click.Group) -> tuple[str, ...]:
        """Let the plugins add commands.

        Returns:
            For each plugin that failed, or that took a name which was already used, what is wrong.
        """
        problems: list[str] = []
        for info, call in self._hooks.commands:
            before = dict(cli.commands)
            try:
                call(cli=cli)
            except Exception as error:  # noqa: BLE001 - a plugin's border: the command line must still work
                problems.append(f"plugin {info.label} could not add its commands: {_cause(error)}")
                cli.commands.clear()
                cli.commands.update(before)
                continue
            for name, command in before.items():
                if cli.commands.get(name) is not command:
                    problems.append(f"plugin {info.label} may not replace the command {name!r}")
                    cli.commands[name] = command
        return tuple(problems)

    def _unknown(self, kind: Kind, name: str) -> str:
        names = (*self.names(kind), *(alias for k, alias in self._aliases if k is kind))
        label = f"{kind}.{name}" if kind.is_stage else f"{kind} {name!r}"
        shown = [f"{kind}.{n}" for n in names] if kind.is_stage else list(names)
        remedy = did_you_mean(f"{kind}.{name}" if kind.is_stage else name, shown)
        absent = [_absence(plugin) for plugin in self.plugins if plugin.status != "ok"]
        if not absent:
            return f"there is no {label}; {remedy}"
        # What they bring is not known, and it may be this: that goes before a guess at another component.
        return f"there is no {label}: {'; '.join(absent[:3])}; {remedy}"


def discover(
    *, environ: Mapping[str, str] | None = None, entry_points: Iterable[EntryPoint] | None = None
) -> ComponentTable:
    """Find and examine every installed plugin.

    Args:
        environ: Read for `DISABLE_VARIABLE`; the process's own if None.
        entry_points: What to examine instead of what is installed.
    """
    off = _disabled(os.environ if environ is None else environ)
    # pluggy's own load_setuptools_entrypoints reads every installed distribution: 51 ms, against 1.2 ms for this.
    found = importlib.metadata.entry_points(group=spec.ENTRY_POINT_GROUP) if entry_points is None else entry_points
    points = tuple(found)
    # Name and version each parse the distribution's metadata, 0.2 ms: done once for all its plugins.
    who = {
        id(dist): (str(dist.name), str(dist.version)) for dist in {id(p.dist): p.dist for p in points}.values() if dist
    }
    examined = [_examine(point, *who.get(id(point.dist), (_top_package(point), "")), off) for point in points]
    examined.sort(key=lambda pair: (pair[0].distribution, pair[0].name))
    by_key: dict[tuple[Kind, str], tuple[Component, ...]] = {}
    for info, _ in examined:
        for component in info.components:
            key = component.kind, component.name
            by_key[key] = (*by_key.get(key, ()), component)
    return ComponentTable(tuple(info for info, _ in examined), by_key, _bind(examined))


def _bind(examined: Sequence[tuple[PluginInfo, pluggy.PluginManager]]) -> _Hooks:
    def callers(hook: str) -> tuple[tuple[PluginInfo, Caller], ...]:
        return tuple((info, getattr(manager.hook, hook)) for info, manager in examined if hook in info.hooks)

    return _Hooks(**{name: callers(f"kvfleet_{name}") for name in ("commands", "secret", "lint", "route_finished")})


def _top_package(point: EntryPoint) -> str:
    """What an entry point whose distribution is not known is called after."""
    return point.value.partition(":")[0].partition(".")[0]


def _examine(
    point: EntryPoint, distribution: str, version: str, off: frozenset[str]
) -> tuple[PluginInfo, pluggy.PluginManager]:
    """Load one plugin into a manager of its own: a broken one leaves no trace in the others'."""
    manager = pluggy.PluginManager(spec.PROJECT)
    manager.add_hookspecs(spec)
    info = PluginInfo(name=point.name, distribution=distribution, version=version, module=point.value)
    if off & {_normal(info.name), _normal(info.distribution)}:
        return attrs.evolve(info, is_disabled=True), manager
    try:
        hooks = _register(manager, point.load(), info)
        components = _collect(manager, info) if "kvfleet_components" in hooks else ()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin's border: anything may go wrong while it is imported
        text = "".join(traceback.format_exception(error))
        return attrs.evolve(info, cause=_cause(error), traceback=text), pluggy.PluginManager(spec.PROJECT)
    return attrs.evolve(info, hooks=hooks, components=components), manager


def _register(manager: pluggy.PluginManager, plugin: Any, info: PluginInfo) -> tuple[str, ...]:
    """Register a plugin and check every hook it implements; gives their names.

    Raises:
        PluginError: if it implements none, or one that does not exist, or with arguments that do not exist.
    """
    try:
        manager.register(plugin, name=info.name)
    except pluggy.PluginValidationError as error:
        raise PluginError(_on_one_line(str(error))) from error
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        optional = all(impl.optionalhook for impl in caller.get_hookimpls())
        if not caller.has_spec() and not optional:
            known = [name for name in spec.__all__ if name.startswith("kvfleet_")]
            raise PluginError(
                f"it implements the hook {caller.name}, which does not exist; {did_you_mean(caller.name, known)}"
            )
    if not callers:
        raise PluginError(
            f"{info.module} implements no hook; mark its functions with @hookimpl from kvfleet.plugin.spec"
        )
    return tuple(sorted(caller.name for caller in callers if caller.has_spec()))


def _collect(manager: pluggy.PluginManager, info: PluginInfo) -> tuple[Component, ...]:
    """The plugin's components, stamped with its distribution.

    Raises:
        PluginError: if it yields anything else, or one name twice.
    """
    found: dict[tuple[Kind, str], Component] = {}
    for given in manager.hook.kvfleet_components():
        for component in given:
            if not isinstance(component, Component):
                raise PluginError(f"kvfleet_components() must yield Component, not {type(component).__name__}")
            if (component.kind, component.name) in found:
                raise PluginError(f"it brings {component.key} twice")
            found[component.kind, component.name] = attrs.evolve(component, distribution=info.distribution)
    return tuple(found.values())


def _absence(plugin: PluginInfo) -> str:
    """Why a plugin's components are not there."""
    if plugin.is_broken:
        return f"plugin {plugin.label} is broken: {plugin.cause}"
    return f"plugin {plugin.label} is disabled by {DISABLE_VARIABLE}, and may bring it"


def _conflict(found: Sequence[Component]) -> str:
    distributions = list(dict.fromkeys(component.distribution for component in found))
    who = " and ".join(distributions) if len(distributions) > 1 else f"two plugins of {distributions[0]}"
    return f"{found[0].key} is brought by {who}; uninstall one, or leave it out with {DISABLE_VARIABLE}=NAME"


def _disabled(environ: Mapping[str, str]) -> frozenset[str]:
    return frozenset(_normal(name) for name in environ.get(DISABLE_VARIABLE, "").split(",") if name.strip())


def _normal(name: str) -> str:
    """A name as packaging compares it: case, hyphens, underscores and dots make no difference."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _cause(error: BaseException) -> str:
    if isinstance(error, ComponentError):
        return str(error)
    return _on_one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
