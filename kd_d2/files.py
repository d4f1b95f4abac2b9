"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing so that a kill at any moment leaves the old file or the new one.

    An exception inside leaves the old file.

    Args:
        mode: "w" for text in UTF-8, "wb" for bytes.
    """
    partial = f"{path}.partial"
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def write_text(path: str, text: str) -> None:
    """`atomic_write` of a text."""
    with atomic_write(path) as file:
        file.write(text)


def write_json(path: str, tree: Any, indent: int | None = 1) -> None:
    """`atomic_write` of a tree."""
    write_text(path, json.dumps(tree, indent=indent) + "\n")
