"""Output files of trainings, and JSON files of finished cells."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from typing import Any

from ..errors import check_number
from ..files import read_json
from ..typed_json import from_tree, members

METRICS = "metrics.json"
OTHER_TASKS = {"mask AP": "segm", "keypoint AP": "keypoints"}
"""Scores of other tasks than boxes, and the names of the tasks in the results of an evaluation."""
REQUIRED = {"scores": dict[str, float | None], "settings": dict}
OPTIONAL = {
    "seconds_per_iteration": float,
    "peak_memory_mib": float,
    "multipliers": dict[str, float],
    "curves": dict[str, list[tuple[float | None, float | None]]],
    "versions": dict[str, str],
}


def result_path(results: str, cell: str, seed: int) -> str:
    return os.path.join(results, f"{cell}-seed{seed}.json")


def read_result(path: str) -> dict[str, Any]:
    """Read the JSON file of a finished cell.

    Raises:
        UserError: the file cannot be read, or its content is invalid.
    """
    tree = read_json(path)
    members(REQUIRED, tree, path)
    for key, kind in OPTIONAL.items():
        if tree.get(key) is not None:
            from_tree(kind, tree[key], path, repr(key))
    for name, value in (tree.get("multipliers") or {}).items():
        check_number(f"{path}: the multiplier of {name!r}", value, 0, exclusive=True)
    return tree


def read_outcome(path: str) -> dict[str, Any]:
    """Read the results of a process: train.json of a training, or teacher.json of an evaluation of the teacher.

    Raises:
        UserError: there is no such file, or it has no results for boxes.
    """
    outcome = read_json(path)
    tasks = ["bbox", *(task for task in OTHER_TASKS.values() if task in outcome)]
    members(dict.fromkeys(tasks, dict[str, float | None]), outcome, path)
    return outcome


def read_versions(folder: str) -> dict[str, str]:
    """Read the software versions of a training from its output folder."""
    path = os.path.join(folder, "versions.json")
    return from_tree(dict[str, str], read_json(path), path) if os.path.isfile(path) else {}


def read_curves(metrics: list[dict[str, Any]]) -> dict[str, list]:
    """Return losses and AP over iterations, for plots; with several test sets, AP by "<test set>/bbox/AP"."""
    curves: dict[str, list] = {}
    for row in metrics:
        for key, value in row.items():
            if key == "total_loss" or key.startswith("loss_") or is_box_ap(key):
                curves.setdefault(key, []).append([row["iteration"], float(f"{value:.4g}")])
    return curves


def is_box_ap(metric: str) -> bool:
    """Return whether a metric is the box AP of the only test set or of one of several."""
    return metric == "bbox/AP" or metric.endswith("/bbox/AP")


def read_multipliers(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Return the last multiplier of each distiller's losses; empty without MODEL.KD.BALANCE."""
    mark = "kd/balance/"
    return {
        name.removeprefix(mark): float(f"{value:.4g}")
        for row in metrics
        for name, value in row.items()
        if name.startswith(mark)
    }


def training_cost(metrics: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Return the median time of an iteration in seconds and the peak memory in MiB; None if no row has them."""
    seconds = [row["time"] for row in metrics if "time" in row]
    memory = max((row["peak_memory_mib"] for row in metrics if "peak_memory_mib" in row), default=None)
    return statistics.median(seconds) if seconds else None, memory


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """Read Detectron2's metrics.json, with one row per iteration, in order.

    Incomplete rows of a killed process are skipped. Where a training was resumed or started anew, earlier rows of the
    same and later iterations are dropped.
    """
    rows: dict[int, dict[str, Any]] = {}
    last = -1
    for row in written_rows(folder):
        if "total_loss" in row and last >= row["iteration"]:
            rows = {iteration: before for iteration, before in rows.items() if iteration < row["iteration"]}
            last = -1
        rows[row["iteration"]] = row
        last = max(last, row["iteration"])
    return [rows[iteration] for iteration in sorted(rows)]


def written_rows(folder: str) -> list[dict[str, Any]]:
    """Return the rows of metrics.json in file order; lines other than rows of numbers with an iteration are skipped."""
    path = os.path.join(folder, METRICS)
    if not os.path.isfile(path):
        return []
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                    rows.append({key: value for key, value in row.items() if isinstance(value, int | float)})
    return rows
