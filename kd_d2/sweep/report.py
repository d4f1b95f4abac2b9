"""A complete sweep: run missing trainings, then write the table and plots."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from ..class_names import ClassCount
from ..config import load_config, load_teacher_config, read_config
from ..errors import UserError, check_number
from ..files import check_output_folder, read_json, write_json, write_text
from ..lazy_teacher import is_lazy_config
from ..typed_json import from_tree
from .costs import measure_costs
from .matrix import Cell, Matrix
from .plots import Curves, plot_ap, plot_curves
from .results import read_result, result_path
from .runner import Job, is_finished, run_jobs, teacher_evaluation, teacher_training, training_job
from .settings import first_difference, own_code_of_student, without_locations
from .table import Row, as_csv, as_markdown, build_rows, read_finished, read_results

logger = logging.getLogger(__name__)

COSTS = "costs.json"
ANY_MARK, END_MARK = "<!-- table of ", "<!-- end of the table -->"


@dataclass(frozen=True)
class SweepOptions:
    """Options for running and reporting a sweep.

    Attributes:
        results: folder of small files to keep: one JSON file per finished cell and seed, and `costs.json`; by default
            `results` in the folder of the trainings.
        report: folder of `table.md`, `table.csv`, `ap.png` and `curves.png`; by default `results`.
        readme: a Markdown file, whose table between two marks is replaced; `FILE#NAME` for the table with that name.
        report_only: report finished trainings without running any.
        cells: cells to run and to report, in addition to finished baseline and plain student; None for all.
        seeds: seeds to run; None for all.
        jobs: number of parallel trainings; by default one for each of `gpus`, or one.
        threads: number of CPU threads per training.
        gpus: GPUs to distribute the trainings over, one each, as in CUDA_VISIBLE_DEVICES.
        imports: user modules and files for the trainings to import, see `extensions`.
    """

    results: str | None = None
    report: str | None = None
    readme: str | None = None
    report_only: bool = False
    cells: list[str] | None = None
    seeds: list[int] | None = None
    jobs: int | None = None
    threads: int = 1
    gpus: Sequence[str] = ()
    imports: Sequence[str] = ()


def run_sweep(matrix: Matrix, output: str, opts: list[Any], options: SweepOptions | None = None) -> list[Row]:
    """Train the unfinished cells of a matrix, and write the table and plots of all finished ones.

    Args:
        output: folder of the trainings, one per cell and seed.
        opts: overrides for all cells.

    Returns:
        The rows of the table with all finished cells.

    Raises:
        UserError: a folder or a readme is not writable, a cell or its config is invalid, there is nothing to report, or
            trainings failed.
    """
    options = options or SweepOptions()
    if options.jobs is None:
        options = replace(options, jobs=max(1, len(options.gpus)))
    check_number("--jobs", options.jobs, 1)
    check_number("--threads", options.threads, 1)
    pairs = matrix.select(options.cells, options.seeds)
    matrix = matrix.reduced_to(options.cells)
    output = os.path.abspath(output)
    results = os.path.abspath(options.results or os.path.join(output, "results"))
    report = os.path.abspath(options.report or results)
    if options.report_only:
        read_finished(matrix, results)  # fails before a folder is created
        for path, difference in _other_settings(matrix, results, opts):
            logger.warning(f"{path} was measured with different settings ({difference}).")
    else:
        check_output_folder(output, "--output")
        check_output_folder(results, "--results")
    check_output_folder(report, "--report")
    if options.readme is not None:
        _split_at_marks(options.readme)  # fails before training
    failed = [] if options.report_only else _run_missing(matrix, pairs, output, results, opts, options)
    rows = write_report(matrix, results, read_costs(results), report)
    if options.readme is not None and rows:
        path, before, after = _split_at_marks(options.readme)
        table = f"\n\n{as_markdown(rows)}\n\n"
        write_text(path, before + (table.replace("\n", "\r\n") if "\r\n" in before + after else table) + after)
    if failed:
        raise UserError(
            "These cells failed: " + "; ".join(f"{j.name}, see {j.output}/process.log" for j in failed) + "."
        )
    return rows


def _run_missing(
    matrix: Matrix,
    pairs: list[tuple[Cell, int]],
    output: str,
    results: str,
    opts: list[Any],
    options: SweepOptions,
) -> list[Job]:
    """Train unfinished (cell, seed) pairs, measure the costs of the detectors, and return the jobs that failed."""
    matrix.check_configs(opts)
    jobs, imports = [], options.imports
    if matrix.teacher is not None:
        for path, difference in _other_settings(matrix, results, opts):
            raise UserError(
                f"{path} was measured with different settings ({difference}); move the file, or choose another --results folder."
            )
        job, names_teacher = teacher_training(matrix, output, results, opts, imports)
        if failed := run_jobs([job], 1, options.jobs * options.threads, options.gpus):
            return failed
        if not os.path.isfile(job.result):
            raise UserError(
                f"Another process is training the teacher in {job.output}; run this command again when it has finished."
            )
        opts = [*opts, *names_teacher]
    elif taught := matrix.taught_cell(opts):
        difference = _other_classes(load_config(taught.config, [*opts, *taught.opts]))
        if difference:
            logger.info(f"The teacher is not evaluated: {difference}.")
        else:
            jobs = [teacher_evaluation(taught, output, results, opts, imports)]
    for cell, seed in _finished_pairs(matrix, results):
        if (cell, seed) not in pairs:  # it is in the table too
            is_finished(training_job(cell, seed, output, results, opts, imports))
    jobs += [training_job(cell, seed, output, results, opts, imports) for cell, seed in pairs]
    failed = run_jobs(jobs, options.jobs, options.threads, options.gpus)
    known = read_costs(results)
    write_json(os.path.join(results, COSTS), {**known, **measure_costs(matrix, opts, known)})
    return failed


def _other_classes(cfg: CfgNode) -> str | None:
    """Return how the numbers of classes of a config's student and teacher differ, or None if they do not or are unknown."""
    if is_lazy_config(cfg.MODEL.KD.TEACHER.CONFIG_FILE):
        return None
    teacher = load_teacher_config(cfg)
    pair = (cfg, cfg.MODEL.KD.STUDENT), (teacher, teacher.MODEL.META_ARCHITECTURE)
    ours, theirs = (ClassCount.in_config(of_detector, META_ARCH_REGISTRY.get(name)) for of_detector, name in pair)
    if ours is None or theirs is None or ours.number == theirs.number:
        return None
    return f"it has {theirs.number} classes and the students {ours.number}"


def _finished_pairs(matrix: Matrix, results: str) -> list[tuple[Cell, int]]:
    pairs = [(cell, seed) for cell in matrix.cells for seed in cell.seeds]
    return [(cell, seed) for cell, seed in pairs if os.path.isfile(result_path(results, cell.name, seed))]


def _other_settings(matrix: Matrix, results: str, opts: list[Any]) -> Iterator[tuple[str, str]]:
    """Yield the results, at most one of a cell, that were measured with other settings than those of matrix and `opts`.

    Files of data and weights, which need not exist, are not compared.
    """
    for cell in matrix.cells:
        cfg = read_config(cell.config, [*opts, *cell.opts])
        now = without_locations(cfg) | own_code_of_student(cfg)
        paths = [result_path(results, cell.name, seed) for seed in cell.seeds]
        found = ((p, first_difference(read_result(p)["settings"], now)) for p in paths if os.path.isfile(p))
        yield from islice(((path, difference) for path, difference in found if difference), 1)


def _split_at_marks(readme: str) -> tuple[str, str, str]:
    """Return the path in `FILE#NAME`, and the text of the file up to the mark of the table and from its end mark on."""
    path, *names = [readme] if os.path.isfile(readme) else readme.rsplit("#", 1)
    if not os.path.isfile(path):
        raise UserError(f"--readme: there is no file {path}.")
    path = os.path.realpath(path)  # a link is kept, and its target changed
    check_output_folder(os.path.dirname(path), "--readme")
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    name = "".join(f": {name}" for name in names if name)
    mark = f"<!-- table of kd-d2 sweep{name} -->"
    text = text.replace(f"<!-- table of tools/compare.py{name} -->", mark)  # the name of the program until 0.1
    before, _, below = text.partition(mark)
    table, end, after = below.partition(END_MARK)
    if not end or mark in below or ANY_MARK in table:
        raise UserError(f"--readme: {path} needs one line {mark} and below it one line {END_MARK}.")
    return path, before + mark, end + after


def write_report(matrix: Matrix, results_folder: str, costs: dict[str, dict[str, float]], folder: str) -> list[Row]:
    """Write the table and plots of finished cells to `folder`, and log the table."""
    results = read_results(matrix, results_folder)
    rows = build_rows(matrix, results, costs)
    for name, text in (("table.md", as_markdown(rows) + "\n"), ("table.csv", as_csv(rows))):
        write_text(os.path.join(folder, name), text)
    plot_ap(rows, os.path.join(folder, "ap.png"))
    plot_curves(first_curves(matrix, results), os.path.join(folder, "curves.png"))
    logger.info(as_markdown(rows))
    logger.info(f"Table and plots are in {folder}")
    return rows


def first_curves(matrix: Matrix, results: dict[str, list[dict[str, Any]]]) -> dict[str, Curves]:
    """Return the curves of the first seed of each finished cell by title."""
    return {cell.title: results[cell.name][0].get("curves") or {} for cell in matrix.cells if results.get(cell.name)}


def read_costs(folder: str) -> dict[str, dict[str, float]]:
    """Return the stored costs of the detectors, or an empty dict if there are none."""
    path = os.path.join(folder, COSTS)
    return from_tree(dict[str, dict[str, float]], read_json(path), path) if os.path.isfile(path) else {}
