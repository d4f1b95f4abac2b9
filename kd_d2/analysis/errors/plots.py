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
        sizes: those of which there are no objects are left out.
    """
    sizes = [size for size in sizes if size in sizes_with_objects(models)] or sizes
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


def sizes_with_objects(models: dict[str, ErrorCurves]) -> list[str]:
    """Return the object sizes for which a model has curves; all sizes if there are none."""
    overall = [curves.overall for curves in models.values()]
    return [size for row, size in enumerate(SIZES) if not all(np.isnan(o[row]).all() for o in overall)] or list(SIZES)


@without_math
def plot_error_shares(models: dict[str, ErrorCurves], path: str) -> None:
    """Plot the cost of each error type by object size, with the models side by side (overall, in AP points).

    Sizes of which there are no objects are left out.
    """
    sizes = sizes_with_objects(models)
    figure, axes = subplots(1, len(sizes), figsize=(3.4 * len(sizes), 3.6), sharey=True)
    width = 0.8 / len(models)
    for axis, size in zip(axes, sizes, strict=True):
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
