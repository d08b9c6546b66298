"""Redirect llama.cpp's messages from the terminal to logging."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

log = logging.getLogger("flapkit.exporters.llama_cpp")


@cache
def load_llama_cpp() -> Any:
    """Import llama_cpp, and redirect its messages to logging at level DEBUG."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
    def log_message(level: int, text: bytes, data: Any) -> None:
        log.debug("%s", text.decode(errors="replace").rstrip())

    llama_cpp.llama_log_set(log_message, None)
    # Keep a reference: llama.cpp does not.
    setattr(llama_cpp, "flapkit_log_callback", log_message)  # noqa: B010
    return llama_cpp
