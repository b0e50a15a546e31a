"""Judges one by one, and several as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import pytest

from kvfleet.adapters.base import ChatResponse
from kvfleet.builtin.judges import ModelJudge, SchemaJudge, SelfConsistency, SignsJudge, TokenJudge
from kvfleet.builtin.panel import Panel, Seat
from kvfleet.config.convert import structure
from kvfleet.errors import BackendError, ComponentError, Fault
from kvfleet.eval import schema_check
from kvfleet.plugin.component import Services
from kvfleet.plugin.judging import Grade, Submission
from kvfleet.plugin.manager import discover
from tests.builtin.making import context, model, user

CTX = context([model("m")], [user("What is the capital of France?")])


@attrs.define
class Asking:
    """Answers from a list, and keeps what was asked; a fault is raised."""

    answers: list[str | Fault] = attrs.field(factory=list)
    asked: list[tuple[Mapping[str, Any], str]] = attrs.field(factory=list)

    async def __call__(self, body: Mapping[str, Any], *, model: str = "") -> ChatResponse:
        self.asked.append((body, model))
        said = self.answers.pop(0)
        if isinstance(said, Fault):
            raise BackendError(said, "no")
        return ChatResponse(said)


def submission(text: str = "Paris.", *, ask: Any = None, **more: Any) -> Submission:
    """An answer to a question about France."""
    given = {"ctx": CTX, "model": model("m"), "response": ChatResponse(text, finish_reason="stop"), **more}
    return Submission(ask=ask or Asking(), **given)


async def test_signs_take_further_patterns() -> None:
    """Of other languages."""
    judge = SignsJudge(refusals=("keine ahnung",), refused=0.2)
    assert (await judge.grade(submission("Keine Ahnung, leider."))).score == 0.2
    assert (await judge.grade(submission("I don't know."))).score == 0.2
    _, findings = structure(SignsJudge, {"refusals": ["("]})
    assert [finding.code for finding in findings] == ["invalid"]


async def test_tokens_by_mean_and_by_percentile() -> None:
    """The least sure tokens are lost in a mean."""
    logprobs = [math.log(0.95)] * 9 + [math.log(0.1)]
    mean = await TokenJudge().grade(submission(logprobs=logprobs))
    least = await TokenJudge(measure="percentile", percentile=10).grade(submission(logprobs=logprobs))
    assert mean == Grade(pytest.approx(0.758, abs=0.001), "probability 0.76, mean of 10 tokens")
    assert least == Grade(pytest.approx(0.1), "probability 0.10, 10 % of 10 tokens are below")
    assert (await TokenJudge().grade(submission())).score is None


async def test_self_consistency_counts_those_that_answer() -> None:
    """A sample that fails says nothing; if all fail, it cannot tell."""
    asking = Asking(["Paris.", Fault.OVERLOADED])
    grade = await SelfConsistency(samples=2, compare="exact").grade(submission("paris. ", ask=asking))
    assert grade == Grade(1.0, "agrees 1.00 with 1 further answer")
    assert {name for _, name in asking.asked} == {""}
    none = await SelfConsistency(samples=1).grade(submission(ask=Asking([Fault.CONNECT])))
    assert none == Grade(None, "asked again, it did not answer")
    assert (await SelfConsistency().grade(submission(is_whole=False))).score is None


async def test_a_model_judges() -> None:
    """By its number; it never judges itself, and a beginning is no answer."""
    asking = Asking(["7", "none at all"])
    judge = ModelJudge(model="big")
    assert await judge.grade(submission(ask=asking)) == Grade(0.7, "big gives it 0.7")
    assert await judge.grade(submission(ask=asking)) == Grade(None, "big gave no number")
    assert asking.asked[0][1] == "big"
    own = await judge.grade(submission(model=model("big"), ask=asking))
    assert own == Grade(None, "big does not judge its own answers")
    assert (await judge.grade(submission(is_whole=False, ask=asking))).score is None
    assert len(asking.asked) == 2


async def test_json_of_the_schema() -> None:
    """What was not asked for is not judged."""
    pytest.importorskip("jsonschema")
    judge = SchemaJudge()
    judge.provision(Services())
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}}
    ctx = context([model("m")], [user("x")], body=wanted)
    assert await judge.grade(submission("{}", ctx=ctx)) == Grade(1.0, "it is JSON of the schema")
    assert await judge.grade(submission("[]", ctx=ctx)) == Grade(0.0, "it is not JSON of the schema")
    assert await judge.grade(submission("x" * 20_000, ctx=ctx)) == Grade(0.0, "it is not JSON of the schema")
    assert (await judge.grade(submission("{", ctx=ctx, is_whole=False))).score is None
    assert (await judge.grade(submission("Paris."))).score is None


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the pipeline is built, not when a request comes."""

    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(schema_check.importlib, "import_module", absent)
    with pytest.raises(ComponentError, match=r"pip install 'kvfleet\[judges\]'"):
        SchemaJudge().provision(Services())


@attrs.define
class Fixed:
    """Gives a grade, or raises."""

    given: Any
    is_costly: bool = False
    asked: int = 0

    async def grade(self, submission: Submission) -> Grade:
        self.asked += 1
        if isinstance(self.given, Exception):
            raise self.given
        return Grade(self.given, "as it was told")


def panel(**judges: Fixed) -> Panel:
    """Judges by name."""
    seats = [Seat(name, judge) for name, judge in judges.items()]
    return Panel(tuple(sorted(seats, key=lambda seat: seat.is_costly)))


class TestPanel:
    """Several judges as one."""

    async def test_the_lowest_verdict_counts(self) -> None:
        """With the name of who gave it; who cannot tell does not count."""
        grade = await panel(a=Fixed(0.9), b=Fixed(0.5), c=Fixed(None)).grade(submission())
        assert grade == Grade(0.5, "b: as it was told")

    async def test_if_nobody_can_tell_it_is_unknown(self) -> None:
        """With everybody's reason."""
        grade = await panel(a=Fixed(None), b=Fixed(None)).grade(submission())
        assert grade == Grade(None, "a: as it was told; b: as it was told")
        assert await Panel().grade(submission()) == Grade(None, "nobody judged it")

    async def test_a_verdict_that_decides_saves_the_others(self) -> None:
        """Those that cost something come last."""
        cheap, dear = Fixed(0.2), Fixed(0.9, is_costly=True)
        await panel(dear=dear, cheap=cheap).grade(submission(), enough=0.7)
        assert (cheap.asked, dear.asked) == (1, 0)
        await panel(dear=dear, cheap=Fixed(0.8)).grade(submission(), enough=0.7, may_ask=False)
        assert dear.asked == 0

    @pytest.mark.parametrize(
        ("given", "why"),
        [
            (ValueError("with the prompt in it"), "it failed: ValueError"),
            (
                BackendError(Fault.CONNECT, "the backend cannot be reached"),
                "it could not ask: the backend cannot be reached",
            ),
            (1.5, "it gave a score that is not between 0 and 1"),
        ],
    )
    async def test_a_judge_that_fails_cannot_tell(self, given: Any, why: str) -> None:
        """It costs no answer, and a foreign error's text is not repeated."""
        assert await panel(a=Fixed(given), b=Fixed(0.8)).grade(submission()) == Grade(0.8, "b: as it was told")
        assert await panel(a=Fixed(given)).grade(submission()) == Grade(None, f"a: {why}")

    def test_it_is_read_from_a_pipeline(self) -> None:
        """Names, and mappings with options."""
        services = Services(models=(model("big"),), find=discover().get)
        entries = [{"use": "model", "with": {"model": "big"}}, "logprobs", {"use": "signs"}]
        read = Panel.read(entries, services)
        assert [seat.name for seat in read.seats] == ["logprobs", "signs", "model"]
        assert (read.wants_logprobs, read.answers_each) == (True, 1)
