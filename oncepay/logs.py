"""Structured logs: one JSON object a line on standard output.

`get_logger` is what every module uses; `setup` is called once by a process's main. Without `setup` (in tests, in the
command line) structlog's own plain output on standard error applies.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import sys
import time
from collections.abc import Mapping
from typing import BinaryIO, cast

import msgspec

# structlog.dev imports rich only to draw tracebacks in colour: half of its import time and 7 MiB a process. A module
# of None makes that import fail quietly; it is taken away again so that whoever wants rich can have it.
_hide_rich = "rich" not in sys.modules
if _hide_rich:
    sys.modules["rich"] = None  # type: ignore[assignment]
try:
    import structlog
finally:
    if _hide_rich:
        del sys.modules["rich"]

Logger = structlog.typing.FilteringBoundLogger
EventDict = structlog.typing.EventDict

FLUSH_S = 0.2
"""How long a line may wait for others to be written with it: a write for each line costs more than the line."""
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def _to_stderr(*_: object) -> structlog.PrintLogger:
    return structlog.PrintLogger(sys.stderr)


structlog.configure(logger_factory=_to_stderr)


def get_logger(name: str) -> Logger:
    """A logger whose lines carry `component=name`. An event is a short sentence, its values are keyword arguments."""
    logger: Logger = structlog.get_logger(component=name)
    return logger


def setup(level: str = "info", **bound: str) -> None:
    """JSON lines on standard output from `level` up, each with the members of `bound` (service, process name).

    Lines of libraries that use `logging` come out in the same form, from WARNING up.
    """
    number = LEVELS.get(level, 20)
    structlog.configure(
        processors=[
            _Line(bound),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.BytesLoggerFactory(cast(BinaryIO, _Lines(sys.stdout.buffer))),
        cache_logger_on_first_use=True,
    )
    _join_stdlib()


class _Line:
    """A line with what every one of the process carries, its level, and the moment as RFC 3339 in UTC to the microsecond.

    One step instead of structlog's chain of five: a payment that is settled is a line.
    """

    def __init__(self, bound: Mapping[str, str]) -> None:
        self._bound = bound

    def __call__(self, logger: object, method: str, event: EventDict) -> bytes:
        for name, value in self._bound.items():
            event.setdefault(name, value)
        event["level"] = _LEVEL_NAMES.get(method, method)
        second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        event["timestamp"] = f"{_second(second)}.{nanoseconds // 1000:06d}Z"
        if "exc_info" in event:
            event = structlog.processors.format_exc_info(logger, method, event)
        return msgspec.json.encode(event, enc_hook=repr)


_LEVEL_NAMES = {"exception": "error", "warn": "warning"}


@functools.lru_cache(4)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class _Lines:
    """A binary file whose lines go out together, FLUSH_S after the first of them at most; all at once without a running loop."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._is_due = False
        atexit.register(self._flush)

    def write(self, line: bytes) -> None:
        self._file.write(line)

    def flush(self) -> None:
        if self._is_due:
            return
        try:
            asyncio.get_running_loop().call_later(FLUSH_S, self._flush)
        except RuntimeError:
            self._file.flush()
        else:
            self._is_due = True

    def _flush(self) -> None:
        self._is_due = False
        self._file.flush()


def _join_stdlib() -> None:
    """Send the standard library's log records (asyncio, aiohttp, grpc) the same way."""
    import logging

    class _Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            get_logger(record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info or None)

    root = logging.getLogger()
    root.handlers[:] = [_Forward()]
    root.setLevel(logging.WARNING)
