"""Recognise the events of a stream that differ from the one before in a single text: nearly all of them.

Looking into an event for a usage, a finish reason or an error costs 1.5 µs, parsing it 3 µs; seeing that it begins and
ends as another one did, with one text between, costs 0.4 µs.
"""

from __future__ import annotations

import re

import attrs

__all__ = ["PlainEvents"]

# The text in runs, for one letter after the other takes 150 ms for a megabyte (`benchmarks/loop_lag.py`).
_TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content|arguments)": ?"([^"\\]*(?:\\.[^"\\]*)*)"')
MOST_LESSONS = 32
_LONGEST_LESSON = 64 * 1024


@attrs.define
class PlainEvents:
    r"""Knows the frame of the last plain event.

    >>> plain = PlainEvents()
    >>> plain.learn(b'data: {"delta":{"content":"a"},"finish_reason":null}\n\n')
    >>> plain.fits(b'data: {"delta":{"content":"b"},"finish_reason":null}\n\n')
    True
    >>> plain.fits(b'data: {"delta":{"content":"b"},"finish_reason":"stop"}\n\n')
    False
    >>> plain.fits(b'data: {"delta":{"content":""},"error":{"x":""},"finish_reason":null}\n\n')
    False
    """

    _before: bytes = attrs.field(init=False, default=b"\0")  # no event begins so
    _after: bytes = attrs.field(init=False, default=b"")
    _begin: int = attrs.field(init=False, default=1)
    _tail: int = attrs.field(init=False, default=0)
    _lessons: int = attrs.field(init=False, default=0)

    def fits(self, event: bytes) -> bool:
        """True if the event is the last plain one with another text, so that there is nothing else to learn from it.

        The text between must hold no quote, not even an escaped one: then it cannot hold another field.
        """
        if not (event.startswith(self._before) and event.endswith(self._after)):
            return False
        begin, end = self._begin, len(event) - self._tail
        return end >= begin and event.find(b'"', begin, end) < 0

    def learn(self, event: bytes) -> None:
        """Take the frame of an event that said nothing but its text. Where the frame keeps changing this gives up."""
        if self._lessons >= MOST_LESSONS or len(event) > _LONGEST_LESSON:
            return
        self._lessons += 1
        found = _TEXT.search(event)
        if found is not None:
            begin, end = found.span(1)
            self._before, self._after = event[:begin], event[end:]
            self._begin, self._tail = begin, len(event) - end
