"""What strategies that learn have in common: arms, guard rails, the draw, rewards, ratings, and what is kept."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from kvfleet.config.fields import number, text
from kvfleet.config.schema import ModelConfig
from kvfleet.router.arms import ArmKeeper, ArmStats, HasServices
from kvfleet.router.chances import draw
from kvfleet.router.learning import Answered, RecentAnswers, compute_reward, result_of
from kvfleet.router.replicas import Replicas
from kvfleet.router.scoring import Ranking, ScoringContext
from kvfleet.telemetry.metrics import MetricsExporter

if TYPE_CHECKING:
    from kvfleet.plugin.contract import Outcome

__all__ = ["MOST_ARMS", "LearnedRanking", "LearnedStrategy"]

MOST_ARMS = 4096
"""Most models of which anything is kept."""


class LearnedRanking(Ranking):
    """A ranking whose first place was drawn.

    Attributes:
        by: The arms it was drawn from, which tell whose choice it was.
        chance: With which probability its first model was to be chosen: the propensity.
        arms: How many models there were.
    """

    __slots__ = ("arms", "by", "chance")

    by: Mapping[str, ArmStats]
    chance: float
    arms: int


_UNTRIED = ArmStats()


@attrs.define(kw_only=True)
class LearnedStrategy:
    """What the four have in common: arms, guard rails, rewards from live outcomes, ratings, and their state on disk."""

    name: ClassVar[str] = ""

    min_samples: int = number(1, ge=0, doc="Rewards a model must have before others are preferred to it.")
    max_exploration: float = number(
        1.0, ge=0, le=1, doc="Largest share of requests that may go to another model than the best known one."
    )
    target_latency_ms: float = number(
        2000, gt=0, unit="ms", doc="An answer that takes this long or longer earns nothing for its time."
    )
    state_path: str = text(
        "", doc="SQLite file in which the arms outlive a restart; in the gateway's state directory if empty."
    )
    _arms: dict[str, ArmStats] = attrs.field(init=False, factory=dict, repr=False, eq=False)
    _answers: RecentAnswers = attrs.field(init=False, factory=RecentAnswers, repr=False, eq=False)
    _random: random.Random = attrs.field(init=False, factory=random.Random, repr=False, eq=False)
    _metrics: MetricsExporter | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _keeper: ArmKeeper = attrs.field(init=False, factory=ArmKeeper, repr=False, eq=False)

    # Choosing --------------------------------------------------------------------------------------------------------

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Draw the first model; the others follow by their mean reward, and a model's replicas by expected time.

        The totals are mean rewards, 0.5 for a model without one. The terms hold each model's propensity and samples.
        """
        # Without a context there is no seed, and a library's user expects a draw all the same.
        context = context or ScoringContext(seed=self._random.getrandbits(32))
        replicas = Replicas.of(models, context)
        names = list(replicas.groups)
        if not names:
            return Ranking((), ())
        arms = [self._arms.get(name, _UNTRIED) for name in names]
        best = self._best(names, arms, [models[at[0]].quality_score for at in replicas.groups.values()])
        chances = self._guarded(self._wanted(names, arms), best)
        chosen = draw(chances, context.seed)
        if not context.dry_run:
            self._choose(names, chances, chosen)
        expected = [arm.mean_reward if arm.pulls else 0.5 for arm in arms]
        places = sorted(range(len(names)), key=lambda i: (i != chosen, -expected[i]))
        order = replicas.order([names[i] for i in places])
        of = {name: i for i, name in enumerate(names)}
        at = [of[models[i].name] for i in order]
        ranking = LearnedRanking(
            [models[i] for i in order],
            [expected[i] for i in at],
            terms={"propensity": [chances[i] for i in at], "samples": [float(arms[i].pulls) for i in at]},
            mode="exploit" if chosen == best else "explore",
        )
        ranking.by, ranking.chance, ranking.arms = self._arms, chances[chosen], len(names)
        return ranking

    def _best(self, names: Sequence[str], arms: Sequence[ArmStats], declared: Sequence[float]) -> int:
        """The best known model: by what was learned, or by its declared quality while nothing is known of any."""
        least = max(self.min_samples, 1)
        known = [i for i, arm in enumerate(arms) if arm.pulls >= least]
        if not known:
            return max(range(len(names)), key=declared.__getitem__)
        return max(known, key=lambda i: self._value(names[i], arms[i]))

    def _wanted(self, names: Sequence[str], arms: Sequence[ArmStats]) -> list[float]:
        """The chance of each model before the guard rail: first those that are short of samples."""
        short = [arm.pulls < self.min_samples for arm in arms]
        if any(short):
            return [is_short / sum(short) for is_short in short]
        return self._chances(names, arms)

    def _guarded(self, chances: list[float], best: int) -> list[float]:
        """The chances, with no more than the allowed share beside the best."""
        share = 1 - chances[best]
        if share <= self.max_exploration:
            return chances
        guarded = [chance * self.max_exploration / share for chance in chances]
        guarded[best] = 1 - self.max_exploration
        return guarded

    def _chances(self, names: Sequence[str], arms: Sequence[ArmStats]) -> list[float]:
        """With which probability the algorithm wants each model; they sum to 1."""
        raise NotImplementedError

    def _value(self, name: str, arm: ArmStats) -> float:  # noqa: ARG002 - others look at the name
        """What makes a model the best known one."""
        return arm.mean_reward

    def _choose(self, names: Sequence[str], chances: Sequence[float], chosen: int) -> None:
        """Note a choice that is acted upon."""

    def _settle(self, name: str) -> None:
        """Note that a choice has come to its end."""

    # Learning --------------------------------------------------------------------------------------------------------

    def update(self, model_name: str, reward: float) -> None:
        """Learn the reward of a model's answer.

        Raises:
            ValueError: if the reward is not between 0 and 1.
        """
        self._settle(model_name)
        self._learn(model_name, reward, None, 0)

    def _learn(self, name: str, reward: float, chance: float | None, count: int) -> None:
        if not 0 <= reward <= 1:
            raise ValueError(f"a reward must be between 0 and 1, not {reward!r}")
        arm = self._arms.get(name)
        if arm is None:
            if len(self._arms) >= MOST_ARMS:
                self._forget(next(iter(self._arms)))
            arm = self._arms[name] = ArmStats()
        arm.add(reward)
        self._keeper.is_dirty = True
        self._learned(name, reward, chance, count)

    def _learned(self, name: str, change: float, chance: float | None, count: int) -> None:
        """Take a reward, or the change of one, into what an algorithm keeps beside its arms."""

    def _forget(self, name: str) -> None:
        del self._arms[name]

    async def observe(self, outcome: Outcome) -> None:
        """Learn how a route ended that this strategy decided; others say nothing about its own choices.

        A model that failed earns 0. Who was refused, left, or sent a wrong request teaches nothing.
        """
        ranking = outcome.ranking
        if not isinstance(ranking, LearnedRanking) or ranking.by is not self._arms:
            return  # it was not this strategy's, nor that of the one before a reload
        first = ranking.models[0].name
        self._settle(first)
        result = result_of(outcome)
        for name in result.failed:
            self._learn(name, 0.0, ranking.chance if name == first else None, ranking.arms if name == first else 0)
            self._show(name, 0.0)
        if result.served and outcome.served_by is not None:
            self._learn_answer(outcome, ranking, outcome.served_by, result.latency_ms)
        if self._keeper.is_due:
            await self._keeper.save(self._kept())

    def _learn_answer(self, outcome: Outcome, ranking: LearnedRanking, served: ModelConfig, latency_ms: float) -> None:
        quality = self._arms.get(served.name, _UNTRIED).quality(served.quality_score)
        reward = compute_reward(latency_ms, quality, outcome.cost_usd, True, self.target_latency_ms)
        is_first = served.name == ranking.models[0].name
        chance, count = (ranking.chance, ranking.arms) if is_first else (None, 0)
        self._learn(served.name, reward, chance, count)
        self._show(served.name, reward)
        answered = Answered(served.name, latency_ms, outcome.cost_usd, quality, reward, chance, count)
        self._answers.add(answered, outcome.context.request.request_id, outcome.trace.trace_id)

    def _show(self, name: str, reward: float) -> None:
        if self._metrics is not None:
            self._metrics.observe("kvfleet_reward", reward, self.name, name)

    def feedback(self, identifier: str, score: float) -> str | None:
        """Learn how good an answer was.

        The answer's reward is corrected by the score in place of the quality that was supposed, and later answers of
        its model are supposed to be as good as its ratings. A second rating of an answer replaces the first.

        Args:
            identifier: Of the request, or of its trace.
            score: 0..1.

        Returns:
            The model that gave the answer; None if the answer is not remembered: it is too old, had another strategy,
            or never was.

        Raises:
            ValueError: if the score is not between 0 and 1.
        """
        if not 0 <= score <= 1:
            raise ValueError(f"a score must be between 0 and 1, not {score!r}")
        answered = self._answers.get(identifier)
        arm = None if answered is None else self._arms.get(answered.model)
        if answered is None or arm is None:
            return None
        reward = compute_reward(answered.latency_ms, score, answered.cost_usd, True, self.target_latency_ms)
        arm.correct(answered.reward, reward)
        arm.rate(score, answered.score)
        self._learned(answered.model, reward - answered.reward, answered.chance, answered.arms)
        answered.reward, answered.score = reward, score
        self._keeper.is_dirty = True
        return answered.model

    def is_rated(self, identifier: str) -> bool:
        """True if somebody has rated that answer already."""
        answered = self._answers.get(identifier)
        return answered is not None and answered.score is not None

    # Showing and keeping ---------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What is known: ``arms`` by model, each with pulls, mean reward, variance, ratings and their mean."""
        arms = {
            name: {
                "pulls": arm.pulls,
                "mean_reward": arm.mean_reward,
                "variance": arm.variance,
                "ratings": arm.ratings,
                "mean_rating": arm.mean_rating if arm.ratings else None,
            }
            for name, arm in self._arms.items()
        }
        return {"total_pulls": sum(arm.pulls for arm in self._arms.values()), "arms": arms, **self._more()}

    def state(self) -> Mapping[str, Any]:
        """As `stats`."""
        return self.stats()

    def _more(self) -> dict[str, Any]:
        """What an algorithm keeps beside its arms, as numbers."""
        return {}

    def _restore(self, more: Mapping[str, Any]) -> None:
        """Take back what `_more` gave."""

    def provision(self, services: HasServices) -> None:
        """Find the place of the state."""
        self._metrics = services.metrics
        self._keeper = ArmKeeper.of(self.name, self.state_path, services)

    async def aopen(self) -> None:
        """Take up what was learned before the last restart.

        Raises:
            ComponentError: if the state cannot be read.
        """
        if self._arms:
            return
        kept = await self._keeper.load()
        more = kept.pop("", {})
        try:
            self._arms = {name: ArmStats(**known) for name, known in kept.items()}
            self._restore(more)
        except (TypeError, ValueError) as error:
            raise self._keeper.unusable("it is not from this version") from error

    def inherit(self, before: LearnedStrategy) -> None:
        """Go on with what was learned before a reload, and see to its keeping instead."""
        self._arms, self._answers = before._arms, before._answers
        self._restore(before._more())
        self._keeper.is_dirty, before._keeper = True, ArmKeeper()

    async def aclose(self) -> None:
        """Keep what was learned."""
        await self._keeper.save(self._kept())

    def _kept(self) -> dict[str, dict[str, Any]]:
        return {"": self._more(), **{name: attrs.asdict(arm) for name, arm in self._arms.items()}}
