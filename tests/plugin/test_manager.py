"""Discovery: what is found, what is set aside, and what each error says."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import attrs
import click
import pytest

from kvfleet.config.fields import number
from kvfleet.config.findings import Finding
from kvfleet.config.schema import FleetConfig
from kvfleet.errors import ComponentError, PluginError
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.plugin.spec import hookimpl


@attrs.define
class Sieve:
    """Drops nothing."""

    mesh: int = number(1, doc="Width.")

    def filter(self, ctx: Any) -> tuple[()]:
        return ()


@attrs.define
class Chooser:
    """Ranks as it comes."""

    def select(self, models: Any, context: Any = None) -> list[Any]:
        return list(models)


@attrs.frozen
class Dist:
    name: str
    version: str = "1.0"


@attrs.frozen
class Point:
    """A fake entry point."""

    name: str
    dist: Dist | None
    plugin: Callable[[], Any]
    value: str = "some_module"

    def load(self) -> Any:
        return self.plugin()


def module(**functions: Callable[..., Any]) -> types.ModuleType:
    """A plugin module with these hook implementations."""
    made = types.ModuleType("some_module")
    for name, function in functions.items():
        setattr(made, name, hookimpl(function))
    return made


def bringing(*components: Any) -> Callable[[], types.ModuleType]:
    """What loads a plugin with these components."""

    def kvfleet_components() -> Any:
        yield from components

    return lambda: module(kvfleet_components=kvfleet_components)


def raising(error: BaseException) -> Callable[[], Any]:
    """What fails to load."""

    def load() -> Any:
        raise error

    return load


SIEVE = Component(Kind.FILTER, "sieve", Sieve)
CHOOSER = Component(Kind.SELECT, "chooser", Chooser)


def table(*points: Point, off: str = "") -> ComponentTable:
    """Discover among these entry points."""
    return discover(environ={"KVFLEET_DISABLE_PLUGINS": off} if off else {}, entry_points=points)


def test_components_carry_their_distribution() -> None:
    """A component knows who brought it."""
    found = table(Point("sieve", Dist("acme"), bringing(SIEVE, CHOOSER)))
    assert found.get(Kind.FILTER, "sieve") == attrs.evolve(SIEVE, distribution="acme")
    assert [c.key for c in found.components] == ["filter.sieve", "select.chooser"]
    assert [p.status for p in found.plugins] == ["ok"]


def test_a_distribution_that_is_not_known_is_named_by_its_module() -> None:
    """An entry point without a distribution still has a name to show."""
    found = table(Point("sieve", None, bringing(SIEVE), value="acme_sieve.plugin:p"))
    assert found.get(Kind.FILTER, "sieve").distribution == "acme_sieve"


def test_a_broken_plugin_is_set_aside_and_named() -> None:
    """One plugin's ImportError leaves the others, and says who and why."""
    found = table(
        Point("bad", Dist("acme-bad", "0.3"), raising(ImportError("no module named torch"))),
        Point("sieve", Dist("acme"), bringing(SIEVE)),
    )
    bad, good = sorted(found.plugins, key=lambda p: p.status)
    assert (bad.label, bad.status, bad.cause) == ("bad (acme-bad 0.3)", "broken", "ImportError: no module named torch")
    assert "Traceback" in bad.traceback
    assert good.components == (found.get(Kind.FILTER, "sieve"),)


def test_a_plugin_that_exits_does_not_take_kvfleet_along() -> None:
    """sys.exit() while a plugin is imported is one more way to be broken."""
    assert [p.cause for p in table(Point("bad", Dist("a"), raising(SystemExit(3)))).plugins] == ["SystemExit: 3"]


def test_an_interrupt_is_not_a_broken_plugin() -> None:
    """Ctrl-C while plugins load stops kvfleet."""
    with pytest.raises(KeyboardInterrupt):
        table(Point("slow", Dist("a"), raising(KeyboardInterrupt())))


def kvfleet_component() -> Any:
    """A hook misspelt."""
    return ()


def wrong_arguments(request: Any) -> Any:
    """A hook with an argument nobody gives."""
    return ()


@pytest.mark.parametrize(
    ("plugin", "cause"),
    [
        (
            lambda: module(kvfleet_component=kvfleet_component),
            "it implements the hook kvfleet_component, which does not exist; did you mean kvfleet_components?",
        ),
        (
            lambda: types.ModuleType("empty"),
            "some_module implements no hook; mark its functions with @hookimpl from kvfleet.plugin.spec",
        ),
        (bringing(Sieve), "kvfleet_components() must yield Component, not type"),
        (bringing(SIEVE, SIEVE), "it brings filter.sieve twice"),
        (
            lambda: module(kvfleet_components=lambda: iter([Component(Kind.SCORE, "sieve", Sieve)])),
            "score.sieve: Sieve has no method score()",
        ),
    ],
)
def test_what_is_wrong_with_a_plugin_is_said_in_a_sentence(plugin: Callable[[], Any], cause: str) -> None:
    """A plugin's author reads what to change."""
    (info,) = table(Point("p", Dist("acme"), plugin)).plugins
    assert info.cause == cause
    assert not info.components


def test_a_hook_with_unknown_arguments_is_broken() -> None:
    """The check that pluggy makes is kept, on one line."""
    (info,) = table(Point("p", Dist("acme"), lambda: module(kvfleet_lint=wrong_arguments))).plugins
    assert "request" in info.cause
    assert "\n" not in info.cause


def test_an_optional_hook_of_another_version_is_no_error() -> None:
    """A plugin may implement a hook that only a newer kvfleet has, if it says so."""
    made = types.ModuleType("m")
    made.kvfleet_future = hookimpl(optionalhook=True)(lambda: None)  # type: ignore[attr-defined]
    made.kvfleet_components = hookimpl(lambda: iter([SIEVE]))  # type: ignore[attr-defined]
    (info,) = table(Point("p", Dist("acme"), lambda: made)).plugins
    assert (info.status, info.hooks) == ("ok", ("kvfleet_components",))


def test_one_name_of_two_distributions_belongs_to_neither() -> None:
    """Which plugin wins must not depend on the order of installation: nobody does, and both are named."""
    found = table(Point("b", Dist("zeta"), bringing(SIEVE, CHOOSER)), Point("a", Dist("kvfleet"), bringing(SIEVE)))
    with pytest.raises(ComponentError) as caught:
        found.get(Kind.FILTER, "sieve")
    assert str(caught.value) == (
        "filter.sieve is brought by kvfleet and zeta; uninstall one, or leave it out with KVFLEET_DISABLE_PLUGINS=NAME"
    )
    assert [c.key for c in found.components] == ["select.chooser"]
    assert [[c.distribution for c in both] for both in found.conflicts] == [["kvfleet", "zeta"]]


@pytest.mark.parametrize("off", ["sieve", "acme_sieve", " Acme.Sieve , other", "x,SIEVE"])
def test_plugins_are_left_out_by_either_name(off: str) -> None:
    """The variable takes the entry point's or the distribution's name, spelt as packaging allows."""
    found = table(Point("sieve", Dist("acme-sieve"), raising(AssertionError("was loaded"))), off=off)
    assert [(p.status, p.cause) for p in found.plugins] == [("disabled", "")]


def test_leaving_one_out_solves_a_conflict() -> None:
    """The remedy that the error names works, also for a built-in."""
    points = Point("b", Dist("zeta"), bringing(SIEVE)), Point("builtin_filters", Dist("kvfleet"), bringing(SIEVE))
    assert table(*points, off="builtin_filters").get(Kind.FILTER, "sieve").distribution == "zeta"


def test_an_unknown_name_gets_the_nearest_one() -> None:
    """A typo in a stage's name is answered with the name."""
    with pytest.raises(ComponentError, match=r"^there is no filter\.seive; did you mean filter\.sieve\?$"):
        table(Point("p", Dist("acme"), bringing(SIEVE))).get(Kind.FILTER, "seive")


def test_an_unknown_name_mentions_what_is_broken() -> None:
    """Who misses a component of a broken plugin learns the cause there and then."""
    found = table(Point("slo", Dist("kvfleet-slo"), raising(ValueError("bad"))))
    with pytest.raises(ComponentError) as caught:
        found.find_stage("filter.slo")
    assert str(caught.value) == (
        "there is no filter.slo: plugin slo (kvfleet-slo 1.0) is broken: ValueError: bad; there are none"
    )


def test_a_disabled_plugin_is_named_before_any_guess() -> None:
    """Who left it out and forgot is not sent to another component first."""
    points = Point("slo", Dist("kvfleet-slo"), bringing(SIEVE)), Point("p", Dist("acme"), bringing(SIEVE))
    with pytest.raises(ComponentError) as caught:
        table(*points, off="slo").find_stage("filter.seive")
    assert str(caught.value) == (
        "there is no filter.seive: plugin slo (kvfleet-slo 1.0) is disabled by KVFLEET_DISABLE_PLUGINS, "
        "and may bring it; did you mean filter.sieve?"
    )


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("filtr.sieve", "'filtr.sieve' is no stage: 'filtr' is no kind of stage; did you mean filter?"),
        ("adapter.vllm", "'adapter.vllm' is no stage: 'adapter' is no kind of stage; known: admit, affinity, answer, "),
        ("filter", "'filter' names no component; write filter.NAME; known: filter.sieve"),
        ("filter.", "'filter.' names no component; write filter.NAME; known: filter.sieve"),
    ],
)
def test_a_use_that_names_no_stage_says_what_would(use: str, message: str) -> None:
    """Each way to misspell a stage has its own words."""
    with pytest.raises(ComponentError) as caught:
        table(Point("p", Dist("acme"), bringing(SIEVE))).find_stage(use)
    assert str(caught.value).startswith(message)


def test_select_alone_means_the_usual_strategy() -> None:
    """``use: select`` needs no name."""
    usual = Component(Kind.SELECT, "hybrid_score", Chooser)
    found = table(Point("p", Dist("acme"), bringing(usual)))
    assert found.find_stage("select").name == "hybrid_score"


def test_a_command_may_be_added_but_not_replaced() -> None:
    """A plugin's command joins the group; one of kvfleet's own stays what it was."""
    cli = click.Group("kvfleet")
    own = click.Command("run")
    cli.add_command(own)

    def kvfleet_commands(cli: click.Group) -> None:
        cli.add_command(click.Command("hello"))
        cli.add_command(click.Command("run"))

    problems = table(Point("p", Dist("acme"), lambda: module(kvfleet_commands=kvfleet_commands))).add_commands(cli)
    assert problems == ("plugin p (acme 1.0) may not replace the command 'run'",)
    assert cli.commands["run"] is own
    assert "hello" in cli.commands


def test_a_plugin_that_fails_to_add_commands_adds_none() -> None:
    """A half-added plugin leaves no trace, and is named."""
    cli = click.Group("kvfleet")

    def kvfleet_commands(cli: click.Group) -> None:
        cli.add_command(click.Command("hello"))
        raise RuntimeError("boom")

    problems = table(Point("p", Dist("acme"), lambda: module(kvfleet_commands=kvfleet_commands))).add_commands(cli)
    assert problems == ("plugin p (acme 1.0) could not add its commands: RuntimeError: boom",)
    assert not cli.commands


def test_the_first_plugin_that_knows_a_secret_gives_it() -> None:
    """References of other kinds are passed on to the next plugin."""
    found = table(
        Point("a", Dist("a"), lambda: module(kvfleet_secret=lambda reference: None)),
        Point("b", Dist("b"), lambda: module(kvfleet_secret=lambda reference: f"value of {reference}")),
    )
    assert found.secret("vault:x") == "value of vault:x"
    assert table().secret("vault:x") is None


def test_a_secret_plugins_failure_is_named_without_its_words() -> None:
    """The message of such an error may hold the secret, so it is not repeated."""

    def kvfleet_secret(reference: str) -> str:
        raise RuntimeError("token hunter2 refused")

    with pytest.raises(PluginError) as caught:
        table(Point("v", Dist("vault"), lambda: module(kvfleet_secret=kvfleet_secret))).secret("vault:x")
    assert str(caught.value) == "plugin v (vault 1.0) failed on a secret reference (RuntimeError)"


def test_lint_collects_findings_and_names_who_fails() -> None:
    """A linter that crashes is a finding beside the others'."""

    def kvfleet_lint(config: FleetConfig) -> list[Finding]:
        return [Finding("too plain")]

    def failing(config: FleetConfig) -> list[Finding]:
        raise KeyError("x")

    found = table(
        Point("a", Dist("a"), lambda: module(kvfleet_lint=kvfleet_lint)),
        Point("b", Dist("b"), lambda: module(kvfleet_lint=failing)),
    ).lint(FleetConfig())
    assert [f.message for f in found] == [
        "too plain",
        "plugin b (b 1.0) failed while it checked the file: KeyError: 'x'",
    ]


def test_a_notification_reaches_every_plugin(caplog: pytest.LogCaptureFixture) -> None:
    """One plugin's failure is logged and does not keep the news from the next."""
    heard: list[Any] = []

    def failing(outcome: Any) -> None:
        raise RuntimeError("the prompt was ...")

    def kvfleet_route_finished(outcome: Any) -> None:
        heard.append(outcome)

    found = table(
        Point("a", Dist("a"), lambda: module(kvfleet_route_finished=failing)),
        Point("b", Dist("b"), lambda: module(kvfleet_route_finished=kvfleet_route_finished)),
    )
    outcome: Any = object()
    found.route_finished(outcome)
    assert heard == [outcome]
    assert [r.getMessage() for r in caplog.records] == [
        "plugin failed plugin=a hook=kvfleet_route_finished error=RuntimeError"
    ]


def test_the_builtins_come_by_entry_point() -> None:
    """The components that kvfleet brings are found the way a third party's are, and can be left out the same way."""
    own = [p for p in discover(environ={}).plugins if p.distribution == "kvfleet"]
    assert {"builtin_filters", "builtin_strategies", "builtin_adapters"} <= {p.name for p in own}
    without = discover(environ={"KVFLEET_DISABLE_PLUGINS": "kvfleet"})
    assert {p.status for p in without.plugins if p.distribution == "kvfleet"} == {"disabled"}
