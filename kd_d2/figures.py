"""Matplotlib without a display, and how its figures are saved."""

from __future__ import annotations

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def save_figure(figure: plt.Figure, path: str) -> None:
    """Write a figure into a file, whose folder is made where it is missing, and close it."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
