"""llama.cpp's own messages, which would fill the terminal, go to logging."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

log = logging.getLogger(__name__)


@cache
def load_llama_cpp() -> Any:
    """Import llama_cpp, and let it tell its messages to logging at the level DEBUG."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
    def tell(level: int, text: bytes, data: Any) -> None:
        log.debug("%s", text.decode(errors="replace").rstrip())

    llama_cpp.llama_log_set(tell, None)
    # llama.cpp holds no reference of Python's to its callback.
    setattr(llama_cpp, "flapkit_log_callback", tell)  # noqa: B010
    return llama_cpp
