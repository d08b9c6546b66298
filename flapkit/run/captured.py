"""What a run notes of its own warnings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def capture_warnings() -> Iterator[list[str]]:
    """Keep the messages of what flapkit's own loggers warn of, besides showing them.

    Yields:
        The messages so far, in the order in which they came.
    """
    messages: list[str] = []
    handler, root = _Noted(messages), logging.getLogger("flapkit")
    root.addHandler(handler)
    try:
        yield messages
    finally:
        root.removeHandler(handler)


class _Noted(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())
