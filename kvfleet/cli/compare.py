"""``kvfleet compare``: prompts put to several models, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import attrs
import click
import orjson

from kvfleet.adapters.base import ChatMessage, ChatRequest, ChatResponse
from kvfleet.cli import render
from kvfleet.cli.options import config_argument, json_option, read_fleet, reports
from kvfleet.cli.shadow import measure, share
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BadRequestError
from kvfleet.eval.asking import mean, median
from kvfleet.eval.compare import ComparisonResult, ModelComparator
from kvfleet.money import money
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.telemetry.cost import cost_usd

__all__ = ["Standing", "chat_request", "compare", "named_models", "standings", "standings_table"]

_NOT_ASKED = ("model", "messages", "stream", "stream_options")


@click.command()
@config_argument()
@click.option("-p", "--prompt", default="", help="The user's message.")
@click.option(
    "-f",
    "--file",
    "path",
    type=click.Path(path_type=Path),
    help='JSON Lines: each a text, {"prompt": ...} or {"messages": [...]}.',
)
@click.option("-m", "--models", default="", help="Models to ask, with commas; every chat model if not given.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, help="In seconds.")
@json_option
@reports
def compare(
    config: Path,
    *,
    prompt: str,
    path: Path | None,
    models: str,
    max_tokens: int | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Put one prompt, or a file of them, to several models of a fleet, and show what each made of it.

    The models are asked directly: no pipeline, no policy, no fallback. For each model its first replica is asked.
    """
    if bool(prompt) == (path is not None):
        raise click.UsageError("give either --prompt or --file")
    requests = [ChatRequest([ChatMessage("user", prompt)])] if path is None else read_prompts(path)
    asked = [attrs.evolve(one, max_tokens=max_tokens or one.max_tokens) for one in requests]
    replicas, found = anyio.run(_compare, config, asked, models, timeout)
    standing = standings(found, replicas)
    if as_json:
        shown = [_as_json(one, replicas) for one in found]
        render.echo_json({"models": [one.to_dict() for one in standing], "prompts": shown})
    elif len(found) == 1:
        render.echo(_side_by_side(found[0], replicas))
    else:
        render.echo(render.count(len(found), "prompt"))
        render.echo(standings_table(standing))


async def _compare(
    path: Path, requests: Sequence[ChatRequest], wanted: str, timeout_s: float
) -> tuple[dict[str, ModelConfig], list[ComparisonResult]]:
    table = discover()
    router = Router(read_fleet(path, table), table=table, polls=False)
    try:
        replicas = named_models(router, wanted)
        adapters = {name: router.adapters[replica.id] for name, replica in replicas.items()}
        comparator = ModelComparator(timeout_s=timeout_s)
        found = []
        for number, request in enumerate(requests, 1):
            render.progress(f"{number}/{len(requests)}")
            found.append(await comparator.compare(request, adapters, list(replicas)))
        return replicas, found
    finally:
        await router.aclose()


def named_models(router: Router, wanted: str) -> dict[str, ModelConfig]:
    """The first replica of each model named, with commas; of every chat model if none is.

    Raises:
        BadRequestError: if there is no such model.
    """
    first: dict[str, ModelConfig] = {}
    for replica in router.models:
        first.setdefault(replica.name, replica)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in first]
    if unknown:
        raise BadRequestError(f"no model is called {unknown[0]!r}; there are {', '.join(first)}")
    return {
        name: replica
        for name, replica in first.items()
        if (name in names if names else replica.enabled and replica.capabilities.model_type == "chat")
    }


def read_prompts(path: Path) -> list[ChatRequest]:
    """The requests of a file, one a line.

    Raises:
        BadRequestError: naming the line, if one is neither a text, nor has a prompt, nor messages.
        OSError: if the file cannot be read.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            body = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise BadRequestError(f"{path}:{number}: is not JSON") from error
        if isinstance(body, str):
            body = {"prompt": body}
        if not isinstance(body, Mapping) or not ("prompt" in body or "messages" in body):
            raise BadRequestError(f'{path}:{number}: must be a text, {{"prompt": ...}} or {{"messages": [...]}}')
        found.append(chat_request(body))
    if not found:
        raise BadRequestError(f"{path}: holds no prompt")
    return found


def chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """An OpenAI body, or one with a ``prompt``, as a request to any model for a whole answer."""
    messages = body.get("messages") or [{"role": "user", "content": str(body.get("prompt", ""))}]
    extra = {key: value for key, value in body.items() if key not in (*_NOT_ASKED, "prompt")}
    return ChatRequest([ChatMessage.from_openai(message) for message in messages], extra=extra)


@attrs.frozen(kw_only=True)
class Standing:
    """How one model did over all prompts: a median of times, means of the rest, and the sum of costs."""

    model: str
    answered: int
    failed: int
    median_ms: float | None
    tokens: float | None
    cost_usd: float | None
    similarity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return attrs.asdict(self)


def standings(
    found: Sequence[Any], replicas: Mapping[str, ModelConfig], similarities: Sequence[Mapping[str, float]] = ()
) -> list[Standing]:
    """One standing for each model; `found` has ``results``, ``latencies`` and ``errors`` by model."""
    return [_standing(name, replica, found, similarities) for name, replica in replicas.items()]


def _standing(
    name: str, replica: ModelConfig, found: Sequence[Any], similarities: Sequence[Mapping[str, float]]
) -> Standing:
    answers = [one.results[name] for one in found if name in one.results]
    costs = [cost for answer in answers if (cost := _cost(replica, answer)) is not None]
    return Standing(
        model=name,
        answered=len(answers),
        failed=sum(name in one.errors for one in found),
        median_ms=median([one.latencies[name] for one in found if name in one.results]),
        tokens=mean([answer.usage.completion_tokens for answer in answers if answer.usage]),
        cost_usd=sum(costs) if costs else None,
        similarity=mean([one[name] for one in similarities if name in one]),
    )


def standings_table(standing: Sequence[Standing], *, alike: bool = False) -> str:
    """The standings below each other."""
    heads = ["model", "answered", "failed", "time", "tokens", "cost", *(["alike"] if alike else [])]
    rows = [
        [
            render.bold(one.model),
            str(one.answered),
            render.bad(str(one.failed)) if one.failed else "0",
            measure(one.median_ms),
            "-" if one.tokens is None else f"{one.tokens:.0f}",
            money(one.cost_usd),
            *([share(one.similarity)] if alike else []),
        ]
        for one in standing
    ]
    return render.table(heads, rows, columns=render.width())


def _cost(replica: ModelConfig, answer: ChatResponse) -> float | None:
    return cost_usd(replica, answer.usage) if answer.usage else None


def _side_by_side(one: ComparisonResult, replicas: Mapping[str, ModelConfig]) -> str:
    rows = []
    for name, replica in replicas.items():
        answer = one.results.get(name)
        if answer is None:
            rows.append((render.bold(name), measure(one.latencies[name]), "-", "-", f"failed: {one.errors[name]}"))
            continue
        tokens = str(answer.usage.completion_tokens) if answer.usage else "-"
        text = " ".join(answer.content.split())
        rows.append(
            (render.bold(name), measure(one.latencies[name]), tokens, money(_cost(replica, answer)), text or "-")
        )
    return render.table(("model", "time", "tokens", "cost", "answer"), rows, columns=render.width())


def _as_json(one: ComparisonResult, replicas: Mapping[str, ModelConfig]) -> dict[str, Any]:
    answers = {
        name: {
            "latency_ms": one.latencies[name],
            **({"error": one.errors[name]} if name in one.errors else {}),
            **(_answer(one.results[name], replicas[name]) if name in one.results else {}),
        }
        for name in replicas
    }
    return {"prompt": one.prompt, "answers": answers}


def _answer(answer: ChatResponse, replica: ModelConfig) -> dict[str, Any]:
    return {
        "content": answer.content,
        "finish_reason": answer.finish_reason,
        "usage": answer.usage.to_openai() if answer.usage else None,
        "cost_usd": _cost(replica, answer),
    }
