"""Plots of the error analysis (figures 10 and 11 of the thesis)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from ...figures import save_figure, shrink_titles, subplots, without_math
from .curves import RECALLS, SIZES, STAGES, ErrorCurves

COLORS = ("white", "0.82", "#6fa8dc", "#e06666", "#8fc97a", "#b490d6", "#f6b26b")
MEANINGS = ("IoU 0.75", "IoU 0.5", "localization", "similar class", "other class", "background", "missed")


@without_math
def plot_error_curves(
    models: dict[str, ErrorCurves], path: str, name: str | None = None, sizes: tuple = ("all",)
) -> None:
    """Plot precision over recall, with error costs as colored areas: one column per model, one row per size.

    Args:
        models: curves by title.
        name: name of a class; None for the mean over classes.
    """
    figure, axes = subplots(len(sizes), len(models), figsize=(4.6 * len(models), 3.9 * len(sizes)), squeeze=False)
    for column, (title, curves) in zip(axes.T, models.items(), strict=True):
        of_sizes = curves.overall if name is None else curves.precision[curves.class_names.index(name)]
        for axis, size in zip(column, sizes, strict=True):
            _draw(axis, of_sizes[SIZES.index(size)])
            axis.set_title(", ".join([f"{title}: {name or 'all classes'}", *([size] if size != "all" else [])]))
    shrink_titles(figure)
    save_figure(figure, path)


def _draw(axis: Axes, curves: np.ndarray) -> None:
    below = np.zeros_like(RECALLS)
    for curve, color, stage, meaning in zip(curves, COLORS, STAGES, MEANINGS, strict=True):
        area = f"[{curve.mean():.3f}]".replace("[0.", "[.") if not np.isnan(curve).any() else "[-]"
        axis.fill_between(
            RECALLS, below, curve, facecolor=color, edgecolor="0.3", linewidth=0.6, label=f"{area} {stage}: {meaning}"
        )
        below = curve
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision")
    axis.legend(loc="lower left", fontsize=7, framealpha=0.9)


@without_math
def plot_error_shares(models: dict[str, ErrorCurves], path: str) -> None:
    """Plot the cost of each error type by object size, with the models side by side (overall, in AP points)."""
    figure, axes = subplots(1, len(SIZES), figsize=(3.4 * len(SIZES), 3.6), sharey=True)
    width = 0.8 / len(models)
    for axis, size in zip(axes, SIZES, strict=True):
        for index, curves in enumerate(models.values()):
            areas = [curves.areas()[size][stage] for stage in STAGES]
            costs = 100 * np.diff(areas)
            axis.bar(np.arange(len(costs)) + (index - (len(models) - 1) / 2) * width, costs, width)
        axis.set_xticks(range(len(STAGES) - 1), MEANINGS[1:], rotation=45, ha="right", fontsize=8)
        axis.set_title(size)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("area gained, points")
    bars = axes[0].containers
    figure.legend(bars, list(models), loc="outside lower center", ncols=min(2, len(models)), fontsize=8)
    save_figure(figure, path)
