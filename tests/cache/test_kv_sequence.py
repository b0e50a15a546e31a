"""Gaps, replays, restarts: what a stream of messages makes known, and when it is believed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("msgspec")

from kvfleet.adapters.base import EngineLoad
from kvfleet.cache.engine_blocks import EngineBlocks
from kvfleet.cache.kv_sequence import EventStream
from kvfleet.cache.kv_state import KVMode
from kvfleet.clock import FrozenClock
from tests.cache.made import Noted
from tests.cache.publisher import Publisher, pump

A, B, C = [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]


class Scene:
    """A publisher, and a stream that listens to it."""

    def __init__(self, *, can_replay: bool = True, keep: int = 1000) -> None:
        self.clock = FrozenClock()
        self.engine = Publisher(self.clock, keep)
        self.index = Noted()
        self.stream = EventStream(
            make_blocks=lambda rank: [EngineBlocks(index=self.index, holder="a", block_tokens=4)],
            clock=self.clock,
            can_replay=can_replay,
        )

    def connect(self) -> None:
        """Connect, and have answered what is asked."""
        self.stream.connected()
        pump(self.engine, self.stream)

    def hear(self, message: tuple[int, bytes]) -> None:
        """A message arrives, and what is asked because of it is answered."""
        self.stream.live(*message)
        pump(self.engine, self.stream)

    @property
    def claims(self) -> set[int]:
        """What is claimed."""
        return self.index.claims.get(("a", "gpu"), set())

    @property
    def mode(self) -> KVMode:
        """How it is known."""
        return self.stream.judge()[0]

    @property
    def why(self) -> str:
        """Why no better."""
        return self.stream.judge()[1]

    def is_right(self) -> bool:
        """True if what is claimed is what is there."""
        return self.claims == self.engine.held()


@pytest.fixture
def scene() -> Scene:
    """With replay."""
    return Scene()


@pytest.fixture
def plain() -> Scene:
    """Without."""
    return Scene(can_replay=False)


class TestBeginning:
    """Before and at the first message."""

    def test_nothing_is_known_before(self, scene: Scene) -> None:
        """And nothing is claimed."""
        assert (scene.mode, scene.why) == (KVMode.APPROXIMATE, "not connected")
        scene.stream.connected()
        assert (scene.mode, scene.why) == (KVMode.APPROXIMATE, "no event was seen yet")

    def test_an_engine_that_said_nothing_holds_nothing(self, scene: Scene) -> None:
        """So everything is known of it."""
        scene.connect()
        assert scene.mode is KVMode.EXACT
        scene.hear(scene.engine.store([*A, *B]))
        assert (scene.mode, scene.is_right(), len(scene.claims)) == (KVMode.EXACT, True, 2)

    def test_who_comes_late_asks_for_what_was_said(self, scene: Scene) -> None:
        """And knows everything."""
        scene.engine.store(A)
        scene.engine.store(B)
        scene.connect()
        assert (scene.mode, scene.is_right(), scene.stream.counts.replays) == (KVMode.EXACT, True, 1)

    def test_who_comes_too_late_knows_a_part(self) -> None:
        """What the engine no longer keeps for replay stays unknown; what is claimed is there."""
        scene = Scene(keep=1)
        scene.engine.store(A)
        scene.engine.store(B)
        scene.connect()
        assert (scene.mode, scene.why) == (KVMode.DEGRADED, "its first 1 messages can no longer be had")
        assert scene.claims < scene.engine.held()

    def test_without_replay_the_first_number_tells(self, plain: Scene) -> None:
        """A message with number 0 is the engine's first."""
        plain.stream.connected()
        assert plain.mode is KVMode.APPROXIMATE
        plain.hear(plain.engine.store(A))
        assert (plain.mode, plain.is_right()) == (KVMode.EXACT, True)

    def test_without_replay_and_too_late(self, plain: Scene) -> None:
        """A part is known, until the cache is emptied."""
        plain.stream.connected()
        plain.engine.store(A)
        plain.hear(plain.engine.store(B))
        assert plain.mode is KVMode.DEGRADED
        plain.hear(plain.engine.clear())
        plain.hear(plain.engine.store(A))
        assert (plain.mode, plain.is_right()) == (KVMode.EXACT, True)

    def test_a_message_that_comes_twice_counts_once(self, scene: Scene) -> None:
        """Once replayed and once as it was published; even if it was published before the replay ended."""
        one, two = scene.engine.store(A), scene.engine.store(B)
        scene.stream.connected()
        scene.stream.live(*one)
        scene.stream.live(*two)
        pump(scene.engine, scene.stream)
        assert (scene.mode, scene.is_right(), scene.stream.duplicates) == (KVMode.EXACT, True, 2)
        scene.hear(scene.engine.evict(random.Random(1)))
        assert (scene.mode, scene.is_right(), scene.stream.counts.restarts) == (KVMode.EXACT, True, 0)

    def test_what_falls_between_replay_and_subscription(self, scene: Scene) -> None:
        """A subscription takes effect late: the stream asks once more, by itself."""
        scene.connect()
        scene.engine.store(A)
        assert not scene.is_right()
        scene.clock.advance(3)
        scene.stream.tick()
        assert pump(scene.engine, scene.stream) == 1
        assert (scene.mode, scene.is_right()) == (KVMode.EXACT, True)


class TestGaps:
    """Messages that did not come."""

    def test_a_gap_is_filled(self, scene: Scene) -> None:
        """While it is, what is known may be out of date."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        scene.engine.evict(random.Random(0))
        scene.stream.live(*scene.engine.store(B))
        assert (scene.mode, scene.why) == (KVMode.DEGRADED, "missed messages are being replayed")
        scene.stream.live(*scene.engine.store(C))
        pump(scene.engine, scene.stream)
        assert (scene.mode, scene.is_right()) == (KVMode.EXACT, True)
        assert (scene.stream.counts.gaps, scene.stream.counts.losses) == (1, 0)

    def test_a_gap_that_cannot_be_filled(self) -> None:
        """What was claimed may be gone, so nothing of it is."""
        scene = Scene(keep=2)
        scene.connect()
        scene.hear(scene.engine.store(A))
        for _ in range(3):
            scene.engine.store(B)
        scene.hear(scene.engine.store(C))
        assert (scene.mode, scene.why) == (KVMode.DEGRADED, "the engine no longer has all that was missed")
        assert (len(scene.claims), scene.claims < scene.engine.held()) == (1, True)

    def test_a_gap_without_replay(self, plain: Scene) -> None:
        """The same, until everything but a fiftieth of the cache is known again."""
        plain.stream.connected()
        plain.hear(plain.engine.store(A))
        plain.engine.store(B)
        plain.hear(plain.engine.store(C))
        assert (plain.mode, plain.why) == (KVMode.DEGRADED, "1 messages were missed, and there is no replay")
        plain.stream.told(EngineLoad(cache_blocks=101))
        assert plain.mode is KVMode.DEGRADED
        plain.hear(plain.engine.store([n for i in range(97) for n in (0, 0, 0, i)]))
        plain.stream.told(EngineLoad(cache_blocks=101))
        assert plain.mode is KVMode.EXACT

    def test_a_replay_that_does_not_come(self, scene: Scene) -> None:
        """Costs what is known; it is asked for again later, and everything is known again."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        scene.engine.store(B)
        scene.stream.live(*scene.engine.store(C))
        scene.engine.replay(scene.stream, fails=True)
        assert scene.mode is KVMode.DEGRADED
        assert len(scene.claims) == 1
        scene.clock.advance(31)
        scene.stream.tick()
        pump(scene.engine, scene.stream)
        assert (scene.mode, scene.is_right()) == (KVMode.EXACT, True)

    def test_what_waits_for_a_replay_is_bounded(self, scene: Scene) -> None:
        """And what found no place is asked for again."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        scene.engine.store(B)
        scene.engine.keep = 20_000
        for _ in range(10_010):
            scene.stream.live(*scene.engine.publish([]))
        pump(scene.engine, scene.stream)
        scene.hear(scene.engine.store(C))
        assert (scene.mode, scene.is_right()) == (KVMode.EXACT, True)


class TestRestarts:
    """An engine that begins anew."""

    @pytest.mark.parametrize("can_replay", [True, False])
    def test_a_lower_number_is_a_restart(self, can_replay: bool) -> None:
        """What was known is forgotten, and what there is is known."""
        scene = Scene(can_replay=can_replay)
        scene.connect()
        for prompt in (A, B):
            scene.hear(scene.engine.store(prompt))
        scene.engine.restart()
        scene.hear(scene.engine.store(C))
        assert (scene.mode, scene.is_right(), scene.stream.counts.restarts) == (KVMode.EXACT, True, 1)

    def test_a_restart_whose_first_messages_were_missed(self, scene: Scene) -> None:
        """They are asked for."""
        scene.connect()
        for prompt in (A, B, C):
            scene.hear(scene.engine.store(prompt))
        scene.engine.restart()
        scene.engine.store(C)
        scene.hear(scene.engine.store(A))
        assert (scene.mode, scene.is_right()) == (KVMode.EXACT, True)

    @pytest.mark.parametrize("said", [0, 1, 2, 3, 5])
    def test_a_restart_unseen(self, scene: Scene, said: int) -> None:
        """While the connection was lost the engine restarted, and said as much as before, or less, or more."""
        scene.connect()
        for prompt in (A, B, C):
            scene.hear(scene.engine.store(prompt))
        scene.stream.disconnected()
        scene.engine.restart()
        for at in range(said):
            scene.engine.store([7, 7, 7, at])
        scene.connect()
        assert (scene.mode, scene.is_right(), scene.stream.counts.restarts) == (KVMode.EXACT, True, 1)
        scene.hear(scene.engine.store(A))
        assert (scene.mode, scene.is_right()) == (KVMode.EXACT, True)

    def test_a_restart_that_looks_like_a_gap(self, scene: Scene) -> None:
        """The number goes on; the last message that was seen does not come back as it was."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        scene.engine.restart()
        for at in range(4):
            scene.engine.store([7, 7, 7, at])
        scene.hear(scene.engine.store(B))
        assert (scene.mode, scene.is_right(), scene.stream.counts.restarts) == (KVMode.EXACT, True, 1)

    def test_a_lost_connection(self, scene: Scene) -> None:
        """What is known may be used a little longer, and is whole again when it is back."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        scene.stream.disconnected()
        assert (scene.mode, scene.why) == (KVMode.DEGRADED, "the connection is lost")
        scene.clock.advance(11)
        assert scene.mode is KVMode.APPROXIMATE
        scene.engine.store(B)
        scene.connect()
        assert (scene.mode, scene.is_right(), scene.stream.counts.losses) == (KVMode.EXACT, True, 0)

    def test_a_lost_connection_without_replay(self, plain: Scene) -> None:
        """Nobody knows what was missed."""
        plain.stream.connected()
        plain.hear(plain.engine.store(A))
        plain.stream.disconnected()
        plain.stream.connected()
        assert (plain.mode, plain.claims) == (KVMode.DEGRADED, set())
        plain.hear(plain.engine.store(B))
        assert plain.mode is KVMode.DEGRADED


class TestDoubts:
    """What makes no sense."""

    def test_an_unreadable_message(self, scene: Scene) -> None:
        """Nothing is believed for a while; then it is all asked for again."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        scene.hear(scene.engine.publish([["BlockRemoved", None]]))
        assert (scene.mode, scene.why, scene.claims) == (KVMode.APPROXIMATE, "some of its events cannot be read", set())
        assert scene.stream.counts.unreadable == 1
        scene.engine.buffer.pop()
        scene.engine.publish([])
        scene.engine.buffer[-1] = (1, scene.engine.buffer[-1][1])
        scene.engine.seq = 2
        scene.clock.advance(31)
        scene.stream.tick()
        pump(scene.engine, scene.stream)
        assert (scene.mode, scene.is_right()) == (KVMode.EXACT, True)

    def test_it_is_asked_for_less_and_less_often(self, scene: Scene) -> None:
        """If it stays unreadable."""
        scene.connect()
        scene.hear(scene.engine.publish([["BlockRemoved", None]]))
        asked = []
        for second in range(1000):
            scene.clock.advance(1)
            scene.stream.tick()
            if pump(scene.engine, scene.stream):
                asked.append(second)
        assert 3 <= len(asked) <= 6
        assert scene.mode is KVMode.APPROXIMATE

    def test_garbage(self, scene: Scene) -> None:
        """Is as good as a message that was missed."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        scene.hear((1, b"\xc1"))
        assert (scene.mode, scene.claims) == (KVMode.APPROXIMATE, set())

    def test_an_orphan(self, scene: Scene) -> None:
        """A block after one that was never announced: the account is not whole, so it is asked for again."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        scene.engine.cache.add((*B,))
        scene.hear(scene.engine.store([*B, *C]))
        assert (scene.mode, scene.why) == (KVMode.DEGRADED, "a block follows one that was never announced")
        assert scene.claims == set()

    def test_more_blocks_than_there_is_room_for(self, scene: Scene) -> None:
        """The engine's own figure contradicts its events."""
        scene.connect()
        scene.hear(scene.engine.store([n for i in range(40) for n in (0, 0, 0, i)]))
        scene.stream.told(EngineLoad(cache_blocks=40))
        assert scene.mode is KVMode.EXACT
        scene.stream.told(EngineLoad(cache_blocks=20))
        assert (scene.mode, scene.why) == (KVMode.APPROXIMATE, "it announced more blocks than its cache has")

    def test_answers_that_disappoint(self, scene: Scene) -> None:
        """Now and then a block is gone before a request arrives; always is another matter."""
        scene.connect()
        scene.hear(scene.engine.store([*A, *B, *C]))
        for _ in range(15):
            scene.stream.answered(12, 0)
        scene.stream.answered(12, 8)
        scene.stream.answered(7, 0)
        scene.stream.answered(12, 4)
        assert scene.mode is KVMode.EXACT
        for _ in range(15):
            scene.stream.answered(12, 0)
        assert (scene.mode, scene.why) == (KVMode.APPROXIMATE, "answers had less cached than the events say")


class TestSilence:
    """An engine that works and says nothing."""

    WORKS = (
        EngineLoad(prefix_queries_tokens=10, prefix_hits_tokens=0),
        EngineLoad(prefix_queries_tokens=9000.0, prefix_hits_tokens=100.0),
    )

    def work(self, scene: Scene) -> None:
        """The engine computes prompts, and time passes."""
        scene.stream.told(self.WORKS[0])
        scene.clock.advance(11)
        scene.stream.told(self.WORKS[1])

    def test_without_replay_it_is_not_believed(self, plain: Scene) -> None:
        """Until it speaks again."""
        plain.stream.connected()
        plain.hear(plain.engine.store(A))
        self.work(plain)
        assert plain.mode is KVMode.APPROXIMATE
        assert "tells of no block" in plain.why
        plain.hear(plain.engine.store(B))
        assert plain.mode is KVMode.EXACT

    def test_with_replay_it_is_asked(self, scene: Scene) -> None:
        """If there was nothing to say, all is well; meanwhile too."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        self.work(scene)
        assert (scene.mode, scene.stream.wanted) == (KVMode.EXACT, 0)
        pump(scene.engine, scene.stream)
        assert (scene.mode, scene.is_right()) == (KVMode.EXACT, True)

    def test_what_was_missed_is_got(self, scene: Scene) -> None:
        """Messages that a broken connection swallowed."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        scene.engine.store(B)
        self.work(scene)
        pump(scene.engine, scene.stream)
        assert (scene.mode, scene.is_right()) == (KVMode.EXACT, True)

    def test_an_engine_that_does_not_answer_either(self, scene: Scene) -> None:
        """Is not believed, and asked again later."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        self.work(scene)
        scene.engine.replay(scene.stream, fails=True)
        assert scene.mode is KVMode.APPROXIMATE
        scene.clock.advance(31)
        scene.stream.tick()
        pump(scene.engine, scene.stream)
        assert (scene.mode, scene.is_right()) == (KVMode.EXACT, True)

    def test_an_idle_engine_may_be_silent(self, scene: Scene) -> None:
        """For as long as it likes."""
        scene.connect()
        scene.hear(scene.engine.store(A))
        for _ in range(5):
            scene.stream.told(self.WORKS[0])
            scene.clock.advance(100)
        assert (scene.mode, scene.stream.wanted) == (KVMode.EXACT, None)


def test_ranks_degrade() -> None:
    """The engine chooses one of its ranks itself, so what any of them holds is not what the chosen one does."""
    scene = Scene()
    scene.connect()
    scene.hear(scene.engine.publish([], rank=0))
    scene.hear(scene.engine.publish([], rank=1))
    assert (scene.mode, scene.stream.ranks) == (KVMode.DEGRADED, (0, 1))


def test_the_age_of_messages(scene: Scene) -> None:
    """By the engine's clock and ours."""
    message = scene.engine.store(A)
    scene.clock.advance(0.25)
    scene.stream.connected()
    scene.engine.replay(scene.stream)
    assert scene.stream.lag_s == pytest.approx(0.25, abs=1e-5)
    assert message[0] == 0


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([2, 5, 1000]))
def test_what_is_claimed_is_there(seed: int, can_replay: bool, keep: int) -> None:
    """Whatever is lost, replayed or restarted: once heard from, nothing is claimed that is not there, and if it is said
    to be exact, nothing is missing.
    """  # noqa: D205 - one sentence
    rng, scene = random.Random(seed), Scene(can_replay=can_replay, keep=keep)
    scene.connect()
    for _ in range(rng.randrange(1, 40)):
        act, engine = rng.random(), scene.engine
        if act < 0.06:  # which nobody does without its connections being lost
            scene.stream.disconnected()
            engine.restart()
            if rng.random() < 0.5:
                scene.connect()
        elif act < 0.12:
            scene.stream.disconnected()
            if rng.random() < 0.5:
                engine.store([rng.randrange(3) for _ in range(4)])
            scene.connect()
        elif act < 0.15:
            scene.clock.advance(40)
            scene.stream.tick()
            pump(engine, scene.stream)
        else:
            start = rng.choice([[], *map(list, sorted(engine.cache))])
            message = (
                engine.evict(rng)
                if act < 0.4 and engine.cache
                else engine.store([*start, *(rng.randrange(3) for _ in range(4))])
            )
            if rng.random() < 0.8:
                scene.stream.live(*message)
                if rng.random() < 0.1 and scene.stream.wanted is not None:
                    engine.replay(scene.stream, fails=True)
                pump(engine, scene.stream)
    scene.hear(scene.engine.store([1, 1, 1, 1]))
    assert scene.claims <= scene.engine.held()
    if scene.mode is KVMode.EXACT:
        assert scene.is_right()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_replayed_is_as_good_as_live(seed: int) -> None:
    """Who listened from the beginning and who asked for it all know the same."""
    rng, live = random.Random(seed), Scene()
    live.connect()
    for _ in range(30):
        prompts = [[], *map(list, sorted(live.engine.cache))]
        tokens = [rng.randrange(3) for _ in range(4)]
        evicts = live.engine.cache and rng.random() < 0.4
        live.hear(live.engine.evict(rng) if evicts else live.engine.store([*rng.choice(prompts), *tokens]))
    late = Scene()
    late.engine = live.engine
    late.connect()
    assert (late.claims, late.mode) == (live.claims, KVMode.EXACT)
    assert late.is_right()
