"""Plots of feature maps: neighbors, channels side by side, and differences between student and teacher."""

from __future__ import annotations

import cv2
import numpy as np
from matplotlib.colors import LogNorm

from ...figures import save_figure, set_row_titles, subplots, without_math
from ..drawing import enlarged, overlay_heat, per_pixel, sheet, titled
from .statistics import FeatureStatistics

SIDE = 240  # shorter side of a picture, in pixels
TILE = 200  # shorter side of a channel, in pixels


@without_math
def plot_neighbors(rows: dict[str, FeatureStatistics], path: str) -> None:
    """Plot 2D histograms of features and their right neighbors, one row per model, one column per level.

    The axes range from the 0.5th to the 99.5th percentile; lighter colors are larger counts.
    """
    most = max(len(statistics.pairs) for statistics in rows.values())
    figure, axes = subplots(len(rows), most, figsize=(2.3 * most, 2.3 * len(rows)), squeeze=False)
    for line, statistics in zip(axes, rows.values()):
        correlations = statistics.mean_correlations()
        for axis in line[len(statistics.pairs) :]:
            axis.set_axis_off()
        for axis, stride in zip(line, sorted(statistics.pairs)):
            x, y = np.concatenate(statistics.pairs[stride], 1)
            low, high = np.percentile(np.concatenate([x, y]), [0.5, 99.5])
            high = max(high, low + 1e-6)
            axis.hist2d(x, y, bins=60, range=[[low, high]] * 2, norm=LogNorm(), cmap="inferno")
            axis.set_facecolor("black")
            axis.set_title(f"stride {stride}, r = {correlations[stride]['horizontal']:.2f}", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.set_aspect("equal")
    figure.supxlabel("feature", fontsize=9)
    figure.supylabel("its right neighbor", fontsize=9)
    save_figure(figure, path, set_row_titles(dict(zip(rows, axes[:, 0])), 9))


def difference_sheet(
    image: np.ndarray, differences: dict[str, dict[int, np.ndarray]], strides: list[int]
) -> np.ndarray:
    """Draw where students differ from the teacher: one row per student, one column (with comparable colors) per level.

    Args:
        image: RGB (H, W, 3) uint8.
        differences: maps (h, w) by student and stride.
    """
    plain = enlarged(image, SIDE)
    rows = []
    for title, maps in differences.items():
        row = [titled(plain, title)]
        for stride in strides:
            largest = max(float(other[stride].max()) for other in differences.values())
            heat = per_pixel(maps[stride], stride, image.shape[:2])
            row.append(
                titled(overlay_heat(plain, heat, largest=largest), f"stride {stride}: {maps[stride].mean():.3f}")
            )
        rows.append(row)
    return sheet(rows)


def channel_sheet(image: np.ndarray, channels: dict[str, np.ndarray], numbers: list[int], stride: int) -> np.ndarray:
    """Draw channels of a level, one row per model, one column per channel, each scaled from black to white.

    Args:
        image: RGB (H, W, 3) uint8.
        channels: maps (k, h, w) by model.
        numbers: numbers of the k channels.
    """
    rows = []
    for title, maps in channels.items():
        row = [titled(enlarged(image, TILE), title)]
        for number, channel in zip(numbers, maps):
            span = max(float(channel.max() - channel.min()), 1e-12)
            gray = per_pixel((channel - channel.min()) / span, stride, image.shape[:2])
            gray = np.repeat((255 * gray).astype(np.uint8)[..., None], 3, axis=2)
            row.append(titled(enlarged(gray, TILE, cv2.INTER_NEAREST), f"channel {number}"))
        rows.append(row)
    return sheet(rows)
