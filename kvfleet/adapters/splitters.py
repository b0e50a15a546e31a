r"""Cut a stream of bytes into whole server-sent events, or whole lines, however the network cut it.

The SSE wire format is that of the HTML standard (server-sent events, parsing); a lone CR as line end, which no engine
sends, is not taken for one.
"""

from __future__ import annotations

import attrs

from kvfleet.errors import BackendError, Fault

__all__ = ["MAX_EVENT_BYTES", "EventSplitter", "LineSplitter", "data_of", "split_events"]

MAX_EVENT_BYTES = 8 * 1024 * 1024
"""Longest event unless said otherwise: the last one of a response holds all of it once more, pictures included."""


@attrs.define
class _Splitter:
    """Holds back what is not whole yet.

    Args:
        max_bytes: Longest event or line.

    Attributes:
        refused: Why nothing more is to be read, once what was whole before has been given out.
        held: What is held back; the same object all the time.
    """

    max_bytes: int = MAX_EVENT_BYTES
    refused: BackendError | None = attrs.field(init=False, default=None)
    held: bytearray = attrs.field(init=False, factory=bytearray)

    @property
    def rest(self) -> bytes:
        """What is held back; at the end of a stream: what was cut off."""
        return bytes(self.held)

    def _hold(self, data: bytes, *, has_given: bool = False) -> None:
        """Hold back; what was whole before is given out first, and then what follows is refused."""
        self.held += data
        if len(self.held) > self.max_bytes:
            limit = f"{self.max_bytes} bytes (gateway.limits.max_event_bytes)"
            error = BackendError(Fault.PROTOCOL, f"the backend sent an event of more than {limit}", received=True)
            if not has_given:
                raise error
            self.refused = error


@attrs.define
class EventSplitter(_Splitter):
    r"""Gives pieces of one or more whole events; CRLF and LF both end a line.

    >>> splitter = EventSplitter()
    >>> splitter.feed(b'data: {"a"'), splitter.feed(b":1}\n"), splitter.feed(b"\n")
    (b'', b'', b'data: {"a":1}\n\n')
    """

    def feed(self, data: bytes) -> bytes:
        """The whole events that `data` completes, unchanged and in one piece; empty if it completes none.

        Raises:
            BackendError: if one event grows beyond the limit.
        """
        if not self.held:
            if data.endswith(b"\n\n"):  # the usual case: one write of the engine, one read here
                return data
            end = _end_of_events(data, 0)
            self._hold(data[end:], has_given=end > 0)
            return data[:end]
        # an end may straddle the seam, but not reach further back than this
        seam = max(len(self.held) - 3, 0)
        self.held += data
        end = _end_of_events(self.held, seam)
        if not end:
            self._hold(b"")
            return b""
        whole = bytes(self.held[:end])
        del self.held[:end]
        self._hold(b"", has_given=True)
        return whole


def _end_of_events(data: bytes | bytearray, start: int) -> int:
    """Where the last whole event ends; 0 if there is none."""
    lf = data.rfind(b"\n\n", start)
    crlf = data.rfind(b"\n\r\n", start)
    return max(lf + 2 if lf >= 0 else 0, crlf + 3 if crlf >= 0 else 0)


@attrs.define
class LineSplitter(_Splitter):
    r"""Gives whole lines without their ends, as newline-delimited JSON has them; empty lines are left out.

    >>> splitter = LineSplitter()
    >>> splitter.feed(b'{"a":1}\n{"b"'), splitter.feed(b":2}\r\n")
    ([b'{"a":1}'], [b'{"b":2}'])
    """

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes.

        Raises:
            BackendError: if one line grows beyond the limit.
        """
        *lines, rest = data.split(b"\n")
        if not lines:
            self._hold(data)
            return []
        if self.held:
            lines[0] = bytes(self.held) + lines[0]
            self.held.clear()
        self._hold(rest, has_given=True)
        return [stripped for line in lines if (stripped := line.removesuffix(b"\r"))]


def split_events(piece: bytes) -> list[bytes]:
    r"""Single events, each with its end; together they are the piece, byte by byte.

    >>> split_events(b"data: a\n\ndata: b\r\n\r\ndata")
    [b'data: a\n\n', b'data: b\r\n\r\n', b'data']
    """
    find, start = piece.find, 0
    if find(b"\n\n") == len(piece) - 2 >= 0 and find(b"\r") < 0:  # as most are
        return [piece]
    found: list[bytes] = []
    at = find(b"\n")
    while at >= 0:  # from line to line; a pattern for an event's end takes 7 ms for a line of a megabyte
        end = at + 1
        if piece.startswith(b"\n", end) or piece.startswith(b"\r\n", end):
            end = find(b"\n", end) + 1
            found.append(piece[start:end])
            start = end
        at = find(b"\n", end)
    if start < len(piece):
        found.append(piece[start:])
    return found


def data_of(event: bytes) -> bytes:
    r"""The data of one event; empty if it has none (a comment, say).

    >>> data_of(b"event: x\r\ndata: a\r\ndata: b\r\n\r\n"), data_of(b"data: one\n\n")
    (b'a\nb', b'one')
    """
    end = event.find(b"\n")
    if event.startswith(b"data:") and end == len(event) - 2 and event.endswith(b"\n"):  # as most are
        return event[5:end].removesuffix(b"\r").removeprefix(b" ")
    lines = (line.removesuffix(b"\r") for line in event.split(b"\n"))
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))
