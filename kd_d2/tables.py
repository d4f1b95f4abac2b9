"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are aligned left, and the others right."""
    align = ["left"] * left + ["right"] * (len(headers) - left)
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=align if rows else None)
