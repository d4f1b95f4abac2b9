"""The table of a comparison: means and spreads, gains, and the closed fraction of the gap to the teacher."""

from __future__ import annotations

import logging
import math
import os
import statistics
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from tabulate import tabulate

from ..errors import UserError
from ..report.page import as_text
from ..text import csv_text, markdown_cell
from .matrix import Matrix
from .results import OTHER_TASKS, read_result, result_path
from .settings import TEACHER, first_difference, test_data

logger = logging.getLogger(__name__)

SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl", *OTHER_TASKS)
OTHER_SCORES = SCORES[1:]


@dataclass
class Row:
    """Results of a cell over all finished seeds.

    Attributes:
        scores: values of the seeds (0 to 100) by column.
        costs: parameters (millions), GFLOPs and ms per image of the detector; see `costs.measure_costs`.
        gain: mean AP minus that of the baseline; None without a baseline.
        is_better: whether the gain is more than two pooled standard deviations; None if unknown.
        gap_closed: closed fraction of the gap between plain student and teacher.
        multipliers: last loss multiplier by distiller, geometric mean over seeds; empty without MODEL.KD.BALANCE.
        seconds_per_iteration, peak_memory_mib: of the training, mean over seeds.
    """

    name: str
    title: str
    scores: dict[str, list[float]]
    costs: dict[str, float]
    gain: float | None = None
    is_better: bool | None = None
    gap_closed: float | None = None
    multipliers: dict[str, float] = field(default_factory=dict)
    seconds_per_iteration: float | None = None
    peak_memory_mib: float | None = None

    @property
    def ap(self) -> float:
        return statistics.mean(self.scores["AP"])


def read_results(matrix: Matrix, folder: str) -> dict[str, list[dict[str, Any]]]:
    """Read the finished results by cell, those of the teacher, if it was evaluated on the same data, as "teacher"."""
    seeds = {cell.name: cell.seeds for cell in matrix.cells}
    seeds["teacher"] = matrix.teacher.seeds if matrix.teacher else (0,)
    results: dict[str, list[dict[str, Any]]] = {}
    for name, of_cell in seeds.items():
        for seed in of_cell:
            path = result_path(folder, name, seed)
            if os.path.isfile(path):
                results.setdefault(name, []).append(read_result(path))
    of_teacher = results.get("teacher", [])
    for entry in chain.from_iterable(of_cell for name, of_cell in results.items() if name != "teacher"):
        if any(first_difference(test_data(entry["settings"]), test_data(t["settings"])) for t in of_teacher):
            path = result_path(folder, "teacher", seeds["teacher"][0])
            logger.warning(f"{path} is left out: the cells were evaluated on other data.")
            return {name: of_cell for name, of_cell in results.items() if name != "teacher"}
    return results


def read_finished(matrix: Matrix, folder: str) -> dict[str, list[dict[str, Any]]]:
    """Read the results as `read_results` does; raise a UserError if there are none."""
    results = read_results(matrix, folder)
    if not results:
        raise UserError(f"--results: {folder} has no finished cell of the sweep.")
    return results


def build_rows(
    matrix: Matrix, results: dict[str, list[dict[str, Any]]], costs: dict[str, dict[str, float]]
) -> list[Row]:
    """Return the rows of the table: the teacher, then the finished cells in the order of the matrix."""
    titles = {"teacher": "teacher"} | {cell.name: cell.title for cell in matrix.cells}
    rows = {}
    for name, title in titles.items():
        if name in results:
            scores = {column: [_score(r["scores"].get(column)) for r in results[name]] for column in SCORES}
            rows[name] = Row(
                name,
                title,
                scores,
                costs.get(name, {}),
                multipliers=_mean_multipliers(results[name]),
                seconds_per_iteration=_mean(r.get("seconds_per_iteration") for r in results[name]),
                peak_memory_mib=_mean(r.get("peak_memory_mib") for r in results[name]),
            )
    baseline, student, teacher = rows.get(matrix.baseline), rows.get(matrix.student), rows.get("teacher")
    for row in rows.values():
        if baseline and row not in (baseline, teacher):
            row.gain = row.ap - baseline.ap
            spread = pooled_deviation(row.scores["AP"], baseline.scores["AP"])
            row.is_better = None if spread is None or math.isnan(spread) else row.gain > 2 * spread
        is_taught_by_it = teacher and not _has_other_teacher(results[row.name], results["teacher"])
        if student and is_taught_by_it and row not in (student, teacher) and teacher.ap > student.ap:
            row.gap_closed = (row.ap - student.ap) / (teacher.ap - student.ap)
    return list(rows.values())


def _has_other_teacher(results: list[dict[str, Any]], of_teacher: list[dict[str, Any]]) -> bool:
    """Return whether the files of the teacher in results of a cell are known and not those of the evaluated teacher."""
    own, evaluated = ({r["settings"].get(TEACHER) for r in of_cell} for of_cell in (results, of_teacher))
    return None not in own | evaluated and own != evaluated


def pooled_deviation(first: list[float], second: list[float]) -> float | None:
    """Return the pooled sample standard deviation of two samples, or None if one has fewer than two values."""
    if min(len(first), len(second)) < 2:
        return None
    squares = sum((len(x) - 1) * statistics.variance(x) for x in (first, second))
    return math.sqrt(squares / (len(first) + len(second) - 2))


def _mean_multipliers(results: list[dict[str, Any]]) -> dict[str, float]:
    of_seeds = [result.get("multipliers") or {} for result in results]
    names = dict.fromkeys(chain.from_iterable(of_seeds))
    return {name: statistics.geometric_mean(m[name] for m in of_seeds if name in m) for name in names}


def _score(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.mean(known) if known else None


HEADERS = (
    "", "seeds", "AP", "gain", "> 2 sd", "gap closed", *OTHER_SCORES,
    "multipliers", "params M", "GFLOPs", "ms / image", "s / iteration", "memory MiB",
)  # fmt: skip


def format_row(row: Row) -> list[str]:
    """Return the cells of a row as text, in the order of HEADERS."""
    better = {None: "", True: "yes", False: "no"}[row.is_better]
    return [
        row.title,
        str(len(row.scores["AP"])),
        _spread(row.scores["AP"]),
        as_text(row.gain, "+.2f", ""),
        better,
        as_text(row.gap_closed, ".2f", ""),
        *(_spread(row.scores.get(column, [math.nan])) for column in OTHER_SCORES),
        ", ".join(
            f"{name} {value:.2g}" if len(row.multipliers) > 1 else f"{value:.2g}"
            for name, value in row.multipliers.items()
        ),
        as_text(row.costs.get("params"), ".2f", ""),
        as_text(row.costs.get("gflops"), ".2f", ""),
        as_text(row.costs.get("ms_per_image"), ".1f", ""),
        as_text(row.seconds_per_iteration, ".3f", ""),
        as_text(row.peak_memory_mib, ".0f", ""),
    ]


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    if math.isnan(mean):
        return ""
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def filled_columns(rows: list[Row]) -> list[list[str]]:
    """Return the headers, then the rows as text, without columns that are empty in every row."""
    cells = [format_row(row) for row in rows]
    kept = [i for i in range(len(HEADERS)) if any(row[i] for row in cells)]
    return [[row[i] for i in kept] for row in (HEADERS, *cells)]


def as_markdown(rows: list[Row]) -> str:
    """Return the table in Markdown, without columns that are empty in every row."""
    headers, *body = filled_columns(rows)
    return tabulate([list(map(markdown_cell, row)) for row in body], headers, "github", disable_numparse=True)


def as_csv(rows: list[Row]) -> str:
    """Return the table as comma-separated values."""
    return csv_text([("cell", *HEADERS[1:]), *([row.name, *format_row(row)[1:]] for row in rows)])
