"""Plots of robustness: performance over severity, and an image under every corruption."""

from __future__ import annotations

import numpy as np

from ...figures import add_legend, save_figure, subplots, without_math, write_no_value
from ..drawing import sheet, titled
from .corruptions import corrupt
from .metrics import CLEAN_SEVERITY, Robustness

COLUMNS = 4


@without_math
def plot_robustness(models: dict[str, Robustness], path: str, metric: str = "AP") -> None:
    """Plot the metric over severity (0: clean), one line per model: a panel per corruption and one for the mean."""
    corruptions = list(next(iter(models.values())).corrupted)
    panels = ["mean of all", *corruptions]
    rows = -(-len(panels) // COLUMNS)
    columns = min(COLUMNS, len(panels))
    figure, axes = subplots(rows, columns, figsize=(2.7 * columns, 2.3 * rows + 0.4), sharey=True, squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        lines = {}
        for index, (title, robustness) in enumerate(models.items()):
            points = robustness.by_severity(panel if panel in corruptions else None, metric)
            (lines[title],) = axis.plot(*zip(*points.items()), color=f"C{index % 10}", marker=".")
        if not any(np.isfinite(line.get_ydata()).any() for line in lines.values()):
            write_no_value(axis)
        axis.set_title(panel.replace("_", " "), fontsize=10)
        axis.set_xticks(list(points), ["clean" if s == CLEAN_SEVERITY else str(s) for s in points], fontsize=8)
        axis.set_xlim(min(points) - 0.25, max(points) + 0.25)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    if any(np.isfinite(line.get_ydata()).any() for axis in axes.flat for line in axis.lines):
        axes[0, 0].set_ylim(bottom=0)
    else:
        axes[0, 0].set_yticks([])
    for row in axes:
        row[0].set_ylabel(metric)
    for axis in axes.flat[max(len(panels) - columns, 0) : len(panels)]:
        axis.set_xlabel("severity")
    legend = add_legend(figure, lines)
    save_figure(figure, path, legend.get_texts())


def corruption_sheet(image: np.ndarray, identity: int | str, corruptions: list[str], severity: int) -> np.ndarray:
    """Draw an image, RGB (H, W, 3) uint8, under every corruption."""
    tiles = [titled(image, "clean")]
    tiles += [titled(corrupt(image, c, severity, identity), f"{c.replace('_', ' ')} {severity}") for c in corruptions]
    return sheet([tiles[start : start + 4] for start in range(0, len(tiles), 4)])
