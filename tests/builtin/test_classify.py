"""The classifiers."""

from __future__ import annotations

import asyncio

import pytest

from kvfleet.adapters.call import Operation
from kvfleet.builtin.classify import ModalityClassifier, PIIClassifier, PromptClassifier
from kvfleet.builtin.facts import MODALITY, PII, PROMPT
from tests.builtin.making import context, user


async def test_the_prompts_length_is_estimated() -> None:
    """Of every request, whatever its shape."""
    found = await PromptClassifier().classify(context(messages=[user("x" * 40)], facts=False))
    assert found[PROMPT].token_estimate == 10


async def test_pictures_are_seen() -> None:
    """In chats; other operations carry text alone."""
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y"}}]}
    found = await ModalityClassifier().classify(context(messages=[picture], facts=False))
    assert found[MODALITY].image_count == 1
    ctx = context(body={"input": "data:image/png;base64,"}, operation=Operation.EMBEDDING, facts=False)
    assert not (await ModalityClassifier().classify(ctx))[MODALITY].is_multimodal


async def test_personal_data_is_found_in_every_message() -> None:
    """Tool results included."""
    talk = [user("Who is it?"), {"role": "tool", "content": "user@example.com, 123-45-6789"}]
    found = await PIIClassifier().classify(context(messages=talk, facts=False))
    assert found[PII].pii_types == ["email", "ssn"]


def test_a_long_text_is_looked_through_beside_the_event_loop() -> None:
    """A short one at once, which waits for nothing; a long one in a thread, with the same outcome."""
    short, long = ("user@example.com " + "word " * count for count in (100, 60_000))
    with pytest.raises(StopIteration) as done:
        PIIClassifier().classify(context(messages=[user(short)], facts=False)).send(None)
    assert done.value.value[PII].pii_types == ["email"]

    async def turns() -> tuple[list[str], int]:
        """What is found, and how often the event loop turned meanwhile."""
        looking = asyncio.ensure_future(PIIClassifier().classify(context(messages=[user(long)], facts=False)))
        count = 0
        while not looking.done():
            await asyncio.sleep(0)
            count += 1
        return looking.result()[PII].pii_types, count

    types, count = asyncio.run(turns())
    assert types == ["email"]
    assert count > 1


async def test_only_the_wanted_types_are_looked_for() -> None:
    """An address is not personal data to everybody."""
    found = await PIIClassifier(types=("ssn",)).classify(context(messages=[user("a@b.co, 123-45-6789")], facts=False))
    assert found[PII].pii_types == ["ssn"]


def test_an_unknown_type_is_refused() -> None:
    """With the types there are."""
    with pytest.raises(ValueError, match="no pattern for the type 'shoe_size'; known: email"):
        PIIClassifier(types=("shoe_size",))
