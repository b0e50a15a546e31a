"""The memory under the caches of answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvfleet.cache.answer_memory import AnswerMemory, Held
from kvfleet.cache.likeness import Wording

LIKENESS = Wording()


def held(text: str = "", *, size: int = 10, until_s: float = 100.0, group: str = "", scope: str = "") -> Held[str]:
    """An answer to this question."""
    return Held(text, size, 0.0, until_s, group, scope, LIKENESS.sketch(text) if text else None)


def nearest(memory: AnswerMemory[str], text: str, scope: str = "", now_s: float = 0.0) -> str | None:
    """The key of what is found for a question."""
    sketch = LIKENESS.sketch(text)
    assert sketch is not None
    found = memory.nearest(
        sketch, scope, LIKENESS, threshold=0.8, now_s=now_s, fits=lambda value: "secret" not in value
    )
    return None if found is None else str(found[0])


def test_the_most_alike_is_found_in_its_own_scope() -> None:
    """Among those that fit and are young enough."""
    memory: AnswerMemory[str] = AnswerMemory(1000)
    memory.put("polite", held("please explain how a cache works"))
    memory.put("plain", held("explain how a cache works"))
    memory.put("other", held("explain how a cache works", scope="b"))
    assert nearest(memory, "Explain how a cache works!") == "plain"
    assert nearest(memory, "Explain how a cache works!", "b") == "other"
    assert nearest(memory, "Explain how a cache works!", "c") is None
    assert nearest(memory, "Explain how a cache works!", now_s=101.0) is None
    assert len(memory) == 1


def test_what_does_not_fit_is_passed_over() -> None:
    """As an answer of a model that is no candidate."""
    memory: AnswerMemory[str] = AnswerMemory(1000)
    memory.put("a", held("where is the secret door"))
    assert nearest(memory, "where is the secret door?") is None


def test_one_tenant_cannot_drive_out_the_others() -> None:
    """Whoever holds the most gives up its own least used."""
    memory: AnswerMemory[str] = AnswerMemory(1e6, 4)
    memory.put("small", held(group="small"))
    for i in range(10):
        memory.put(f"big{i}", held(group="big"))
    assert memory.get("small", 0.0) is not None
    assert [i for i in range(10) if memory.get(f"big{i}", 0.0)] == [7, 8, 9]


def test_what_is_larger_than_all_room_is_not_kept() -> None:
    """And takes nothing else with it."""
    memory: AnswerMemory[str] = AnswerMemory(100)
    memory.put("a", held(size=90))
    memory.put("b", held(size=101))
    assert (memory.get("a", 0.0) is not None, memory.get("b", 0.0)) == (True, None)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60), st.sampled_from("xyz"), st.booleans()), max_size=60))
def test_the_bounds_and_the_books_always_hold(steps: list[tuple[int, int, str, bool]]) -> None:
    """Whatever is kept and dropped: entries, bytes, and nothing left behind in an index."""
    memory: AnswerMemory[str] = AnswerMemory(150, 5)
    kept: dict[int, int] = {}
    for key, size, group, drops in steps:
        if drops:
            memory.drop(key)
        else:
            memory.put(key, held("what is it", size=size, group=group))
            kept[key] = size
        assert len(memory) <= 5
        assert memory.size == sum(size for key, size in kept.items() if memory.get(key, 0.0)) <= 150
    for key in kept:
        memory.drop(key)
    assert (len(memory), memory.size, nearest(memory, "what is it")) == (0, 0, None)


def test_clearing_leaves_nothing() -> None:
    """Neither by key nor by likeness."""
    memory: AnswerMemory[str] = AnswerMemory(100)
    memory.put("a", held("what is it"))
    memory.clear()
    assert (len(memory), memory.size, nearest(memory, "what is it")) == (0, 0, None)
