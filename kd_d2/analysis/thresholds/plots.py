"""Plots of the threshold analysis."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from ...figures import save_figure, shrink_titles, subplots, without_math, write_no_value
from .curves import OperatingPoint, ThresholdCurve

COLUMNS = 3
DRAWN = 2000
"""Thresholds of a plotted curve, at most."""
LONGEST_NAME = 28
"""Characters of a class name in a plot, at most."""
MOST_CLASSES = 100
"""Classes of a plotted matrix, at most."""
MARKERS = ("o", "^", "v")


@without_math
def plot_threshold_curves(
    models: dict[str, ThresholdCurve], points: dict[str, dict[str, OperatingPoint | None]], path: str
) -> None:
    """Plot precision, recall and F1 over the score threshold, with the chosen points: one panel per model.

    Args:
        models: curves of all classes together, by title.
        points: by title and criterion.
    """
    columns = min(COLUMNS, len(models))
    rows = -(-len(models) // columns)
    figure, axes = subplots(rows, columns, figsize=(5.2 * columns, 4.9 * rows), squeeze=False)
    for axis, (title, curve) in zip(axes.flat, models.items(), strict=False):
        _draw_curve(axis, curve, points[title])
        axis.set_title(title)
    for axis in axes.flat[len(models) :]:
        axis.set_axis_off()
    shrink_titles(figure)
    save_figure(figure, path)


def _draw_curve(axis: Axes, curve: ThresholdCurve, points: dict[str, OperatingPoint | None]) -> None:
    axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="score threshold")
    axis.grid(alpha=0.3)
    if not len(curve.scores):
        write_no_value(axis)
        return
    shown = curve.spread(DRAWN)[::-1]
    for name, values, width in (
        ("precision", curve.precision, 1.4),
        ("recall", curve.recall, 1.4),
        ("F1", curve.f1, 2.2),
    ):
        axis.plot(curve.scores[shown], values[shown], drawstyle="steps-pre", linewidth=width, label=name)
    for marker, (criterion, point) in zip(MARKERS, points.items(), strict=False):
        if point is not None:
            label = f"{criterion}: threshold {point.threshold_text}"
            values = [point.precision, point.recall, point.f1]
            axis.axvline(point.threshold, color="0.35", linestyle=":", linewidth=1)
            axis.plot([point.threshold] * 3, values, marker, color="0.2", markersize=5, linestyle="none", label=label)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=8)


@without_math
def plot_confusion(matrix: np.ndarray, class_names: list[str], title: str, path: str) -> None:
    """Plot a matrix of `confusion_matrix`, colored by the shares of each row, with the counts that are not 0.

    Of more than 100 classes, those with the most errors are drawn.
    """
    errors = (matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal())[:-1]
    shown = np.sort(np.argsort(-errors, kind="stable")[:MOST_CLASSES])
    if len(shown) < len(class_names):
        title = f"{title}, {len(shown)} of {len(class_names)} classes with the most errors"
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    drawn = np.append(shown, len(class_names))
    counts, shares = matrix[np.ix_(drawn, drawn)], shares[np.ix_(drawn, drawn)]
    names = [_shortened(class_names[index]) for index in shown]
    cell = float(np.clip(11 / len(drawn), 0.24, 0.75))  # inches
    panel = max(cell * len(drawn), 2.6)
    figure, axis = subplots(1, 1, figsize=(panel + 6, panel + 6))
    shares[-1, -1] = np.nan
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = min(9.0, 28 * cell)
    axis.set_xticks(range(len(drawn)), [*names, "missed"], rotation=90, fontsize=size)
    axis.set_yticks(range(len(drawn)), [*names, "background"], fontsize=size)
    axis.set(xlabel="detected", ylabel="annotated")
    axis.set_title(title, fontsize=10)
    axis.axhline(len(names) - 0.5, color="0.4", linewidth=0.8)
    axis.axvline(len(names) - 0.5, color="0.4", linewidth=0.8)
    for row, column in np.argwhere(counts):
        text = str(counts[row, column])
        color = "white" if shares[row, column] > 0.55 else "0.15"
        fitting = min(size, 72 * cell * 0.9 / (0.62 * max(len(text), 2)))
        axis.text(column, row, text, ha="center", va="center", fontsize=fitting, color=color)
    shrink_titles(figure)
    beside, below = (
        max(max(text.get_window_extent().size) for text in labels) / figure.dpi
        for labels in (axis.get_yticklabels(), axis.get_xticklabels())
    )
    figure.set_size_inches(panel + beside + 0.6, panel + below + 0.9)
    shrink_titles(figure)
    save_figure(figure, path)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "\u2026"
