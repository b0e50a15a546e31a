"""Several replays at once: the same results, and a word of what broke."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from kvfleet.config.origin import NOWHERE
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.plugin.manager import discover
from kvfleet.replay.driver import Replay, ReplayResult
from kvfleet.replay.generate import generator_from
from kvfleet.replay.several import ReplayError, cores, replay_all

pytestmark = pytest.mark.skipif(cores() == 1, reason="replays run one after the other here")
TRACE = generator_from("shared_prefix:requests=120,prompts=3,system_tokens=2000").generate(0)


def runs(*strategies: str) -> dict[str, Replay]:
    """A replay of each strategy over two replicas."""
    model = ModelConfig(name="m", provider="vllm", endpoint="http://a", replicas=("http://b",))
    return {
        name: Replay(config=FleetConfig(models=(model,), strategy=name, origin=NOWHERE), trace=TRACE, table=discover())
        for name in strategies
    }


def test_side_by_side_they_come_to_the_same_in_the_same_order() -> None:
    """Whatever the number of jobs, to the last digit; and every request is counted on the way."""
    told: list[int] = []
    one_by_one = replay_all(runs("round_robin", "expected_latency", "random"), 1)
    at_once = replay_all(runs("round_robin", "expected_latency", "random"), 2, told.append)
    assert [one.label for one in at_once] == ["round_robin", "expected_latency", "random"]
    assert at_once == one_by_one
    assert told == sorted(told)
    assert told[-1] == 3 * len(TRACE.requests)


class Breaking(Replay):
    """A replay that breaks."""

    def run(self, label: str = "") -> ReplayResult:
        """Break."""
        raise ValueError(f"{label} does not work")


class Dying(Replay):
    """A replay whose process is ended."""

    def run(self, label: str = "") -> ReplayResult:
        """End the process."""
        os.kill(os.getpid(), signal.SIGKILL)
        return super().run(label)


@pytest.mark.parametrize(
    ("cls", "why"),
    [(Breaking, "replay of bad broke: ValueError: bad does not work"), (Dying, "bad was ended from outside")],
)
def test_one_that_breaks_ends_them_all_and_says_which(cls: type[Replay], why: str) -> None:
    """And no process is left."""
    known = runs("round_robin", "random")
    first = known["round_robin"]
    bad = cls(config=first.config, trace=TRACE, table=discover())
    with pytest.raises(ReplayError, match=why):
        replay_all({**known, "bad": bad}, 3)
    assert multiprocessing.active_children() == []
