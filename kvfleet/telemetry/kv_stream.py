"""Listens to what an engine publishes of its KV cache, over ZMQ, and asks for what was missed.

The wire is vLLM's, which SGLang and NVIDIA Dynamo share (``vllm/distributed/kv_events.py``): a PUB socket whose
messages are ``[topic, number, payload]``, and a ROUTER socket that, asked with ``[b"", first number]``, answers with
one ``[b"", number, payload]`` for each message it still has, and an end marker. Numbers are eight bytes, big-endian.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import anyio
import attrs

from kvfleet.background import until_cancelled
from kvfleet.cache.kv_sequence import EventStream
from kvfleet.errors import ComponentError

__all__ = ["EventReader", "zmq_context"]

_log = logging.getLogger(__name__)
_END = (1 << 64) - 1
_QUEUE = 20_000
_MOST_BYTES = 64 * 1024 * 1024
_RECONNECT_MS, _SLOWEST_RECONNECT_MS = 100, 30_000
_HEARTBEAT_MS, _DEAD_MS = 5_000, 15_000
_REPLAY_S = 5.0
_TICK_S = 0.5
_TURN = 8
"""Messages taken in before others get their turn on the event loop."""


def zmq_context() -> Any:
    """A ZMQ context for `EventReader`.

    Raises:
        ComponentError: if the extra is not installed.
    """
    try:
        import zmq.asyncio  # noqa: PLC0415 - an extra, imported when it is used
    except ImportError as error:
        raise ComponentError("KV events need ZMQ: pip install 'kvfleet[events]'") from error
    return zmq.asyncio.Context()


@attrs.define(eq=False, kw_only=True)
class EventReader:
    """Brings one publisher's messages to an `EventStream`, for as long as it runs. ZMQ itself connects again.

    Args:
        state: What the messages are brought to.
        context: From `zmq_context`.
        endpoint: Where the engine publishes; where to listen, if it is the engine that connects.
        replay: Where to ask for what was missed; empty for nowhere.
        topic: What topics must begin with.
        binds: True to listen instead of connecting.
    """

    state: EventStream
    context: Any = attrs.field(repr=False)
    endpoint: str
    replay: str = ""
    topic: str = ""
    binds: bool = False
    _wakes: asyncio.Event = attrs.field(init=False, factory=asyncio.Event, repr=False)
    _peers: int = attrs.field(init=False, default=0)
    _socket: Any = attrs.field(init=False, default=None, repr=False)
    _monitor: Any = attrs.field(init=False, default=None, repr=False)

    async def run(self) -> None:
        """Listen until cancelled. Start it in a task group that somebody owns.

        Cancelled, it stays subscribed: what is published meanwhile waits in the socket's queue, and the next `run` goes
        on there. `close` ends that.
        """
        try:
            if self._socket is None:
                await self._open()
            self._wake()
            async with anyio.create_task_group() as group:
                group.start_soon(until_cancelled, self._watch)
                group.start_soon(until_cancelled, self._listen)
                group.start_soon(until_cancelled, self._ask)
                group.start_soon(until_cancelled, self._tick)
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Subscribe no more; twice is harmless."""
        if self._socket is None:
            return
        socket, monitor = self._socket, self._monitor
        self._socket = self._monitor = None
        self._peers = 0
        self.state.disconnected()
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close(linger=0)

    async def _open(self) -> None:
        """Connect, or listen as soon as the port is free."""
        import zmq  # noqa: PLC0415 - the context exists, so it is installed

        socket = self.context.socket(zmq.SUB)
        options = {
            zmq.RCVHWM: _QUEUE,
            zmq.MAXMSGSIZE: _MOST_BYTES,
            zmq.LINGER: 0,
            zmq.RECONNECT_IVL: _RECONNECT_MS,
            zmq.RECONNECT_IVL_MAX: _SLOWEST_RECONNECT_MS,
            zmq.HEARTBEAT_IVL: _HEARTBEAT_MS,
            zmq.HEARTBEAT_TIMEOUT: _DEAD_MS,
            zmq.IPV6: 1,
        }
        for option, value in options.items():
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.SUBSCRIBE, self.topic.encode())
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket = socket
        if not self.binds:
            socket.connect(self.endpoint)
            return
        try:
            await self._bind(socket)
        except BaseException:
            self.close()
            raise

    async def _bind(self, socket: Any) -> None:
        """Listen as soon as the port is free."""
        import zmq  # noqa: PLC0415 - see `_open`

        while True:
            try:
                socket.bind(self.endpoint)
            except zmq.ZMQError as error:
                _log.warning("kv events cannot listen endpoint=%s error=%s", self.endpoint, error.strerror)
                await anyio.sleep(_REPLAY_S)
            else:
                return

    async def _watch(self) -> None:
        """See the engine come and go."""
        import zmq  # noqa: PLC0415 - see `_open`
        from zmq.utils.monitor import recv_monitor_message  # noqa: PLC0415 - see `_open`

        monitor = self._monitor
        while True:
            await monitor.poll()  # and then without waiting, so that nothing is lost to a cancellation
            event = await recv_monitor_message(monitor, zmq.NOBLOCK)
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._peers += 1
                self.state.connected()
                _log.info("kv events connected endpoint=%s", self.endpoint)
            else:
                self._peers = max(self._peers - 1, 0)
                if not self._peers:
                    self.state.disconnected()
                    _log.warning("kv events lost endpoint=%s", self.endpoint)
            self._wake()

    async def _listen(self) -> None:
        """Take in messages as they come."""
        import zmq  # noqa: PLC0415 - see `_open`

        socket, count = self._socket, 0
        while True:
            try:
                frames = await socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                await socket.poll()  # the same
                continue
            numbered = _numbered(frames[1:])
            if numbered is None:
                self.state.counts.unreadable += 1  # and its number will be missing
            else:
                self.state.live(*numbered)
                self._wake()
            count += 1
            if count % _TURN == 0:
                await asyncio.sleep(0)

    async def _tick(self) -> None:
        """Let time pass for the state."""
        while True:
            await anyio.sleep(_TICK_S)
            if self._peers > 1:
                self.state.doubt("several engines connect to one port")
            self.state.tick()
            self._wake()

    def _wake(self) -> None:
        if self.state.wanted is not None:
            self._wakes.set()

    async def _ask(self) -> None:
        """Ask for what was missed, whenever something was."""
        while True:
            await self._wakes.wait()
            self._wakes.clear()
            while self.state.wanted is not None:
                await self._replay(self.state.take_wanted())

    async def _replay(self, start: int) -> None:
        """Ask for the messages from one on, and take them in."""
        import zmq  # noqa: PLC0415 - see `_open`

        socket = self.context.socket(zmq.DEALER)
        for option, value in {zmq.RCVHWM: _QUEUE, zmq.MAXMSGSIZE: _MOST_BYTES, zmq.LINGER: 0, zmq.IPV6: 1}.items():
            socket.setsockopt(option, value)
        try:
            socket.connect(self.replay)
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            is_whole = await self._take_replay(socket)
        except zmq.ZMQError as error:
            _log.warning("kv events replay failed endpoint=%s error=%s", self.replay, error.strerror)
            is_whole = False
        except asyncio.CancelledError:
            self.state.replay_broken_off()
            raise
        finally:
            socket.close(linger=0)
        if is_whole:
            self.state.replay_ended()
        else:
            self.state.replay_failed()

    async def _take_replay(self, socket: Any) -> bool:
        """Take in a replay's messages; True if its end came."""
        count = 0
        with contextlib.suppress(TimeoutError):
            while True:
                with anyio.fail_after(_REPLAY_S):
                    frames = await socket.recv_multipart()
                numbered = _numbered(frames[-2:])
                if numbered is None:
                    return False
                if numbered[0] == _END:
                    return True
                self.state.replayed(*numbered)
                count += 1
                if count % _TURN == 0:
                    await asyncio.sleep(0)
        _log.warning("kv events replay did not end endpoint=%s", self.replay)
        return False


def _numbered(frames: list[bytes]) -> tuple[int, bytes] | None:
    """A message's number and payload; None for something else."""
    if len(frames) != 2 or len(frames[0]) != 8:
        return None
    return int.from_bytes(frames[0], "big"), frames[1]
