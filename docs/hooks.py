"""What MkDocs calls for every page."""

from __future__ import annotations

import re
from typing import Any

_SPACE = r"(?<=\d) (?=%|[/±] \d)|(?<=\d [/±]) (?=\d)"
_NAME = r"<code>(?=[^<\s]{1,24}</code>)"
_FOUND = re.compile(rf"<pre\b.*?</pre>|{_NAME}|<code\b.*?</code>|{_SPACE}", re.DOTALL)
_INSTEAD = {" ": "\N{NO-BREAK SPACE}", "<code>": '<code class="name">'}


def on_page_content(html: str, **_: Any) -> str:
    """Keep together on one line: ``50 %``, ``54.8 / 11.4``, ``29.0 ± 4.6``, and names in code, by a class.

    Blocks of code, and longer code in a text, stay as they are.
    """
    return _FOUND.sub(lambda found: _INSTEAD.get(found[0], found[0]), html)
