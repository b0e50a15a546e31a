"""Logging of a running gateway: one line an event, plain or JSON, on standard error."""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

import orjson

__all__ = ["JsonLines", "set_up_logging"]


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, logger, event."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def set_up_logging(*, as_json: bool, level: int | str = logging.INFO, stream: TextIO | None = None) -> None:
    """Send kvfleet's log lines, and the warnings of everything else, to a stream.

    Args:
        as_json: JSON lines instead of plain text (`telemetry.structured_logs`).
        level: Of kvfleet's own lines.
        stream: Standard error if None.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)-7s %(name)s %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("kvfleet").setLevel(level)
