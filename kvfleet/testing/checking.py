"""What is wrong with a pipeline's tests, before any of them runs: names that do not exist, requests that are none."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import attrs

from kvfleet.config.findings import Finding, Path, did_you_mean
from kvfleet.config.origin import Origin
from kvfleet.config.schema import AUTO_MODEL, FleetConfig
from kvfleet.pipeline.build import read
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.manager import ComponentTable
from kvfleet.registry.models import ModelRegistry
from kvfleet.testing.vocabulary import Case, CaseRequest, Expected, Given

__all__ = ["Names", "check_case"]


@attrs.frozen(kw_only=True)
class Names:
    """The names a test may use.

    Attributes:
        models: The fleet's models.
        targets: Models, and replicas as ``model@endpoint``.
        asked: What a request may ask for: models, aliases, ``auto``.
        strategies: Strategies a request may ask for.
        stages: The pipeline's stages, as ``filter.health``.
        facts: Facts its classifiers give.
    """

    models: Collection[str]
    targets: Collection[str]
    asked: Collection[str]
    strategies: Collection[str]
    stages: Collection[str]
    facts: Collection[str]

    @classmethod
    def of(cls, config: FleetConfig, table: ComponentTable) -> Names:
        """The names of a fleet."""
        built, _ = read(config, table)
        models = {model.name for model in config.models}
        return cls(
            models=models,
            targets=models | {replica.id for replica in ModelRegistry.from_configs(config.models).replicas},
            asked=models | set(config.aliases) | {AUTO_MODEL},
            strategies={name for one in table.of_kind(Kind.SELECT) for name in (one.name, *one.aliases)},
            stages={f"{entry.component.kind}.{entry.name}" for entry in built},
            facts={fact.name for entry in built for fact in entry.component.gives},
        )


@attrs.frozen
class _Checker:
    """Checks the names of one case."""

    names: Names
    origin: Origin

    def _known(self, path: Path, what: str, words: Iterable[str], known: Collection[str]) -> Iterator[Finding]:
        for word in words:
            if word and word not in known:
                yield self.origin.finding(
                    path, f"unknown {what} {word!r}", did_you_mean(word, known), code="unknown-name"
                )

    def _items(self, path: Path, what: str, words: Iterable[str], known: Collection[str]) -> Iterator[Finding]:
        for index, word in enumerate(words):
            yield from self._known((*path, index), what, [word], known)

    def _keys(self, path: Path, what: str, words: Iterable[str], known: Collection[str]) -> Iterator[Finding]:
        for word in words:
            yield from self._known((*path, word), what, [word], known)

    def request(self, path: Path, request: CaseRequest) -> Iterator[Finding]:
        """A request asks one thing, of somebody who exists."""
        given = [key for key in ("prompt", "messages", "body") if getattr(request, key)]
        if len(given) != 1:
            what = f"has {' and '.join(given)}" if given else "has no prompt, messages or body"
            yield self.origin.finding(path, f"the request {what}", "give one of them", code="request")
        names = self.names
        yield from self._known((*path, "model"), "model", [request.model], names.asked)
        yield from self._items((*path, "models"), "model", request.models, names.models)
        yield from self._known((*path, "strategy"), "strategy", [request.strategy], names.strategies)

    def given(self, path: Path, given: Given) -> Iterator[Finding]:
        """The world's state speaks of those who exist."""
        for key in ("backends", "health", "load", "rate_limits"):
            yield from self._keys((*path, key), "model", getattr(given, key), self.names.targets)
            for target, state in given.health.items() if key == "health" else ():
                yield from self._known((*path, key, target), "state", [state], ("up", "down"))
        yield from self._known((*path, "select"), "model", [given.select], self.names.targets)

    def expected(self, path: Path, expect: Expected, repeat: int) -> Iterator[Finding]:
        """What is expected speaks of those who exist, and can be."""
        if expect == Expected():
            yield self.origin.finding(path, "nothing is expected", "say what must hold", code="empty-test")
        targets, names = self.names.targets, self.names
        for key in ("selected", "served_by"):
            yield from self._known((*path, key), "model", [getattr(expect, key)], targets)
        for key in ("attempts", "ranking", "kept"):
            yield from self._items((*path, key), "model", getattr(expect, key) or (), targets)
        for key in ("dropped", "scores", "cached", "share"):
            yield from self._keys((*path, key), "model", getattr(expect, key), targets)
        yield from self._known((*path, "answered_by"), "stage", [expect.answered_by], names.stages)
        for target, drop in expect.dropped.items():
            yield from self._known((*path, "dropped", target, "by"), "stage", [drop.by], names.stages)
        yield from self._keys((*path, "facts"), "fact", expect.facts, names.facts)
        yield from self._shares((*path, "share"), expect, repeat)

    def _shares(self, path: Path, expect: Expected, repeat: int) -> Iterator[Finding]:
        if expect.share and repeat == 1:
            yield self.origin.finding(path, "a share of one request says nothing", "add `repeat:`", code="share")
        for target, share in expect.share.items():
            if len(share.between) != 2 or not 0 <= share.between[0] <= share.between[1] <= 1:
                what = "must be two numbers from 0 to 1, the lesser first"
                place = (*path, target, "between")
                yield self.origin.finding(place, what, "write it as in [0.4, 0.6]", code="share")


def check_case(case: Case, path: Path, names: Names, origin: Origin) -> list[Finding]:
    """Everything wrong with one case."""
    checker = _Checker(names, origin)
    if not case.turns:
        findings = list(checker.request((*path, "request"), case.request))
        findings += checker.given((*path, "given"), case.given)
        findings += checker.expected((*path, "expect"), case.expect, case.repeat)
        return findings
    findings = list(checker.given((*path, "given"), case.given))
    if case.request != CaseRequest() or case.expect != Expected():
        what = "a case with turns has its requests and expectations there"
        findings.append(origin.finding(path, what, "move `request` and `expect` into a turn", code="request"))
    for index, turn in enumerate(case.turns):
        at = (*path, "turns", index)
        findings += checker.request((*at, "request"), turn.request)
        findings += checker.given((*at, "given"), turn.given)
        findings += checker.expected((*at, "expect"), turn.expect, case.repeat)
    return findings
