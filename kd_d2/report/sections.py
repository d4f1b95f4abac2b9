"""Report sections of trainings and sweeps."""

from __future__ import annotations

import math
import os
from typing import Any

import yaml

from ..errors import UserError
from ..files import read_json
from ..plain_yaml import read_text
from ..sweep import Matrix
from ..sweep.plots import plot_ap, plot_curves
from ..sweep.report import first_curves, read_costs
from ..sweep.results import read_curves, read_metrics, read_versions, training_cost
from ..sweep.table import SCORES, build_rows, filled_columns, read_finished
from ..typed_json import from_tree
from .page import Listing, Picture, Section, Table, as_text

CLASS_COLUMNS = 4


def sweep_section(matrix: Matrix, results_folder: str, scratch: str) -> Section:
    """Create the section of a sweep: table, plots and settings.

    Args:
        scratch: a temporary folder for the plots.

    Raises:
        UserError: no cell of the matrix is finished.
    """
    results = read_finished(matrix, results_folder)
    rows = build_rows(matrix, results, read_costs(results_folder))
    headers, *cells = filled_columns(rows)
    table = Table(headers, cells)
    titles = {cell.name: cell.title for cell in matrix.cells}
    table.caption = (
        f"Mean and standard deviation over seeds. gain: over {titles[matrix.baseline]}; > 2 sd: whether it is more than two "
        "pooled standard deviations; gap closed: closed fraction of the gap from the plain student to the teacher. Parameters, "
        "GFLOPs and ms / image are those of the detector at inference; s / iteration and memory those of the training."
    )
    section = Section("Sweep", (), [table])
    ap, curves = (os.path.join(scratch, name) for name in ("ap.png", "curves.png"))
    plot_ap(rows, ap)
    section.blocks.append(Picture(ap, "AP and AP50 by method; a dot is a seed, the dashed line the teacher."))
    plot_curves(first_curves(matrix, results), curves)
    if os.path.isfile(curves):
        section.blocks.append(Picture(curves, "AP and losses over the iterations, first seed of each cell."))
    for name, of_cell in results.items():
        settings = {key: of_cell[0][key] for key in ("settings", "versions") if of_cell[0].get(key)}
        section.blocks.append(Listing(f"Settings: {titles.get(name, name)}", _as_yaml(settings)))
    return section


def is_run(folder: str) -> bool:
    """Return whether a folder is the output folder of a training."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("config.yaml", "metrics.json"))


def run_section(folder: str, scratch: str) -> Section:
    """Create the section of a training: scores, classes, curves, cost and config.

    Args:
        folder: see `is_run`.
        scratch: a temporary folder for the plots.

    Raises:
        UserError: metrics.json has no iterations.
    """
    metrics = read_metrics(folder)
    if not metrics:
        raise UserError(f"{folder}: metrics.json has no iterations.")
    name = "/".join(os.path.abspath(folder).split(os.sep)[-2:])
    section = Section(f"Training {name}", [_cost_sentence(metrics)])
    for dataset, results in _results_by_dataset(folder).items():
        section.blocks += _score_tables(results, dataset)
    curves = os.path.join(scratch, f"run-{len(os.listdir(scratch))}.png")
    plot_curves({name: read_curves(metrics)}, curves)
    if os.path.isfile(curves):
        section.blocks.append(Picture(curves, "AP and losses over the iterations."))
    config = os.path.join(folder, "config.yaml")
    section.blocks.append(Listing("config.yaml", read_text(config, f"Config file {config}")))
    made_with = read_versions(folder)
    if made_with:
        section.blocks.append(Listing("Versions", _as_yaml(made_with)))
    return section


def _cost_sentence(metrics: list[dict[str, Any]]) -> str:
    last = max((row["iteration"] for row in metrics if "total_loss" in row), default=-1) + 1
    seconds, memory = training_cost(metrics)
    parts = [f"{last} iterations"]
    parts += [f"{seconds:.2f} s per iteration (median)"] if seconds is not None else []
    parts += [f"peak memory {memory:.0f} MiB"] if memory is not None else []
    return ", ".join(parts) + "."


def _results_by_dataset(folder: str) -> dict[str, dict]:
    """Return the results at the end of a training by dataset; the name is empty if there is only one dataset."""
    path = os.path.join(folder, "train.json")
    if not os.path.isfile(path):
        return {}
    results = read_json(path)
    if not isinstance(results, dict):
        raise UserError(f"{path} has no results by name.")
    by_dataset = {"": results} if "bbox" in results else results
    return {name: _scores_by_task(r, path) for name, r in by_dataset.items() if isinstance(r, dict)}


def _scores_by_task(results: dict[str, Any], path: str) -> dict[str, dict[str, float | None]]:
    tasks = {task: scores for task, scores in results.items() if isinstance(scores, dict)}
    return from_tree(dict[str, dict[str, float | None]], tasks, path)


def _score_tables(results: dict[str, dict[str, float]], dataset: str) -> list[Table]:
    tables = []
    for task, scores in results.items():
        of = " ".join(part for part in (task, dataset) if part)
        overall = [name for name in SCORES if name in scores]
        tables.append(Table(["", *overall], [[of, *(as_text(scores[name], ".2f") for name in overall)]]))
        classes = [(name.removeprefix("AP-"), value) for name, value in scores.items() if name.startswith("AP-")]
        classes.sort(key=lambda entry: -entry[1] if entry[1] is not None and not math.isnan(entry[1]) else math.inf)
        if classes:
            tables.append(_in_columns([(name, as_text(value, ".2f")) for name, value in classes], f"{of} AP by class."))
    return tables


def _in_columns(entries: list[tuple[str, str]], caption: str) -> Table:
    """Arrange names and values in pairs of columns, from top to bottom."""
    height = -(-len(entries) // CLASS_COLUMNS)
    padded = entries + [("", "")] * (-len(entries) % height)
    columns = [padded[start : start + height] for start in range(0, len(padded), height)]
    rows = [[text for pair in row for text in pair] for row in zip(*columns, strict=True)]
    return Table(["class", "AP"] * len(columns), rows, caption)


def _as_yaml(tree: dict) -> str:
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120)
