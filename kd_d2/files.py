"""Files that are whole or not there at all."""

from __future__ import annotations

import json
import os
from typing import Any


def write_whole(path: str, text: str) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one."""
    with open(path + ".partial", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".partial", path)


def write_json(path: str, tree: Any, indent: int | None = 1) -> None:
    """`write_whole` of a tree."""
    write_whole(path, json.dumps(tree, indent=indent) + "\n")
