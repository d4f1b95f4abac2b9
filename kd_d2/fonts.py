"""Fonts for drawings, whose labels may have characters of any script."""

from __future__ import annotations

import functools
import logging
import os

import matplotlib
from matplotlib.ft2font import FT2Font

FONT = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")

logger = logging.getLogger(__name__)


@functools.cache
def font_file(text: str) -> str:
    """Return DejaVu Sans, or an installed font if only that has all characters of a text; warn if there is none."""
    if _has_glyphs(FONT, text):
        return FONT
    for path in installed_fonts():
        if _has_glyphs(path, text):
            return path
    logger.warning(f"No installed font has all characters of {text!r}; those that are missing are drawn as boxes.")
    return FONT


def installed_fonts() -> list[str]:
    """Return the files of the fonts that Matplotlib finds, except Last Resort, which draws every character as a box."""
    from matplotlib.font_manager import fontManager  # its import searches the system

    return sorted(entry.fname for entry in fontManager.ttflist if not entry.name.startswith("Last Resort"))


def _has_glyphs(path: str, text: str) -> bool:
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # a font that was removed, or is broken
        return False
    return font.scalable and all(font.get_char_index(ord(character)) for character in text)
