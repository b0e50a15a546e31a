"""The classifier with a fake analyzer, and with Presidio itself where it is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
from kvfleet_presidio import PresidioClassifier

from kvfleet.builtin.facts import PII
from kvfleet.errors import BadRequestError, ComponentError
from kvfleet.plugin.contract import Kind, RouteRequest, RoutingContext
from kvfleet.plugin.manager import discover

MODEL = "en_core_web_sm"


@attrs.frozen
class Found:
    """What Presidio's results have."""

    entity_type: str
    score: float = 0.9


@attrs.define
class Analyzer:
    """Finds what a test says, by word; keeps what it read, and in which thread."""

    finds: dict[str, Found] = attrs.field(factory=dict)
    texts: list[str] = attrs.field(factory=list)
    threads: list[int] = attrs.field(factory=list)

    def __call__(self, text: str) -> Sequence[Found]:
        self.texts.append(text)
        self.threads.append(threading.get_ident())
        return [found for word, found in self.finds.items() if word in text]


FINDS = {"Ada": Found("PERSON"), "555": Found("PHONE_NUMBER"), "Rome": Found("LOCATION", 0.3)}


def context(*texts: str, **body: Any) -> RoutingContext:
    """A chat on its way."""
    messages = [{"role": "user", "content": text} for text in texts]
    return RoutingContext(request=RouteRequest(body={"messages": messages, **body}), candidates=())


def types_of(stage: PresidioClassifier, analyzer: Analyzer, *texts: str) -> list[str]:
    """What the opened classifier finds."""

    async def run() -> list[str]:
        stage.use(analyzer)
        await stage.aopen()
        facts = await stage.classify(context(*texts))
        await stage.aclose()
        await stage.aclose()
        found: list[str] = facts[PII].pii_types
        return found

    return asyncio.run(run())


def test_it_is_found() -> None:
    """By the entry point, as a classifier that gives the built-in's fact."""
    component = discover(environ={}).get(Kind.CLASSIFY, "presidio")
    assert component.cls is PresidioClassifier
    assert component.gives == (PII,)


def test_types_are_named_as_kvfleet_names_them() -> None:
    """What policies know under a name keeps it; the rest is Presidio's in lower case; unsure finds are left out."""
    assert types_of(PresidioClassifier(), Analyzer(FINDS), "Ada, 555, Rome") == ["person", "phone"]
    assert types_of(PresidioClassifier(min_score=0.2), Analyzer(FINDS), "in Rome") == ["location"]
    assert types_of(PresidioClassifier(), Analyzer(FINDS), "nobody") == []


def test_every_text_is_read_off_the_event_loop() -> None:
    """All messages, in another thread than the loop's."""
    analyzer = Analyzer(FINDS)
    assert types_of(PresidioClassifier(), analyzer, "Ada", "", "555") == ["person", "phone"]
    assert analyzer.texts == ["Ada", "555"]
    assert threading.get_ident() not in analyzer.threads


def test_a_text_that_is_too_long_is_not_let_through() -> None:
    """It is refused, and the message has lengths only."""
    analyzer = Analyzer(FINDS)
    with pytest.raises(BadRequestError, match=r"12 characters are more than are looked through here \(10\)"):
        types_of(PresidioClassifier(max_chars=10), analyzer, "Ada 555", "12345")
    assert analyzer.texts == []


def test_without_the_model_it_says_what_to_install() -> None:
    """Opening fails, so the gateway does not start; nothing is downloaded."""
    with pytest.raises(ComponentError, match=r"pip install 'kvfleet-presidio\[analyzer\]'"):
        asyncio.run(PresidioClassifier(model="no_such_spacy_model").aopen())


def test_it_counts_requests() -> None:
    """For the dashboard; no text."""
    stage = PresidioClassifier()
    types_of(stage, Analyzer(), "Ada")
    assert stage.state() == {"requests": 1}


@pytest.mark.real
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(
    importlib.util.find_spec("presidio_analyzer") is None or importlib.util.find_spec(MODEL) is None,
    reason="presidio-analyzer or the spaCy model is not installed",
)
def test_with_presidio_itself() -> None:
    """Names are found, which no pattern does."""

    async def run() -> list[str]:
        stage = PresidioClassifier()
        await stage.aopen()
        found: list[str] = (await stage.classify(context("Ada Lovelace is at ada@example.com")))[PII].pii_types
        await stage.aclose()
        return found

    assert asyncio.run(run()) == ["email", "person"]
