"""``kvfleet mock-engine``: simulated engines as a process, one port each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import click

from kvfleet.adapters.mock import MockAdapter
from kvfleet.cli import render
from kvfleet.cli.options import Decorator, reports
from kvfleet.cli.serve import secret
from kvfleet.config.options import Option, options
from kvfleet.config.schema import GatewayConfig
from kvfleet.errors import BadRequestError
from kvfleet.gateway.auth import Keys
from kvfleet.gateway.listening import check_exposure
from kvfleet.gateway.logs import set_up_logging
from kvfleet.gateway.server import loop_factory
from kvfleet.mock.engine import MockEngine
from kvfleet.mock.faults import FaultRule, parse_fault
from kvfleet.mock.kv_publisher import KVPublisher, zmq_context
from kvfleet.mock.server import serve_engines

__all__ = ["mock_engine"]

_CONTEXT_TOKENS = 8192
_ENGINE = (
    *("speed", "prefill_tokens_per_s", "decode_ms_per_token", "decode_slowdown", "token_budget", "max_batch"),
    *("max_queue", "cache_tokens", "block_tokens", "window_tokens", "window_cache_tokens", "context_tokens"),
    *("answer_tokens", "reply", "echo", "preset"),
)
"""The mock provider's options that are options here as well."""


def _engine_options() -> Decorator:
    known = options(MockAdapter)
    made: list[Decorator] = []
    for name in _ENGINE:
        option = known[name]
        unit = f" ({option.info.unit})" if option.info.unit else ""
        more: dict[str, Any] = {"is_flag": True}
        if option.type is not bool:
            default = _CONTEXT_TOKENS if name == "context_tokens" else option.default()
            more = {"type": _type(option), "default": default, "show_default": default != ""}
        made.append(click.option(_flag(name), help=option.info.doc + unit, **more))
    return _all(made)


def _type(option: Option) -> Any:
    """What click makes of an option's type and range."""
    if option.type is str:
        return click.Choice(option.info.choices) if option.info.choices else click.STRING
    low, is_open = (option.info.gt, True) if option.info.ge is None else (option.info.ge, False)
    kind: Any = click.FloatRange if option.type is float else click.IntRange
    return kind(min=low, max=option.info.le, min_open=low is not None and is_open)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _all(made: Sequence[Decorator]) -> Decorator:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(made):
            function = option(function)
        return function

    return add


def _rules(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[FaultRule, ...]:
    try:
        return tuple(map(parse_fault, values))
    except BadRequestError as error:
        raise click.BadParameter(error.message, ctx, param) from error


@click.command("mock-engine")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "-p", "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="First port; 0 for any."
)
@click.option(
    "-n", "--engines", type=click.IntRange(1, 256), default=1, show_default=True, help="So many, on ports one by one."
)
@click.option(
    "--data-parallel-size",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Data-parallel ranks of each engine: behind its port, with a cache, a queue and KV events (at the ports that "
    "follow) of their own.",
)
@click.option("-m", "--model", default="mock", show_default=True, help="Name of the model they serve.")
@click.option(
    "-k",
    "--api-key",
    default="",
    callback=secret,
    help="Key that clients must send; env:NAME keeps it off the list of processes.",
)
@click.option("--allow-unauthenticated", is_flag=True, help="Listen beyond this machine without a key.")
@_engine_options()
@click.option(
    "--fault",
    "rules",
    multiple=True,
    callback=_rules,
    metavar="KIND[,NAME=VALUE…]",
    help="What goes wrong, as in '429,every=10' or 'stall,after_tokens=5,wait_s=20'; see the documentation.",
)
@click.option("--kv-events-port", type=click.IntRange(1, 65535), help="Publish KV events (ZMQ) from this port on.")
@click.option("--kv-replay-port", type=click.IntRange(1, 65535), help="Answer for missed KV events from this port on.")
@click.option("--kv-events-connect", default="", help="Connect to this ZMQ endpoint instead, where somebody listens.")
@click.option("--kv-events-topic", default="kv-events", show_default=True, help="Topic of the messages.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="warning", show_default=True
)
@reports
def mock_engine(
    host: str,
    port: int,
    api_key: str,
    *,
    allow_unauthenticated: bool,
    log_level: str,
    engines: int,
    data_parallel_size: int,
    rules: tuple[FaultRule, ...],
    **given: Any,
) -> None:
    """Serve simulated engines: OpenAI's API, vLLM's metrics and KV events, and faults on demand.

    They have a queue, a batch, chunked prefill, a prefix cache and the pace they are given; no model, no GPU. Use them
    to try a fleet file, to test a client, or to measure a router. SIGTERM and Ctrl-C stop them.
    """
    set_up_logging(as_json=False, level=log_level.upper())
    keys = Keys.of(GatewayConfig(), api_key, tenants=())
    check_exposure(host, keys, allowed=allow_unauthenticated)
    publishing = _Publishing(
        host=host, **{name: given.pop(name) for name in attrs.fields_dict(_Publishing) if name in given}
    )
    model = given.pop("model")
    made = []
    for index in range(engines):
        places = range(index * data_parallel_size, (index + 1) * data_parallel_size)
        adapters = [MockAdapter(endpoint=f"mock://{place}", model_id=model, **given) for place in places]
        first, *others = zip(adapters, map(publishing.publisher, places), strict=True)
        made.append(MockEngine(*first, others=[MockEngine(*rank) for rank in others]))
        for rule in rules:
            made[-1].faults.add(rule)
    run = serve_engines(made, host=host, port=port, keys=keys, on_ready=lambda urls: _welcome(urls, model))
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(run)
    finally:
        publishing.close()


@attrs.define(kw_only=True)
class _Publishing:
    """Where KV events go, as the command line has it."""

    host: str
    kv_events_port: int | None
    kv_replay_port: int | None
    kv_events_connect: str
    kv_events_topic: str
    _context: Any = attrs.field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        if self.kv_events_port or self.kv_events_connect:
            self._context = zmq_context()
        elif self.kv_replay_port:
            raise click.UsageError("--kv-replay-port needs --kv-events-port or --kv-events-connect")

    def publisher(self, index: int) -> KVPublisher | None:
        """The publisher of one engine; None if there are to be none."""
        if self._context is None:
            return None
        here = f"tcp://{self.host}"
        return KVPublisher(
            context=self._context,
            endpoint=self.kv_events_connect or f"{here}:{(self.kv_events_port or 0) + index}",
            replay=f"{here}:{self.kv_replay_port + index}" if self.kv_replay_port else "",
            topic=self.kv_events_topic,
            binds=not self.kv_events_connect,
            time_s=time.time,
        )

    def close(self) -> None:
        """Close what was opened."""
        if self._context is not None:
            self._context.destroy(linger=0)


def _welcome(urls: Sequence[str], model: str) -> None:
    for url in urls:
        render.echo(f"{render.bold(model)} at {render.good(url)}")
    render.echo(render.dim("GET /mock says what it does, POST /mock/faults makes it fail; Ctrl-C stops"))
