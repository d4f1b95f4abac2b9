"""Plots of robustness: performance over severity, and an image under every corruption."""

from __future__ import annotations

import cv2
import numpy as np

from ...figures import add_legend, save_figure, subplots, without_math, write_no_value
from ..drawing import sheet, titled
from .corruptions import corrupt
from .metrics import CLEAN_SEVERITY, Robustness

COLUMNS = 4
TILE_SIDES = (240, 480)
"""The shorter side of a picture of the sheet, in pixels: at least, so that its title is readable, and at most."""
LONGEST_TILE = 960
"""The longer side of a picture of the sheet, in pixels, at most."""


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
    """Draw an image, RGB (H, W, 3) uint8, under every corruption. Each is corrupted at its size, and then resized."""
    tiles = [titled(_resized(image), "clean")]
    for name in corruptions:
        corrupted = corrupt(image, name, severity, identity)
        tiles.append(titled(_resized(corrupted), f"{name.replace('_', ' ')} {severity}"))
    return sheet([tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)])


def _resized(image: np.ndarray) -> np.ndarray:
    shorter, longer = sorted(image.shape[:2])
    least, most = TILE_SIDES
    scale = min(max(min(1.0, most / shorter), least / shorter), LONGEST_TILE / longer)
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
