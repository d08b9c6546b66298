"""What MkDocs calls for every page."""

from __future__ import annotations

import re
from typing import Any

_CODE_OR_SPACE = re.compile(r"<(pre|code)\b.*?</\1>|(?<=\d) (?=%)", re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Keep a number and its per cent sign on one line; code stays as it is."""
    return _CODE_OR_SPACE.sub(lambda found: "\N{NO-BREAK SPACE}" if found[0] == " " else found[0], html)
