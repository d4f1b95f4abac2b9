"""Matplotlib without a display, and how its figures are saved."""

from __future__ import annotations

import os

import matplotlib

from .text import label

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text

matplotlib.rcParams["text.parse_math"] = False  # a name may have dollar signs


def save_figure(figure: plt.Figure, path: str) -> None:
    """Write a figure into a file, whose folder is made where it is missing, and close it. Its texts are put on a line each, and shortened."""
    for text in figure.findobj(Text):
        text.set_text(label(text.get_text()))
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
