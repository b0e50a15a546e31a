"""What is known of a fleet's caches."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

pytest.importorskip("msgspec")

from kvfleet.adapters.base import EngineLoad
from kvfleet.cache.block_chain import token_hashes
from kvfleet.cache.knowledge import CacheKnowledge, Held, TokenChain
from kvfleet.cache.kv_events import BlockStored
from kvfleet.cache.kv_sequence import EventStream
from kvfleet.cache.kv_state import KVMode
from kvfleet.clock import FrozenClock
from kvfleet.config.caching import KVEventsConfig, PromptBlocksConfig
from kvfleet.config.schema import ModelConfig
from tests.cache.made import stored, words
from tests.cache.publisher import Publisher, pump

PROMPT = list(range(1, 13))
BLOCKS = PromptBlocksConfig(mode="engine", block_tokens=4)


def model(name: str = "m", endpoint: str = "http://a", **events: Any) -> ModelConfig:
    """A replica whose engine tells."""
    settings = KVEventsConfig(replay="tcp://{host}:5558", **events)
    return ModelConfig(name=name, endpoint=endpoint, kv_events=settings, prompt_blocks=BLOCKS)


def chain(tokens: list[int], size: int = 4) -> TokenChain:
    """A prompt's chain."""
    return TokenChain(token_hashes(words(tokens), size), size, len(tokens))


class Scene:
    """A fleet's knowledge, and engines that tell."""

    def __init__(self, *models: ModelConfig) -> None:
        self.clock = FrozenClock()
        self.caches = CacheKnowledge(self.clock)
        self.caches.register(models)

    def connect(self, at: int = 0, rank: int = 0) -> Publisher:
        """Connect an engine."""
        engine = Publisher(self.clock)
        self.stream(at, rank).connected()
        pump(engine, self.stream(at, rank))
        return engine

    def stream(self, at: int = 0, rank: int = 0) -> EventStream:
        """A source's state."""
        state = self.caches.sources[at].states[rank]
        assert isinstance(state, EventStream)
        return state

    def tell(self, event: BlockStored, *, at: int = 0, of: int = 0, rank: int = 0) -> None:
        """An event of a data-parallel rank, as one of the source's publishers has it."""
        self.stream(at, of).take_in(rank, [event], 0.0)

    def held(self, tokens: list[int], name: str = "m") -> dict[str, Held]:
        """What is held of a prompt, now."""
        self.clock.advance(1)
        return dict(self.caches.held(name, chain(tokens), self.clock.now_s()))


def exact(tokens: float, other: float = 0.0, mode: KVMode = KVMode.EXACT) -> Held:
    """What is held."""
    return Held(tokens, other, mode)


def test_each_replica_by_itself() -> None:
    """Of an engine that was not heard of, nothing is said at all; of others also that they hold nothing."""
    a, b, c = model(), model(endpoint="http://b"), model(endpoint="http://c")
    scene = Scene(a, b, c)
    scene.connect(0)
    scene.connect(1)
    scene.tell(stored([1, 2], PROMPT[:8]))
    assert scene.held(PROMPT) == {a.id: exact(8), b.id: exact(0)}
    assert scene.caches.mode(c.id) == (KVMode.APPROXIMATE, "not connected")
    assert scene.caches.mode("x") is None
    assert scene.held(PROMPT, "other") == {}


def test_the_last_token_is_always_computed() -> None:
    """So a prompt of whole blocks that is all there counts without its last block."""
    a = model()
    scene = Scene(a)
    scene.connect()
    scene.tell(stored([1, 2, 3], PROMPT))
    assert scene.held(PROMPT) == {a.id: exact(8)}
    assert scene.held([*PROMPT, 99]) == {a.id: exact(12)}


def test_an_engine_finds_blocks_of_its_own_size() -> None:
    """If ours are smaller, what goes beyond its last whole block does not count."""
    a = model()
    scene = Scene(a)
    scene.connect()
    scene.tell(stored([1], PROMPT[:8], size=8))
    assert scene.held([*PROMPT[:7], 0, 0, 0]) == {a.id: exact(0)}
    assert scene.held(PROMPT) == {a.id: exact(8)}


def test_other_tiers() -> None:
    """Are told apart."""
    a = model()
    scene = Scene(a)
    scene.connect()
    scene.tell(stored([1], PROMPT[:4]))
    scene.tell(stored([1], PROMPT[:4], tier="cpu"))
    scene.tell(stored([2], PROMPT[4:8], parent=1, tier="cpu"))
    assert scene.held(PROMPT) == {a.id: exact(4, 4)}


def test_ranks_on_one_port() -> None:
    """Any of them may be the one, so it is their mean that is expected."""
    a = model()
    scene = Scene(a)
    scene.connect()
    scene.tell(stored([1, 2], PROMPT[:8]), rank=0)
    scene.tell(stored([9], [5, 5, 5, 5]), rank=1)
    assert scene.held(PROMPT) == {a.id: exact(4, mode=KVMode.DEGRADED)}


def test_ranks_on_ports_of_their_own() -> None:
    """The same."""
    a = model(data_parallel_ranks=2)
    scene = Scene(a)
    scene.connect(0, 0)
    scene.connect(0, 1)
    scene.tell(stored([1, 2], PROMPT[:8]), of=0, rank=0)
    scene.tell(stored([1], PROMPT[:4]), of=1, rank=1)
    assert scene.held(PROMPT) == {a.id: exact(6, mode=KVMode.DEGRADED)}
    assert "2 data-parallel ranks" in scene.caches.mode(a.id)[1]  # type: ignore[index]


def test_a_single_rank_with_another_number() -> None:
    """As with an engine that is one rank of many, each with an endpoint of its own."""
    a = model()
    scene = Scene(a)
    scene.connect()
    scene.tell(stored([1, 2], PROMPT[:8]), rank=3)
    assert scene.held(PROMPT) == {a.id: exact(8)}


def test_an_adapter_beside_its_base() -> None:
    """One engine, two models: one source, and each model's blocks are its own."""
    base, tuned = model("m"), model("t", lora="tune")
    scene = Scene(base, tuned)
    assert len(scene.caches.sources) == 1
    scene.connect()
    scene.tell(stored([1], PROMPT[:4]))
    scene.tell(stored([2, 3], PROMPT[:8], lora="tune"))
    assert scene.held(PROMPT) == {base.id: exact(4)}
    assert scene.held(PROMPT, "t") == {tuned.id: exact(8)}


def test_a_restart_is_forgotten_at_once() -> None:
    """And what comes then is known."""
    a = model()
    scene = Scene(a)
    engine = scene.connect()
    for prompt in (PROMPT[:8], [7, 7, 7, 7]):
        scene.stream().live(*engine.store(prompt))
    assert scene.held(PROMPT) == {a.id: exact(8)}
    engine.restart()
    scene.stream().live(*engine.store(PROMPT[:4]))
    assert scene.held(PROMPT) == {a.id: exact(4)}


def test_answers_that_disappoint() -> None:
    """End an engine's credit."""
    a = model()
    scene = Scene(a)
    scene.connect()
    scene.tell(stored([1, 2, 3], PROMPT))
    for _ in range(16):
        scene.caches.answered(a.id, 12, 0)
    scene.caches.answered("x", 12, 0)
    assert scene.held(PROMPT) == {}
    assert scene.caches.mode(a.id) == (KVMode.APPROXIMATE, "answers had less cached than the events say")


def test_disabled_models_are_left_alone() -> None:
    """Nobody listens for them."""
    scene = Scene(attrs.evolve(model(), enabled=False), ModelConfig(name="n", endpoint="http://n"))
    assert (scene.caches.sources, scene.caches.tells("m"), scene.caches.tells("n")) == ([], False, False)


def test_bounds_are_held() -> None:
    """What is beyond them degrades the replica, and takes no memory."""
    a = model(max_blocks=2)
    scene = Scene(a)
    scene.connect()
    scene.tell(stored([1, 2, 3], PROMPT))
    assert scene.held([*PROMPT, 0]) == {a.id: exact(8, mode=KVMode.DEGRADED)}
    assert scene.caches.state() == {"m": {"entries": 2, "refused": 0}}
    scene.stream().told(EngineLoad(cache_blocks=100))
    assert scene.held(PROMPT)[a.id].mode is KVMode.DEGRADED


# Reloads


def reloaded(scene: Scene, *models: ModelConfig) -> CacheKnowledge:
    """What is known after the fleet file was read anew."""
    now = CacheKnowledge(scene.clock)
    now.register(models)
    now.inherit(scene.caches)
    scene.caches = now
    return now


def test_the_same_engine_is_known_as_before() -> None:
    """Also beside others that come, and what it tells from then on is known, too."""
    a, b = model(), model(endpoint="http://b")
    scene = Scene(a)
    scene.connect()
    scene.tell(stored([1], PROMPT[:4]))
    before = scene.stream()
    reloaded(scene, attrs.evolve(a, latency_p50_ms=7), b)
    assert scene.stream() is before
    assert scene.held(PROMPT) == {a.id: exact(4)}
    scene.tell(stored([2], PROMPT[4:8], parent=1))
    scene.connect(1)
    assert scene.held(PROMPT) == {a.id: exact(8), b.id: exact(0)}


@pytest.mark.parametrize(
    "changed",
    [
        {"kv_events": KVEventsConfig(replay="tcp://{host}:5559")},
        {"kv_events": KVEventsConfig(replay="tcp://{host}:5558", max_blocks=7)},
        {"prompt_blocks": PromptBlocksConfig(mode="engine", block_tokens=2)},
    ],
)
def test_an_engine_that_is_asked_in_another_way_begins_anew(changed: dict[str, Any]) -> None:
    """And nothing is claimed for it by what was told before."""
    a = model()
    scene = Scene(a)
    scene.connect()
    scene.tell(stored([1], PROMPT[:4]))
    before = scene.stream()
    now = reloaded(scene, attrs.evolve(a, **changed))
    assert scene.stream() is not before
    assert now.mode(a.id) == (KVMode.APPROXIMATE, "not connected")
    assert now.state() == {"m": {"entries": 0, "refused": 0}}
    scene.connect()
    assert now.mode(a.id) == (KVMode.EXACT, "")
    assert now.state() == {"m": {"entries": 0, "refused": 0}}


def test_an_engine_that_is_gone_is_forgotten() -> None:
    """Those that stay are not, and the one that comes back begins anew; other models keep to themselves."""
    a, b, n = model(), model(endpoint="http://b"), model("n", "http://c")
    scene = Scene(a, b, n)
    for at in range(3):
        scene.connect(at)
        scene.tell(stored([1], PROMPT[:4]), at=at)
    reloaded(scene, b, n)
    assert scene.caches.mode(a.id) is None
    assert scene.held(PROMPT, "n") == {n.id: exact(4)}
    assert scene.caches.mode(b.id) == (KVMode.EXACT, "")
    assert scene.held(PROMPT) == {b.id: exact(4)}
    reloaded(scene, a, b)
    assert scene.held(PROMPT) == {b.id: exact(4)}
    assert not scene.caches.tells("n")
    assert scene.caches.state() == {"m": {"entries": 1, "refused": 0}}


def test_an_engine_that_connects_is_told_apart_by_its_port() -> None:
    """The replica before it is gone, so its engine is listened to on another port: it begins anew."""
    a, b = model(bind=True, endpoint="http://a"), model(bind=True, endpoint="http://b")
    scene = Scene(a, b)
    scene.connect(1)
    scene.tell(stored([1], PROMPT[:4]), at=1)
    reloaded(scene, b)
    assert scene.held(PROMPT) == {}
    assert scene.caches.state() == {"m": {"entries": 0, "refused": 0}}


class TestDrafting:
    """An engine that computes the last block it finds anew (EAGLE, MTP): no event says so, its answers do."""

    @pytest.fixture
    def scene(self) -> Scene:
        """One that holds a prompt."""
        scene = Scene(model())
        scene.connect()
        scene.tell(stored([1, 2, 3], PROMPT))
        return scene

    def test_it_is_learned_and_unlearned(self, scene: Scene) -> None:
        """After eight answers in a row that differ by just a block."""
        state, longer = scene.stream(), [*PROMPT, 1]
        for _ in range(7):
            state.answered(12, 8)
        assert scene.held(longer) == {model().id: exact(12)}
        state.answered(0, 0)  # says nothing
        state.answered(12, 8)
        assert scene.held(longer) == {model().id: exact(8)}
        assert scene.held(PROMPT[:5]) == {model().id: exact(0)}
        for _ in range(8):
            state.answered(8, 12)
        assert scene.held(longer) == {model().id: exact(12)}

    def test_it_counts_from_the_end_whatever_tier_that_is_in(self, scene: Scene) -> None:
        """What must be loaded from elsewhere comes after what is on the device."""
        scene.tell(stored([4, 5], [1, 2, 3, 4, 5, 6, 7, 8], parent=3, tier="cpu"))
        for _ in range(8):
            scene.stream().answered(12, 8)
        whole = [*PROMPT, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert scene.held(whole) == {model().id: exact(12, 4)}
        assert scene.held(whole[:17]) == {model().id: exact(12, 0)}

    def test_one_answer_as_expected_is_enough(self, scene: Scene) -> None:
        """Blocks that went while requests waited are no habit."""
        for cached in [8] * 7 + [12] + [8] * 7:
            scene.stream().answered(12, cached)
        assert not scene.stream().drops_block

    def test_a_restart_is_another_engine(self, scene: Scene) -> None:
        """It may have been started without its draft."""
        for _ in range(8):
            scene.stream().answered(12, 8)
        scene.stream().forget()
        assert not scene.stream().drops_block
