"""Files that are whole or not there at all."""

from __future__ import annotations

import json
import os
from typing import Any


def write_json(path: str, tree: Any, indent: int | None = 1) -> None:
    """Write a json file so that a kill at any moment leaves the old one or the new one."""
    with open(path + ".partial", "w", encoding="utf-8") as file:
        json.dump(tree, file, indent=indent)
        file.write("\n")
    os.replace(path + ".partial", path)
