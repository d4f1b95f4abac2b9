"""Plots of a comparison: AP with its spread, and losses and AP over the iterations."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
from typing import Any

import matplotlib
from matplotlib.lines import Line2D

from ..errors import is_finite_number
from ..figures import add_legend, save_figure, shrink_titles, subplots, without_math
from ..text import wrapped_label
from .results import is_box_ap
from .table import Row

TEACHER_COLOR = "0.45"
DASHES = ("-", "--", ":", "-.")
LEAST_AP = 1
"""The least upper end of an axis of AP, which would be around 0 with negative values if every AP is 0."""

Curves = dict[str, list[tuple[int, float]]]
"""Points (iteration, value) by metric: "bbox/AP" or "<test set>/bbox/AP", "total_loss", "loss_..."."""


@without_math
def plot_ap(rows: list[Row], path: str) -> None:
    """Plot mean AP and AP50 as bars, each seed as a dot, and the teacher as a line."""
    students = [row for row in rows if row.name != "teacher"]
    teacher = next((row for row in rows if row.name == "teacher"), None)
    figure, axes = subplots(1, 2, figsize=(11, 0.45 * len(students) + 1.6), sharey=True)
    for axis, column in zip(axes, ("AP", "AP50")):
        if not any(math.isfinite(statistics.mean(row.scores[column])) for row in rows):
            axis.set_xticks([])
        for place, row in enumerate(students):
            values = row.scores[column]
            mean, is_measured = statistics.mean(values), math.isfinite(statistics.mean(values))
            axis.barh(place, mean if is_measured else 0, color=look(place, len(students))["color"], alpha=0.75)
            axis.plot(values, [place] * len(values), "k.", markersize=5)
            axis.annotate(
                f" {mean:.1f}" if is_measured else "no value",
                (max(values) if is_measured else 0, place),
                va="center",
                xytext=(4, 0),
                textcoords="offset points",
            )
        if teacher and math.isfinite(statistics.mean(teacher.scores[column])):
            axis.axvline(statistics.mean(teacher.scores[column]), color=TEACHER_COLOR, linestyle="--", label="teacher")
            axis.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
        axis.set_xlabel(column)
        axis.margins(x=0.12, y=0.02)
        axis.set_xlim(0, max(axis.get_xlim()[1], LEAST_AP))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(students)), [wrapped_label(row.title) for row in students])
    axes[0].invert_yaxis()
    save_figure(figure, path)


@without_math
def plot_curves(curves: dict[str, Curves], path: str) -> None:
    """Plot AP and every loss over the iterations, one line per training.

    If no metric has two finite points, there is no plot, and an earlier one is removed.
    """
    drawable = {
        key for c in curves.values() for key, points in c.items() if sum(is_finite_number(y) for _, y in points) > 1
    }
    panels = sorted(drawable, key=lambda key: (not is_box_ap(key), key != "total_loss", key))
    if not panels:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False)
    for axis, key in zip(axes.flat, panels):
        for index, of_training in enumerate(curves.values()):
            points = of_training.get(key)
            if points:
                x, y = zip(*points)
                marker = {"marker": "o", "markersize": 3} if is_box_ap(key) else {}
                axis.plot(x, y, linewidth=1.3, **marker, **look(index, len(curves)))
        axis.set_title(key.replace("bbox/", ""), fontsize=10)
        axis.set_xlabel("iteration", fontsize=8)
        axis.grid(alpha=0.3)
        if axis.dataLim.ymin >= 0:
            axis.update_datalim([(0, 0)], updatex=False)  # the margin is a share of the whole axis
            axis.autoscale_view(scalex=False)
            axis.set_ylim(bottom=0)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    lines = {title: Line2D([], [], **look(index, len(curves))) for index, title in enumerate(curves)}
    legend = add_legend(figure, lines)
    shrink_titles(figure)
    save_figure(figure, path, legend.get_texts())


def look(index: int, count: int) -> dict[str, Any]:
    """Return the color and dashes of one of `count` lines; colors repeat with different dashes."""
    colors = matplotlib.colormaps["tab10" if count <= 10 else "tab20"].colors
    return {"color": colors[index % len(colors)], "linestyle": DASHES[index // len(colors) % len(DASHES)]}
