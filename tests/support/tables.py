"""Tables in docs/ that tests make."""

from __future__ import annotations

import os
from pathlib import Path


def write_or_compare(path: Path, text: str) -> None:
    """The document is what the test found; with SHOAL_WRITE_DOCS it becomes that first."""
    if os.environ.get("SHOAL_WRITE_DOCS"):
        path.write_text(text)
    assert path.read_text() == text, "run `make docs`"
