"""Who holds which beginning."""

from __future__ import annotations

from typing import Any

from kvfleet.cache.fingerprints import Mark, PromptFingerprinter
from kvfleet.cache.mark_index import MarkIndex

MAKE = PromptFingerprinter(prefix_tokens=16)
SYSTEM = {"role": "system", "content": "You are a helpful assistant, and you answer in verse."}


def marks(*messages: Any) -> tuple[Mark, ...]:
    """The marks of a conversation."""
    return MAKE.fingerprint([SYSTEM, *messages]).marks


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


HELLO = user("Hello, who are you?")
ANSWER = {"role": "assistant", "content": "A poet in a box of sand." * 20}


def test_what_was_answered_is_held() -> None:
    """The whole prompt, by whoever answered it."""
    index = MarkIndex()
    index.record(marks(HELLO), "a", 0.0)
    assert index.lookup(marks(HELLO), 0.0) == {"a": 18}
    assert index.lookup(MAKE.fingerprint([HELLO]).marks, 0.0) == {}


def test_the_answer_itself_is_held_too() -> None:
    """The next turn finds prompt and answer, since that replica wrote the answer."""
    index = MarkIndex()
    index.record(marks(HELLO), "a", 0.0)
    turn = marks(HELLO, ANSWER, user("More."))
    assert index.lookup(turn, 0.0) == {"a": 138}
    assert turn[-1][1] == 140


def test_others_hold_the_system_prompt() -> None:
    """Each holder is found with the longest beginning it has."""
    index = MarkIndex()
    index.record(marks(user("Something else.")), "a", 0.0)
    index.record(marks(HELLO), "b", 0.0)
    assert index.lookup(marks(HELLO), 0.0) == {"a": 14, "b": 18}


def test_what_is_too_old_is_not_believed() -> None:
    """And it is forgotten when the next prompt is recorded."""
    index = MarkIndex(ttl_s=10)
    index.record(marks(HELLO), "a", 0.0)
    assert index.lookup(marks(HELLO), 10.0) == {"a": 18}
    assert index.lookup(marks(HELLO), 10.1) == {}
    index.record(MAKE.fingerprint_text("x").marks, "b", 10.1)
    assert len(index) == 1


def test_being_used_keeps_a_beginning_alive() -> None:
    """A system prompt that is asked under all day stays."""
    index = MarkIndex(ttl_s=10)
    for second in range(0, 100, 5):
        index.record(marks(user(str(second))), "a", float(second))
    assert index.lookup(marks(HELLO), 100.0) == {"a": 14}
    assert len(index) <= 2 * 3 + 1


def test_the_index_is_bounded() -> None:
    """The oldest marks go first, however many prompts come."""
    index = MarkIndex(max_entries=100)
    for i in range(1000):
        index.record(MAKE.fingerprint_text(f"prompt {i}").marks, "a", float(i))
    assert len(index) == 100
    assert index.lookup(MAKE.fingerprint_text("prompt 999").marks, 999.0) == {"a": 3}
    assert index.lookup(MAKE.fingerprint_text("prompt 0").marks, 999.0) == {}
    assert index.state() == {"entries": 100, "max_entries": 100}


def test_a_mark_has_bounded_holders() -> None:
    """A system prompt that everybody has keeps its 16 latest holders."""
    index = MarkIndex()
    for i in range(100):
        index.record(marks(HELLO), f"r{i}", float(i))
    assert set(index.lookup(marks(HELLO), 100.0)) == {f"r{i}" for i in range(84, 100)}


def test_a_long_conversation_leaves_few_marks() -> None:
    """Eight at the most for a prompt of any length, its beginnings and its end among them."""
    index = MarkIndex()
    talk = marks(*[user(f"turn {i} " * 20) for i in range(200)])
    assert len(talk) > 200
    index.record(talk, "a", 0.0)
    assert len(index) == 8
    assert index.lookup(talk, 0.0) == {"a": talk[-1][1]}
    assert index.lookup(marks(HELLO), 0.0) == {"a": 14}
