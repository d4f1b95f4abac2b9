"""A whole comparison: run what is missing, then write table and plots."""

from __future__ import annotations

import json
import os
from typing import Any

from .costs import measure_costs
from .matrix import Matrix
from .plots import plot_ap, plot_curves
from .runner import run_jobs, teacher_evaluation_job, teacher_training_job, training_job
from .table import Row, as_csv, as_markdown, build_rows, read_results


def compare(
    matrix: Matrix,
    output: str,
    opts: list[Any],
    *,
    cells: list[str] | None = None,
    seeds: list[int] | None = None,
    jobs: int = 1,
    threads: int = 1,
) -> list[Row]:
    """Run the cells of a matrix that are not finished, and write `table.md`, `table.csv`, `costs.json`, `ap.png`, `curves.png`.

    Args:
        output: folder of runs and results.
        opts: overrides for all cells.
        cells, seeds: only these; None for all.
        jobs: trainings at a time.
        threads: CPU threads of each.

    Returns:
        The rows of the table: everything that is finished by now.
    """
    output = os.path.abspath(output)
    selected = matrix.select(cells, seeds)
    if matrix.teacher is None:
        first, teacher_opts = teacher_evaluation_job(matrix, output, opts), []
    else:
        first, teacher_opts = teacher_training_job(matrix, output, opts)
    run_jobs([first], 1, jobs * threads)
    run_jobs([training_job(cell, seed, output, [*opts, *teacher_opts]) for cell, seed in selected], jobs, threads)
    return write_report(matrix, output, [*opts, *teacher_opts])


def write_report(matrix: Matrix, output: str, opts: list[Any]) -> list[Row]:
    """Write table and plots of what is finished, and print the table."""
    results = read_results(matrix, output)
    path = os.path.join(output, "costs.json")
    costs = {}
    if os.path.isfile(path):
        with open(path) as file:
            costs = json.load(file)
    if not {"teacher", *(cell.name for cell in matrix.cells)} <= costs.keys():
        costs = measure_costs(matrix, opts)
        with open(path, "w") as file:
            json.dump(costs, file, indent=1)
    rows = build_rows(matrix, results, costs)
    for name, text in (("table.md", as_markdown(rows) + "\n"), ("table.csv", as_csv(rows))):
        with open(os.path.join(output, name), "w", encoding="utf-8") as file:
            file.write(text)
    plot_ap(rows, os.path.join(output, "ap.png"))
    plot_curves(matrix, results, os.path.join(output, "curves.png"))
    print(as_markdown(rows), flush=True)
    print(f"Table and plots are in {output}", flush=True)
    return rows
