"""``python -m flapkit``."""

from __future__ import annotations

from flapkit.cli import main

main()
