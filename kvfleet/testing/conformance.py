"""`check_component`: does a component keep its contract?

A plugin author calls it in a test of their own. It tries the component on a small fleet and many kinds of request, and
raises one `ConformanceError` that lists everything that is wrong::

    from kvfleet.testing.conformance import check_component

    def test_least_busy_keeps_the_contract():
        check_component(LeastBusy)
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import io
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import attrs
import ruamel.yaml

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.config.convert import structure, unstructure
from kvfleet.config.fields import FieldInfo, info_of, options_of
from kvfleet.config.findings import did_you_mean
from kvfleet.pipeline.build import adapter_options
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Fact, Kind
from kvfleet.plugin.manager import discover
from kvfleet.testing.adapters import make_adapter
from kvfleet.testing.kinds import CHECKS
from kvfleet.testing.trial import Trial

__all__ = ["ConformanceError", "check_component", "kind_of"]

_MOST_STATE_BYTES = 256 * 1024


class ConformanceError(AssertionError):
    """A component that breaks its contract; `breaches` says how, one sentence each."""

    def __init__(self, name: str, breaches: Sequence[str]) -> None:
        self.breaches = tuple(breaches)
        lines = "".join(f"\n  - {breach}" for breach in self.breaches)
        super().__init__(f"{name} breaks the contract of its kind:{lines}")


def check_component(
    component: Component | type,
    /,
    *,
    facts: Mapping[Fact[Any], Any] | None = None,
    **sample_options: Any,
) -> None:
    """Check that a component keeps the contract of its kind.

    Checked are: a docstring; options with a doc, a default (or a sample here) and a sound range; the round trip of the
    options through YAML; the kind's verb, sync or async as the contract has it; `provision`, `aopen`, `aclose` (twice)
    and `state`; and by kind, on many contexts, that what the verb returns is what the engine takes, is the same for the
    same input, and leaves its input alone.

    Args:
        component: The component, or its class; a class alone is checked without what only its registration says
            (`needs` and `gives`).
        facts: Values of facts it needs, where no installed classifier gives them.
        sample_options: Values of options that have no default, and of those whose default switches the component off.

    Raises:
        ConformanceError: with every breach.

    >>> import attrs
    >>> from kvfleet.config.fields import number
    >>> from kvfleet.router.scoring import rank
    >>> @attrs.frozen
    ... class ByQuality:
    ...     '''Send the request to the best model.'''
    ...     bonus: float = number(0.0, doc="Added to every score.")
    ...     def select(self, models, context=None):
    ...         return rank(models, [self.bonus + model.quality_score for model in models])
    >>> check_component(ByQuality)
    """
    name = component.key if isinstance(component, Component) else component.__qualname__
    breaches = _run(lambda: _check(component, dict(facts or {}), sample_options))
    if breaches:
        raise ConformanceError(name, breaches)


def kind_of(cls: type) -> Kind | None:
    """The kind a class is meant to be of, by its verb; any kind may also observe. None if it has no verb.

    >>> kind_of(int) is None
    True
    """
    if issubclass(cls, InferenceAdapter):
        return Kind.ADAPTER
    verbs = [kind for kind in Kind if kind.verb and callable(getattr(cls, kind.verb, None))]
    return next((kind for kind in verbs if kind is not Kind.OBSERVE), verbs[0] if verbs else None)


def _run(work: Callable[[], Coroutine[Any, Any, list[str]]]) -> list[str]:
    """Run a coroutine, also from within a running loop, as async tests call this."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(work())).result()


async def _check(component: Component | type, facts: Mapping[Fact[Any], Any], sample: Mapping[str, Any]) -> list[str]:
    cls = component.cls if isinstance(component, Component) else component
    if not attrs.has(cls):
        return ["it is not an attrs class; decorate it with @attrs.frozen or @attrs.define"]
    kind = component.kind if isinstance(component, Component) else kind_of(cls)
    if kind is None:
        known = ", ".join(f"{k.verb}()" for k in Kind if k.verb)
        return [f"it has no verb; a component has one of {known}"]
    breaches = _check_declaration(cls, kind) + _check_options(cls, kind, sample)
    if breaches:
        return breaches  # an instance made from wrong options would only repeat them
    table = discover()
    trial = Trial(
        kind=kind,
        make=lambda services: _make(cls, kind, sample, services),
        component=component if isinstance(component, Component) else None,
        facts=facts,
        table=table,
    )
    breaches += await _check_life(trial, sample, cls)
    return breaches or await CHECKS[kind](trial)


# Declaration


_ASYNC = frozenset({Kind.CLASSIFY, Kind.ADMIT, Kind.ANSWER, Kind.EXECUTE, Kind.OBSERVE, Kind.JUDGE})


def _check_declaration(cls: type, kind: Kind) -> list[str]:
    breaches = []
    if not (cls.__doc__ or "").strip() or (cls.__doc__ or "").startswith(f"{cls.__name__}("):
        breaches.append("it has no docstring; its first line is what `kvfleet components` shows")
    wanted = {verb: kind in _ASYNC for verb in (kind.verb,) if verb} | {"observe": True, "aopen": True, "aclose": True}
    wanted |= {"provision": False, "state": False}
    for name, is_async in wanted.items():
        method = getattr(cls, name, None)
        if method is None:
            continue
        if inspect.iscoroutinefunction(method) != is_async:
            breaches.append(f"{name}() must {'be async' if is_async else 'not be async'}")
    return breaches


# Options


def _own_options(cls: type, kind: Kind) -> dict[str, attrs.Attribute[Any]]:
    """The options users set; the fields every adapter has are not among them."""
    every = options_of(cls)
    if kind is not Kind.ADAPTER:
        return dict(every)
    inherited = options_of(InferenceAdapter)
    return {name: attribute for name, attribute in every.items() if name not in inherited}


def _check_options(cls: type, kind: Kind, sample: Mapping[str, Any]) -> list[str]:
    options = _own_options(cls, kind)
    breaches = [f"there is no option {name!r}; {did_you_mean(name, options)}" for name in sample if name not in options]
    for name, attribute in options.items():
        info = info_of(attribute)
        if info is None or not info.doc.strip():
            breaches.append(
                f"option {name!r} has no doc; make it with a function of kvfleet.config.fields, or init=False"
            )
        elif name.startswith("_") or attribute.name.startswith("_"):
            breaches.append(f"option {name!r} must not begin with an underscore; state is init=False")
        elif attribute.default is attrs.NOTHING and name not in sample:
            breaches.append(f"option {name!r} has no default; give check_component a sample, as in {name}=…")
    return breaches or _check_yaml(adapter_options(cls) if kind is Kind.ADAPTER else cls, options, sample)


def _check_yaml(cls: type, options: Mapping[str, attrs.Attribute[Any]], sample: Mapping[str, Any]) -> list[str]:
    """Read defaults and sample as the pipeline reads `with:`, write them, and read them again."""
    plain = _plain_defaults(options) | {name: _plain(value) for name, value in sample.items()}
    first, findings = structure(cls, plain)
    if findings:
        return [f"its own default or sample is refused: {finding}" for finding in findings]
    secrets = {name: plain[name] for name in options if name in plain and _info(options[name]).is_secret}
    again, findings = structure(cls, _through_yaml(unstructure(first)) | secrets)
    if findings:
        return [f"what it was written as is refused when read: {finding}" for finding in findings]
    wrong = [name for name, a in options.items() if getattr(again, a.name) != getattr(first, a.name)]
    return [f"option {name!r} is not the same after it was written as YAML and read back" for name in wrong]


def _info(attribute: attrs.Attribute[Any]) -> FieldInfo:
    info = info_of(attribute)
    assert info is not None  # noqa: S101 - checked before
    return info


def _plain_defaults(options: Mapping[str, attrs.Attribute[Any]]) -> dict[str, Any]:
    """Simple defaults, spelled out, so that they are checked against their own range."""
    return {
        name: attribute.default
        for name, attribute in options.items()
        if isinstance(attribute.default, str | int | float)
    }


def _plain(value: Any) -> Any:
    return unstructure(value) if attrs.has(type(value)) else value


def _through_yaml(data: Any) -> Any:
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    stream = io.StringIO()
    yaml.dump(data, stream)
    return yaml.load(stream.getvalue())


def _make(cls: type, kind: Kind, sample: Mapping[str, Any], services: Services) -> Any:
    """A fresh, wired instance."""
    if kind is Kind.ADAPTER:
        return make_adapter(cls, sample)
    instance = cls(**sample)
    if callable(provision := getattr(instance, "provision", None)):
        provision(services)
    return instance


# Life


async def _check_life(trial: Trial, sample: Mapping[str, Any], cls: type) -> list[str]:
    """Make it, wire it, close it unopened, open it, close it twice; look at its state and its repr."""
    where = "it cannot be made and provisioned"
    try:
        unopened, opened = trial.fresh(), trial.fresh()
        where = "aclose() fails without aopen()"
        await _call(unopened, "aclose")
        where = "aopen() fails"
        await _call(opened, "aopen")
        breaches = _check_state(opened)
        where = "aclose() fails"
        await _call(opened, "aclose")
        where = "aclose() fails the second time"
        await _call(opened, "aclose")
    except Exception as error:  # noqa: BLE001 - whatever a component raises here is the breach
        return [f"{where}: {type(error).__name__}: {error}"]
    return breaches + _check_secrecy(opened, sample, cls)


async def _call(instance: Any, name: str) -> None:
    if callable(method := getattr(instance, name, None)):
        await method()


def _check_state(instance: Any) -> list[str]:
    if not callable(read := getattr(instance, "state", None)):
        return []
    state = read()
    if not isinstance(state, Mapping):
        return [f"state() must give a mapping, not {type(state).__name__}"]
    try:
        size = len(json.dumps(dict(state)))
    except (TypeError, ValueError) as error:
        return [f"state() must hold plain JSON types: {error}"]
    if size > _MOST_STATE_BYTES:
        return [f"state() of a fresh component takes {size} bytes; it must stay bounded"]
    return []


def _check_secrecy(instance: Any, sample: Mapping[str, Any], cls: type) -> list[str]:
    secrets = [
        value
        for name, attribute in options_of(cls).items()
        if (info := info_of(attribute)) and info.is_secret and isinstance(value := sample.get(name), str) and value
    ]
    shown = repr(instance) + (str(instance.state()) if callable(getattr(instance, "state", None)) else "")
    return ["its repr or state shows a secret option"] if any(secret in shown for secret in secrets) else []
