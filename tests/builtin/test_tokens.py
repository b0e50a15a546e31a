"""The classifier that makes prompts' tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from kvfleet.adapters.call import Operation, Usage
from kvfleet.builtin.facts import estimate_prompt, prompt_of, prompt_tokens
from kvfleet.builtin.tokens import TOKENS, PromptTokens, TokensClassifier
from kvfleet.cache.block_chain import token_hashes
from kvfleet.cache.tokens import packed
from kvfleet.clock import FrozenClock
from kvfleet.config.caching import PromptBlocksConfig
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, ComponentError, Fault
from kvfleet.plugin.component import Services
from kvfleet.testing.fakes import FakeAdapter
from kvfleet.trace import names
from kvfleet.trace.spans import Span
from tests.builtin.making import context, outcome, user
from tests.cache.tokenizing import save


@attrs.define
class Teller(FakeAdapter):
    """An engine that says what tokens a prompt has, or does not."""

    tokens: Sequence[int] | None = (1, 2, 3)
    fails: BackendError | None = None
    takes_s: float = 0.0
    asked: int = 0

    async def prompt_tokens(self, operation: Operation, body: Mapping[str, Any]) -> Sequence[int] | None:
        """Say it."""
        self.asked += 1
        await asyncio.sleep(self.takes_s)
        if self.fails is not None:
            raise self.fails
        return self.tokens


def model(name: str, endpoint: str = "http://a", **blocks: Any) -> ModelConfig:
    """A replica."""
    return ModelConfig(name=name, endpoint=endpoint, prompt_blocks=PromptBlocksConfig(block_tokens=2, **blocks))


PLAIN = ModelConfig(name="plain", endpoint="http://p")


class Fleet:
    """The stage, and requests for it."""

    def __init__(self, *models: ModelConfig, teller: Teller | None = None) -> None:
        self.clock = FrozenClock()
        self.teller = teller or Teller()
        self.models = models
        self.services = Services(clock=self.clock, models=models, adapters={m.id: self.teller for m in models})
        self.stage = TokensClassifier()
        self.stage.provision(self.services)

    async def find(self, *messages: Any, **more: Any) -> PromptTokens:
        """What is found of a request."""
        ctx = context(self.models, messages or [user("Hello there.")], now_s=self.clock.now_s(), **more)
        found = (await self.stage.classify(ctx))[TOKENS]
        facts: dict[Any, Any] = ctx.facts  # type: ignore[assignment]
        facts[TOKENS] = found
        self.ctx = ctx
        assert isinstance(found, PromptTokens)
        return found

    def count(self, name: str, model: str) -> float:
        """A counter's value."""
        return self.services.metrics.registry.get_sample_value(name, {"model": model}) or 0.0


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model's folder."""
    return str(save(tmp_path))


class TestHere:
    """Tokens made here."""

    async def test_by_a_tokenizer(self, folder: str) -> None:
        """The prompt as the engine's tokens, in blocks."""
        fleet = Fleet(model("m", mode="tokenizer", tokenizer=folder), PLAIN)
        await fleet.stage.aopen()
        found = await fleet.find()
        chain = found.chains["m"]
        assert (len(chain.hashes), chain.block_tokens, set(found.chains)) == (chain.tokens // 2, 2, {"m"})
        assert TOKENS.describe(found) == (f"m: {chain.tokens} tokens",)
        assert fleet.stage.state() == {"m": {"cut": True, "tokenised_characters": 62}}
        assert fleet.teller.asked == 0

    async def test_the_prompt_has_as_many_tokens_from_then_on(self, folder: str) -> None:
        """What is cached of it is told in them, so what is not has to be counted in them too."""
        fleet = Fleet(model("m", mode="tokenizer", tokenizer=folder))
        await fleet.stage.aopen()
        chain = (await fleet.find(user("Hello there. " * 40))).chains["m"]
        prompt, blocks = prompt_of(fleet.ctx), prompt_of(fleet.ctx).blocks(0, 64)
        assert prompt.token_estimate == blocks.tokens == prompt_tokens(fleet.ctx) == chain.tokens
        assert chain.tokens != estimate_prompt(Operation.CHAT, fleet.ctx.request.body)

    async def test_a_salt_makes_other_blocks(self, folder: str) -> None:
        """As the engine does not share them."""
        fleet = Fleet(model("m", mode="tokenizer", tokenizer=folder))
        await fleet.stage.aopen()
        plain, salted = await fleet.find(), await fleet.find(body={"cache_salt": "team"})
        assert plain.chains["m"].tokens == salted.chains["m"].tokens
        assert not set(plain.chains["m"].hashes) & set(salted.chains["m"].hashes)

    async def test_models_of_one_family_share_a_tokenizer(self, folder: str) -> None:
        """It is loaded once, and its memory is one."""
        fleet = Fleet(*(model(name, mode="tokenizer", tokenizer=folder) for name in ("m", "n")))
        await fleet.stage.aopen()
        found = await fleet.find()
        assert found.chains["m"].hashes == found.chains["n"].hashes
        makers = fleet.stage._makers
        assert makers["m"].local is makers["n"].local

    async def test_pictures(self, folder: str) -> None:
        """Cannot be made to tokens here; the prompt is compared by its bytes, and the trace says why."""
        fleet = Fleet(model("m", mode="tokenizer", tokenizer=folder))
        await fleet.stage.aopen()
        found = await fleet.find({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]})
        assert found == PromptTokens({}, {"m": "a message has more than text in it"})
        assert TOKENS.describe(found) == ("m: by bytes, a message has more than text in it",)
        assert fleet.count("kvfleet_prompt_tokens_missing_total", "m") == 1

    async def test_a_tokenizer_that_is_not_there(self, tmp_path: Path) -> None:
        """Keeps the router from opening."""
        fleet = Fleet(model("m", mode="tokenizer", tokenizer=str(tmp_path)))
        with pytest.raises(ComponentError):
            await fleet.stage.aopen()

    async def test_other_counts_than_the_engines(self, folder: str) -> None:
        """Three in a row, and the tokenizer is not believed to be the engine's, for a minute."""
        fleet = Fleet(model("m", mode="tokenizer", tokenizer=folder))
        await fleet.stage.aopen()
        right = (await fleet.find()).chains["m"].tokens
        for counted in (right + 1, right + 1, right, right + 1, right + 1):
            await fleet.stage.observe(outcome(fleet.ctx, fleet.models[0], usage=Usage(counted)))
        assert (await fleet.find()).chains
        await fleet.stage.observe(outcome(fleet.ctx, fleet.models[0], usage=Usage(right + 1)))
        assert (await fleet.find()).missing == {"m": "the engine counts other tokens"}
        assert fleet.count("kvfleet_prompt_tokens_miscounted_total", "m") == 5
        fleet.clock.advance(61)
        assert (await fleet.find()).chains

    async def test_an_answer_that_another_replica_went_on_with(self, folder: str) -> None:
        """Is not held against the tokenizer: its engine counted what was said before as a part of the prompt."""
        fleet = Fleet(model("m", mode="tokenizer", tokenizer=folder))
        await fleet.stage.aopen()
        right = (await fleet.find()).chains["m"].tokens
        route = Span("kvfleet.route", 0, attributes={names.CONTINUED: 1})
        for _ in range(5):
            ended = outcome(fleet.ctx, fleet.models[0], usage=Usage(right + 21), spans=[route])
            await fleet.stage.observe(ended)
        assert (await fleet.find()).chains
        assert not fleet.count("kvfleet_prompt_tokens_miscounted_total", "m")


class TestThere:
    """Tokens that engines are asked for."""

    async def test_an_engine_is_asked_once(self) -> None:
        """The same prompt is known the next time, whatever else the request says."""
        fleet = Fleet(model("m", mode="engine"), model("m", "http://b", mode="engine"))
        assert (await fleet.find()).chains["m"].hashes == token_hashes(packed([1, 2, 3]), 2)
        assert (await fleet.find(body={"temperature": 1})).chains["m"].tokens == 3
        assert fleet.teller.asked == 1
        await fleet.find(user("Something else."))
        assert fleet.teller.asked == 2

    async def test_in_a_simulation_nobody_is_asked(self) -> None:
        """But what is known is known."""
        fleet = Fleet(model("m", mode="engine"))
        assert (await fleet.find(dry_run=True)).missing == {"m": "nobody is asked in a simulation"}
        await fleet.find()
        assert (await fleet.find(dry_run=True)).chains
        assert fleet.teller.asked == 1

    @pytest.mark.parametrize(
        ("teller", "why"),
        [
            (Teller(tokens=None), "the engine cannot be asked for it"),
            (Teller(tokens=(-1,)), "the engine gave no token ids"),
            (Teller(fails=BackendError(Fault.NOT_FOUND, "no")), "the engine did not say (not_found)"),
            (Teller(takes_s=5), "not made within 20 ms"),
        ],
    )
    async def test_what_can_go_wrong(self, teller: Teller, why: str) -> None:
        """The prompt is compared by its bytes, and the request goes on."""
        fleet = Fleet(model("m", mode="engine", deadline_ms=20), teller=teller)
        assert await fleet.find() == PromptTokens({}, {"m": why})

    async def test_a_prompt_whose_tokens_come_late_is_counted_as_others_were(self) -> None:
        """By how many tokens their bytes came to, not by its own bytes alone: paces and caches are in the engine's."""
        fleet = Fleet(model("m", mode="engine", deadline_ms=20), teller=Teller(tokens=range(150)))
        fleet.teller.takes_s = 5
        await fleet.find(user("a" * 400))
        assert prompt_tokens(fleet.ctx) == 100  # nothing is known yet
        fleet.teller.takes_s = 0
        await fleet.find(user("b" * 400))
        fleet.teller.takes_s = 5
        found = await fleet.find(user("c" * 800))
        assert TOKENS.describe(found) == ("m: by bytes, not made within 20 ms", "counted as about 300 tokens")
        blocks = prompt_of(fleet.ctx).blocks(0, 64)
        assert (prompt_tokens(fleet.ctx), blocks.tokens) == (300, 300)
        assert blocks.block_tokens * len(blocks.hashes) == pytest.approx(300, rel=0.1)

    async def test_what_teaches_nothing_of_bytes(self) -> None:
        """Tokens that a request brings, and a simulation."""
        fleet = Fleet(model("m", mode="engine", deadline_ms=20), teller=Teller(tokens=range(150)))
        await fleet.find(operation=Operation.COMPLETION, body={"prompt": [5] * 900})
        fleet.teller.takes_s = 5
        await fleet.find(user("c" * 800), dry_run=True)
        assert prompt_tokens(fleet.ctx) == 200

    async def test_what_is_remembered_is_bounded(self) -> None:
        """The prompts asked for least recently go."""
        fleet = Fleet(model("m", mode="engine", cache_megabytes=0.001))
        for at in range(20):
            await fleet.find(user(f"{at}"))
        await fleet.find(user("19"))
        assert fleet.teller.asked == 20
        await fleet.find(user("0"))
        assert fleet.teller.asked == 21

    async def test_tokens_given_need_nobody(self) -> None:
        """A completion may bring its own."""
        fleet = Fleet(model("m", mode="engine"))
        found = await fleet.find(operation=Operation.COMPLETION, body={"prompt": [5, 6, 7]})
        assert found.chains["m"].hashes == token_hashes(packed([5, 6, 7]), 2)
        assert fleet.teller.asked == 0


async def test_other_calls_have_no_prompt() -> None:
    """Embeddings have a cache of nothing; nor do models compared by bytes."""
    fleet = Fleet(model("m", mode="engine"))
    assert await fleet.find(operation=Operation.EMBEDDING, body={"input": "x"}) == PromptTokens()
    assert await Fleet(PLAIN).find() == PromptTokens()
    await fleet.stage.observe(outcome(fleet.ctx, fleet.models[0], usage=Usage(3)))
    await fleet.stage.observe(outcome(fleet.ctx, None))
