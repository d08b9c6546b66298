"""Collect the warnings of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def capture_warnings() -> Iterator[list[str]]:
    """Collect the warnings of flapkit's loggers; they are still shown.

    Yields:
        The messages so far, in order.
    """
    messages: list[str] = []
    handler, root = _Collector(messages), logging.getLogger("flapkit")
    root.addHandler(handler)
    try:
        yield messages
    finally:
        root.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())
