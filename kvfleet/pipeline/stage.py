"""A stage as the engine runs it: a component bound to its place in the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.contract import Kind
from kvfleet.trace import names
from kvfleet.trace.spans import AttributeValue, Shape, Span

__all__ = ["BoundStage", "Checked", "Pipeline", "Said"]

_MOST_SHAPES = 64
_MOST_CANDIDATE_SETS = 1024
_USUAL: Mapping[Kind, tuple[tuple[str, ...], str]] = {
    Kind.FILTER: ((names.CANDIDATES_IN, names.CANDIDATES_OUT), ""),
    Kind.AFFINITY: ((names.SCORE_VALUES, names.SCORE_MODES), names.SCORED),
    Kind.SCORE: ((names.SCORE_COLUMN, names.SCORE_UNIT, names.SCORE_VALUES), names.SCORED),
}
"""What the spans of a kind say, by name, and about what."""


Said = tuple[Shape, tuple[Any, ...], tuple[str, ...]]
"""What a stage's record says: its shape, its values, and what they stand for."""


@attrs.define(eq=False)
class Checked:
    """A column that was found sound, for which candidates, and what the record says of it."""

    column: Any = None
    ids: tuple[str, ...] = ()
    said: Said | None = None


@attrs.frozen(kw_only=True)
class BoundStage:
    """One stage, ready to run.

    Attributes:
        kind, name: As the trace shows it; `name` is the component's unless the pipeline gave another.
        component: The object, one for each entry of the pipeline.
        run: Its verb, bound.
        distribution: Who brought the component; errors name it.
        skips: True if the route goes on when it fails.
        is_policy: True for a filter that must hold: an exclusion by it alone is a 403.
        span_name: Precomputed.
        attributes: What every span of this stage carries.
        usual: The shape of its spans in the usual case; says nothing for kinds that have none.
        checked: The last column that was found sound: a scorer may give the same one again.
    """

    kind: Kind
    name: str
    component: Any
    run: Callable[..., Any]
    distribution: str = ""
    skips: bool = False
    is_policy: bool = False
    span_name: str = ""
    attributes: Mapping[str, AttributeValue] = attrs.field(factory=dict)
    usual: Shape = attrs.field(init=False, repr=False, eq=False)
    checked: Checked = attrs.field(init=False, factory=Checked, repr=False, eq=False)
    _shapes: dict[tuple[str, ...], Shape] = attrs.field(init=False, factory=dict, repr=False, eq=False)
    _rankings: dict[tuple[str, ...], Shape] = attrs.field(init=False, factory=dict, repr=False, eq=False)

    @usual.default
    def _make_usual(self) -> Shape:
        return Shape(self.span_name, self.attributes, *_USUAL.get(self.kind, ((), "")))

    @classmethod
    def bind(
        cls,
        kind: Kind,
        name: str,
        component: Any,
        *,
        distribution: str = "",
        skips: bool | None = None,
        is_policy: bool = False,
    ) -> BoundStage:
        """Bind a component; `skips` of None takes the kind's default."""
        return cls(
            kind=kind,
            name=name,
            component=component,
            run=getattr(component, kind.verb),
            distribution=distribution,
            skips=kind.may_skip if skips is None else skips,
            is_policy=is_policy,
            span_name=f"{names.STAGE_PREFIX}{kind}.{name}",
            attributes={
                names.STAGE_KIND: str(kind),
                names.STAGE_NAME: name,
                **({names.STAGE_POLICY: True} if is_policy else {}),
            },
        )

    @property
    def key(self) -> str:
        """``filter.health``: kind and name."""
        return f"{self.kind}.{self.name}"

    def shape(self, names: tuple[str, ...], about: str = "") -> Shape:
        """The shape of this stage's spans that have values of these names; made once for each, of which there are few.

        Args:
            names: The attributes' names.
            about: Name of the attribute that says what the values stand for; the same for every span of the stage.
        """
        found = self._shapes.get(names)
        if found is None:
            found = Shape(self.span_name, self.attributes, names, about)
            if len(self._shapes) < _MOST_SHAPES:
                self._shapes[names] = found
        return found

    def shape_of_ranking(self, terms: Iterable[str], details: Iterable[str]) -> Shape:
        """The shape of the choice's spans with these terms and details."""
        key = (*terms, "", *details)
        found = self._rankings.get(key)
        if found is None:
            parts = [names.TERM_PREFIX + name for name in terms] + [names.INSTEAD_PREFIX + name for name in details]
            found = self.shape((names.SCORE_VALUES, names.SCORE_UNIT, names.SELECT_MODE, *parts), names.SCORED)
            if len(self._rankings) < _MOST_SHAPES:
                self._rankings[key] = found
        return found

    def span(self) -> Span:
        """A span of this stage that says nothing yet."""
        return Span(self.span_name, 0, 0, dict(self.attributes))


Planned = tuple[Callable[..., Any], BoundStage, bool]
"""What is done, for which stage, and whether it is to be awaited."""


@attrs.frozen(kw_only=True)
class Pipeline:
    """Everything that decides and executes, in order.

    Attributes:
        stages: Those before the choice, in order.
        select: The choice.
        strategies: What a request may ask for instead, by name; the pipeline's own is among them.
        execute: Gets the answer.
        observe: The observe stages.
        listeners: Other components with an `observe`: they are told of every outcome too, after the observe stages.
        markers: Observers with something to say in the route's record.
        placers: Stages that are told at once where a request goes.
        passes_native: True if the execute stage reads no answers, so that one may pass in another API's words.
        passes_bytes: True if no component judges texts (says ``judges_texts``), so that a request's bytes may go on to
            anybody. Else models that are not private get what was judged, the parsed body: of a key that stands twice
            some engines read the other value.
        computes_all: False if a score that the strategy does not read is left out, because nobody asked for it.
        hash: Tells one configuration from another.
    """

    stages: tuple[BoundStage, ...]
    select: BoundStage
    strategies: Mapping[str, BoundStage]
    execute: BoundStage
    observe: tuple[BoundStage, ...] = ()
    listeners: tuple[BoundStage, ...] = ()
    markers: tuple[BoundStage, ...] = ()
    placers: tuple[BoundStage, ...] = ()
    computes_all: bool = True
    hash: str = ""
    passes_native: bool = attrs.field(init=False)
    passes_bytes: bool = attrs.field(init=False)
    _ids: dict[int, tuple[Sequence[ModelConfig], tuple[str, ...]]] = attrs.field(
        init=False, factory=dict, repr=False, eq=False
    )
    _plans: dict[int, Sequence[Planned]] = attrs.field(init=False, factory=dict, repr=False, eq=False)

    def plan(self, select: BoundStage, steps: Mapping[Kind, tuple[Callable[..., Any], bool]]) -> Sequence[Planned]:
        """What is done up to the choice by one of the strategies, in order; made once for each.

        Args:
            select: One of `strategies`.
            steps: What is done for a stage, by its kind, and whether that is to be awaited.
        """
        found = self._plans.get(id(select))
        if found is None:
            reads = None if self.computes_all else getattr(select.component, "reads", None)
            used = [s for s in self.stages if reads is None or s.kind is not Kind.SCORE or s.name in reads]
            stages = (*used, select)
            found = self._plans[id(select)] = tuple([(steps[s.kind][0], s, steps[s.kind][1]) for s in stages])
        return found

    @passes_native.default
    def _reads_no_answers(self) -> bool:
        return not getattr(self.execute.component, "reads_answers", True)

    @passes_bytes.default
    def _judges_no_texts(self) -> bool:
        return not any(getattr(one.component, "judges_texts", False) for one in (*self.stages, self.execute))

    def ids(self, candidates: Sequence[ModelConfig]) -> tuple[str, ...]:
        """The candidates' ids; the same tuple for the same candidates, of which requests that ask alike have one."""
        found = self._ids.get(id(candidates))
        if found is not None:  # it is still the same object, because it is kept here
            return found[1]
        ids = tuple([model.id for model in candidates])
        if len(self._ids) < _MOST_CANDIDATE_SETS:
            self._ids[id(candidates)] = (candidates, ids)
        return ids

    @property
    def all_stages(self) -> tuple[BoundStage, ...]:
        """Every stage of the pipeline once, in order."""
        return (*self.stages, self.select, self.execute, *self.observe)

    @property
    def components(self) -> tuple[Any, ...]:
        """Every component object once, those of other strategies included."""
        found = [stage.component for stage in (*self.all_stages, *self.strategies.values())]
        return tuple({id(component): component for component in found}.values())
