"""Figures that are only saved. The backend and the settings of Matplotlib in the calling program do not change."""

from __future__ import annotations

import contextlib
import os
import textwrap
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text

from .files import named_in_errors
from .fonts import font_file
from .text import label, wrapped_label

without_math = matplotlib.rc_context({"text.parse_math": False})
"""Decorator of functions that draw names, which may contain dollar signs."""


def subplots(rows: int, columns: int, *, figsize: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """Return a figure with panels in constrained layout; `options` are those of `Figure.subplots`."""
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


@without_math
def shrink_titles(figure: Figure) -> None:
    """Write each panel's title, shortened to one line, small enough for the width of the panel."""
    for axis in figure.axes:
        axis.title.set_text(label(axis.title.get_text()))
    _lay_out(figure)
    for axis in figure.axes:
        excess = axis.title.get_window_extent().width / axis.get_window_extent().width
        axis.title.set_size(axis.title.get_size() / max(excess, 1))


@without_math
def set_row_titles(titles: dict[str, Axes], size: float) -> list[Text]:
    """Write the titles of rows to the left of their first panels, in several lines and small enough for their heights."""
    texts = {axis: axis.set_ylabel(label(title), fontsize=size) for title, axis in titles.items()}
    for text, excess in _excess_heights(texts):
        if excess > 1:
            text.set_text(textwrap.fill(text.get_text(), max(int(len(text.get_text()) / excess), 1)))
    for text, excess in _excess_heights(texts):
        text.set_size(size / max(excess, 1))
    return list(texts.values())


def _excess_heights(texts: dict[Axes, Text]) -> list[tuple[Text, float]]:
    _lay_out(next(iter(texts)).figure)
    return [(t, t.get_window_extent().height / axis.get_window_extent().height) for axis, t in texts.items()]


@without_math
def add_legend(figure: Figure, lines: dict[str, Line2D]) -> Legend:
    """Add a legend of up to three columns below the panels, which keep their height, and enlarge the figure for it.

    Args:
        lines: by title.
    """
    entries = {"handles": [*lines.values()], "labels": [*map(wrapped_label, lines)], "fontsize": 8}
    columns = figure.bbox.width // _legend_size(figure, entries, 1)[0]
    columns = int(min(max(columns, 1), 3, len(lines)))
    width, height = _legend_size(figure, entries, columns) / figure.dpi
    figure.set_size_inches(max(figure.get_figwidth(), width + 0.2), figure.get_figheight() + height)
    return figure.legend(**entries, ncols=columns, loc="outside lower center")


def _legend_size(figure: Figure, entries: dict[str, Any], columns: int) -> np.ndarray:
    """Return the width and height in pixels of a legend for which the figure may have no space yet."""
    legend = figure.legend(**entries, ncols=columns, loc="lower center")
    _lay_out(figure)
    size = legend.get_window_extent().size
    legend.remove()
    return size


def write_no_value(axis: Axes) -> None:
    """Say in an empty panel that there is no value to draw."""
    axis.text(0.5, 0.5, "no value", transform=axis.transAxes, ha="center", va="center", color="0.45", fontsize=9)


def _lay_out(figure: Figure) -> None:
    with _fitting_fonts(figure):
        figure.draw_without_rendering()


@contextlib.contextmanager
def _fitting_fonts(figure: Figure) -> Iterator[None]:
    """Write each text in a font with its characters; for those that no font has, `font_file` warns, not Matplotlib."""
    for text in figure.findobj(Text):
        font = text.get_fontproperties().copy()
        if not text.get_text().isascii() and font.get_file() is None:
            font.set_file(font_file(text.get_text().replace("\n", " ")))
            text.set_fontproperties(font)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


@without_math
def save_figure(figure: Figure, path: str, wrapped: Collection[Text] = ()) -> None:
    """Save a figure, creating the folder if needed. Each text, except those `wrapped`, is shortened to one line."""
    for text in figure.findobj(Text):
        if text not in wrapped:
            text.set_text(label(text.get_text()))
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with _fitting_fonts(figure), named_in_errors(path):
        figure.savefig(path, dpi=110)
