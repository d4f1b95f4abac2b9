"""Matplotlib with a non-interactive backend, and saving of figures."""

from __future__ import annotations

import os
from collections.abc import Collection

import matplotlib

from .text import label

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text

matplotlib.rcParams["text.parse_math"] = False  # names may contain dollar signs


def shrink_titles(figure: plt.Figure) -> None:
    """Write each panel's title, shortened to one line, small enough for the width of the panel."""
    for axis in figure.axes:
        axis.title.set_text(label(axis.title.get_text()))
    figure.draw_without_rendering()
    for axis in figure.axes:
        excess = axis.title.get_window_extent().width / axis.get_window_extent().width
        axis.title.set_size(axis.title.get_size() / max(excess, 1))


def save_figure(figure: plt.Figure, path: str, wrapped: Collection[Text] = ()) -> None:
    """Save a figure, creating the folder if needed, and close it. Each text, except those `wrapped`, is shortened to one line."""
    for text in figure.findobj(Text):
        if text not in wrapped:
            text.set_text(label(text.get_text()))
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
