"""Finished analyses of any kind, from the folders that they wrote."""

from __future__ import annotations

import os

from ..files import read_json
from ..typed_json import members
from .base import MARKER, Analysis
from .registry import find_analysis


def is_analysis(folder: str) -> bool:
    """Whether an analysis has finished in this folder."""
    return os.path.isfile(os.path.join(folder, MARKER))


def load_analysis(folder: str) -> Analysis:
    """The result of whichever analysis has written into a folder.

    Raises:
        UserError: no analysis has finished there, or its files have other content than it writes.
    """
    path = os.path.join(folder, MARKER)
    return find_analysis(members({"analysis": str}, read_json(path), path, "the file")["analysis"]).load(folder)
