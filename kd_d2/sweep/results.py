"""What trainings leave in their folders, and the json files of finished cells."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from ..errors import UserError
from ..files import read_json
from ..typed_json import from_tree, members

METRICS = "metrics.json"
REQUIRED = {"scores": dict[str, float | None], "settings": dict}
OPTIONAL = {
    "seconds_per_iteration": float,
    "peak_memory_mib": float,
    "multipliers": dict[str, float],
    "curves": dict[str, list[list[float | None]]],
    "versions": dict[str, str],
}


def result_path(results: str, cell: str, seed: int) -> str:
    return os.path.join(results, f"{cell}-seed{seed}.json")


def read_result(path: str) -> dict[str, Any]:
    """The json file of a finished cell.

    Raises:
        UserError: it cannot be read, or is none.
    """
    tree = read_json(path)
    members(REQUIRED, tree, path, "the file")
    for key, kind in OPTIONAL.items():
        if tree.get(key) is not None:
            from_tree(kind, tree[key], path, repr(key))
    return tree


def read_outcome(folder: str) -> dict[str, Any]:
    """What the process wrote at its end: train.json of a training, teacher.json of the teacher's evaluation.

    Raises:
        UserError: there is none, or it has no results for boxes.
    """
    for name in ("train.json", "teacher.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            outcome = read_json(path)
            members({"bbox": dict[str, float | None]}, outcome, path, "the file")
            return outcome
    raise UserError(f"{folder} has no results, though its process ended well.")


def read_versions(folder: str) -> dict[str, str]:
    """What a training was made with, as its output folder says."""
    path = os.path.join(folder, "versions.json")
    return from_tree(dict[str, str], read_json(path), path, "the file") if os.path.isfile(path) else {}


def read_curves(metrics: list[dict[str, Any]]) -> dict[str, list]:
    """Losses and AP over iterations, for the plots."""
    curves: dict[str, list] = {}
    for row in metrics:
        for key, value in row.items():
            if key == "total_loss" or key.startswith("loss_") or key == "bbox/AP":
                curves.setdefault(key, []).append([row["iteration"], round(value, 4)])
    return curves


def read_multipliers(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """The last multiplier of each distiller's losses, where MODEL.KD.BALANCE gave them one."""
    mark = "kd/balance/"
    return {
        name.removeprefix(mark): float(f"{value:.4g}")
        for row in metrics
        for name, value in row.items()
        if name.startswith(mark)
    }


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """Detectron2's metrics.json, a row an iteration, in their order.

    What a kill left half-written is passed over; an iteration that was repeated after it counts as it was at last.
    """
    rows = {row["iteration"]: row for row in written_rows(folder)}
    return [rows[iteration] for iteration in sorted(rows)]


def written_rows(folder: str) -> list[dict[str, Any]]:
    """The rows of metrics.json as they were written; what is no row of numbers with an iteration is passed over."""
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
