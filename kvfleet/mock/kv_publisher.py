"""KV events of a mock engine over ZMQ, as vLLM 0.32 sends them (``vllm/distributed/kv_events.py``).

A batch is ``[topic, number, payload]`` on a PUB socket, the number eight bytes big-endian from 0, the payload msgpack
of ``[time, events, rank]``. A ROUTER socket answers a request ``[b"", first number]`` with one message ``[b"", topic,
number, payload]`` for each batch it still has, and ends with the number -1 and nothing.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from kvfleet.adapters.mock_answer import MockText
from kvfleet.errors import ComponentError
from kvfleet.sim.events import Cleared, Event, Removed, Stored
from kvfleet.sim.tokens import TOKEN_BYTES, token_ids

__all__ = ["KVPublisher", "wire_events", "zmq_context"]

_END = (-1).to_bytes(8, "big", signed=True)
_BATCHES = 10_000  # vLLM's buffer_steps
_HIGH_WATER = 100_000  # vLLM's hwm


def zmq_context() -> Any:
    """A ZMQ context for publishers.

    Raises:
        ComponentError: if the extra is not installed.
    """
    try:
        import msgspec  # noqa: F401, PLC0415 - an extra, imported when it is used
        import zmq.asyncio  # noqa: PLC0415 - the same
    except ImportError as error:
        raise ComponentError("KV events need ZMQ and msgpack: pip install 'kvfleet[events]'") from error
    return zmq.asyncio.Context()


def wire_events(events: Sequence[Event], block_tokens: int, window_tokens: int = 0) -> Iterator[dict[str, Any]]:
    """What happened to blocks, in vLLM's words; one removal for each block, as there.

    Args:
        events: What happened.
        block_tokens: Tokens in a block.
        window_tokens: What the second group of layers looks back on; 0 if there is none.
    """
    for event in events:
        match event:
            case Stored():
                yield _stored(event, block_tokens, window_tokens)
            case Removed(_, blocks, group):
                for block in blocks:
                    yield {"type": "BlockRemoved", "block_hashes": [block], "medium": "GPU", "group_idx": group}
            case Cleared():
                yield {"type": "AllBlocksCleared"}
            case _:
                pass


def _stored(event: Stored, block_tokens: int, window_tokens: int) -> dict[str, Any]:
    key = event.job.key if isinstance(event.job.key, MockText) else MockText(b"")
    size = block_tokens * TOKEN_BYTES
    extras: list[Any] = [None] * len(event.blocks)
    if key.salt and not event.first:
        extras[0] = [key.salt]
    return {
        "type": "BlockStored",
        "block_hashes": list(event.blocks),
        "parent_block_hash": event.parent,
        "token_ids": token_ids(key.text[event.first * size : event.last * size]),
        "block_size": block_tokens,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": extras,
        "group_idx": event.group,
        **(
            {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": window_tokens}
            if event.group
            else {"kv_cache_spec_kind": "full_attention"}
        ),
    }


@attrs.define(eq=False, kw_only=True)
class KVPublisher:
    """One engine's publisher.

    Args:
        context: From `zmq_context`.
        endpoint: Where to publish: bound if it has a ``*`` for its port or if `binds`, else connected to.
        replay: Where to be asked for what was missed; empty for nowhere.
        topic: Of every message.
        binds: True to listen on the endpoint, False to connect to a subscriber that listens.
        time_s: Unix seconds.
        batches: How many are kept for those who missed some.
        rank: The data-parallel rank whose cache it tells of.
    """

    context: Any = attrs.field(repr=False)
    endpoint: str
    replay: str = ""
    topic: str = "kv-events"
    binds: bool = True
    time_s: Callable[[], float]
    batches: int = _BATCHES
    rank: int = 0
    _publisher: Any = attrs.field(init=False, default=None, repr=False)
    _router: Any = attrs.field(init=False, default=None, repr=False)
    _pack: Callable[[Any], bytes] = attrs.field(init=False, repr=False)
    _kept: deque[tuple[bytes, bytes]] = attrs.field(init=False, repr=False)
    _number: int = attrs.field(init=False, default=0)

    def open(self) -> None:
        """Open the sockets.

        Raises:
            OSError: if an endpoint cannot be had; names it.
        """
        import msgspec  # noqa: PLC0415 - the context exists, so it is installed
        import zmq  # noqa: PLC0415 - the same

        self._pack = msgspec.msgpack.Encoder().encode
        self._kept = deque(maxlen=self.batches)
        # A plain socket: publishing never waits, and what subscribers are too slow for is dropped for them.
        self._publisher = self.context.socket(zmq.PUB, socket_class=zmq.Socket)
        self._publisher.set_hwm(_HIGH_WATER)
        self._publisher.setsockopt(zmq.LINGER, 0)
        with _named(self.endpoint, zmq.ZMQError):
            (self._publisher.bind if self.binds else self._publisher.connect)(self.endpoint)
        if self.replay:
            self._router = self.context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.LINGER, 0)
            with _named(self.replay, zmq.ZMQError):
                self._router.bind(self.replay)

    @property
    def sent(self) -> int:
        """How many batches it sent since it started."""
        return self._number

    def publish(self, events: list[dict[str, Any]]) -> None:
        """Send a batch, and keep it."""
        number = self._number.to_bytes(8, "big")
        payload = self._pack([self.time_s(), events, self.rank])
        self._number += 1
        self._kept.append((number, payload))
        self._publisher.send_multipart((self.topic.encode(), number, payload))

    async def serve_replay(self) -> None:
        """Answer those who missed batches, until cancelled."""
        if self._router is None:
            return
        topic = self.topic.encode()
        while True:
            frames = await self._router.recv_multipart()
            if len(frames) != 3:
                continue
            asker, _, first = frames
            for number, payload in tuple(self._kept):
                if number >= first:  # big-endian numbers of one length are ordered as their bytes
                    await self._router.send_multipart((asker, b"", topic, number, payload))
            await self._router.send_multipart((asker, b"", b"", _END, b""))

    def restart(self) -> None:
        """Forget what was sent, and count from 0 again, as an engine that starts anew."""
        self._kept.clear()
        self._number = 0

    def close(self) -> None:
        """Close the sockets; safe twice."""
        for socket in (self._publisher, self._router):
            if socket is not None:
                socket.close()
        self._publisher = self._router = None


@contextlib.contextmanager
def _named(endpoint: str, wrong: type[Exception]) -> Iterator[None]:
    try:
        yield
    except wrong as error:
        raise OSError(f"cannot publish KV events at {endpoint}: {error}") from error
